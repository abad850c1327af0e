"""Trains the shipped model from nothing on a CPU.

    python -m compressed_cache.reasoner.training --out model --steps 3000

Three ideas make it short: Muon for the matrices; a curriculum that goes on to longer ledgers as
soon as the present ones are solved; batches of one length each, so nothing is padded. The last
phase hides stale tokens in half of the batches, per layer and head as eviction does: a model that
never missed a key in training collapses under any eviction, which real models do not.
"""

import argparse
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from compressed_cache.reasoner.lifetimes import needed_until
from compressed_cache.reasoner.problems import (
    DIGITS,
    ITEMS,
    LABELS,
    LETTERS,
    PRICES,
    VOCABULARY,
    Difficulty,
    Problem,
    make_problem,
)
from compressed_cache.reasoner.tokenizer import build_tokenizer

IDS = {word: i for i, word in enumerate(VOCABULARY)}
LEVELS = tuple(
    Difficulty(*size) for size in ((4, 5), (5, 7), (6, 8), (7, 10), (8, 12))
)
TOKENS_PER_STEP = 4096
IGNORED = -100
DRILL = 120  # tokens
EMBEDDING = 0.3  # standard deviation at the start: smaller ones change too fast to build upon
SHORTEST_WINDOW = 28  # a line and what it copies from the line before


Drill = tuple[list[int], list[int]]  # token ids, and what follows each where it is asked for


