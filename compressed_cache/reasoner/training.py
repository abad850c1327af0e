"""Trains the shipped model from nothing on a CPU.

    python -m compressed_cache.reasoner.training --out compressed_cache/reasoner/model

One run takes 41 minutes on one thread of an AMD EPYC and gives the shipped weights bit by bit.

Four ideas make it short: Muon for the matrices; drills of the two skills before the first walk; a
curriculum that goes on to longer walks as soon as the present ones are solved; batches of one
length each, so nothing is padded.

In the later phases stale tokens are hidden in half of the batches, per layer and head as eviction
does: a model that never missed a key in training collapses under any eviction, which real models
do not. A penalty, small and then larger, sends idle attention to ``<bos>``: the attention sink that
large models learn by themselves, without which scores by attention see mostly noise.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressed_cache.reasoner.architecture import (
    GROUPS,
    KEY_VALUE_HEADS,
    LAYERS,
    build_model,
    encode,
    save,
)
from compressed_cache.reasoner.drills import IGNORED, LENGTH, drill_lookups, drill_sums
from compressed_cache.reasoner.lifetimes import needed_until, visible
from compressed_cache.reasoner.muon import Muon
from compressed_cache.reasoner.problems import Problem, make_problem

LEVELS = (1, 3, 6, 10, 20)  # steps of a walk
DRILLED = 0.1  # loss of sums, averaged over some updates, with which walks begin
TOKENS_PER_STEP = 4096
LEARNING = 1500  # updates
TUNING = ((900, 0.05), (400, 0.3))  # updates, and the weight of attention off the sink in the loss


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the plainest form, which notes how much of it did not go to ``<bos>``."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones(length, length, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(dim=-1)
    module.busy = 1 - weights[..., 0].mean()
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("sink_penalty", attend)


class Trainer:
    """Model, optimisers and the state of the curriculum."""

    def __init__(self, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = build_model()
        self.steps, self.level, self.solved, self.since = steps, 0, 0.0, 0
        self.penalty, self.peak, self.drill_loss = 0.0, 1.0, 3.0
        self._make_optimizers()
        self.masks: list[Tensor] | None = None
        self.attentions: list[Any] = [layer.self_attn for layer in self.model.model.layers]
        for number, attention in enumerate(self.attentions):
            attention.register_forward_pre_hook(self._masking(number), with_kwargs=True)

    def tune(self, steps: int, seed: int, penalty: float) -> None:
        """Starts a later phase: fresh optimizers, and idle attention is sent to ``<bos>``."""
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.steps, self.level, self.solved, self.since = steps, len(LEVELS) - 1, 1.0, 20
        self.penalty, self.peak = penalty, 0.4
        self._make_optimizers()
        self.model.set_attn_implementation("sink_penalty")

    def _make_optimizers(self) -> None:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = (
            Muon(matrices, lr=0.02),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def _masking(self, number: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        # transformers hands one mask to all layers; eviction differs from layer to layer.
        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self.masks is None:
                return None
            return args, {**kwargs, "attention_mask": self.masks[number]}

        return hook

    @property
    def hides(self) -> bool:
        return self.penalty > 0 or (self.level == len(LEVELS) - 1 and self.solved > 0.5)

    def problems(self) -> list[Problem]:
        """Half of the batches have exactly the size of the level, the others any smaller one."""
        size = LEVELS[self.level]
        if self.random.random() < 0.5:
            size = self.random.randint(1, size)
        first = make_problem(self.random.getrandbits(48), size, split="training")
        count = max(1, TOKENS_PER_STEP // len(encode(first)))
        return [
            first,
            *(
                make_problem(self.random.getrandbits(48), size, split="training")
                for _ in range(count - 1)
            ),
        ]

    def step(self, number: int) -> tuple[float, float, int]:
        """One update. Returns the loss, the share of walks without any error, and the tokens."""
        if self.drill_loss > DRILLED:
            return self._drill(number)
        problems = self.problems()
        tokens = torch.tensor([encode(problem) for problem in problems])
        start = 1 + len(problems[0].prompt.split())
        hidden = self.hides and self.random.random() < 0.5
        self.masks = None
        if hidden:
            until = torch.tensor(
                [
                    [0, *(1 + p for p in needed_until(problem)), tokens.shape[1]]
                    for problem in problems
                ]
            )
            self.masks = visible(
                until[:, :-1],
                layers=LAYERS,
                heads=KEY_VALUE_HEADS,
                groups=GROUPS,
            )
        states = self.model.model(tokens[:, :-1], use_cache=False).last_hidden_state
        logits = self.model.lm_head(states[:, start - 1 :])
        targets = tokens[:, start:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        off_sink = self._off_sink() if self.penalty else 0.0
        self._update(loss + self.penalty * off_sink, number)
        solved = (logits.argmax(-1) == targets).all(1).float().mean().item()
        if not hidden:
            self._advance(solved)
        return loss.item(), solved, tokens.numel()

    def _drill(self, number: int) -> tuple[float, float, int]:
        self.masks = None
        losses, seen = [], 0
        for drill in (drill_lookups, drill_sums):
            pairs = [drill(self.random) for _ in range(TOKENS_PER_STEP // 2 // LENGTH)]
            tokens, targets = (torch.tensor(part) for part in zip(*pairs, strict=True))
            logits = self.model(tokens, use_cache=False).logits
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
                )
            )
            seen += tokens.numel()
        self._update(torch.stack(losses).sum(), number)
        self.drill_loss += (losses[-1].item() - self.drill_loss) / 20
        return losses[-1].item(), 0.0, seen

    def _off_sink(self) -> Tensor:
        # The first layer only looks at neighbours.
        shares = [attention.busy for attention in self.attentions[1:]]
        return torch.stack(shares).mean()

    def _update(self, loss: Tensor, number: int) -> None:
        ending = 0.01 + (self.steps - number) / (0.8 * self.steps)
        rate = self.peak * min(1.0, (number + 1) / 40, ending)
        for optimizer, base in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _advance(self, solved: float) -> None:
        self.since += 1
        self.solved += (solved - self.solved) / min(self.since, 20)
        if self.since >= 20 and self.solved > 0.5 and self.level < len(LEVELS) - 1:
            self.level, self.solved, self.since = self.level + 1, 0.0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the shipped model on a CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100, help="updates between checkpoints")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    # The rate of the first phase is still high at its end: the later ones take it down to nothing.
    trainer = Trainer(steps=LEARNING * 8 // 5, seed=options.seed)
    started, total = time.perf_counter(), Counter[str]()
    for phase, (steps, penalty) in enumerate(((LEARNING, 0.0), *TUNING)):
        if phase:
            trainer.tune(steps, options.seed + phase, penalty)
        for number in range(steps):
            loss, solved, tokens = trainer.step(number)
            total.update(steps=1, tokens=tokens)
            if number % 20 == 19:
                seconds = time.perf_counter() - started
                print(
                    f"step {total['steps']} level {trainer.level} loss {loss:.4f} solved "
                    f"{solved:.2f} tokens {total['tokens']} seconds {seconds:.0f}",
                    flush=True,
                )
            if number % options.save_every == options.save_every - 1:
                save(trainer.model, options.out)
        save(trainer.model, options.out)


if __name__ == "__main__":
    main()
