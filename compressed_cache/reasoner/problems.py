"""Generated shopping ledgers, each solved by a long written chain of thought.

The prompt states every fact once. Entries are shuffled, so they can only be found by content::

    tax 4 goods b jam 7p a tea 3p c end order two tea three end one jam solve

The trace first works out what every good costs, then walks through the order with a running total.
All arithmetic keeps the last digit only::

    good a tea 3p so 3 plus tax 4 is 7 now tea 7 .
    good b jam 7p so 7 plus tax 4 is 1 now jam 1 .
    good c end .
    step one jam 1 . total 0 plus 1 is 1 . check 1 minus 1 is 0 ok .
    step two tea 7 . total 1 plus 7 is 8 . check 8 minus 7 is 1 ok .
    step three end . answer 8

Three kinds of tokens result: facts of the prompt, needed once and possibly late; the costs, which
exist only in the trace and are needed again at irregular intervals; and the rest, which is useless
a line later.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["training", "validation", "held_out"]

LETTERS = tuple("abcdefghi")
LABELS = tuple(
    "one two three four five six seven eight nine ten eleven twelve thirteen".split()  # noqa: SIM905
)
ITEMS = tuple(
    "tea jam oil rye egg ham fig nut pea soy cod bun lime corn leek plum".split()  # noqa: SIM905
)
DIGITS = tuple("0123456789")
PRICES = tuple(f"{digit}p" for digit in DIGITS)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(
    "tax goods order end solve good plus is so now . step total check minus ok answer".split()  # noqa: SIM905
)
VOCABULARY = (*SPECIALS, *WORDS, *DIGITS, *PRICES, *LETTERS, *LABELS, *ITEMS)

_ANSWER = re.compile(r"\banswer (\d)\b")


@dataclass(frozen=True)
class Problem:
    """One ledger: what the model is given, what it should write, and the digit that counts."""

    prompt: str
    trace: str
    answer: str


@dataclass(frozen=True)
class Difficulty:
    """How many goods are priced and how many entries are ordered."""

    items: int
    entries: int

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("items", self.items, len(LETTERS) - 1),
            ("entries", self.entries, len(LABELS) - 1),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"{name} must be between 1 and {limit}, got {value}")


def make_problem(seed: int, difficulty: Difficulty, *, split: Split = "held_out") -> Problem:
    """A ledger that depends on nothing but the arguments.

    The splits are disjoint in content, not only in seeds: a hash of the prompt decides which split
    a ledger belongs to, and ledgers of another split are thrown away.
    """
    generator = random.Random(f"{seed} {difficulty.items} {difficulty.entries}")
    while True:
        problem = _draw(generator, difficulty)
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


def _draw(generator: random.Random, difficulty: Difficulty) -> Problem:
    tax = generator.randrange(10)
    goods = [(item, generator.randrange(10)) for item in generator.sample(ITEMS, difficulty.items)]
    order = [generator.choice(goods)[0] for _ in range(difficulty.entries)]
    costs = {item: (price + tax) % 10 for item, price in goods}

    total, steps = 0, []
    for label, item in zip(LABELS, order, strict=False):
        before, total = total, (total + costs[item]) % 10
        steps.append(
            f"step {label} {item} {costs[item]} . total {before} plus {costs[item]} is "
            f"{total} . check {total} minus {costs[item]} is {before} ok ."
        )
    trace = (
        *(
            f"good {letter} {item} {price}p so {price} plus tax {tax} is {costs[item]} now {item} "
            f"{costs[item]} ."
            for letter, (item, price) in zip(LETTERS, goods, strict=False)
        ),
        f"good {LETTERS[difficulty.items]} end .",
        *steps,
        f"step {LABELS[difficulty.entries]} end . answer {total}",
    )
    prompt = (
        f"tax {tax} goods",
        *_shuffled(generator, LETTERS, [*(f"{item} {price}p" for item, price in goods), "end"]),
        "order",
        *_shuffled(generator, LABELS, [*order, "end"]),
        "solve",
    )
    return Problem(" ".join(prompt), " ".join(trace), str(total))


def _shuffled(generator: random.Random, labels: Sequence[str], entries: Sequence[str]) -> list[str]:
    lines = [f"{label} {entry}" for label, entry in zip(labels, entries, strict=False)]
    generator.shuffle(lines)
    return lines
