"""Which drafted tokens stay, and the token after them: the text is that of the model alone.

Shapes: ``B`` rows, ``K`` drafted tokens, ``V`` tokens of the vocabulary.
"""

import torch
from torch import Tensor


def accept_greedy(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps drafts as far as they are what the model itself finds best.

    Args:
        drafts: ``[B, K]`` int64.
        scores: ``[B, K + 1, V]``, of the model, before each draft and after the last.

    Returns:
        How many drafts stay, ``[B]`` int64, and the token after them, ``[B, 1]`` int64.
    """
    best = scores.argmax(dim=-1)
    accepted = _leading(drafts == best[:, :-1])
    return accepted, best.gather(1, accepted[:, None])


def accept_sampled(
    drafts: Tensor, draft_probabilities: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (https://arxiv.org/abs/2211.17192, algorithm 1): whatever the drafts are
    drawn from, the text has the distribution of the model.

    Args:
        drafts: ``[B, K]`` int64, drawn from ``draft_probabilities``.
        draft_probabilities: ``[B, K, V]``.
        probabilities: ``[B, K + 1, V]``, of the model, before each draft and after the last.

    Returns:
        How many drafts stay, ``[B]`` int64, and the token after them, ``[B, 1]`` int64.
    """
    index = drafts[:, :, None]
    wanted = probabilities[:, :-1].gather(2, index).squeeze(2)
    proposed = draft_probabilities.gather(2, index).squeeze(2)
    # As a product, because a quotient could overflow.
    accepted = _leading(torch.rand_like(proposed) * proposed < wanted)
    # What the drafts proposed too rarely makes up for what was rejected. After the last draft
    # nothing was proposed.
    proposals = torch.nn.functional.pad(draft_probabilities, (0, 0, 0, 1))
    index = accepted[:, None, None].expand(-1, 1, probabilities.shape[2])
    wanted = probabilities.gather(1, index).squeeze(1)
    missing = (wanted - proposals.gather(1, index).squeeze(1)).clamp(min=0.0)
    # Rounding can reject a draft where the two are equal.
    is_equal = missing.sum(dim=1, keepdim=True) <= 0.0
    return accepted, torch.multinomial(torch.where(is_equal, wanted, missing), 1)


def _leading(accepted: Tensor) -> Tensor:
    """Of each row ``[B, K]`` bool, how many are ``True`` before the first that is not."""
    return accepted.long().cumprod(dim=1).sum(dim=1)
