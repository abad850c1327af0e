"""Several questions about one text that is read once, under a full cache and under presses.

    python examples/long_text.py --out pictures
    python examples/long_text.py --out pictures --model Qwen/Qwen3-4B --budgets 256,768

The model that ships with this package solves walks through a market and nothing else: its text is
the list of goods, each question is a walk, and what gets long is its own chain of thought. Any
other model is asked about lighthouses.txt, some 1,500 words.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import pipeline

import compressed_cache.integrations  # noqa: F401
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import extract_answer, make_problem

ABOUT_LIGHTHOUSES = {
    "Who built the first tower on the Eddystone rocks?": "Winstanley",
    "In which year was the light on the Bell Rock shown for the first time?": "1811",
    "Where was the first lens of Fresnel put to use?": "Cordouan",
    "Who received the Nobel Prize in Physics in 1912?": "Dal",
    "What was the name of the ship from which Grace Darling saved people?": "Forfarshire",
}


def main() -> None:
    """Asks, prints what was answered, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for long_text.png")
    parser.add_argument("--model", help="a hub or local model (default: the shipped one)")
    parser.add_argument("--presses", default="random,snapkv,h2o")
    parser.add_argument("--budgets", default=None, help="default: 150,230; with --model 256,768")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    options = parser.parse_args()

    context, asked = walks(options.questions)
    if options.model:
        context = Path(__file__).with_name("lighthouses.txt").read_text()
        asked = dict(list(ABOUT_LIGHTHOUSES.items())[: options.questions])
    budgets = options.budgets or ("256,768" if options.model else "150,230")
    settings: list[dict[str, Any]] = [{}] + [
        dict(press=press, budget=int(budget))
        for budget in budgets.split(",")
        for press in options.presses.split(",")
    ]
    pipe: Any = pipeline("kv-press-text-generation", model=options.model or str(MODEL_PATH))
    rows = []
    for setting in settings:
        found = pipe(
            context, questions=list(asked), max_new_tokens=options.max_new_tokens, **setting
        )
        right = [
            expected in reply if options.model else extract_answer(reply) == expected
            for reply, expected in zip(found["answers"], asked.values(), strict=True)
        ]
        name = f"{setting['press']}, {setting['budget']}" if setting else "full cache"
        kib = found["timing"].cache_bytes / 1024
        print(f"{name:>18}: {sum(right)} of {len(right)} right, {kib:,.0f} KiB")
        rows.append((name, right, kib))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / "long_text.png")


def walks(count: int) -> tuple[str, dict[str, str]]:
    """One market, and walks through it with their answers."""
    context = make_problem(seed=1, steps=9).prompt.partition(" start")[0]
    words = context.split()
    tax, goods = int(words[1]), words[3:]
    costs = {
        int(place): (int(price[0]) + tax) % 10
        for place, price in zip(goods[::3], goods[2::3], strict=True)
    }
    asked = {}
    for start in random.Random(0).sample(range(10), count):
        total = start
        for left in range(12, 0, -1):
            total = (total + costs[total] + left) % 10
        asked[f"start {start} steps 1 2 solve"] = str(total)
    return context, asked


def draw(rows: list[tuple[str, list[bool], float]], path: Path) -> None:
    """Which questions were answered, and what the cache took."""
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
    names, answered, kib = zip(*rows, strict=True)
    left.pcolormesh(answered, cmap="RdYlGn", vmin=-0.25, vmax=1.25, edgecolor="white", linewidth=3)
    left.set_yticks([row + 0.5 for row in range(len(rows))], names)
    left.set_xticks([column + 0.5 for column in range(len(answered[0]))])
    left.set_xticklabels(range(1, len(answered[0]) + 1))
    left.set_xlabel("question")
    left.set_title("right (green) or wrong")
    left.invert_yaxis()
    left.tick_params(length=0)
    bars = right.barh([row + 0.5 for row in range(len(rows))], kib, height=0.6, color="#4a7fb0")
    right.bar_label(bars, [f"{size:,.0f}" for size in kib], padding=3)
    right.set_title("KiB of cache at the end")
    right.margins(x=0.15)
    for panel in (left, right):
        panel.spines[:].set_visible(False)
    right.set_xticks([])
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
