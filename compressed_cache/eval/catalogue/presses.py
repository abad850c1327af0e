"""Presses of kvpress and of its forks for reasoning, and what to type here."""

from typing import NamedTuple

KVPRESS = "kvpress 0.5"
"""https://github.com/NVIDIA/kvpress"""
FORK = "fork"
"""https://github.com/minghui-liu/kvpress, the code beside https://arxiv.org/abs/2512.12008"""
AMS_FORK = "AMS"
"""https://github.com/EIT-NLP/AdaptiveMassSegment, the code of https://arxiv.org/abs/2605.23200"""


class PressEquivalent(NamedTuple):
    """A press. Without ``here`` there is no counterpart, and ``note`` says why."""

    origin: str
    name: str
    arguments: str
    """Those of its constructor with their defaults, beside ``compression_ratio``."""
    here: str
    """Arguments of ``CompressedCache`` with the same meaning, beside ``budget``."""
    note: str = ""


# What a user of kvpress types for the budget is told once, beside the table.
_MANY: tuple[PressEquivalent, ...] = tuple(
    PressEquivalent(KVPRESS, *row)
    for row in (
        (
            "AdaKVPress",
            "press, alpha_safeguard=0.2",
            '"snapkv+adakv", floor=0.2',
            "after any policy whose scores are comparable between heads",
        ),
        ("BasePress", "", "", "subclass `Policy`: one function of tensors"),
        (
            "BlockPress",
            "press, block_size=128",
            '"keydiff"',
            "and `generate(..., prefill_chunk_size=128)`, which goes with every policy",
        ),
        (
            "CAMPress",
            "base_press, compression_interval=512, target_size=2048, "
            "hidden_states_buffer_size=256, merge_budget=32",
            "",
            "merges into the next tokens by chance; `h2o+merging` merges into the most similar one",
        ),
        (
            "CapPress",
            "tau=5.0, n_future_positions=512, n_sink=4, epsilon=1e-06",
            "",
            "inverts a matrix over the whole prompt; not made for decode steps",
        ),
        (
            "ChunkKVPress",
            "press, chunk_length=20",
            '"snapkv+chunkkv", chunk_length=20',
            "after any policy",
        ),
        (
            "ChunkPress",
            "press, chunk_length=1024",
            '"snapkv+chunk", block_length=1024',
            "after any policy",
        ),
        (
            "CompactorPress",
            "sink_size_start=8, sink_size_end=4, chunk_size=256, sketch_dimension=48, "
            "blending=None",
            "",
            "looks at what comes later in a prompt; there is no later in a decode step",
        ),
        ("ComposedPress", "presses", '"snapkv+think"', "one policy, then modifiers in their order"),
        (
            "CompressionRatioDecodingPress",
            "base_press, compression_interval=512, hidden_states_buffer_size=256, "
            "target_compression_ratio=0.5",
            '"rpc", interval=512, compression=2.0',
            "of the generated tokens, with the scores of RPC; all else has a fixed budget",
        ),
        (
            "CriticalAdaKVPress",
            "press=None, alpha_safeguard=0.2, epsilon=0.0001, first_stage_ratio=0.5",
            '"snapkv+adakv+criticalkv", floor=0.2, score_offset=0.0001, first_stage_ratio=0.5',
        ),
        (
            "CriticalKVPress",
            "press, epsilon=0.0001, first_stage_ratio=0.5",
            '"snapkv+criticalkv", score_offset=0.0001, first_stage_ratio=0.5',
        ),
        (
            "CURPress",
            "num_sinks=4, leverage_type='kv_product', use_random_leverage=False, "
            "use_local_approximation=True, local_window_size=16",
            '"curdkv", rank=0, recent=0',
            "the product of both only; `rank=20` is `use_random_leverage=True`, and "
            "`local_window=0` is `use_local_approximation=False`",
        ),
        (
            "DecodingPress",
            "base_press, compression_interval=512, target_size=2048, hidden_states_buffer_size=256",
            '"knorm", interval=512',
            "any policy; the budget is the peak there, `target_size + compression_interval`",
        ),
        (
            "DMSPress",
            "press, threshold=None, sliding_window_size=128, decoding=False",
            "",
            "a threshold bounds no memory",
        ),
        (
            "DuoAttentionPress",
            "head_compression_ratio=0.0, on_the_fly_scoring=False",
            '"snapkv+duo_attention"',
            "the policy is that of the heads that retrieve",
        ),
        (
            "EntropyGatedChunkKVPress",
            "press, chunk_length=10, low_entropy_chunk_length=4",
            "",
            "not ported; `snapkv+chunkkv` keeps chunks as a whole",
        ),
        (
            "ExpectedAttentionPress",
            "n_future_positions=512, n_sink=4, use_covariance=True, use_vnorm=True, epsilon=0.0",
            '"expected_attention", n_future=512, n_sinks=4, use_covariance=True, use_vnorm=True, '
            "epsilon=0.0",
        ),
        (
            "ExpectedAttentionStatsPress",
            "n_future_positions=512, n_sink=4, use_covariance=True, use_vnorm=True, epsilon=0.0, "
            "sample_seq_len=1000, num_samples=100, dataset_name='kmfoda/booksum', "
            "stats_folder=None",
            '"expected_attention", n_future=512, n_sinks=4, use_covariance=True, use_vnorm=True, '
            "epsilon=0.0",
            "with `calibration=` the file of the hub, once downloaded, or one that "
            "`compressed-cache calibrate` wrote",
        ),
        (
            "FastKVzipPress",
            "layerwise=False, n_sink=4, window_size=4096, window_ratio=0.02",
            "",
            "its gates are products of two projections, not MLPs",
        ),
        (
            "FinchPress",
            "chunk_length=None, normalize_scores=True, rerotate_keys=True",
            '"finch+key_rerotation", normalize_scores=True',
            "`window=` is the length of the question, where there it follows a delimiter",
        ),
        ("KeyDiffPress", "", '"keydiff"'),
        ("KeyRerotationPress", "press", '"streaming_llm+key_rerotation"', "after any policy"),
        ("KnormPress", "", '"knorm"'),
        (
            "KVComposePress",
            "structured=True, agg_task='max', agg_group='mean', agg_head='mean', "
            "add_v_norm=False, add_mean_across_heads=True, keep_token_lower_bound=0",
            "",
            "makes one token of different ones in each head, over the whole prompt",
        ),
        (
            "KVgradPress",
            "layerwise=False, n_sink=4, chunk_size=512",
            "",
            "needs a second pass over the prompt, and gradients",
        ),
        (
            "KVzapPress",
            "model_type='mlp'",
            '"learned_gate"',
            "with weights=FILE, the model.safetensors of its authors",
        ),
        (
            "KVzipPress",
            "layerwise=False, n_sink=4, kvzip_plus_normalization=False, chunk_size=2048",
            '"kvzip+adakv", floor=0.0, sinks=4, repeat_chunk=2048',
            "after `compress`, which makes the second pass; slots stay in their layer, as with "
            "`layerwise=True`; alike where a chat template puts `n_sink` tokens before the text",
        ),
        (
            "LagKVPress",
            "n_sink=4, lag_size=128, cross_scoring=False",
            '"lagkv", num_sinks=4, lag=128, cross_scoring=False',
        ),
        ("LeverageScorePress", "sketch_dimension=48", "", "a part of CompactorPress"),
        (
            "LUKVPress",
            "press=ExpectedAttentionPress(...), sink=4, window=1",
            "",
            "needs budget curves measured for the model",
        ),
        (
            "MergingPress",
            "press=None, similarity_threshold=0.0, merge_fraction=1.0",
            '"h2o+merging", merge_threshold=0.0, merge_fraction=1.0',
            "after any policy",
        ),
        ("NonCausalAttnPress", "chunk_size=256", "", "a part of CompactorPress"),
        ("ObservedAttentionPress", "", '"observed_attention"'),
        (
            "PerLayerCompressionPress",
            "press, compression_ratios",
            '"snapkv", budget=[384, 256, 256, 128]',
            "slots of each layer; also a list for each head",
        ),
        (
            "PrefillDecodingPress",
            "prefilling_press=None, decoding_press=None",
            '"snapkv/h2o"',
            "any two policies: for the prompt / for decode steps",
        ),
        (
            "PyramidKVPress",
            "window_size=64, kernel_size=5, beta=20",
            '"pyramidkv", window=64, kernel_size=5, beta=20, fit_prompt=True',
        ),
        (
            "QFilterPress",
            "",
            '"qfilter", recent=0',
            "filters come from a calibration, not from the hub",
        ),
        ("RandomPress", "seed=None", '"random", seed=0'),
        (
            "RestoreKVPress",
            "layerwise=False, n_sink=4, kvzip_plus_normalization=False, chunk_size=2048",
            "",
            "needs trained adapters, and a second pass over the prompt",
        ),
        ("ScorerPress", "", "", "subclass `Policy`: one function of tensors"),
        (
            "SimLayerKVPress",
            "lazy_threshold=1.0, n_last=1, n_recent=1024, n_initial=4",
            '"snapkv+simlayerkv", lazy_threshold=0.9, lazy_queries=1, lazy_recent=1023',
            "`n_recent` counts a token whose weights it leaves out; after any policy; layers that "
            "are not lazy keep to the budget too",
        ),
        (
            "SnapKVPress",
            "window_size=64, kernel_size=5",
            '"snapkv", window=64, kernel_size=5',
            "`recent` is `window` by default",
        ),
        ("StreamingLLMPress", "n_sink=4", '"streaming_llm", sinks=4'),
        (
            "ThinKPress",
            "key_channel_compression_ratio=0.0, window_size=32",
            '"snapkv+think", think_window=32',
            "`channel_ratio` is the share left out, and it does save memory",
        ),
        ("TOVAPress", "", '"tova", recent=1'),
    )
) + tuple(
    PressEquivalent(FORK, *row)
    for row in (
        ("AttentionCapPress", "attention_cap=0.5", "", "changes the attention, not the cache"),
        (
            "EvictPress",
            "cache_budget=0, evict_threshold=0.1",
            "",
            "evicts what is attended most, as a counter-test",
        ),
        ("FullPress", "", '"full"'),
        ("H2OPress", "cache_budget=0", '"h2o"', "needs no eager attention"),
        (
            "HashEvictPress",
            "cache_budget=0, compress_interval=64, window_size=8, kernel_size=5",
            "",
            "scores as RKVPress; its hashes were not finished",
        ),
        ("KnormPress", "cache_budget=0", '"knorm"'),
        ("NonePress", "", '"full"', "or no cache at all"),
        (
            "PagedAttentionPress",
            "block_size=256, max_blocks=40960, offload_threshold=10",
            "",
            "pages for a server; slots are never moved here",
        ),
        ("QuestPress", "block_size=256", "", "not finished there; `shadowkv` selects chunks too"),
        ("RandomPress", "cache_budget=0, seed=None", '"random", seed=0'),
        (
            "RKVLSHPress",
            "cache_budget=0, compress_interval=64, window_size=8, kernel_size=5, "
            "n_hash_buckets=6, lam=0.1",
            '"rkv_lsh", interval=64, window=8, kernel_size=5, bits=6, mix_lambda=0.1',
            "redundancy is subtracted; there it is added",
        ),
        (
            "RKVPress",
            "cache_budget=0, compress_interval=64, window_size=8, kernel_size=5",
            '"rkv", interval=64, window=8, kernel_size=5',
            "redundancy is subtracted, as in the paper; there it is added",
        ),
        (
            "RPCPress",
            "cache_budget=0, window_size=32, compress_interval=128, kernel_size=7",
            '"rpc", interval=128, window=32, kernel_size=7, protect_prompt=True',
            "the budget holds the prompt too",
        ),
        (
            "SCOPEPress",
            "cache_budget=0, decoding_cache_budget=0, compress_interval=32, decoding_window_size=8",
            '"snapkv/h2o", interval=32, recent=8',
            "nearest: one budget for all layers, and attention is added up while decoding",
        ),
        (
            "SnapKVPress",
            "cache_budget=0, window_size=64, kernel_size=5",
            '"snapkv", interval=1, window=64, kernel_size=5',
        ),
        ("StreamingLLMPress", "cache_budget=0, n_sink=4", '"streaming_llm", sinks=4'),
        (
            "TurboQuantPress",
            "n_bits=4, cache_budget=0, seed=42",
            "",
            "quantises, and keeps every token",
        ),
        (
            "ZipCachePress",
            "high_bits=4, low_bits=2, salient_ratio=0.1, probe_window=32, recent_window=32, "
            "group_size=0, cache_budget=0",
            "",
            "quantises, and keeps every token",
        ),
    )
)
PRESSES: tuple[PressEquivalent, ...] = (
    *_MANY,
    PressEquivalent(
        AMS_FORK,
        "AdaptiveMassSegmentWrapperHeadPress",
        "base_press=None, window_size=32, segment_mass=0.02, min_seg_len=64, max_seg_len=2048, "
        "min_keep_per_segment=8, n_sink=0, always_keep_last=0, window_kernel_size=5, "
        "use_credit=True, credit_decay=0.8, mix_beta=0.7",
        '"keydiff+ams", mass_window=32, segment_mass=0.02, min_segment_length=64, '
        "max_segment_length=2048, min_keep_per_segment=8, sinks=0, recent=0, "
        "mass_kernel_size=5, credit_decay=0.8, mix_beta=0.7",
        "after any policy that decides for each head on its own; `mix_beta=1` is "
        "`use_credit=False`",
    ),
)
