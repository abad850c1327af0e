"""What the training script relies on; the training itself takes longer than all tests."""

import pytest
import torch

from compressed_cache.reasoner import training
from compressed_cache.reasoner.lifetimes import SHORTEST_WINDOW, needed_until, visible
from compressed_cache.reasoner.problems import make_problem

STEPS = 6


def test_facts_are_needed_until_their_last_lookup() -> None:
    for seed in range(20):
        problem = make_problem(seed, STEPS, split="training")
        tokens = f"{problem.prompt} {problem.trace}".split()
        until = needed_until(problem)
        prompt = len(problem.prompt.split())
        assert len(until) == len(tokens)
        assert all(last >= position for position, last in enumerate(until))
        walk = tokens.index("left")
        for step in range(STEPS):
            place, item = (i + walk + 19 * step for i in (4, 5))
            fact = tokens.index(tokens[item])
            assert fact < prompt
            assert tokens[fact - 1] == tokens[place]
            assert until[fact] >= place
            cost = next(
                i + 2
                for i in range(prompt, walk)
                if tokens[i] == "so" and tokens[i + 1] == tokens[item]
            )
            assert tokens[cost] == tokens[item + 1]
            assert until[cost] >= item


def test_what_is_needed_is_never_hidden() -> None:
    torch.manual_seed(0)
    problem = make_problem(0, STEPS, split="training")
    until = torch.tensor([needed_until(problem)])
    length = until.shape[1]
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    hidden = 0
    for _ in range(8):
        for mask in visible(until, layers=2, heads=2, groups=2):
            assert mask.shape == (1, 4, length, length)
            assert not (mask & (columns > rows)).any()
            needed = (columns <= rows) & ((rows <= until[0]) | (rows - columns <= SHORTEST_WINDOW))
            assert mask[..., needed].all()
            assert torch.equal(mask[:, 0], mask[:, 1])
            hidden += int((~mask & (columns <= rows)).sum())
    assert hidden > 0


def test_training_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 500)

    def losses(seed: int) -> list[float]:
        trainer = training.Trainer(steps=8, seed=seed)
        found = [trainer.step(number)[0] for number in range(2)]
        trainer.drill_loss = 0.0
        found += [trainer.step(number)[0] for number in range(2, 4)]
        trainer.tune(2, seed, penalty=0.1)
        return found + [trainer.step(number)[0] for number in range(2)]

    first = losses(0)
    assert losses(0) == first
    assert losses(1) != first
