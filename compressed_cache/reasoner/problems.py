"""Generated market walks, each solved by a long written chain of thought.

The prompt states every fact once and in random order: which good stands at which of ten places,
its price, the tax, where the walk starts and how many steps it takes::

    tax 4 goods 3 oil 2p 0 tea 7p 1 jam 3p ... start 1 steps 1 8 solve

The trace first works out what every good costs and lists it, then walks. Each step buys the good
of the place that the total points to, so no one can tell which fact will be needed next. All
arithmetic keeps the last digit only::

    0 tea 7p plus tax 4 is 1 so tea 1 .
    1 jam 3p plus tax 4 is 7 so jam 7 .
    ...
    list tea 1 jam 7 ... .
    left 1 8 at 1 jam 7 . total 1 plus 7 is 8 plus 8 is 6 .
    left 1 7 at 6 ...
    ...
    left 0 0 answer 3

Three kinds of tokens result: facts of the prompt, and costs that exist only in the trace, both
needed again and again at irregular intervals; and the rest, which is useless a line later.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

Split = Literal["training", "validation", "held_out"]

PLACES = 10
ITEMS = tuple("tea jam oil rye egg ham fig nut pea soy".split())  # noqa: SIM905
DIGITS = tuple("0123456789")
PRICES = tuple(f"{digit}p" for digit in DIGITS)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(
    "tax goods start steps solve plus is so . list left at total answer".split()  # noqa: SIM905
)
VOCABULARY = (*SPECIALS, *WORDS, *DIGITS, *PRICES, *ITEMS)

_ANSWER = re.compile(r"\banswer (\d)\b")


@dataclass(frozen=True)
class Problem:
    """One walk: what the model is given, what it should write, and the digit that counts."""

    prompt: str
    trace: str
    answer: str


def make_problem(seed: int, steps: int, *, split: Split = "held_out") -> Problem:
    """A walk that depends on nothing but the arguments.

    The splits are disjoint in content, not only in seeds: a hash of the prompt decides which split
    a walk belongs to, and walks of another split are thrown away.

    Raises:
        ValueError: `steps` is not between 1 and 99.
    """
    if not 1 <= steps <= 99:
        raise ValueError(f"steps must be between 1 and 99, got {steps}")
    generator = random.Random(f"{seed} {steps}")
    while True:
        problem = _draw(generator, steps)
        if split_of(problem.prompt) == split:
            return problem


def split_of(prompt: str) -> Split:
    """The only split where a prompt can occur: a tenth is held out, a tenth is for validation."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return "held_out" if bucket == 0 else "validation" if bucket == 1 else "training"


def extract_answer(text: str) -> str | None:
    """The digit after ``answer``; ``None``, which counts as wrong, where the text has none."""
    found = _ANSWER.search(text)
    return found.group(1) if found else None


def _draw(generator: random.Random, steps: int) -> Problem:
    tax, start = generator.randrange(10), generator.randrange(10)
    goods = generator.sample(ITEMS, PLACES)
    prices = [generator.randrange(10) for _ in goods]
    costs = [(price + tax) % 10 for price in prices]

    entries = [f"{place} {goods[place]} {prices[place]}p" for place in range(PLACES)]
    generator.shuffle(entries)
    prompt = (f"tax {tax} goods", *entries, f"start {start} steps {_spaced(steps)} solve")

    trace = [
        f"{place} {good} {price}p plus tax {tax} is {cost} so {good} {cost} ."
        for place, (good, price, cost) in enumerate(zip(goods, prices, costs, strict=True))
    ]
    trace += ["list", *(f"{good} {costs[goods.index(good)]}" for good in ITEMS), "."]
    total = start
    for left in range(steps, 0, -1):
        place, cost = total, costs[total]
        subtotal, total = (place + cost) % 10, (place + cost + left) % 10
        trace.append(
            f"left {_spaced(left)} at {place} {goods[place]} {cost} . "
            f"total {place} plus {cost} is {subtotal} plus {left % 10} is {total} ."
        )
    trace.append(f"left 0 0 answer {total}")
    return Problem(" ".join(prompt), " ".join(trace), str(total))


def _spaced(number: int) -> str:
    """Two digits, one token each."""
    return " ".join(f"{number:02}")
