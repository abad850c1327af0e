"""The two skills of a ledger, practised alone.

A ledger asks so seldom for either that it takes thousands of steps to emerge from ledgers alone.
"""

import random

from compressed_cache.reasoner.architecture import IDS
from compressed_cache.reasoner.problems import DIGITS, ITEMS, LABELS, LETTERS, PRICES

IGNORED = -100
LENGTH = 120  # tokens
Drill = tuple[list[int], list[int]]  # token ids, and what follows each where it is asked for


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
    return _drill(words[: LENGTH + 1], asked[:LENGTH])


def _drill(words: list[str], asked: list[bool]) -> Drill:
    ids = [IDS[word] for word in words]
    targets = [IDS[w] if ask else IGNORED for w, ask in zip(words[1:], asked, strict=True)]
    return ids[:-1], targets
