"""The two skills of a walk, practised before the first walk.

Both emerge within 300 updates where each update practises both. From walks alone, or from drills
that alternate with walks, sums did not emerge in 900.
"""

import random

from compressed_cache.reasoner.architecture import IDS
from compressed_cache.reasoner.problems import DIGITS, ITEMS, PRICES

IGNORED = -100
LENGTH = 120  # tokens
Drill = tuple[list[int], list[int]]  # token ids, and what follows each where it is asked for


def drill_lookups(generator: random.Random, pairs: int = 20, repeats: int = 3) -> Drill:
    """A list of facts, then the same facts again in other orders."""
    keys = generator.sample((*DIGITS, *ITEMS), pairs)
    facts = [(key, generator.choice((*ITEMS, *PRICES, *DIGITS))) for key in keys]
    words, asked = ["<bos>"], []
    for repeat in range(repeats):
        generator.shuffle(facts)
        for key, value in facts:
            words += [key, value]
            asked += [False, repeat > 0]
    return _drill(words, asked)


def drill_sums(generator: random.Random) -> Drill:
    """Unrelated sums, in the two forms that walks use."""
    words, asked = ["<bos>"], []
    while len(words) <= LENGTH:
        a, b, c = (generator.randrange(10) for _ in range(3))
        ab, abc = (a + b) % 10, (a + b + c) % 10
        line = generator.choice(
            (f"{a}p plus tax {b} is {ab} .", f"total {a} plus {b} is {ab} plus {c} is {abc} .")
        ).split()
        words += line
        asked += [word == "is" for word in ("", *line[:-1])]
    return _drill(words[: LENGTH + 1], asked[:LENGTH])


def _drill(words: list[str], asked: list[bool]) -> Drill:
    ids = [IDS[word] for word in words]
    targets = [IDS[w] if ask else IGNORED for w, ask in zip(words[1:], asked, strict=True)]
    return ids[:-1], targets
