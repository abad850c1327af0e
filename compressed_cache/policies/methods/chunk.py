"""Each block of a prompt gives up its share."""

from dataclasses import dataclass
from typing import ClassVar

from compressed_cache.policies.modifier import Modifier


@dataclass(frozen=True, kw_only=True)
class Chunk(Modifier):
    """Ranks each block of ``block_length`` positions of a prompt on its own, as if it were all.

    Chunked compression of the prompt, as in kvpress's ``ChunkPress``: attention is among the tokens
    of a block, its own last queries vote, and as large a part of each block stays, so that what
    stays is spread over the prompt. Decode steps, further prompts and all chunks of a prompt but
    its first are as without it. FINCH (https://doi.org/10.1162/tacl_a_00716) reads a prompt in
    chunks too, but there the question votes in each, also on what is left of those before:
    ``finch+chunk`` is not that.

    Differs from kvpress in five points: the budget is met exactly, by the rank of a token in its
    block divided by the length of the block; queries have the angles of their own positions (there
    those of the end of the prompt); what the cache protects is protected in the text, not in each
    block; padding belongs to no block; and the first stage of ``criticalkv`` is a share of the
    whole budget in each block (there of what the block keeps), as the large values of ``vase`` are,
    so that it leaves nothing to the second stage in a prompt of ``1 / first_stage_ratio`` blocks or
    more.
    """

    name: ClassVar[str] = "chunk"
    block_length: int = 1024
    """Positions of a block, counted from the start of the text (the ``chunk_length`` of
    kvpress)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 1:
            raise ValueError(f"block_length must be >= 1, got {self.block_length}")

    @property
    def prompt_block(self) -> int:
        return self.block_length
