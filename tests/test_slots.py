"""Each tensor step equals a Python loop. Shapes are distinct primes."""

import math

import torch

from compressed_cache.ops import eviction as slots

B, H, S = 2, 3, 7


def _scores(ties: bool = True) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 3, (B, H, S)).float() if ties else torch.randn(B, H, S)


def _positions() -> torch.Tensor:
    torch.manual_seed(1)
    positions = torch.stack([torch.randperm(20)[:S] for _ in range(B * H)]).view(B, H, S)
    positions[0, 0, 2] = positions[1, 2, 5] = positions[1, 2, 0] = -1
    return positions


def _order(scores: list[float], positions: list[int]) -> list[int]:
    return sorted(range(S), key=lambda s: (scores[s], positions[s], s))


def test_rank_sorts_by_score_and_then_by_age() -> None:
    scores, positions = _scores(), _positions()
    scores = scores.masked_fill(positions < 0, -math.inf)
    ranked = slots.sort_slots(scores, positions)
    for b in range(B):
        for h in range(H):
            expected = _order(scores[b, h].tolist(), positions[b, h].tolist())
            assert ranked[b, h].tolist() == expected


def test_lowest_slot_is_the_first_of_the_ranking() -> None:
    scores, positions = _scores(), _positions()
    scores = scores.masked_fill(positions < 0, -math.inf)
    assert torch.equal(
        slots.lowest_slot(scores, positions), slots.sort_slots(scores, positions)[..., :1]
    )


def test_ties_keep_the_newer_token() -> None:
    positions = torch.tensor([[[5, 9, 2]]])
    scores = torch.zeros(1, 1, 3)
    assert slots.lowest_slot(scores, positions).item() == 2
    assert slots.keep_best(scores, positions, count=2)[0, 0].tolist() == [0, 1]


def test_keep_best_returns_the_best_in_order_of_position() -> None:
    scores, positions = _scores(), _positions()
    kept = slots.keep_best(scores, positions, count=5)
    for b in range(B):
        for h in range(H):
            best = _order(scores[b, h].tolist(), positions[b, h].tolist())[-5:]
            expected = sorted(best, key=lambda s: positions[b, h, s].item())
            assert [positions[b, h, s].item() for s in kept[b, h]] == [
                positions[b, h, s].item() for s in expected
            ]


def test_protect_marks_sinks_recent_and_empty_slots() -> None:
    scores, positions = _scores(ties=False), _positions()
    next_position, prefix, recent = torch.tensor([20, 16]), torch.tensor([3, 0]), 4
    # What a policy always keeps ranks below what is protected.
    scores[:, 0] = math.inf
    protected = slots.protect(
        scores, positions, next_position=next_position, protected_prefix=prefix, recent=recent
    )
    for b in range(B):
        for h in range(H):
            for s in range(S):
                position = positions[b, h, s].item()
                if position < 0:
                    expected = -math.inf
                elif position < prefix[b]:
                    expected = math.inf
                elif position >= next_position[b] - recent:
                    expected = slots.RECENT_SCORE
                else:
                    expected = min(scores[b, h, s].item(), slots.HIGHEST_SCORE)
                assert protected[b, h, s].item() == expected


def test_no_score_of_a_policy_equals_that_of_what_is_recent() -> None:
    assert slots.HIGHEST_SCORE < slots.RECENT_SCORE < math.inf
    highest = torch.tensor(slots.HIGHEST_SCORE)
    assert highest.item() == slots.HIGHEST_SCORE  # it is a float32


def test_pooling_follows_positions_and_skips_empty_slots() -> None:
    values, positions = _scores(ties=False), _positions()
    for reduce, combine in (("mean", sum), ("max", max)):
        for kernel_size in (1, 3, 5):
            pooled = slots.pool_by_position(
                values, positions, kernel_size=kernel_size, reduce=reduce
            )
            for b in range(B):
                for h in range(H):
                    order = [s for s in range(S) if positions[b, h, s] >= 0]
                    order.sort(key=lambda s: positions[b, h, s].item())
                    for i, s in enumerate(order):
                        near = order[max(0, i - kernel_size // 2) : i + kernel_size // 2 + 1]
                        expected = combine([values[b, h, n].item() for n in near])
                        expected /= kernel_size if reduce == "mean" else 1
                        assert math.isclose(pooled[b, h, s].item(), expected, rel_tol=1e-5)


def test_next_victims_go_on_with_the_oldest_and_never_take_what_is_protected_for_good() -> None:
    positions = torch.tensor([[[0, 7, 1, 9, 8, -1, 4]]])
    # Sinks below 2, recent from 7 on, one free slot, one token to choose.
    scores = torch.tensor([[[math.inf] * 5 + [-math.inf, 0.5]]])
    prefix = dict(next_position=torch.tensor([10]), protected_prefix=torch.tensor([2]))
    victims = slots.next_victims(scores, positions, **prefix, count=7)
    assert victims[0, 0].tolist() == [5, 6, 1, 4, 3, 5, 6]


def test_next_victims_never_take_what_the_first_of_them_will_hold_for_good() -> None:
    positions = torch.tensor([[[1, -1, -1, 0, -1]]])
    scores = torch.where(positions < 0, -math.inf, math.inf)
    # Of a prompt of two tokens; the next two are below the prefix as well.
    prefix = dict(next_position=torch.tensor([2]), protected_prefix=torch.tensor([4]))
    victims = slots.next_victims(scores, positions, **prefix, count=6)
    first, second, third = {1, 2, 4}, victims[0, 0, 1], victims[0, 0, 2]
    assert set(victims[0, 0, :3].tolist()) == first and second != third
    assert victims[0, 0, 3:].tolist() == [third] * 3
