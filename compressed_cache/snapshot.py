"""What a cache holds at one moment, to come back to or to keep on disk."""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from compressed_cache.hf import checks
from compressed_cache.hf.columns import Columns
from compressed_cache.hf.linear_attention import LinearLayers, detached
from compressed_cache.observers import Observed
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.ops.tokens import Sizes
from compressed_cache.policies.base import Policy
from compressed_cache.policies.budgets import to_budget
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.policies.registry import as_policy, make_policy, split_name
from compressed_cache.policies.relative_budget import UNKNOWN, RelativeBudget
from compressed_cache.step_counter import StepCounter
from compressed_cache.stores.bound_policy import copied
from compressed_cache.stores.slots import SlotStore
from compressed_cache.tensorfile import opened, write

_FORMAT = "9"
_COLUMNS = "columns"
_TEXT = "text"
_CONSTANT = "constants."


class LayerState(NamedTuple):
    """What one layer holds, apart from where."""

    sizes: Sizes
    tensors: dict[str, Tensor]
    transform: LogitTransform
    window: int | None
    budget: int | tuple[int, ...]
    """Slots of every head, or of each."""
    constants: dict[str, Tensor]

    @classmethod
    def of(cls, store: SlotStore) -> Self:
        """A copy of what a store holds."""
        assert store.sizes is not None
        copies = {name: tensor.clone() for name, tensor in store.named_tensors().items()}
        bound = store.bound
        budget = bound.head_budgets or bound.budget
        constants = copied(bound.constants)
        return cls(store.sizes, copies, bound.transform, bound.window, budget, constants)


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything a cache holds. Later steps of the cache do not change it."""

    policy: Policy
    eviction: EvictionConfig
    counter: dict[str, int | bool]
    columns: Tensor | None
    """``[B, T]`` bool, see :class:`~compressed_cache.hf.columns.Columns`."""
    layers: tuple[LayerState | LinearAttentionLayer | None, ...]
    """One per layer of the model; None for a layer without a cache."""
    text: Tensor | None = None
    """``[B, C]`` ids of the first columns, as far as they were told."""

    def check(self, policy: Policy, eviction: EvictionConfig) -> None:
        """Raises ``ValueError`` unless it is of a cache with these."""
        if (self.policy, self.eviction) != (policy, eviction):
            raise ValueError(
                f"snapshot must be of a cache like this one ({policy}, {eviction}), got one with "
                f"{self.policy}, {self.eviction}"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file.

        Raises:
            NotImplementedError: a model with linear-attention layers.
        """
        tensors: dict[str, Tensor] = {}
        described: list[dict[str, Any] | None] = []
        if self.columns is not None:
            tensors[_COLUMNS] = self.columns
        if self.text is not None:
            tensors[_TEXT] = self.text
        for index, state in enumerate(self.layers):
            if isinstance(state, LinearAttentionLayer):
                raise NotImplementedError(
                    f"layer {index} is of linear attention, whose state cannot be saved to a file"
                )
            if state is None:
                described.append(None)
                continue
            tensors |= {f"{index}.{name}": part for name, part in state.tensors.items()}
            for name, constant in state.constants.items():
                tensors[f"{index}.{_CONSTANT}{name}"] = constant.detach()
            if state.transform.sinks is not None:
                tensors[f"{index}.sinks"] = state.transform.sinks.detach()
            described.append(
                {
                    "heads": state.sizes.heads,
                    "groups": state.sizes.groups,
                    "context": state.sizes.context,
                    "scaling": state.transform.scaling,
                    "softcap": state.transform.softcap,
                    "window": state.window,
                    "budget": state.budget,
                }
            )
        metadata = {
            "format": _FORMAT,
            "policy": self.policy.label,
            "options": json.dumps(self.policy.options),
            "eviction": json.dumps(asdict(self.eviction)),
            "counter": json.dumps(self.counter),
            "layers": json.dumps(described),
        }
        write(path, {name: part.contiguous() for name, part in tensors.items()}, metadata)

    @classmethod
    def load(
        cls, path: str | Path, *, policy: Policy | None = None, device: torch.device | str = "cpu"
    ) -> "Snapshot":
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            policy: the policy object, for a policy that is not in ``POLICIES``.
            device: where the tensors go.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, of another policy, or of another version of the
                format.
        """
        with opened(path, device=str(device)) as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{str(path)!r} must be written by CompressedCache.save in format {_FORMAT}, got "
                f"format {found.get('format')}"
            )
        if policy is None:
            try:
                split_name(found["policy"])
            except ValueError:
                raise ValueError(
                    f"{str(path)!r} was saved with a policy of your own. Pass it as policy="
                ) from None
            policy = make_policy(found["policy"], **json.loads(found["options"]))
        else:
            policy = as_policy(policy, {})
            saved = f"{found['policy']!r} {found['options']}"
            if (given := f"{policy.label!r} {json.dumps(policy.options)}") != saved:
                raise ValueError(f"policy must be that of {str(path)!r}, {saved}, got {given}")
        layers = tuple(
            described and _described_state(described, _part(tensors, f"{index}."))
            for index, described in enumerate(json.loads(found["layers"]))
        )
        eviction = json.loads(found["eviction"])
        eviction = EvictionConfig(**eviction | {"budget": to_budget(eviction["budget"])})
        counter, columns = json.loads(found["counter"]), tensors.get(_COLUMNS)
        return cls(policy, eviction, counter, columns, layers, tensors.get(_TEXT))


class Snapshots(LinearLayers, Observed):
    """The part of a cache that comes back to what it held before, also from disk."""

    policy: Policy
    eviction: EvictionConfig
    counter: StepCounter
    columns: Columns

    relative: RelativeBudget | None

    def go_by(self, eviction: EvictionConfig) -> None:
        """Takes these numbers for the text that begins."""
        raise NotImplementedError

    def attention_layer(self, index: int) -> Any:
        """The layer of this index, made where there is none yet."""
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        """A copy of what is held, for :meth:`restore`: one prompt can then begin many texts.

        Raises:
            ValueError: a text that a failed call has left half read.
        """
        checks.check_whole(is_torn=self.is_torn)
        return Snapshot(
            self.policy,
            self.eviction,
            self.counter.state(),
            self.columns.known_until(self.counter.tokens_seen),
            tuple(_state(layer) for layer in self.layers),
            self.columns.text_until(self.counter.tokens_seen),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Holds again what it held at :meth:`snapshot`, in place where the batch is as large.

        Raises:
            ValueError: a snapshot of a cache with another policy or other arguments.
        """
        own = self.eviction
        if self.relative is not None:
            # A share of the prompt is that of the prompt that comes back.
            own = self.relative.resolve(budget=snapshot.eviction.budget)
        snapshot.check(self.policy, own)
        self.go_by(own)
        self.notify("restore")
        self.hold(snapshot)

    def save(self, path: str | Path) -> None:
        """Writes what is held to a safetensors file.

        A cache with ``compression_ratio`` comes back with the budget of its prompt.

        Raises:
            NotImplementedError: a model with linear-attention layers.
            ValueError: a budget that no prompt has settled yet, or a text that is half read.
        """
        if self.eviction.budget == UNKNOWN:
            raise ValueError(
                "a cache with compression_ratio must hold a prompt to be saved, got an empty one"
            )
        self.snapshot().save(path)

    @classmethod
    def load(
        cls, path: str | Path, *, policy: Policy | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """A cache that goes on where the one that wrote ``path`` with :meth:`save` was.

        Args:
            path: the file.
            policy: the policy object, for a policy that is not in ``POLICIES``.
            device: where its tensors go, that of the model.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, of another policy, or of another version of the
                format.
        """
        snapshot = Snapshot.load(path, policy=policy, device=device)
        make: Any = cls
        cache = make(snapshot.policy, **snapshot.eviction.arguments)
        cache.hold(snapshot)
        return cache

    def hold(self, snapshot: Snapshot) -> None:
        """Holds what a snapshot says, in place where it fits."""
        for index, layer in enumerate(self.layers):
            if index >= len(snapshot.layers) or snapshot.layers[index] is None:
                is_linear = isinstance(layer, LinearAttentionLayer)
                layer.reset() if is_linear else layer.reset(keeps_module=True)
        for index, state in enumerate(snapshot.layers):
            if isinstance(state, LayerState):
                self.attention_layer(index).restore(state)
            elif state is not None:
                self.restore_linear_layer(index, state)
        self.is_torn = False
        self.counter.restore(snapshot.counter)
        self.columns.reset()
        self.columns.known = snapshot.columns
        self.columns.hold_text(snapshot.text)


def _state(layer: Any) -> LayerState | LinearAttentionLayer | None:
    is_linear = isinstance(layer, LinearAttentionLayer)
    return copy.deepcopy(detached(layer)) if is_linear else layer.state()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _described_state(described: dict[str, Any], tensors: dict[str, Tensor]) -> LayerState:
    constants = {
        name.removeprefix(_CONSTANT): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(_CONSTANT)
    }
    transform = LogitTransform(
        described["scaling"], described["softcap"], tensors.pop("sinks", None)
    )
    keys, values = tensors["keys"], tensors["values"]
    batch, _, capacity = keys.shape[:3]
    dim = keys.shape[3]
    if "recent_channels" in tensors:
        dim += tensors["recent_channels"].shape[3]
    sizes = Sizes(
        *(batch, described["heads"], described["groups"], capacity, dim, values.shape[-1]),
        *(keys.dtype, values.dtype, keys.device, described["context"]),
    )
    window, budget = described["window"], described["budget"]
    budget = budget if isinstance(budget, int) else tuple(budget)
    return LayerState(sizes, tensors, transform, window, budget, constants)
