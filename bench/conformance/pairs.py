"""Which press is which policy. To compare another one, add a line."""

from typing import NamedTuple


class Pair(NamedTuple):
    """A press and its counterpart, as one would type them.

    Both may use ``ratio``, the part of the prompt that goes, and the counterpart ``tokens``, the
    length of the prompt, ``statistics``, files of the model by policy, and ``wordings``, the
    instructions of ``KVzipPress``. A press is given its own statistics and takes as arguments what
    it finds in a text or in a file otherwise: ``FinchPress`` the length of the question,
    ``DuoAttentionPress`` its two sizes.
    """

    press: str
    """Without its ``compression_ratio``."""
    here: str
    """Arguments of ``CompressedCache``; without a ``budget`` it is that of the press."""
    why: str = ""
    """The cause of a difference that remains once the errors of kvpress are undone."""
    why_decoding: str = ""
    """The same while decoding, where it is another one."""
    attention: str = "sdpa"
    """The attention that the press needs."""
    block: int = 0
    """Tokens that are read at once here, after as many as there are slots; 0: the whole prompt."""


_LAST_QUERY = "it knows the attention of the last query alone"
_MASKED = "its cache keeps what it masks, with other keys, and ranks it again"

PAIRS = (
    Pair("KnormPress()", '"knorm"'),
    Pair("KeyDiffPress()", '"keydiff"'),
    Pair("StreamingLLMPress(n_sink=4)", '"streaming_llm", sinks=4'),
    Pair("LagKVPress(lag_size=16)", '"lagkv", lag=16'),
    Pair("LagKVPress(lag_size=16, cross_scoring=True)", '"lagkv", lag=16, cross_scoring=True'),
    Pair("QFilterPress()", '"qfilter", calibration=statistics["qfilter"], recent=0'),
    Pair("TOVAPress()", '"tova", recent=1'),
    Pair(
        "ObservedAttentionPress()",
        '"observed_attention"',
        why_decoding=_LAST_QUERY,
        attention="eager",
    ),
    Pair("CURPress()", '"curdkv", rank=0, recent=0'),
    Pair("SnapKVPress(window_size=6)", '"snapkv", window=6'),
    Pair("SnapKVPress(window_size=6, kernel_size=1)", '"snapkv", window=6, kernel_size=1'),
    Pair(
        "PyramidKVPress(window_size=6, kernel_size=1)",
        '"pyramidkv", window=6, kernel_size=1, fit_prompt=True',
        "other budgets of the layers",
    ),
    Pair("FinchPress(window_size=6, rerotate_keys=False)", '"finch", window=6'),
    Pair("FinchPress(window_size=6)", '"finch+key_rerotation", window=6'),
    Pair(
        "ExpectedAttentionStatsPress()",
        '"expected_attention", calibration=statistics["expected_attention"]',
    ),
    Pair(
        "ExpectedAttentionPress()",
        '"expected_attention"',
        why_decoding="statistics are those of the last steps there, of the prompt here",
    ),
    Pair(
        "AdaKVPress(SnapKVPress(window_size=6, kernel_size=1))",
        '"snapkv+adakv", window=6, kernel_size=1',
        why_decoding=_MASKED,
    ),
    Pair(
        "CriticalKVPress(SnapKVPress(window_size=6, kernel_size=1))",
        '"snapkv+criticalkv", window=6, kernel_size=1',
    ),
    Pair(
        "CriticalAdaKVPress(SnapKVPress(window_size=6, kernel_size=1))",
        '"snapkv+adakv+criticalkv", window=6, kernel_size=1',
        "the first stage has the mean budget, not the budget of the head",
    ),
    Pair("KeyRerotationPress(KnormPress())", '"knorm+key_rerotation"'),
    Pair("MergingPress(KnormPress())", '"knorm+merging"'),
    Pair(
        "ChunkKVPress(KeyDiffPress(), chunk_length=10)",
        '"keydiff+chunkkv", chunk_length=10',
        "chunks are kept as a whole there; here the last one gives tokens to meet the budget",
    ),
    Pair(
        "ChunkPress(KeyDiffPress(), chunk_length=50)",
        '"keydiff+chunk", block_length=50',
        "each block rounds its share down there; here the budget is met",
    ),
    Pair(
        "ChunkPress(SnapKVPress(window_size=6, kernel_size=1), chunk_length=50)",
        '"snapkv+chunk", window=6, kernel_size=1, block_length=50',
        "the window of each block is kept there, here that of the prompt",
    ),
    Pair(
        "BlockPress(KeyDiffPress(), block_size=16)",
        '"keydiff"',
        "later blocks attend to the whole prompt there, here to what is held",
        block=16,
    ),
    Pair(
        "PerLayerCompressionPress(KnormPress(), [0.25, 0.5, 0.7, 0.9])",
        '"knorm", budget=[int(tokens * (1 - r)) for r in (0.25, 0.5, 0.7, 0.9)]',
    ),
    Pair(
        "DuoAttentionPress(head_compression_ratio=ratio, sink_size=4, recent_size=16)",
        '"knorm+duo_attention", gates=statistics["duo_attention"], sparsity=ratio, duo_sinks=4, '
        "duo_recent=16, budget=tokens",
    ),
    Pair(
        "SimLayerKVPress(lazy_threshold=0.5, n_recent=17)",
        '"knorm+simlayerkv", lazy_threshold=0.5, lazy_queries=1, lazy_recent=16, budget=tokens',
        "the weights of the newest token are left out there",
    ),
    Pair("KVzipPress()", '"kvzip+adakv", floor=0.0, sinks=4, repeat_chunk=2048, **wordings'),
    Pair(
        "KVzipPress(layerwise=True)",
        '"kvzip+adakv", floor=0.0, sinks=4, repeat_chunk=2048, **wordings',
    ),
    Pair(
        "KVzipPress(layerwise=True, chunk_size=64)",
        '"kvzip+adakv", floor=0.0, sinks=4, repeat_chunk=64, **wordings',
    ),
)

UNCOMPARED = {
    "ComposedPress": "leaves out channels of keys, not tokens",
    "CompressionRatioDecodingPress": "has no fixed budget; `rpc` keeps a part of what it wrote",
    "DecodingPress": "is what the second table runs",
    "KVzapPress": "needs gates that were trained for a model",
    "PrefillDecodingPress": "puts two presses together that are compared one by one",
    "RandomPress": "draws other numbers",
    "ThinKPress": "leaves out channels of keys, not tokens",
}
"""Presses with a counterpart that are not run, and why."""