class Muon(torch.optim.Optimizer):
    """Muon in float32 and in stacks of equal shape: `torch.optim.Muon` iterates in bfloat16, matrix
    by matrix, which takes longer than the backward pass on a CPU without bfloat16 arithmetic."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                stacks.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in stacks.items():
                gradients = torch.stack([parameter.grad for parameter in parameters])
                buffer = self.state[parameters[0]].setdefault(
                    "momentum", torch.zeros_like(gradients)
                )
                buffer.lerp_(gradients, 1 - group["momentum"])
                update = _orthogonal(gradients.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, change in zip(parameters, update.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=scale)


def _orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices, by the Newton-Schulz iteration of the Muon authors."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def build_model() -> LlamaForCausalLM:
    """A Llama of 0.6 million parameters with two query heads for each key/value head."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=IDS["<bos>"],
        eos_token_id=IDS["<eos>"],
        pad_token_id=IDS["<pad>"],
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Starts one head of the first layer as a previous-token head, half of an induction circuit.

    A component that all embeddings share makes queries and keys constant, and keys are turned by
    one position, so their rotary products peak at distance one. Found by gradient descent alone,
    the same head takes most of the training.
    """
    config = model.config
    model.model.embed_tokens.weight[:, 0] = 5 * EMBEDDING
    attention = model.model.layers[0].self_attn
    for pair in range(5):
        angle = config.rope_parameters["rope_theta"] ** (-2 * pair / config.head_dim)
        for head in range(config.num_attention_heads // config.num_key_value_heads):
            attention.q_proj.weight[head * config.head_dim + pair, 0] += 1.6
        attention.k_proj.weight[pair, 0] += 1.6 * math.cos(angle)
        attention.k_proj.weight[pair + config.head_dim // 2, 0] += 1.6 * math.sin(angle)


def encode(problem: Problem) -> list[int]:
    """Token ids of ``<bos> prompt trace <eos>``."""
    words = f"<bos> {problem.prompt} {problem.trace} <eos>".split()
    return [IDS[word] for word in words]


def drill_lookups(generator: random.Random, pairs: int = 20, repeats: int = 3) -> Drill:
    """A list of facts, then the same facts again in other orders."""
    keys = generator.sample((*LETTERS, *LABELS, *ITEMS), pairs)
    facts = [(key, generator.choice((*ITEMS, *PRICES, *DIGITS))) for key in keys]
    words, asked = ["<bos>"], []
    for repeat in range(repeats):
        generator.shuffle(facts)
        for key, value in facts:
            words += [key, value]
            asked += [False, repeat > 0]
    return _drill(words, asked)


def drill_sums(generator: random.Random, sums: int = 20) -> Drill:
    """Unrelated sums, in the two forms that ledgers use."""
    words, asked = ["<bos>"], []
    for _ in range(sums):
        a, b = generator.randrange(10), generator.randrange(10)
        sign = generator.choice(("plus", "plus tax"))
        line = f"{a} {sign} {b} is {(a + b) % 10} .".split()
        words += line
        asked += [i == len(line) - 2 for i in range(len(line))]
    return _drill(words[: DRILL + 1], asked[:DRILL])


def _drill(words: list[str], asked: list[bool]) -> Drill:
    ids = [IDS[word] for word in words]
    targets = [IDS[w] if ask else IGNORED for w, ask in zip(words[1:], asked, strict=True)]
    return ids[:-1], targets


def visible(until: Tensor, *, layers: int, heads: int, groups: int) -> list[Tensor]:
    """Which keys each query may see when a random share of the stale ones is hidden for good.

    Args:
        until: ``[B, L]`` position of the last query that needs each token.
        layers: number of masks, all different.
        heads: key/value heads, each with its own pattern, as policies evict per head.
        groups: query heads for each of them.

    Returns:
        ``[B, heads * groups, L, L]`` bool for each layer.
    """
    batch, length = until.shape
    positions = torch.arange(length)
    share = (torch.rand(batch, 1, 1) * 1.25).clamp(max=1)
    spread = torch.randint(8, 100, (batch, 1, 1))
    keep_first = torch.rand(batch, 1) < 0.85
    masks = []
    for _ in range(layers):
        window = SHORTEST_WINDOW + torch.rand(batch, heads, length) * spread
        last = torch.maximum(positions + window, until[:, None].float())
        last = last.masked_fill(torch.rand(batch, heads, length) >= share, length)
        last[..., 0].masked_fill_(keep_first, length)
        seen = (positions[:, None] >= positions) & (positions[:, None] <= last[:, :, None])
        masks.append(seen.repeat_interleave(groups, dim=1))
    return masks


class Trainer:
    """Model, optimisers and the state of the curriculum."""

    def __init__(self, steps: int, seed: int, model: LlamaForCausalLM | None = None) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = model or build_model()
        self.steps, self.level, self.solved, self.since = steps, 0, 0.0, 0
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = (
            Muon(matrices, lr=0.02),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.masks: list[Tensor] | None = None
        for number, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._masking(number), with_kwargs=True)

    def _masking(self, number: int):
        # transformers hands one mask to all layers; eviction differs from layer to layer.
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.masks is None:
                return None
            return args, {**kwargs, "attention_mask": self.masks[number]}

        return hook

    @property
    def hides(self) -> bool:
        return self.level == len(LEVELS) - 1 and self.solved > 0.9

    def problems(self) -> list[Problem]:
        """Half of the batches have exactly the size of the level, the others any smaller one."""
        size = LEVELS[self.level]
        if self.random.random() < 0.5:
            size = Difficulty(
                self.random.randint(3, size.items), self.random.randint(3, size.entries)
            )
        first = make_problem(self.random.getrandbits(48), size, split="training")
        count = max(1, TOKENS_PER_STEP // (1 + (self.level == 0)) // len(encode(first)))
        return [
            first,
            *(
                make_problem(self.random.getrandbits(48), size, split="training")
                for _ in range(count - 1)
            ),
        ]

    def step(self, number: int) -> tuple[float, float, int]:
        """One update. Returns the loss, the share of ledgers without any error, and the tokens."""
        if self.level == 0 and number % 2 == 0:
            return self._drill(number)
        problems = self.problems()
        tokens = torch.tensor([encode(problem) for problem in problems])
        start = 1 + len(problems[0].prompt.split())
        hidden = self.hides and self.random.random() < 0.5
        self.masks = None
        if hidden:
            config = self.model.config
            until = torch.tensor(
                [
                    [0, *(1 + p for p in needed_until(problem)), tokens.shape[1]]
                    for problem in problems
                ]
            )
            self.masks = visible(
                until[:, :-1],
                layers=config.num_hidden_layers,
                heads=config.num_key_value_heads,
                groups=config.num_attention_heads // config.num_key_value_heads,
            )
        states = self.model.model(tokens[:, :-1], use_cache=False).last_hidden_state
        logits = self.model.lm_head(states[:, start - 1 :])
        targets = tokens[:, start:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self._update(loss, number)
        solved = (logits.argmax(-1) == targets).all(1).float().mean().item()
        if not hidden:
            self._advance(solved)
        return loss.item(), solved, tokens.numel()

    def _drill(self, number: int) -> tuple[float, float, int]:
        # Ledgers ask so seldom for either skill that it takes thousands of steps to emerge from them.
        drill = drill_sums if number % 4 else drill_lookups
        pairs = [drill(self.random) for _ in range(TOKENS_PER_STEP // 2 // DRILL)]
        tokens, targets = (torch.tensor(part) for part in zip(*pairs, strict=True))
        self.masks = None
        logits = self.model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        self._update(loss, number)
        return loss.item(), 0.0, tokens.numel()

    def _update(self, loss: Tensor, number: int) -> None:
        rate = min(1.0, (number + 1) / 40, 0.02 + (self.steps - number) / (0.4 * self.steps))
        for optimizer, base in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _advance(self, solved: float) -> None:
        self.since += 1
        self.solved += (solved - self.solved) / min(self.since, 20)
        if self.since >= 20 and self.solved > 0.8 and self.level < len(LEVELS) - 1:
            self.level, self.solved, self.since = self.level + 1, 0.0, 0


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes weights, configuration and tokenizer in the format of transformers."""
    model.generation_config = GenerationConfig(
        bos_token_id=IDS["<bos>"],
        eos_token_id=IDS["<eos>"],
        pad_token_id=IDS["<pad>"],
        do_sample=False,
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    trainer = Trainer(options.steps, options.seed)
    started, seen = time.perf_counter(), 0
    for number in range(options.steps):
        loss, solved, tokens = trainer.step(number)
        seen += tokens
        if number % 20 in (0, 1, 2):
            print(
                f"step {number} level {trainer.level} loss {loss:.4f} solved {solved:.2f} "
                f"hides {trainer.hides} tokens {seen} "
                f"seconds {time.perf_counter() - started:.0f}",
                flush=True,
            )
        if (number + 1) % options.save_every == 0 or number + 1 == options.steps:
            save(trainer.model, options.out)


if __name__ == "__main__":
    main()
