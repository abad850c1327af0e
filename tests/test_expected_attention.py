"""Where the mean and covariance of expected attention come from."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.calibration.recording import collect
from compressed_cache.policies import LayerContext, make_policy
from compressed_cache.policies import statistics_file as files
from tests.reference.comparison import NUM_STEPS, assert_agree, distinct_tokens, make_model
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules, Vector, expected_attention
from tests.reference.policies.statistics import mean_rotation, moments
from tests.test_calibration import calibrated, straight_queries

FUTURE = 20
D = 16


def cache_for(budget: int = 64, **options: Any) -> CompressedCache:
    return CompressedCache("expected_attention", budget, **{"n_future": FUTURE, **options})


def read(model: Any, cache: CompressedCache, *parts: Sequence[int]) -> CompressedCache:
    with torch.no_grad():
        for part in parts:
            model(torch.tensor([part]), past_key_values=cache)
    return cache


def states(cache: CompressedCache) -> list[dict[str, Tensor]]:
    return [layer.store.query_state for layer in cache.layers]


def assert_same_states(found: CompressedCache, expected: CompressedCache, row: int = 0) -> None:
    for one, other in zip(states(found), states(expected), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name][row], other[name][0], rtol=1e-5, atol=1e-5)


# Of the prompt.


def test_mean_and_covariance_are_those_of_the_prompt_behind_its_first_tokens() -> None:
    model, text = make_model(), distinct_tokens(30, seed=1)
    cache = read(model, cache_for(n_sinks=3), text)
    rotation = mean_rotation(0, FUTURE, D, 10_000.0)
    for state, queries in zip(states(cache), straight_queries(model, text), strict=True):
        for head in range(4):
            mean, covariance = moments(list(queries[3:, head]), D)
            found = {
                name: part[0].flatten(0, 1)[head].double().numpy() for name, part in state.items()
            }
            assert found["count"] == 27
            np.testing.assert_allclose(found["mean"], rotation @ mean, atol=1e-5)
            turned = rotation @ covariance @ rotation.T
            np.testing.assert_allclose(found["covariance"], turned, atol=1e-5)


def test_each_padded_row_has_statistics_of_its_own() -> None:
    model = make_model()
    rows = [distinct_tokens(length, seed=length) for length in (30, 7, 2)]
    ids = torch.tensor([[0] * (30 - len(row)) + row for row in rows])
    mask = (ids != 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = cache_for()
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    for number, row in enumerate(rows):
        assert_same_states(cache, read(model, cache_for(), row), number)


@pytest.mark.parametrize("lengths", [(1, 29), (2, 2, 26), (3, 27), (17, 13)], ids=str)
def test_a_prompt_in_chunks_has_the_statistics_of_the_whole(lengths: tuple[int, ...]) -> None:
    model, text = make_model(), distinct_tokens(30, seed=2)
    parts = [part.tolist() for part in torch.tensor(text).split(list(lengths))]
    whole = read(model, cache_for(), text)
    assert_same_states(read(model, cache_for(), *parts), whole)


def test_a_long_prompt_is_taken_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_model(), distinct_tokens(50, seed=3)
    whole = read(model, cache_for(), text)
    monkeypatch.setattr("compressed_cache.policies.methods.expected_attention._BLOCK", 7)
    assert_same_states(read(model, cache_for(), text), whole)


def test_decoded_tokens_and_later_prompts_change_nothing() -> None:
    model, text = make_model(), distinct_tokens(60, seed=4)
    cache, other = (read(model, cache_for(), text[:20]) for _ in range(2))
    read(model, cache, text[20:21], text[21:22], text[22:50])
    assert_same_states(cache, other)


def test_a_large_mean_does_not_drown_the_covariance() -> None:
    policy: Any = make_policy("expected_attention", n_sinks=0)
    generator = torch.Generator().manual_seed(5)
    queries = 300 + torch.randn(1, 1, 1, 5000, 4, dtype=torch.float64, generator=generator)
    still = {
        "frequencies": torch.zeros(4),
        "partners": torch.arange(4),
        "signs": torch.zeros(4),
        "mean_rotation": torch.eye(4),
    }
    shapes = policy.query_state_shapes(4)
    state = {name: torch.zeros(1, 1, 1, *shape) for name, shape in shapes.items()}
    found = policy.observe_queries(state, queries.float(), torch.arange(5000)[None], still)
    expected = torch.cov(queries[0, 0, 0].mT, correction=0)
    torch.testing.assert_close(found["covariance"][0, 0, 0].double(), expected, rtol=0, atol=1e-4)


def test_a_query_that_is_no_number_does_not_count() -> None:
    policy: Any = make_policy("expected_attention", n_sinks=0)
    queries = torch.randn(1, 1, 2, 9, 4, generator=torch.Generator().manual_seed(6))
    constants = {
        "frequencies": torch.full((4,), 0.1),
        "partners": torch.tensor([2, 3, 0, 1]),
        "signs": torch.tensor([-1.0, -1.0, 1.0, 1.0]),
        "mean_rotation": torch.eye(4),
    }
    shapes = policy.query_state_shapes(4)
    state = {name: torch.zeros(1, 1, 2, *shape) for name, shape in shapes.items()}
    broken = queries.clone()
    broken[0, 0, 1, 8] = torch.nan
    found = policy.observe_queries(state, broken, torch.arange(9)[None], constants)
    whole = policy.observe_queries(state, queries, torch.arange(9)[None], constants)
    rest = policy.observe_queries(state, queries[..., :8, :], torch.arange(8)[None], constants)
    for name in shapes:
        assert torch.equal(found[name][:, :, 0], whole[name][:, :, 0])
        torch.testing.assert_close(found[name][:, :, 1], rest[name][:, :, 1])


@pytest.mark.parametrize("interval", [1, 3])
def test_a_prompt_of_no_more_than_the_sinks_expects_the_same_of_all_tokens(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, interval: int
) -> None:
    texts = [distinct_tokens(length + NUM_STEPS, seed=length) for length in (4, 2)]
    assert_agree(
        *(precise_model, reference, texts, [4, 2]),
        name="expected_attention",
        rules=Rules(12, interval, sinks=2),
        tolerance=tolerance,
        options={"n_future": FUTURE, "n_sinks": 4},
    )


def test_statistics_are_saved_chosen_counted_and_forgotten(tmp_path: Path) -> None:
    model, texts = make_model(), [distinct_tokens(30, seed=seed) for seed in (7, 8)]
    first, second = (read(model, cache_for(20), text) for text in texts)
    cache = cache_for(20)
    with torch.no_grad():
        model(torch.tensor(texts), past_key_values=cache)
    before = cache.snapshot()
    cache.save(tmp_path / "it.safetensors")
    loaded = CompressedCache.load(tmp_path / "it.safetensors")
    assert_same_states(loaded, first, 0)
    assert_same_states(loaded, second, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_same_states(cache, second, 0)
    cache.batch_select_indices(torch.tensor([1]))
    assert_same_states(cache, first, 0)
    cache.restore(before)
    assert_same_states(cache, first, 0)
    assert_same_states(cache, second, 1)
    kept = sum(part.nbytes for state in states(cache) for part in state.values())
    assert kept == 2 * 2 * 4 * (D * D + D + 1) * 4
    without = cache_for(20, use_covariance=False)
    with torch.no_grad():
        model(torch.tensor(texts), past_key_values=without)
    assert cache.nbytes - without.nbytes == 2 * 2 * 4 * D * D * 4
    second.reset()
    assert_same_states(read(model, second, texts[0]), first)


# From a file.

Writer = Callable[[Path, Any], str]


def of_this_package(path: Path, model: Any) -> str:
    return calibrated(path / "it.safetensors", "expected_attention", model, 60, 50)


def of_kvpress(path: Path, model: Any, *, dtype: torch.dtype = torch.float32) -> str:
    """What ``ExpectedAttentionStats.save_pretrained`` writes, of the queries before RoPE."""
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randint(1, 90, (n,), generator=generator).tolist() for n in (60, 50)]
    texts = [straight_queries(model, piece) for piece in pieces]
    means, covariances = [], []
    for layer in range(model.config.num_hidden_layers):
        later = np.concatenate([text[layer][4:] for text in texts])
        pairs = [moments(list(later[:, head]), later.shape[-1]) for head in range(later.shape[1])]
        means.append(np.stack([mean for mean, _ in pairs]))
        covariances.append(np.stack([covariance for _, covariance in pairs]))
    tensors = {"query_mean": np.stack(means), "query_cov": np.stack(covariances)}
    path.mkdir(exist_ok=True)
    parts = {name: torch.tensor(part).to(dtype) for name, part in tensors.items()}
    save_file(parts, path / "model.safetensors", {"format": "pt"})
    return str(path)


def known(model: Any) -> Callable[[int, int, int], tuple[Vector, Vector]]:
    """The statistics in such files, of the reference."""
    layers = collect(model, _pieces(), "expected_attention")

    def of(layer: int, head: int, member: int) -> tuple[Vector, Vector]:
        found = {name: part.double().numpy() for name, part in layers[layer][1].items()}
        return found["mean"][head, member], found["covariance"][head, member]

    return of


def _pieces() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 90, (n,), generator=generator).tolist() for n in (60, 50)]


@pytest.mark.parametrize("write", [of_this_package, of_kvpress])
def test_statistics_from_a_file_keep_the_tokens_of_the_reference(
    tmp_path: Path,
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    write: Writer,
) -> None:
    options: dict[str, Any] = {"n_future": FUTURE, "n_sinks": 1, "epsilon": 0.01}
    lengths = [21, 12, 5]
    texts = [distinct_tokens(length + NUM_STEPS, seed=20 + length) for length in lengths]
    assert_agree(
        *(precise_model, reference, texts, lengths),
        name="expected_attention",
        rules=Rules(14, 3, sinks=1, recent=2),
        tolerance=tolerance,
        score=partial(expected_attention, statistics=known(precise_model), **options),
        options={"calibration": write(tmp_path, precise_model), **options},
    )


def test_nothing_of_the_prompt_is_kept_beside_a_file(tmp_path: Path) -> None:
    model = make_model()
    cache = read(model, cache_for(calibration=of_this_package(tmp_path, model)), [1, 2, 3, 4, 5])
    assert states(cache) == [{}, {}]


def _context(model: Any, layer: int, *, first_head: int = 0, heads: int = 2) -> LayerContext:
    module, dim = model.model.layers[layer].self_attn, model.config.head_dim
    place = dict(first_head=first_head, heads=heads, groups=2, dim=dim, value_dim=dim)
    place |= dict(total_heads=2, hidden_size=0)
    return LayerContext(model.config, module, layer, **place, device=torch.device("cpu"))


def test_a_model_that_scales_what_it_rotates_is_told_so_of_queries_before_rope(
    tmp_path: Path,
) -> None:
    model: Any = make_model()
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = type(model.config)(
        **{**model.config.to_dict(), "rope_parameters": {"rope_theta": 1e4, **rope}}
    )
    model = LlamaForCausalLM(config).eval().double()
    path = of_kvpress(tmp_path, model)
    for layer, (_, expected) in collect(model, _pieces(), "expected_attention").items():
        found = files.load("expected_attention", path, _context(model, layer))
        for name, part in expected.items():
            torch.testing.assert_close(found[name].double(), part, rtol=0, atol=1e-5)


def test_heads_of_a_file_are_those_at_hand(tmp_path: Path) -> None:
    model = make_model()
    path = of_kvpress(tmp_path, model, dtype=torch.bfloat16)
    both = files.load("expected_attention", path, _context(model, 1))
    second = files.load("expected_attention", path, _context(model, 1, first_head=1, heads=1))
    assert both["mean"].shape == (2, 2, D) and both["mean"].dtype == torch.float32
    for name in both:
        assert torch.equal(second[name], both[name][1:])


def test_filters_of_the_hub_are_those_of_a_file_of_ours(tmp_path: Path) -> None:
    model = make_model()
    found = collect(model, _pieces(), "qfilter")
    filters = torch.stack([found[layer][1]["filters"] for layer in range(2)]).float()
    save_file({"q_filters": filters}, tmp_path / "published.safetensors")
    own = calibrated(tmp_path / "own.safetensors", "qfilter", model, 60, 50)
    text, positions = distinct_tokens(40, seed=9), []
    for path in (own, str(tmp_path / "published.safetensors")):
        cache = CompressedCache("qfilter", 16, calibration=path, recent=2)
        read(model, cache, text)
        positions.append([layer.positions for layer in cache.layers])
    for one, other in zip(*positions, strict=True):
        assert torch.equal(one, other)


def test_a_folder_may_have_a_file_of_ours_or_one_of_the_hub(tmp_path: Path) -> None:
    model = make_model()
    folder = of_kvpress(tmp_path, model)
    make_policy("expected_attention", calibration=folder)
    with pytest.raises(ValueError, match="statistics for policy 'expected_attention', not 'qfil"):
        make_policy("qfilter", calibration=folder)
    calibrated(tmp_path / "qfilter.safetensors", "qfilter", model, 60)
    make_policy("qfilter", calibration=folder)


@pytest.mark.parametrize(
    ("policy", "shapes", "message"),
    [
        ("qfilter", {"q_filters": (3, 2, D)}, r"key/value heads and dimension are \[3, 2, 16\]"),
        ("qfilter", {"q_filters": (2, 4, D)}, r"\[2, 4, 16\], those of this model \[2, 2, 16\]"),
        (
            "qfilter",
            {"q_filters": (0, 2, D)},
            r"dimension are \[0\], those of this model \[2, 2, 16\]",
        ),
        (
            "expected_attention",
            {"query_mean": (2, 2, D), "query_cov": (2, 2, D, D)},
            r"query heads and dimension are \[2, 2, 16\], those of this model \[2, 4, 16\]",
        ),
        (
            "expected_attention",
            {"query_mean": (2, 4, 8), "query_cov": (2, 4, 8, 8)},
            r"are \[2, 4, 8\], those of this model \[2, 4, 16\]",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused(
    tmp_path: Path, policy: str, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    cache = CompressedCache(policy, 16, calibration=str(path))
    with pytest.raises(ValueError, match=f"statistics of another model: its layers.*{message}"):
        read(make_model(), cache, [1, 2, 3])


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
def test_statistics_that_are_no_numbers_are_refused(tmp_path: Path, wrong: float) -> None:
    mean, covariance = torch.zeros(2, 4, D), torch.zeros(2, 4, D, D)
    covariance[1, 2, 3, 4] = wrong
    path = str(tmp_path / "model.safetensors")
    save_file({"query_mean": mean, "query_cov": covariance}, path)
    with pytest.raises(ValueError, match=r"safetensors' must have finite .* infinity in query_cov"):
        CompressedCache("expected_attention", 16, calibration=path)


@pytest.mark.parametrize(
    "shapes",
    [
        {"q_filters": (2, D)},
        {"q_filters": (2, 2, D), "more": (1,)},
        {"query_mean": (2, 4, D)},
        {"query_mean": (2, 4, D), "query_cov": (2, 4, D)},
    ],
    ids=str,
)
def test_what_is_of_no_known_form_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match="or be a file of kvpress with query_mean and query_cov"):
        make_policy("qfilter", calibration=str(path))
