"""Every eviction is in the trace, at the step it happened, and costs what a full cache says."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.models.llama import modeling_llama

from compressed_cache import CompressedCache
from compressed_cache.telemetry import Recorder, Trace
from compressed_cache.telemetry.trace import LOSSES, PRUNES, TOKENS, losses_path
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held

PROMPT, NEW, BUDGET, LAYERS, HEADS = 40, 14, 16, 2, 2

POLICIES = {
    "full": {},
    "streaming_llm": {},
    "h2o": {},
    "snapkv": {"interval": 4},
    "rkv": {},
    "h2o+caote": {},
    "knorm+key_rerotation": {},
    "h2o+think": {},
    "snapkv+adakv": {},
    "h2o+simlayerkv": {},
}


class Notes(LogitsProcessor):
    """A record by hand: what every head holds after each call that ended in logits."""

    def __init__(self, cache: CompressedCache) -> None:
        self.cache = cache
        self.held: list[list[list[list[int]]]] = []
        """By call, layer, row and head."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = range(len(input_ids))
        here = [[held(self.cache, layer, row) for row in rows] for layer in range(LAYERS)]
        self.held.append(here)
        return scores

    def evicted(self, layer: int, row: int, head: int, *, prompt: int) -> dict[int, int]:
        """When each position was first missing."""
        found: dict[int, int] = {}
        for step, call in enumerate(self.held):
            for position in range(prompt + step):
                if position not in call[layer][row][head]:
                    found.setdefault(position, step)
        return found


def _generate(model: Any, ids: Tensor, cache: CompressedCache, **more: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **cache_argument(cache), **more}
    return model.generate(ids, **options)


def _lives(trace: Trace, layer: int, row: int, head: int) -> list[tuple[int, int, int]]:
    """Position, step of arrival and step of departure of the tokens of a head."""
    columns = trace.tokens
    own = (columns["layer"] == layer) & (columns["row"] == row) & (columns["head"] == head)
    names = ("position", "inserted", "evicted")
    return list(zip(*(columns[name][own].tolist() for name in names), strict=True))


def _padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("padding", [0, 11])
def test_streaming_llm_evicts_the_oldest_after_its_sinks(
    model: LlamaForCausalLM, padding: int
) -> None:
    sinks = 4
    ids = distinct_tokens(2, PROMPT)
    cache = CompressedCache("streaming_llm", BUDGET, sinks=sinks)
    recorder = Recorder(cache)
    _generate(model, ids, cache, **_padded(ids, padding))
    trace = recorder.trace()
    lengths = [PROMPT - padding, PROMPT]
    assert trace.metadata["prompt_lengths"] == lengths
    assert trace.metadata["steps"] == NEW - 1
    for row, length in enumerate(lengths):
        expected = []
        for position in range(length + NEW - 1):
            inserted = max(0, position - length + 1)
            # The token so many positions later takes its slot.
            evicted = max(0, position + BUDGET - sinks - length + 1)
            stays = position < sinks or evicted > NEW - 1
            expected.append((position, inserted, -1 if stays else evicted))
        for layer in range(LAYERS):
            for head in range(HEADS):
                assert _lives(trace, layer, row, head) == expected


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_trace_is_what_the_positions_say_step_by_step(
    model: LlamaForCausalLM, policy: str, shadow: bool
) -> None:
    padding = 7
    ids = distinct_tokens(2, PROMPT)
    cache = CompressedCache(policy, BUDGET, protect_prompt=False, **POLICIES[policy])
    recorder, notes = Recorder(cache, shadow=shadow), Notes(cache)
    _generate(
        *(model, ids, cache),
        **_padded(ids, padding),
        logits_processor=LogitsProcessorList([notes]),
    )
    trace = recorder.trace()
    assert {name: str(column.dtype) for name, column in trace.tokens.items()} == TOKENS
    assert {name: str(column.dtype) for name, column in trace.losses.items()} == LOSSES
    for layer in range(LAYERS):
        for row, prompt in enumerate((PROMPT - padding, PROMPT)):
            for head in range(HEADS):
                evicted = notes.evicted(layer, row, head, prompt=prompt)
                assert bool(evicted) == (policy != "full")
                expected = [
                    (position, max(0, position - prompt + 1), evicted.get(position, -1))
                    for position in range(prompt + NEW - 1)
                ]
                lives = _lives(trace, layer, row, head)
                assert lives == expected
                # Tokens read are tokens held and tokens evicted.
                gone = sum(departure >= 0 for _, _, departure in lives)
                assert len(lives) == len(held(cache, layer, row)[head]) + gone


