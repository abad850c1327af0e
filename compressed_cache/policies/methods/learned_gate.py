"""By gates that somebody trained for the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from compressed_cache.policies import gate_file as files
from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.view import LayerContext, Slots
from compressed_cache.wording import shown

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}
_BLOCK_ELEMENTS = 1 << 24
"""Numbers of hidden states that are turned into doubles at once while a prompt is read."""


@dataclass(frozen=True, kw_only=True)
class LearnedGate(Policy):
    """Keeps the tokens that trained gates rate highest by the hidden states they came from.

    KVzap (https://arxiv.org/abs/2601.07891): in each layer, a linear layer or an MLP with one
    hidden layer takes what the attention module is given (after the norm) and returns a number for
    each key/value head, which stays with the token. The model is left as it is, and the gates are
    yours: files of the authors (``model.safetensors`` of their repositories) can be used as they
    are. The last 128 tokens are kept through ``recent``, as with the authors' window, where the
    budget is at least twice as large.

    With ``decay`` the number is that of TRIM-KV (https://arxiv.org/abs/2512.03324): its
    log-sigmoid is ``log beta``, and a token at position ``i`` is rated ``(t - i) * log beta`` when
    the one at ``t`` comes in. Nothing is kept through ``recent`` then. Of the authors' gates
    ``linear1``, ``linear2.weight`` and ``bias`` are to be named ``0``, ``2.weight`` and ``2.bias``.

    Differs in three points: a budget decides how much is kept, where KVzap drops whatever is rated
    below a threshold; gates are computed in float64 (KVzap's in the dtype of the model); and the
    age of a token is that of the TRIM-KV paper (their code counts one more).
    """

    name: ClassVar[str] = "learned_gate"
    weights: str | None = None
    """Path of a safetensors file with ``module_list.LAYER.weight`` ``[H, E]`` and ``.bias`` of each
    layer, or of an MLP ``.0.weight`` ``[M, E]``, ``.0.bias``, ``.2.weight`` ``[H, M]`` and
    ``.2.bias``, for hidden states of ``E`` numbers; a first prompt without it is refused."""
    activation: str = "gelu"
    """Between the two layers of an MLP: ``"gelu"`` (KVzap), ``"silu"`` (TRIM-KV's, for most
    models) or ``"relu"``."""
    decay: bool = False
    """Whether ratings decay with age, as those of TRIM-KV."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and not isinstance(self.weights, str):
            raise TypeError(f"weights must be a str or None, got {shown(self.weights)}")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")
        if self.weights is not None:
            files.check(self.weights)

    @property
    def needs(self) -> Needs:
        return Needs(notes=1, hidden_states=True, whole_keys=False, model=("trained gates",))

    def defaults(self, budget: int) -> Defaults:
        return Defaults(recent=0 if self.decay else min(128, budget // 2))

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        gate = files.load(self.weights, context)
        return {f"gate.{name}": part.double() for name, part in gate.items()}

    def note(self, tokens: Slots) -> Tensor:
        assert tokens.hidden_states is not None
        batch, _, width = tokens.hidden_states.shape
        block = max(1, _BLOCK_ELEMENTS // (batch * width))
        blocks = tokens.hidden_states.split(block, dim=1)
        ratings = [self._ratings(hidden, tokens.constants) for hidden in blocks]
        return torch.cat(ratings, dim=1).transpose(1, 2).unsqueeze(-1)

    def scores(self, slots: Slots) -> Tensor:
        rating = slots.notes.squeeze(-1)
        if not self.decay:
            return rating
        return (slots.next_position[:, None, None] - slots.positions).float() * rating

    def _ratings(self, hidden: Tensor, gate: Mapping[str, Tensor]) -> Tensor:
        """``[B, L, H]`` float32 of hidden states ``[B, L, E]``."""
        # How a sum is rounded depends on the shape of the call. Of doubles that is lost in the
        # result, so that equal tokens are equal in every call.
        hidden, last = hidden.double(), ""
        if "gate.0.weight" in gate:
            inner = functional.linear(hidden, gate["gate.0.weight"], gate["gate.0.bias"])
            hidden, last = _ACTIVATIONS[self.activation](inner), "2."
        rating = functional.linear(hidden, gate[f"gate.{last}weight"], gate[f"gate.{last}bias"])
        return (functional.logsigmoid(rating) if self.decay else rating).float()
