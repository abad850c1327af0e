"""The Triton kernels against loops in float64: on CUDA where there is one, else interpreted."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache, compile_layers_once
from compressed_cache.ops import attention_sums as torch_sums
from compressed_cache.ops.attention import LogitTransform, attention_rows
from compressed_cache.ops.kernels import operators
from compressed_cache.ops.tokens import Sizes
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens
from tests.grids import pairwise, slow_but
from tests.kinds import KINDS

pytest.importorskip("triton")
from compressed_cache.ops.kernels import attention_sums as sums
from compressed_cache.ops.kernels import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Where there is a device, all of them run on it.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NEEDS_CUDA = pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter multiplies bfloat16 as if it were integers"
)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
RECENT, SEEN = 5, 500


def in_each_dtype(*axes: list[Any]) -> list[Any]:
    """Any two values of two axes, in float32 or float16, and again in bfloat16."""
    bfloat16 = [pytest.param(torch.bfloat16, *point, marks=NEEDS_CUDA) for point in pairwise(*axes)]
    return [*pairwise([torch.float32, torch.float16], *axes), *bfloat16]


def softmax(logits: np.ndarray, sink: float | None = None) -> np.ndarray:
    exponentials = np.exp(logits)
    return exponentials / (exponentials.sum() + (0 if sink is None else math.exp(sink)))


def bent(logits: np.ndarray, softcap: float | None) -> np.ndarray:
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


def victim(scores: np.ndarray, positions: np.ndarray, prefix: int) -> int:
    """The slot to overwrite: an empty one, else the lowest unprotected, the oldest of equals."""

    def order(slot: int) -> tuple[float, ...]:
        position = positions[slot]
        if position < 0:
            return (0, 0, slot)
        if position < prefix:
            return (3, 0, position)
        if position >= SEEN - RECENT:
            return (2, 0, position)
        score = scores[slot]
        return (0, 0, position + 1) if np.isnan(score) else (1, score, position)

    return min(range(len(positions)), key=order)


def make_step(
    *sizes: int, dtype: torch.dtype, record: str, chooses: bool, with_sinks: bool
) -> decode.Step:
    batch, heads, groups, capacity, dim, value_dim = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    positions = torch.stack(
        [torch.randperm(SEEN, generator=generator)[:capacity] for _ in range(batch * heads)]
    )
    positions = positions.view(batch, heads, capacity)
    # The oldest of the recent tokens would be the first to go.
    oldest, own = capacity // 3, positions[-1, -1]
    own[own == SEEN - RECENT] = own[oldest]
    own[oldest] = SEEN - RECENT
    positions[0, 0, : capacity // 3] = -1
    scores = normal(batch, heads, capacity).float()
    scores[-1, -1, capacity // 2 :] = scores[-1, -1].min()
    scores[-1, 0, capacity // 2] = torch.nan
    scores[-1, -1, oldest] = -100
    slot = torch.randint(0, capacity, (batch, heads, 1), generator=generator).to(DEVICE)
    counts = torch.full((batch, 3), SEEN).to(DEVICE)
    step = decode.Step(
        query=normal(batch, heads * groups, 1, dim),
        key=normal(batch, heads, 1, dim),
        value=normal(batch, heads, 1, value_dim),
        keys=normal(batch, heads, capacity, dim),
        values=normal(batch, heads, capacity, value_dim),
        positions=positions.to(DEVICE),
        memory=normal(batch, heads, capacity if record != "nothing" else 0).float().abs(),
        arrived=torch.zeros(batch, heads + 1, dtype=torch.int32, device=DEVICE),
        counts=counts,
        protected_prefix=torch.arange(batch).to(DEVICE) * 200,
        slot=None if chooses else slot,
        scores=None if record == "total" else scores,
        sinks=normal(heads * groups) if with_sinks else None,
    )
    step.memory[-1, -1, oldest : oldest + 1] = 0
    # What an empty slot holds must never be read.
    step.keys[0, 0, : capacity // 3] = torch.nan
    step.values[0, 0, : capacity // 3] = torch.inf
    return step


def check_step(
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    record: str = "nothing",
    chooses: bool = True,
    splits: int | None = 1,
    softcap: float | None = None,
    with_sinks: bool = False,
    pads: bool = False,
) -> None:
    step = make_step(*sizes, dtype=dtype, record=record, chooses=chooses, with_sinks=with_sinks)
    if pads:
        step = step._replace(real=torch.arange(sizes[0]).to(DEVICE) % 2 == 1)
    before = [None if x is None else x.double().cpu().numpy().copy() for x in step]
    scaling = sizes[4] ** -0.5
    output, weights = decode.decode_step(
        step, recent=RECENT, scaling=scaling, softcap=softcap, record=record, splits=splits
    )
    batch, heads, groups = sizes[:3]
    query, key, value, keys, values, positions, memory, _, _, prefix, slots, scores, *others = (
        before
    )
    sinks, real = others
    scores = memory if scores is None else scores
    expected = np.zeros(output.shape)
    expected_weights = np.zeros((batch, heads, groups, 1, sizes[3]))
    rows = [row for row in range(batch) if real is None or real[row]]
    for row in rows:
        for head in range(heads):
            held = positions[row, head]
            slot = (
                victim(scores[row, head], held, prefix[row])
                if chooses
                else int(slots[row, head, 0])
            )
            held[slot] = SEEN
            keys[row, head, slot] = key[row, head, 0]
            values[row, head, slot] = value[row, head, 0]
            visible = held >= 0
            if record != "nothing":
                memory[row, head, slot] = 0
            for group in range(groups):
                own = head * groups + group
                logits = bent(keys[row, head, visible] @ query[row, own, 0] * scaling, softcap)
                row_weights = softmax(logits, None if sinks is None else sinks[own])
                expected[row, own, 0] = row_weights @ values[row, head, visible]
                expected_weights[row, head, group, 0, visible] = row_weights
                if record == "total":
                    memory[row, head, visible] += row_weights / groups
    counts = [[SEEN, SEEN, SEEN]] * batch
    if record != "weights":
        counts = [[SEEN + (row in rows), SEEN + 1, SEEN + 1] for row in range(batch)]
    assert step.counts.tolist() == counts
    for found, wanted in zip(step[3:6], (keys, values, positions), strict=True):
        np.testing.assert_array_equal(found.double().cpu().numpy(), wanted)
    tolerance = TOLERANCES[dtype]
    output, weights = output[rows], weights[rows] if weights.numel() else weights
    expected, expected_weights = expected[rows], expected_weights[rows]
    np.testing.assert_allclose(output.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(step.memory.cpu(), memory, rtol=2e-5, atol=2e-5)
    if record == "weights":
        np.testing.assert_allclose(weights.cpu(), expected_weights, rtol=2e-5, atol=2e-5)
    else:
        assert weights.numel() == 0
    assert not step.arrived.any()


@pytest.mark.parametrize(
    ("dtype", "sizes", "chooses", "record", "splits"),
    in_each_dtype(
        [(2, 2, 2, 40, 16, 16), (1, 2, 4, 300, 80, 64), (1, 1, 7, 130, 256, 256)],
        [True, False],
        ["nothing", "weights", "total"],
        [1, 3],
    ),
    ids=str,
)
def test_decode_step(
    sizes: tuple[int, ...], chooses: bool, record: str, splits: int, dtype: torch.dtype
) -> None:
    check_step(*sizes, dtype=dtype, record=record, chooses=chooses, splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("record", ["weights", "total"])
def test_decode_step_with_sinks_and_softcap(
    record: str, softcap: float | None, splits: int
) -> None:
    sizes = (2, 2, 2, 200, 32, 32)
    check_step(*sizes, record=record, splits=splits, softcap=softcap, with_sinks=True)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("record", ["nothing", "weights", "total"])
def test_padding_changes_nothing_of_its_row(record: str, chooses: bool, splits: int) -> None:
    check_step(3, 2, 2, 200, 32, 32, record=record, chooses=chooses, splits=splits, pads=True)


def test_what_a_policy_always_keeps_goes_before_what_is_protected() -> None:
    step = make_step(
        *(2, 2, 2, 40, 16, 16),
        dtype=torch.float32,
        record="nothing",
        chooses=True,
        with_sinks=False,
    )
    step.scores.fill_(torch.inf)
    # Older than all others, which may go.
    step.positions[-1, -1, 5] = 0
    before = step.positions.cpu().numpy().copy()
    decode.decode_step(step, recent=RECENT, scaling=1.0, softcap=None, record="nothing", splits=1)
    for row, prefix in enumerate(step.protected_prefix.tolist()):
        for head in range(2):
            slot = victim(np.full(40, np.inf), before[row, head], prefix)
            before[row, head, slot] = SEEN
    np.testing.assert_array_equal(step.positions.cpu().numpy(), before)


def test_programs_that_share_a_head_do_what_one_does_step_after_step() -> None:
    sizes = (3, 2, 4, 480, 32, 32)
    one, many = (
        make_step(
            *sizes, dtype=torch.float32, record="total", chooses=True, with_sinks=False
        )._replace(real=torch.tensor([True, False, True]).to(DEVICE))
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(500 if DEVICE == "cuda" else 3):
        new = [
            torch.randn(x.shape, generator=generator).to(DEVICE)
            for x in (one.query, one.key, one.value)
        ]
        outputs = [
            decode.decode_step(
                step._replace(query=new[0], key=new[1], value=new[2]),
                **dict(recent=RECENT, scaling=0.2, softcap=None, record="total", splits=splits),
            )[0]
            for step, splits in ((one, 1), (many, 4))
        ]
        torch.testing.assert_close(*(output[::2] for output in outputs), rtol=1e-4, atol=1e-5)
        # Or a rounding would send them different ways.
        many.memory.copy_(one.memory)
    for name in ("positions", "counts", "keys", "values", "arrived"):
        assert torch.equal(*(getattr(step, name).nan_to_num() for step in (one, many))), name


def test_a_slot_of_one_and_a_group_of_one() -> None:
    check_step(1, 1, 1, 1, 8, 8, record="total")


@pytest.mark.parametrize("record", ["weights", "total"])
def test_a_large_group_is_remembered_in_parts(record: str) -> None:
    check_step(1, 1, 64, 300, 16, 16, record=record)


@pytest.mark.parametrize(
    ("programs", "capacity", "expected"),
    [(8, 4096, 32), (8, 256, 2), (64, 4096, 4), (132, 4096, 2), (133, 4096, 1), (512, 4096, 1)],
)
def test_no_more_programs_share_a_head_than_fit_the_device(
    programs: int, capacity: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    assert decode._splits(programs, capacity, torch.device("cuda")) == expected


def test_a_broken_key_spoils_its_own_head_only() -> None:
    step = make_step(
        *(1, 2, 2, 40, 16, 16),
        dtype=torch.float32,
        record="total",
        chooses=False,
        with_sinks=False,
    )
    step.keys[0, 1, 3] = torch.nan
    step.slot.fill_(7)
    memory = step.memory.clone()
    output, _ = decode.decode_step(
        step, recent=0, scaling=1.0, softcap=None, record="total", splits=1
    )
    assert output[0, :2].isfinite().all()
    assert output[0, 2:].isnan().all()
    memory[0, 1, 7] = 0
    torch.testing.assert_close(step.memory[0, 1], memory[0, 1])


@pytest.mark.parametrize(
    ("dtype", "way", "sizes", "with_sinks", "softcap"),
    in_each_dtype(
        ["kernel", "blocks", "rows"],
        [(3, 2, 2, 70, 16), (1, 1, 4, 130, 80), (2, 1, 1, 33, 256)],
        [False, True],
        [None, 2.0],
    ),
    ids=str,
)
def test_attention_sums(
    way: str,
    sizes: tuple[int, ...],
    with_sinks: bool,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_sums, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(torch_sums, "_FEWEST_ROWS", 1)
    batch, heads, groups, length, dim = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # As a model has them: tokens before heads in memory.
    queries = normal(batch, length, heads * groups, dim).transpose(1, 2)
    keys = normal(batch, length, heads, dim).transpose(1, 2)
    sinks = normal(heads * groups) if with_sinks else None
    padding = torch.tensor([0, 9 if length < 64 else 40, length][:batch])
    if way == "kernel":
        found = sums.attention_sums(
            queries, keys, padding.to(DEVICE), sinks, scaling=0.3, softcap=softcap
        )
    else:
        torch_way = {"blocks": torch_sums._sums_of_blocks, "rows": row_sums}[way]
        real = torch.arange(length) >= padding[:, None]
        tensors = (tensor.cpu() for tensor in (queries, keys))
        found = torch_way(
            *tensors, real, LogitTransform(0.3, softcap, None if sinks is None else sinks.cpu())
        )
    expected = np.zeros(found.shape)
    q, k = queries.double().cpu().numpy(), keys.double().cpu().numpy()
    for row in range(batch):
        for own in range(heads * groups):
            for token in range(int(padding[row]), length):
                seen = slice(int(padding[row]), token + 1)
                logits = bent(k[row, own // groups, seen] @ q[row, own, token] * 0.3, softcap)
                sink = None if sinks is None else float(sinks[own])
                expected[row, own // groups, seen] += softmax(logits, sink) / groups
    np.testing.assert_allclose(found.cpu(), expected, rtol=2e-5, atol=2e-5)


def row_sums(queries: Tensor, keys: Tensor, real: Tensor, transform: LogitTransform) -> Tensor:
    """What a prompt gives where neither kernels nor blocks serve."""
    positions = torch.where(real, real.cumsum(dim=1) - 1, -1)
    rows = attention_rows(
        queries, keys, query_positions=positions, positions=positions[:, None], transform=transform
    )
    return sum((weights.mean(2).sum(2) for weights, _ in rows), torch.zeros(keys.shape[:3]))


def test_a_grid_has_room_for_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA has 65,535 programs in any dimension but the first."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_log_sum_exp_kernel", "_column_sums_kernel"):
        monkeypatch.setattr(sums, name, Kernel())
    sums.attention_sums(
        torch.empty(4096, 32, 130, 16, device="meta"),
        torch.empty(4096, 32, 130, 16, device="meta"),
        torch.empty(4096, device="meta"),
        None,
        scaling=1.0,
        softcap=None,
    )
    assert [math.prod(grid) for grid in grids] == [4096 * 32 * 5] * 2
    assert all(programs <= 65535 for grid in grids for programs in grid[1:])


def test_a_broken_key_leaves_the_totals_of_the_others() -> None:
    queries, keys = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    keys[0, 1, 5] = torch.nan
    real = torch.ones(1, 40, dtype=torch.bool)
    sizes = SERVED._replace(device=torch.device("cpu"))
    transform = LogitTransform(1.0)
    assert torch_sums.attention_sums(queries, keys, real, transform=transform, sizes=sizes) is None
    found = row_sums(queries, keys, real, transform)
    assert found[0, 1, 5] == 0
    # Query 5 of the second head still gives all its attention away.
    torch.testing.assert_close(found.sum(dim=-1), torch.full((1, 2), 40.0))


def test_totals_pass_over_what_is_not_a_number() -> None:
    queries, keys = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    keys[0, 1, 5] = torch.nan
    found = sums.attention_sums(
        queries.to(DEVICE),
        keys.to(DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        None,
        scaling=1.0,
        softcap=None,
    ).cpu()
    assert found.isfinite().all()
    assert found[0, 1, 5] == 0
    # Query 5 of the second head sees its own key nowhere and still gives all its attention away.
    torch.testing.assert_close(found.sum(dim=-1), torch.full((1, 2), 40.0))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Not that of the session, which stays where it is."""
    return make_model().to(DEVICE)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether layers use the kernels, whatever the device is."""

    def serve(answer: bool) -> None:
        monkeypatch.setattr(operators, "serves", lambda sizes: answer)

    return serve


def generate(
    model: LlamaForCausalLM, policy: str, *, protect_prompt: bool = False, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    ids = distinct_tokens(3, 30, seed=4)
    # Of at most 16 tokens where the prompt has to fit.
    mask = torch.arange(30) >= torch.tensor([14, 16, 19] if protect_prompt else [0, 6, 19])[:, None]
    ids = ids * mask
    cache = CompressedCache(policy, 20, protect_prompt=protect_prompt)
    with torch.inference_mode():
        text = model.generate(
            ids.to(DEVICE),
            attention_mask=mask.to(DEVICE),
            **cache_argument(cache),
            max_new_tokens=12,
            do_sample=False,
            **options,
        )
    return text, [layer.positions.clone() for layer in cache.layers]


@pytest.mark.parametrize("policy", slow_but(["h2o"], (name for name in KINDS if name != "full")))
def test_generation_is_the_same_with_and_without(
    policy: str, model: LlamaForCausalLM, served: Callable[[bool], None]
) -> None:
    served(False)
    text, positions = generate(model, policy, disable_compile=True)
    served(True)
    fused, fused_positions = generate(model, policy, disable_compile=True)
    assert torch.equal(text, fused)
    assert all(map(torch.equal, positions, fused_positions))


def test_fused_steps_keep_a_protected_prompt_beside_few_recent_tokens(
    model: LlamaForCausalLM, served: Callable[[bool], None]
) -> None:
    served(False)
    text, positions = generate(model, "h2o", protect_prompt=True, disable_compile=True)
    served(True)
    fused, fused_positions = generate(model, "h2o", protect_prompt=True, disable_compile=True)
    assert torch.equal(text, fused)
    for plain, other in zip(positions, fused_positions, strict=True):
        assert torch.equal(plain, other)
        # 41 positions were seen, four slots are left: the prompt stays, and what is most recent.
        assert plain[0].sort().values.tolist() == [[*range(16), *range(23, 27)]] * plain.shape[1]


# Nothing is recorded, or sums, or weights; scores are of this step or of an earlier one; notes.
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "h2o", "tova", "snapkv", "gkv"])
def test_compiled_generation_is_the_same_with_and_without(
    policy: str, model: LlamaForCausalLM, served: Callable[[bool], None]
) -> None:
    served(False)
    text, positions = generate(model, policy, disable_compile=True)
    served(True)
    torch._dynamo.reset()
    backend = CountingBackend()
    fused, fused_positions = generate(model, policy, compile_config=compiled(backend))
    assert torch.equal(text, fused)
    assert all(map(torch.equal, positions, fused_positions))
    assert backend.graphs == (
        2 if CompressedCache(policy, 20, protect_prompt=False).rules.interval > 1 else 1
    )


@pytest.mark.slow
def test_layers_compiled_once_are_left_whole(
    make_model: Callable[..., LlamaForCausalLM], served: Callable[[bool], None]
) -> None:
    model = make_model().to(DEVICE)
    served(True)
    text, positions = generate(model, "h2o", disable_compile=True)
    compile_layers_once(model)
    torch._dynamo.reset()
    backend = CountingBackend()
    fused, fused_positions = generate(model, "h2o", compile_config=compiled(backend))
    assert torch.equal(text, fused)
    assert all(map(torch.equal, positions, fused_positions))
    assert backend.graphs == 1


def test_eager_attention_has_its_weights(
    make_model: Callable[..., LlamaForCausalLM], served: Callable[[bool], None]
) -> None:
    model = make_model(attn_implementation="eager").to(DEVICE)
    served(True)
    cache = CompressedCache("h2o", 8)
    with torch.inference_mode():
        model(torch.arange(1, 12, device=DEVICE)[None], **cache_argument(cache))
        output = model(
            torch.tensor([[20]], device=DEVICE), **cache_argument(cache), output_attentions=True
        )
    for weights in output.attentions:
        assert weights.shape == (1, 4, 1, 8)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


def test_operators_keep_their_promises() -> None:
    step = make_step(
        *(1, 2, 2, 20, 16, 16),
        dtype=torch.float32,
        record="total",
        chooses=True,
        with_sinks=False,
    )
    for record in ("total", "weights"):
        torch.library.opcheck(
            operators.decode_step,
            tuple(step),
            {"recent": 3, "scaling": 0.2, "softcap": None, "record": record},
        )
    torch.library.opcheck(
        operators.attention_sums,
        (
            step.query.repeat(1, 1, 20, 1),
            step.memory.new_ones(1, 2, 20, 16),
            step.protected_prefix,
            None,
        ),
        {"scaling": 0.2, "softcap": None},
    )


SERVED = Sizes(*(1, 2, 4, 16, 128, 128), torch.bfloat16, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "value_dtype": torch.float16}, True),
        ({"dim": 256, "value_dim": 256}, True),
        ({"dim": 257}, False),
        ({"value_dim": 512}, False),
        ({"groups": 65}, False),
        ({"dtype": torch.float64, "value_dtype": torch.float64}, False),
        ({"value_dtype": torch.float16}, False),
    ],
)
def test_sizes_out_of_range_are_left_to_torch(
    change: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "has_device", lambda device: True)
    assert operators.serves(SERVED._replace(**change)) is expected


def test_a_cpu_is_left_to_torch() -> None:
    assert not operators.serves(SERVED._replace(device=torch.device("cpu")))


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from compressed_cache.ops.kernels import attention_sums as sums
from compressed_cache.ops.kernels import decode
TYPES = {"bf16": 2, "fp32": 4}
POINTERS = dict(
    query="*{t}", key="*{t}", value="*{t}", keys="*{t}", values="*{t}", queries="*{t}",
    output="*{t}", positions="*i64", counts="*i64", prefixes="*i64", slots_given="*i64",
    arrived="*i32", reals="*i64", paddings="*i64", scaling="fp32", softcap="fp32", memory="*fp32",
    scores="*fp32", sinks="*fp32", logits="*fp32", weights="*fp32", partial="*fp32",
    peaks="*fp32", totals="*fp32", found="*fp32",
)
CONSTANTS = dict(
    GROUPS=4, DIM=128, VALUE_DIM=128, GROUPS_PAD=16, DIM_PAD=128, VALUE_PAD=128, RANK_BLOCK=256,
    CHOOSES=True, SOFTCAP=True, SINKS=True, PADS=True, RECORD="total", REMEMBERS=True,
    COUNTS=True,
)
for (name, size), capability in itertools.product(TYPES.items(), (80, 90)):
    for kernel, splits, block, warps in (
        (decode._attend_kernel, 1, decode._TILE_BYTES[size] // 128 // size, decode._WARPS[size]),
        (decode._attend_kernel, 4, decode._TILE_BYTES[size] // 128 // size, decode._WARPS[size]),
        (sums._log_sum_exp_kernel, 0, sums._BLOCK[size], sums._WARPS[size]),
        (sums._column_sums_kernel, 0, sums._BLOCK[size], sums._WARPS[size]),
    ):
        constants = {**CONSTANTS, "SPLITS": splits, "BLOCK": block}
        kinds = {
            argument: "constexpr" if argument in constants
            else POINTERS.get(argument, "i32").format(t=name)
            for argument in kernel.arg_names
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(kinds.values()) if kind[0] == "*"
        }
        known = {key: constants[key] for key in kinds if key in constants}
        source = triton.compiler.ASTSource(kernel, kinds, known, aligned)
        target = GPUTarget("cuda", capability, 32)
        program = triton.compile(source, target=target, options={"num_warps": warps})
        # What the smallest of these devices gives one program.
        assert program.asm["cubin"] and program.metadata.shared <= 99 * 1024, (
            kernel.__name__, name, capability, program.metadata.shared)
        print(kernel.__name__, name, capability)
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper() -> None:
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 16