def test_nothing_leaves_a_cache_that_keeps_its_prompt_off_the_device(
    model: LlamaForCausalLM,
) -> None:
    ids = distinct_tokens(1, 120)
    cache = CompressedCache("shadowkv", 16, chunk_size=4, local_chunks=1, outlier_chunks=1)
    recorder = Recorder(cache, shadow=True)
    _generate(model, ids, cache)
    trace = recorder.trace()
    assert (trace.tokens["evicted"] == -1).all()
    assert len(trace.tokens["row"]) == (120 + NEW - 1) * LAYERS * HEADS
    # What was not fetched was not attended to.
    assert (trace.losses["lost"][trace.losses["step"] > 0] > 0).any()
    assert (trace.losses["dropped"] == 0).all()


def test_chunks_are_one_step_and_a_further_prompt_is_another(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(1, PROMPT + 9)
    cache = CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache, shadow=True)
    first = _generate(model, ids[:, :PROMPT], cache, prefill_chunk_size=9)
    later = torch.cat([first, ids[:, PROMPT:]], dim=1)
    _generate(model, later, cache)
    trace = recorder.trace()
    (prompt,) = trace.metadata["prompt_lengths"]
    assert prompt == PROMPT
    # The last token of an answer is read with what follows it.
    steps = [*[0] * PROMPT, *range(1, NEW), *[NEW] * 10, *range(NEW + 1, 2 * NEW)]
    assert [inserted for _, inserted, _ in _lives(trace, 0, 0, 0)] == steps
    assert sorted(set(trace.losses["step"].tolist())) == list(range(2 * NEW))


@pytest.mark.slow
def test_steps_compile_as_they_do_unwatched(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model, ids = make_model(num_hidden_layers=1), distinct_tokens(2, PROMPT)
    graphs, texts, traces = [], [], []
    for watched in (False, True):
        torch._dynamo.reset()
        backend = CountingBackend()
        cache = CompressedCache("h2o", BUDGET, telemetry=watched)
        recorder = Recorder(cache) if watched else None
        texts.append(_generate(model, ids, cache, compile_config=compiled(backend)))
        graphs.append(backend.graphs)
        traces.append(recorder and recorder.trace())
    torch._dynamo.reset()
    assert graphs == [1, 1]
    assert torch.equal(*texts)
    cache = CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache)
    _generate(model, ids, cache)
    eager = recorder.trace()
    assert all(np.array_equal(traces[1].tokens[n], eager.tokens[n], True) for n in TOKENS)


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "snapkv+adakv"])
def test_a_cache_is_the_same_bit_for_bit_with_and_without(
    model: LlamaForCausalLM, policy: str, shadow: bool
) -> None:
    ids, states = distinct_tokens(2, PROMPT), []
    for watched in (False, True):
        cache = CompressedCache(policy, BUDGET, telemetry=watched)
        if watched:
            Recorder(cache, shadow=shadow)
        text = _generate(model, ids, cache)
        states.append([text, *(t for layer in cache.layers for t in layer.tensors())])
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


# The shadow.


