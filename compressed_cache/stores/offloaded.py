"""A store whose prompt is held off the device and fetched chunk by chunk."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from compressed_cache.ops import attention
from compressed_cache.ops.rotary import Rotary
from compressed_cache.ops.tokens import Sizes, Tokens
from compressed_cache.policies.methods.shadowkv import ShadowKV
from compressed_cache.stores.growing import GrowingStore, power_of_two
from compressed_cache.stores.inputs import AttentionInputs

_OFFLOADED = ("offloaded_keys", "offloaded_values")
_RESIDENT = ("landmarks", "is_listed", "factors", "basis")


class OffloadedStore(GrowingStore):
    """Keys and values of one attention layer, most of the prompt off the device.

    The slots hold, in this order: what the last step fetched, the outliers, the end of the prompt
    and all later tokens, so that attention runs over one tensor. Of the prompt (the context below,
    from the start of each row, padding left out) every chunk but outliers and the end has a
    landmark, so no token is met twice.

    On CUDA the context is in pinned memory. Which chunks a step needs is known on the device and
    gathered by the host, so each layer waits for the device once in each step.

    Attributes:
        counts: as everywhere, but the third number is the slot of the incoming token.
        landmarks: ``[B, H, C, D]`` mean key of each of the ``C`` chunks.
        is_listed: ``[B, H, C]`` bool, whether a chunk may be fetched.
        offloaded_keys: ``[B, H, C * chunk_size, D]`` on the host; without channels where keys are
            of low rank.
        offloaded_values: ``[B, H, C * chunk_size, D]`` on the host.
        factors: ``[B, C * chunk_size, R]`` of the keys before their rotation, ``R = 0`` where these
            are on the host.
        basis: ``[B, H, R, D]``.
    """

    landmarks: Tensor
    is_listed: Tensor
    offloaded_keys: Tensor
    offloaded_values: Tensor
    factors: Tensor
    basis: Tensor
    context_tokens = 0
    """Tokens of the first prompt, padding included."""

    # Memory.

    @property
    def free_slot(self) -> Tensor:
        """0-d int64, the slot of the incoming token."""
        return self.counts[0, 2]

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the context on the host."""
        return sum(vars(self)[name].nbytes for name in _OFFLOADED if name in vars(self))

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots for a prompt of this length, and tokens of it that must fit off the device."""
        chunk_size = self.numbers.chunk_size
        chunks = -(-power_of_two(length) // chunk_size)
        return power_of_two(sum(self._regions(chunks)) + 1), chunks * chunk_size

    def grow(self, tokens: int) -> None:
        """Doubles the slots until what is on the device of ``tokens`` tokens fits."""
        if self.sizes is not None:
            super().grow(tokens - self.context_tokens + sum(self._regions(self._num_chunks)))

    def load(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        """Takes over the contents of another memory, in place where the sizes are the same."""
        super().load(tensors, sizes)
        later = self.counts[0, 2] - sum(self._regions(self._num_chunks))
        self.context_tokens = int(self.counts[0, 1] - later)

    @torch.inference_mode(False)
    def allocate(self, sizes: Sizes) -> None:
        """New memory, empty; what is off the device stays where only the slots are others."""
        held = self.sizes
        super().allocate(sizes)
        if held is not None and held._replace(capacity=sizes.capacity) == sizes:
            return
        batch, heads, dim, context = sizes.batch, sizes.heads, sizes.dim, sizes.context
        rank = min(self.numbers.rank or 0, heads * dim)
        on_host = dict(device="cpu", pin_memory=sizes.device.type == "cuda")
        of_keys = dict(dtype=sizes.dtype, device=sizes.device)

        def zeros(*shape: int, **options: Any) -> Tensor:
            return torch.zeros(shape, **options)

        self.offloaded_keys = zeros(
            *(batch, heads, context, 0 if rank else dim), **on_host, dtype=sizes.dtype
        )
        self.offloaded_values = zeros(
            *(batch, heads, context, sizes.value_dim), **on_host, dtype=sizes.value_dtype
        )
        chunks = self._num_chunks
        self.landmarks = zeros(batch, heads, chunks, dim, **of_keys)
        self.is_listed = zeros(batch, heads, chunks, dtype=torch.bool, device=sizes.device)
        self.factors = zeros(batch, context, rank, **of_keys)
        self.basis = zeros(batch, heads, rank, dim, **of_keys)
        self.mark()

    @property
    def numbers(self) -> ShadowKV:
        """The policy."""
        return cast(ShadowKV, self.bound.policy)

    @property
    def _num_chunks(self) -> int:
        assert self.sizes is not None
        return self.sizes.context // self.numbers.chunk_size

    def _regions(self, chunks: int) -> tuple[int, int, int]:
        """Slots for what is fetched, for outliers and for the end of the prompt."""
        size = self.numbers.chunk_size
        fetched = min(self.bound.budget // size, chunks)
        outliers = min(self.numbers.outlier_chunks, chunks)
        return fetched * size, outliers * size, (self.numbers.local_chunks + 1) * size - 1

    def check_renumber(self, moved: Tensor) -> None:
        """Raises ``NotImplementedError`` if a token of the prompt is to go."""
        position = torch.arange(moved.shape[1], device=moved.device)
        in_prompt = position < self.prompt_length[:, None]
        if bool((in_prompt & (moved < 0)).any()):
            raise NotImplementedError(
                f"attention_mask must not hide tokens of the first prompt with "
                f"{self.bound.policy.label!r}, which holds them off the device in whole chunks"
            )

    # A prompt.

    def held_for_chunk(
        self, inputs: AttentionInputs, *, is_first_prompt: bool
    ) -> tuple[Tokens, Tensor]:
        """What the tokens of a chunk may see: of a further prompt what it asks for, of the first
        one all its parts before."""
        if not is_first_prompt:
            self.fetch(inputs.query.detach(), inputs.real)
            return super().held_for_chunk(inputs, is_first_prompt=is_first_prompt)
        had = self.context_tokens
        before = torch.arange(had, device=inputs.key.device)
        before = torch.where(before < self.next_position[:, None], before, -1)
        keys = self._context_keys(before)
        values = self.offloaded_values[:, :, :had].to(keys.device)
        return self.new_tokens(keys, values, before), keys

    def keep_chunk(self, tokens: Tokens, new: Tokens, *, is_first_prompt: bool) -> None:
        """Organises the first prompt anew with its next part; a further one stays on the device."""
        if not is_first_prompt:
            self.append(new)
            self.counts[:, 2] += new.positions.shape[2]
            return
        assert self.sizes is not None
        counts = {name: vars(self)[name] for name in ("counts", "prompt_length")}
        self.provide(tokens.keys, tokens.values, self.sizes.groups)
        for name, held in counts.items():
            vars(self)[name].copy_(held)
        self.keep(tokens)

    def keep(self, tokens: Tokens, scores: Tensor | None = None) -> None:
        """Takes a prompt ``[B, H, L, ...]``: what stays on the device and what goes to the host."""
        keys, values, positions = tokens[:3]
        self.context_tokens = keys.shape[2]
        fetched, outlying, local = self._regions(self._num_chunks)
        keys, values, count = self._aligned(keys, values, positions[:, 0])
        size = self.numbers.chunk_size
        chunks = keys.to(torch.promote_types(keys.dtype, torch.float32)).unflatten(2, (-1, size))
        first_local = (count // size - self.numbers.local_chunks).clamp(min=0)
        number = torch.arange(chunks.shape[2], device=keys.device)
        is_context = (number < first_local[:, None])[:, None].expand(chunks.shape[:3])

        landmarks = chunks.mean(dim=3)
        unlike = -cosine_similarity(landmarks.unsqueeze(3), chunks, dim=-1).amin(dim=3)
        # A broken key has no cosine. Its chunk is fetched after all others.
        unlike = unlike.masked_fill(~is_context | unlike.isnan(), -torch.inf)
        outliers, is_outlier = _best(unlike, outlying // size)
        stays = torch.zeros_like(is_context).scatter(2, outliers, is_outlier)
        self.landmarks.copy_(landmarks)
        self.is_listed.copy_(is_context & ~stays)

        end = first_local[:, None] * size + torch.arange(local, device=keys.device)
        end = end.masked_fill(end >= count[:, None], -1)[:, None].expand(-1, keys.shape[1], -1)
        kept = torch.cat([self._positions_of(outliers, is_outlier), end], dim=2)
        index = kept.clamp(min=0).unsqueeze(-1)
        self.tokens.positions.fill_(-1)
        chosen = [x.gather(2, index.expand(*kept.shape, x.shape[3])) for x in (keys, values)]
        self._put(fetched, chosen[0], chosen[1], kept)
        self.counts[:, 2] = fetched + kept.shape[2]

        self.offloaded_values.copy_(values)
        if self.numbers.rank is None:
            self.offloaded_keys.copy_(keys)
        else:
            self._factorise(keys)

    def _aligned(
        self, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens at the places of their positions, zeros after them, and how many there are."""
        assert self.sizes is not None
        order = positions.masked_fill(positions < 0, positions.shape[1]).argsort(dim=1)
        count = (positions >= 0).sum(dim=1)
        padding = (torch.arange(order.shape[1], device=order.device) >= count[:, None])[:, None]
        aligned = []
        for tokens in (keys, values):
            index = order[:, None, :, None].expand_as(tokens)
            tokens = tokens.gather(2, index).masked_fill(padding.unsqueeze(-1), 0)
            aligned.append(pad(tokens, (0, 0, 0, self.sizes.context - tokens.shape[2])))
        return *aligned, count

    # Keys of low rank.

    def _factorise(self, keys: Tensor) -> None:
        """Keeps the keys ``[B, H, T, D]`` of all heads, turned back, as a product."""
        place = torch.arange(keys.shape[2], device=keys.device)
        straight = self._rotary.rotate(keys, -place).nan_to_num(0.0, 0.0, 0.0)
        flat = straight.transpose(1, 2).flatten(2)
        # The basis is orthogonal, so at full rank nothing is lost, however it was found.
        basis = torch.linalg.eigh((flat.mT @ flat).double()).eigenvectors.to(flat.dtype)
        basis = basis[:, :, -self.factors.shape[2] :]
        self.factors.copy_(flat @ basis)
        self.basis.copy_(basis.mT.unflatten(2, keys.shape[1::2]).transpose(1, 2))

    def _rebuilt(self, factors: Tensor, positions: Tensor) -> Tensor:
        """Keys ``[B, H, T, D]`` of factors ``[B, H | 1, T, R]`` at these positions."""
        exact = torch.promote_types(factors.dtype, torch.float32)
        straight = factors.to(exact) @ self.basis.to(exact)
        return self._rotary.rotate(straight, positions).to(self.tokens.keys.dtype)

    def _context_keys(self, positions: Tensor) -> Tensor:
        """The first keys of the context ``[B, H, T, D]``, at positions ``[B, T]``."""
        tokens = positions.shape[1]
        if self.numbers.rank is None:
            return self.offloaded_keys[:, :, :tokens].to(self.tokens.keys.device)
        return self._rebuilt(self.factors[:, None, :tokens], positions[:, None])

    @property
    def _rotary(self) -> Rotary:
        return Rotary.among(self.bound.constants)

    # What a step fetches.

    def fetch(self, query: Tensor, real: Tensor | None = None) -> None:
        """Puts the chunks that queries ``[B, H * G, L, D]`` ask for into the first slots; real
        ``[B, L]`` bool."""
        size = self.numbers.chunk_size
        grouped = attention.group_queries(query, self.tokens.keys.shape[1])
        logits = self.bound.transform.logits(grouped, self.landmarks)
        shares = attention.masked_softmax(logits, self.is_listed[:, :, None, None])
        if real is not None:
            shares = shares.masked_fill(~real[:, None, None, :, None], 0.0)
        wanted = shares.sum(dim=3).amax(dim=2).masked_fill(~self.is_listed, -torch.inf)
        fetched, _, _ = self._regions(self.landmarks.shape[2])
        chunks, is_chunk = _best(wanted, fetched // size)
        positions = self._positions_of(chunks, is_chunk)
        if self.numbers.rank is None:
            keys = _gather(self.offloaded_keys, chunks, size)
        else:
            keys = self._rebuilt(_gather(self.factors[:, None], chunks, size), positions)
        values = _gather(self.offloaded_values, chunks, size)
        self._put(0, keys, values, positions)

    def _positions_of(self, chunks: Tensor, exist: Tensor) -> Tensor:
        """``[B, H, K * chunk_size]`` positions of the tokens of chunks, -1 where there is none."""
        size = self.numbers.chunk_size
        inside = torch.arange(size, device=chunks.device)
        positions = chunks.unsqueeze(-1) * size + inside
        return positions.masked_fill(~exist.unsqueeze(-1), -1).flatten(2)

    def _put(self, slot: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Writes tokens to the slots from this one on, zeros where there is none."""
        none = (positions < 0).unsqueeze(-1)
        parts = keys.masked_fill(none, 0), values.masked_fill(none, 0), positions
        for memory, part in zip(self.tokens[:3], parts, strict=True):
            memory[:, :, slot : slot + positions.shape[2]].copy_(part)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The chunks ``[B, H, K]`` with the highest scores, of equals the newer, and which exist."""
    order = scores.argsort(dim=-1, stable=True)
    best = order[..., order.shape[-1] - count :]
    return best, scores.gather(-1, best) > -torch.inf


def _gather(memory: Tensor, chunks: Tensor, size: int) -> Tensor:
    """Tokens ``[B, H, K * size, ...]`` of these chunks of ``[B, H | 1, ...]``, on the device of
    ``chunks``."""
    rows = memory.unflatten(2, (-1, size)).flatten(3)
    first = torch.arange(rows.shape[:2].numel(), device=memory.device) * rows.shape[2]
    index = (first.view(*rows.shape[:2], 1) + chunks.to(memory.device)).flatten()
    # Rows as a whole: on a CPU many times as fast as to gather numbers.
    found = rows.flatten(0, 2).index_select(0, index)
    return found.view(*chunks.shape[:2], -1, *memory.shape[3:]).to(chunks.device)
