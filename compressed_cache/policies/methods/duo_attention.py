"""Retrieval heads and streaming heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressed_cache.policies import statistics_file as files
from compressed_cache.policies.budgets import compressed_layers, share_out
from compressed_cache.policies.capabilities import Protected, SharesBudget, find, find_store
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.view import LayerContext, Slots
from compressed_cache.tensorfile import check_finite
from compressed_cache.wording import shown


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Modifier):
    """Keeps only first and last tokens in streaming heads; the others share what they leave over.

    DuoAttention, section 3 (https://arxiv.org/abs/2410.10819). A gate of each key/value head tells
    how much it needs the middle of the text, and the part ``sparsity`` of all heads, those with the
    smallest gates, are streaming heads: the first ``duo_sinks`` and the last ``duo_recent`` tokens.
    All other heads have the same number of slots, in which the policy before ``+`` decides.

    Differs from the authors' code in five points: retrieval heads have a budget too (theirs keep
    everything); with a budget below twice ``duo_sinks + duo_recent`` both shrink in proportion to
    half the budget, or to what is protected; streaming heads hold what ``sinks`` and a given
    ``recent`` protect too, with as many slots as that takes, but a default of ``recent`` does not
    hold there; gates of the calibration are the attention that a head pays to the middle (theirs
    are learned; their files are read too); and of equal gates those of later heads stream first
    (they add noise).
    """

    name: ClassVar[str] = "duo_attention"
    store: ClassVar = "pool"
    gates: str | None = None
    """Path of a file that ``compressed-cache calibrate`` wrote for the model, or of a
    ``.tsv`` of the authors, a row for each layer; a folder as of ``calibration``; None: the one
    that came with this package."""
    sparsity: float = 0.5
    """Part of the heads, between 0 and 1, that are streaming heads (the authors' 0.5)."""
    duo_sinks: int = 64
    """First tokens that streaming heads keep (the authors deploy 64)."""
    duo_recent: int = 256
    """Last tokens that streaming heads keep (the authors deploy 256)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be between 0 and 1, got {self.sparsity}")
        for name, least in (("duo_sinks", 0), ("duo_recent", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if find_store(self.base) != "slots" or find(self.base, SharesBudget):
            raise ValueError(f"duo_attention cannot share out the slots of {self.base.label!r}")
        if self.gates is not None and not isinstance(self.gates, str):
            raise TypeError(f"gates must be a str or None, got {shown(self.gates)}")
        if self._is_table and not Path(str(self.gates)).is_file():
            raise FileNotFoundError(f"no file of gates {self.gates!r}")
        if self.gates is not None and not self._is_table:
            files.check_policy(self.gates, self.name)

    def budgets(
        self, budget: int, num_heads: int, protected: Protected, config: Any
    ) -> list[list[int]]:
        layers, streaming = compressed_layers(config), self._streaming(config)
        for layer in layers:
            if len(streaming.get(layer, ())) != num_heads:
                raise ValueError(
                    f"gates must be of {num_heads} key/value heads in layer {layer}, got "
                    f"{len(streaming.get(layer, ()))}"
                )
        kinds = [kind for layer in layers for kind in streaming[layer]]
        recent = protected.least_recent
        few = min(self._length, max(budget // 2, protected.sinks + recent + 1))
        first = max(protected.sinks, few * self.duo_sinks // self._length)
        few = min(budget, max(few, first + recent + 1))
        rest = kinds.count(False)
        left = budget * len(kinds) - few * (len(kinds) - rest)
        many = iter(share_out(left, [Fraction(1)] * rest) if rest else [])
        if not rest:
            few = budget
        return [[few if kind else next(many) for kind in streaming[layer]] for layer in layers]

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        if not self._is_table:
            # For what it refuses.
            files.load(self.name, self.gates, context, option="gates")
        own = self._streaming(context.config)[context.layer][context.first_head :][: context.heads]
        streaming = torch.tensor(own, device=context.device)
        return {"streaming": streaming}

    def first_tokens(self, budget: int, recent: int, constants: Mapping[str, Tensor]) -> Tensor:
        # Where there is a streaming head, it has the fewest slots.
        share = budget * self.duo_sinks // self._length
        return constants["streaming"] * max(0, min(self.duo_sinks, share, budget - recent - 1))

    def scores(self, slots: Slots) -> Tensor:
        streaming = slots.constants["streaming"][:, None]
        return torch.where(streaming, slots.positions.float(), super().scores(slots))

    @property
    def _length(self) -> int:
        return self.duo_sinks + self.duo_recent

    @property
    def _is_table(self) -> bool:
        return self.gates is not None and Path(self.gates).suffix == ".tsv"

    def _streaming(self, config: Any) -> dict[int, list[bool]]:
        """Of each layer which heads are streaming heads."""
        gates = self._gates(config)
        heads = [(gate, layer, head) for layer in gates for head, gate in enumerate(gates[layer])]
        # A stable sort of the heads in reverse has the later ones of equals first.
        lowest = sorted(reversed(heads), key=lambda entry: entry[0])
        chosen = {entry[1:] for entry in lowest[: round(self.sparsity * len(heads))]}
        return {
            layer: [(layer, head) in chosen for head in range(len(gates[layer]))] for layer in gates
        }

    def _gates(self, config: Any) -> Mapping[int, list[float]]:
        if self._is_table:
            lines = Path(str(self.gates)).read_text().split("\n")
            rows = [[float(x) for x in line.split()] for line in lines if line]
            for row in rows:
                check_finite(str(self.gates), "a row", torch.tensor(row))
            rows = [[min(1.0, max(0.0, gate)) for gate in row] for row in rows]
            return dict(zip(compressed_layers(config), rows, strict=False))
        found = files.load_layers(self.name, self.gates, config, "gates", option="gates")
        return {
            layer: found[layer].tolist() for layer in compressed_layers(config) if layer in found
        }