class Projections:
    """Queries and keys of every call, where Llama has just rotated them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        original = modeling_llama.apply_rotary_pos_emb

        def rotate(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found = original(*args, **kwargs)
            self.calls.append(found)
            return found

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)

    def attention(self, layer: int, step: int, row: int, head: int, *, padding: int) -> Any:
        """Of the last query of a step over all keys so far, in float64, by loops."""
        own = self.calls[layer::LAYERS][: step + 1]
        keys = [k for _, key in own for k in key[row, head].double().numpy()][padding:]
        queries = own[-1][0][row].double().numpy()
        groups = len(queries) // HEADS
        rows = []
        for query in queries[head * groups : (head + 1) * groups, -1]:
            logits = [float(query @ key) / len(query) ** 0.5 for key in keys]
            weights = [np.exp(logit - max(logits)) for logit in logits]
            rows.append([weight / sum(weights) for weight in weights])
        return np.mean(rows, axis=0)


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "snapkv", "snapkv+adakv"])
def test_lost_attention_is_that_of_a_full_cache_in_float64(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    padding, length = 5, 24
    ids = distinct_tokens(2, length)
    cache = CompressedCache(policy, 10, recent=4, **({"interval": 3} if policy == "h2o" else {}))
    recorder, notes = Recorder(cache, shadow=True), Notes(cache)
    projections = Projections(monkeypatch)
    _generate(
        *(model, ids, cache),
        **_padded(ids, padding),
        logits_processor=LogitsProcessorList([notes]),
    )
    trace = recorder.trace()
    lost = _by_place(trace)
    missed = {
        tuple(place): value
        for *place, value in zip(
            *(trace.tokens[name].tolist() for name in ("row", "layer", "head", "position")),
            trace.tokens["attention"].tolist(),
            strict=True,
        )
    }
    exact = dict(rel=1e-4, abs=1e-6)
    for row, left in enumerate((padding, 0)):
        for layer in range(LAYERS):
            for head in range(HEADS):
                prompt = length - left
                evicted = notes.evicted(layer, row, head, prompt=prompt)
                sums = np.zeros(prompt + NEW - 1)
                for step in range(NEW):
                    weights = projections.attention(layer, step, row, head, padding=left)
                    gone = [p for p, when in evicted.items() if when <= step]
                    now = [p for p, when in evicted.items() if when == step]
                    found = lost[row, step, layer, head]
                    assert found == (
                        pytest.approx(weights[gone].sum(), **exact),
                        pytest.approx(weights[now].sum(), **exact),
                    )
                    if step:
                        sums[gone] += weights[gone]
                got = [missed[row, layer, head, position] for position in range(len(sums))]
                assert got == pytest.approx(sums, **exact)
    assert max(share for share, _ in lost.values()) > 0.2


def _by_place(trace: Trace) -> dict[tuple[int, ...], tuple[float, float]]:
    """What was lost at each row, step, layer and head, at all and by this step."""
    columns = [trace.losses[name].tolist() for name in LOSSES]
    return {tuple(place): (lost, now) for *place, lost, now in zip(*columns, strict=True)}


def test_without_a_shadow_nothing_is_said_of_attention(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache)
    _generate(model, distinct_tokens(1, PROMPT), cache)
    trace = recorder.trace()
    assert np.isnan(trace.tokens["attention"]).all()
    assert not len(trace.losses["lost"])


# Files.


@pytest.fixture(scope="module")
def trace(model: LlamaForCausalLM) -> Trace:
    cache = CompressedCache("streaming_llm", BUDGET, sinks=4)
    recorder = Recorder(cache, shadow=True, model="small")
    _generate(model, distinct_tokens(2, PROMPT), cache)
    return recorder.trace()


def test_a_trace_is_read_as_it_was_written(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    trace.write(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "run.losses.parquet",
        "run.parquet",
    ]
    again = Trace.read(path)
    assert again.metadata == trace.metadata
    for schema, got, expected in (
        (TOKENS, again.tokens, trace.tokens),
        (LOSSES, again.losses, trace.losses),
    ):
        assert list(got) == list(schema)
        for name, dtype in schema.items():
            assert got[name].dtype == dtype
            assert np.array_equal(got[name], expected[name])
    schema = pyarrow.parquet.read_schema(path)
    about = json.loads(schema.metadata[b"compressed_cache"])
    assert about["policy"] == "streaming_llm" and about["model"] == "small"
    assert about["rules"]["budget"] == BUDGET and about["format"] == "1"


def test_a_csv_has_one_prune_step_per_event_and_a_line_per_head(
    trace: Trace, tmp_path: Path
) -> None:
    path = tmp_path / "run.csv"
    trace.write_csv(path, row=1)
    with open(path) as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == PRUNES
    assert len(lines) == NEW * LAYERS * HEADS
    lost = _by_place(trace)
    for number, line in enumerate(lines):
        step, layer, head = number // 4, number // 2 % 2, number % 2
        window = BUDGET - 4
        last = PROMPT + step
        gone = range(4, PROMPT - window) if step == 0 else [last - window - 1]
        before = PROMPT if step == 0 else BUDGET + 1
        assert line == {
            "prune_step": str(step),
            "layer_idx": str(layer),
            "head_idx": str(head),
            "kv_len_pre": str(before),
            "attn_len": str(PROMPT if step == 0 else BUDGET),
            "diff_indices": " ".join(map(str, gone)),
            "attn_loss": line["attn_loss"],
        }
        assert float(line["attn_loss"]) == pytest.approx(lost[1, step, layer, head][1])


def test_files_of_something_else_are_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"run.parquet' must be a parquet file"):
        Trace.read(path)
    pyarrow.parquet.write_table(pyarrow.table({"row": [1]}), path)
    with pytest.raises(ValueError, match=r"eviction trace in format 1 .* got format None"):
        Trace.read(path)
    newer = Trace(trace.tokens, trace.losses, trace.metadata | {"format": "2"})
    newer.write(path)
    with pytest.raises(ValueError, match="got format 2"):
        Trace.read(path)
    trace.write(path)
    losses_path(path).unlink()
    with pytest.raises(FileNotFoundError, match=r"run\.losses\.parquet"):
        Trace.read(path)
    with pytest.raises(ValueError, match="row must be from 0 to 1, got 2"):
        trace.write_csv(path, row=2)


def test_a_missing_pyarrow_is_told_in_one_line(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '/.*\[report\]'"):
        trace.write(tmp_path / "run.parquet")


# What cannot be recorded.


@pytest.mark.parametrize("what", ["reset", "restore", "batch_select_indices", "reorder_cache"])
def test_what_is_no_reading_is_refused_until_stopped(model: LlamaForCausalLM, what: str) -> None:
    cache = CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache, shadow=True)
    cache.reset()
    _generate(model, distinct_tokens(2, PROMPT), cache)
    rows = torch.tensor([0, 0])
    arguments = {"reset": (), "restore": (cache.snapshot(),)}.get(what, (rows,))
    before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors()]
    with pytest.raises(NotImplementedError, match=f"{what} cannot be recorded"):
        getattr(cache, what)(*arguments)
    after = [tensor for layer in cache.layers for tensor in layer.tensors()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    recorder.stop()
    getattr(cache, what)(*arguments)
    assert recorder.trace().metadata["steps"] == NEW - 1
    assert not cache.readers and not cache.observers


def test_a_mask_that_hides_what_was_read_is_refused(model: LlamaForCausalLM) -> None:
    cache, ids = CompressedCache("h2o", BUDGET), distinct_tokens(1, PROMPT + 3)
    mask = torch.ones_like(ids)
    mask[:, 2] = 0
    Recorder(cache)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="attention_mask cannot be recorded"):
            model(ids[:, PROMPT:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"num_beams": 2}, "reorder_cache"),
        ({"prompt_lookup_num_tokens": 3}, "activate_past_recording"),
    ],
)
def test_beams_and_drafts_are_refused(
    model: LlamaForCausalLM, options: dict[str, int], what: str
) -> None:
    cache = CompressedCache("h2o", BUDGET)
    Recorder(cache)
    with pytest.raises(NotImplementedError, match=f"{what} cannot be recorded"):
        _generate(model, distinct_tokens(1, PROMPT), cache, **options)


def test_a_shadow_keeps_generate_from_compiling(make_model: Callable[..., Any]) -> None:
    backend, cache = CountingBackend(), CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache, shadow=True)
    ids = distinct_tokens(1, PROMPT)
    _generate(make_model(), ids, cache, compile_config=compiled(backend))
    assert backend.graphs == 0
    assert set(recorder.trace().losses["step"].tolist()) == set(range(NEW))


def test_a_model_compiled_by_hand_is_refused(make_model: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model, cache = make_model(num_hidden_layers=1), CompressedCache("h2o", BUDGET)
    recorder = Recorder(cache, shadow=True)
    ids = distinct_tokens(1, PROMPT)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        step = torch.compile(model, backend=CountingBackend())
        for _ in range(2):
            step(ids[:, :1], **cache_argument(cache))
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="compiled by hand"):
        recorder.trace()


def test_a_cache_in_use_and_an_empty_trace_are_refused(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", BUDGET)
    with pytest.raises(ValueError, match="after the prompt, got a cache that has read nothing"):
        Recorder(cache).trace()
    _generate(model, distinct_tokens(1, PROMPT), cache)
    with pytest.raises(ValueError, match="cache must be empty, got one that has read 53 tokens"):
        Recorder(cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shadow", [False, True])
def test_a_trace_made_on_cuda_is_what_the_positions_say(
    make_model: Callable[..., Any], shadow: bool
) -> None:
    model, ids = make_model().cuda(), distinct_tokens(2, PROMPT).cuda()
    cache = CompressedCache("h2o", BUDGET)
    recorder, notes = Recorder(cache, shadow=shadow), Notes(cache)
    _generate(model, ids, cache, logits_processor=LogitsProcessorList([notes]))
    trace = recorder.trace()
    for row in range(2):
        evicted = notes.evicted(0, row, 0, prompt=PROMPT)
        found = {p: when for p, _, when in _lives(trace, 0, row, 0) if when >= 0}
        assert found == evicted
