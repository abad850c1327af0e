"""A policy of one's own beside others: how often its answers are right, and what it holds.

python examples/own_policy.py --out pictures
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressed_cache import CompressedCache, Defaults, Policy, Slots
from compressed_cache.policies import AttentionRows, Needs
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import extract_answer, make_problem
from compressed_cache.versions import cache_argument


@dataclass(frozen=True, kw_only=True)
class Breadth(Policy):
    """Keeps the tokens that many queries attended to, be it ever so little."""

    power: float = 0.5
    """Of each query's attention: below 1 many weak looks count for more than one strong one."""

    @property
    def needs(self) -> Needs:
        return Needs(attention=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=budget // 2)

    def accumulate(self, state: Tensor, rows: AttentionRows) -> Tensor:
        return state + rows.weights.mean(dim=2).pow(self.power).sum(dim=2)

    def scores(self, slots: Slots) -> Tensor:
        return slots.attention_state


def main() -> None:
    parser = argparse.ArgumentParser(description="A policy of one's own beside others.")
    parser.add_argument("--out", type=Path, required=True, help="folder for own_policy.png")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16, help="of each walk, at most 99")
    parser.add_argument("--budget", type=int, default=170)
    options = parser.parse_args()

    problems = [make_problem(seed, options.steps) for seed in range(options.problems)]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    prompts = [problem.prompt for problem in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    maps = {}
    for policy in ("random", "h2o", Breadth()):
        cache = CompressedCache(policy, options.budget)
        tokens = 200 + 20 * options.steps
        output = model.generate(
            **inputs, **cache_argument(cache), max_new_tokens=tokens, do_sample=False
        )
        found = [extract_answer(text) for text in tokenizer.batch_decode(output)]
        right = sum(f == p.answer for f, p in zip(found, problems, strict=True))
        title = f"{cache.policy.label}: {right} of {len(found)} right"
        print(title)
        maps[title] = shares(cache)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(maps, options.out / "own_policy.png")


def shares(cache: CompressedCache) -> Any:
    """``[1, T]`` of the first text: the share of all heads that hold each position at the end."""
    positions = torch.cat([layer.positions[0] for layer in cache.layers])
    counts = torch.bincount(positions[positions >= 0], minlength=cache.get_seq_length())
    return (counts[None] / len(positions)).numpy()


def draw(maps: dict[str, Any], path: Path) -> None:
    """A strip for each policy, dark where most heads still hold a token."""
    figure = Figure(figsize=(9, 0.7 + len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), 1, sharex=True)
    for panel, (title, held) in zip(panels, maps.items(), strict=True):
        panel.imshow(held, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_yticks([])
    panels[-1].set_xlabel("position in the text of the first problem, prompt included")
    figure.colorbar(
        panels[-1].images[0], ax=panels, label="share of heads\nthat hold it at the end"
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
