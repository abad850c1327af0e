"""Several questions about one text that is read once, under a full cache and under policies.

    python examples/long_text.py --out pictures
    python examples/long_text.py --out pictures --model Qwen/Qwen3-4B --budgets 256,768

The model that ships with this package solves walks through a market and nothing else: its text is
the list of goods, each question is a walk, and what gets long is its own chain of thought. Any
other model is asked about lighthouses.txt, some 1,500 words.
"""

import argparse
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
    parser = argparse.ArgumentParser(description="Questions about one text that is read once.")
    parser.add_argument("--out", type=Path, required=True, help="folder for long_text.png")
    parser.add_argument("--model", help="a hub or local model (default: the shipped one)")
    parser.add_argument("--policies", default="random,h2o")
    parser.add_argument("--budgets", default="150,230", help="tokens that each head may hold")
    parser.add_argument("--questions", type=int, default=5, help="5 at most")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    options = parser.parse_args()

    context, asked = walks()
    if options.model:
        context, asked = Path(__file__).with_name("lighthouses.txt").read_text(), ABOUT_LIGHTHOUSES
    questions = list(asked)[: options.questions]
    settings: list[dict[str, Any]] = [{}]
    for b in options.budgets.split(","):
        settings += [dict(policy=policy, budget=int(b)) for policy in options.policies.split(",")]
    # The tasks that a type checker knows of are transformers' own.
    task: Any = "kv-press-text-generation"
    pipe: Any = pipeline(task, model=options.model or str(MODEL_PATH))
    rows = []
    for setting in settings:
        limit = options.max_new_tokens
        found = pipe(context, questions=questions, max_new_tokens=limit, **setting)
        replies = found["answers"] if options.model else map(extract_answer, found["answers"])
        right = [asked[q] in (reply or "") for q, reply in zip(questions, replies, strict=True)]
        name = f"{setting['policy']}, {setting['budget']}" if setting else "full cache"
        kib = found["timing"].cache_bytes / 1024
        print(f"{name:>18}: {sum(right)} of {len(right)} right, {kib:,.0f} KiB")
        rows.append((name, right, kib))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / "long_text.png")


def walks() -> tuple[str, dict[str, str]]:
    """One market, and walks through it with their answers."""
    market = make_problem(seed=1, steps=12).prompt.partition(" start")[0]
    return market, {f"start {start} steps 1 2 solve": walk(market, start) for start in range(5)}


def walk(market: str, start: int) -> str:
    """Where twelve steps lead."""
    _, tax, _, *goods = market.split()
    prices = dict(zip(goods[::3], goods[2::3], strict=True))
    total = start
    for left in range(12, 0, -1):
        total = (total + int(prices[str(total)][0]) + int(tax) + left) % 10
    return str(total)


def draw(rows: list[tuple[str, list[bool], float]], path: Path) -> None:
    """Which questions were answered, and what the cache took."""
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names, answered, kib = zip(*rows, strict=True)
    left.imshow(answered, cmap="RdYlBu", vmin=-0.6, vmax=1.6, aspect="auto")
    for row, cells in enumerate(answered):
        for column, is_right in enumerate(cells):
            left.text(column, row, "right" if is_right else "wrong", ha="center", va="center")
    left.set_yticks(range(len(rows)), names)
    numbers = range(len(answered[0]))
    left.set_xticks(numbers, [f"question {number + 1}" for number in numbers], size=8)
    right.bar_label(right.barh(names, kib, height=0.6), [f"{size:,.0f}" for size in kib], padding=3)
    right.set_title("KiB of cache at the end", size=10)
    right.margins(x=0.15)
    right.set_xticks([])
    for panel in (left, right):
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
