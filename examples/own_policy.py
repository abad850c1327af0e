"""A policy of one's own beside others: how often its answers are right, and what it holds.

    python examples/own_policy.py --out pictures
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import pipeline

import compressed_cache.integrations  # noqa: F401
from compressed_cache import CompressedCache, Defaults, Policy, Slots
from compressed_cache.policies.base import Rows
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import extract_answer, make_problem
from compressed_cache.versions import cache_argument


@dataclass(frozen=True, kw_only=True)
class Breadth(Policy):
    """Keeps the tokens that many queries attended to, be it ever so little."""

    observes_attention: ClassVar = True

    power: float = 0.5
    """Of each query's attention: below 1 many weak looks count for more than one strong one."""

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=budget // 2)

    def accumulate(self, attention: Tensor, rows: Rows) -> Tensor:
        return attention + rows.weights.mean(dim=2).pow(self.power).sum(dim=2)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention


def main() -> None:
    """Solves held-out problems of the shipped model under each policy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for own_policy.png")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16, help="of each walk, at most 99")
    parser.add_argument("--budget", type=int, default=170)
    options = parser.parse_args()

    problems = [make_problem(seed, options.steps) for seed in range(options.problems)]
    texts = [problem.prompt.partition(" start") for problem in problems]
    pipe: Any = pipeline("kv-press-text-generation", model=str(MODEL_PATH))
    maps = {}
    for press in ("random", "h2o", Breadth()):
        name = press if isinstance(press, str) else press.label
        replies = pipe(
            [context for context, _, _ in texts],
            questions=[[start + rest] for _, start, rest in texts],
            batch_size=len(texts),
            press=press,
            budget=options.budget,
            max_new_tokens=(tokens := 200 + 20 * options.steps),
        )
        right = sum(
            extract_answer(reply["answers"][0]) == problem.answer
            for reply, problem in zip(replies, problems, strict=True)
        )
        print(f"{name:>8}: {right} of {len(problems)} right")
        maps[f"{name}: {right} of {len(problems)} right"] = held(
            pipe, problems[0].prompt, tokens, CompressedCache(press, options.budget)
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(maps, options.out / "own_policy.png")


def held(pipe: Any, prompt: str, tokens: int, cache: CompressedCache) -> Tensor:
    """The share of all heads that hold each position at the end of a text."""
    inputs = pipe.tokenizer(prompt, return_tensors="pt").to(pipe.model.device)
    pipe.model.generate(**inputs, **cache_argument(cache), max_new_tokens=tokens, do_sample=False)
    positions = torch.cat([layer.positions[0] for layer in cache.layers]).cpu()
    counts = torch.bincount(positions[positions >= 0], minlength=cache.get_seq_length())
    return counts / len(positions)


def draw(maps: dict[str, Tensor], path: Path) -> None:
    """A strip for each policy, dark where most heads still hold a token."""
    figure = Figure(figsize=(9, 0.7 + len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), 1, sharex=True)
    for panel, (title, shares) in zip(panels, maps.items(), strict=True):
        image = panel.imshow(shares[None], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_yticks([])
    panels[-1].set_xlabel("position in the text of the first problem")
    figure.colorbar(image, ax=panels, label="share of heads\nthat hold it at the end")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
