"""What a run took: exact by a clock made for it, the same text, the same graphs."""

import csv
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from compressed_cache import CompressedCache, DraftStatistics, decode, lossless
from compressed_cache.hf.verifier import Verifier
from compressed_cache.telemetry import Timing, measure, timestamps
from compressed_cache.telemetry.timing import total
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens

PROMPT, NEW, BUDGET, ROWS = 20, 5, 12, 2

SetClock = Callable[[Sequence[float]], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetClock]:
    """Says what the clock shows when it is read; all of that must be asked for."""
    left: list[Iterator[float]] = []

    def set_clock(moments: Sequence[float]) -> None:
        left[:] = [iter(moments)]
        clock = SimpleNamespace(perf_counter=lambda: next(left[0]))
        monkeypatch.setattr(timestamps, "time", clock)

    yield set_clock
    assert all(next(moments, None) is None for moments in left)


def _generate(model: Any, ids: Tensor, cache: Any, **more: Any) -> Any:
    given = {} if cache is None else cache_argument(cache)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **given, **more})


@pytest.fixture
def ids() -> Tensor:
    return distinct_tokens(ROWS, PROMPT)


# By the cache alone.


def test_a_cache_times_every_step_but_the_last(
    model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock
) -> None:
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    # The prompt and four steps begin.
    set_clock([10, 13, 14, 16, 20])
    _generate(model, ids, cache)
    timing = cache.timing()
    assert timing.prefill_s == 3
    assert timing.step_s == (1, 2, 4)
    assert timing.decode_s == 7
    assert timing.tokens_in == ROWS * PROMPT
    assert timing.tokens_out == ROWS * (NEW - 1)
    assert timing.tokens_per_s == ROWS * 3 / 7
    assert timing.evicted_tokens == cache.evicted_tokens == PROMPT + NEW - 1 - BUDGET
    assert timing.cache_bytes == cache.nbytes
    assert timing.peak_allocated_bytes is timing.peak_reserved_bytes is None
    assert timing.peak_rss_bytes is None or timing.peak_rss_bytes > cache.nbytes
    assert cache.timing().step_s == timing.step_s


def test_chunks_are_prefill_and_waiting_for_a_further_prompt_is_not_counted(
    model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock
) -> None:
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    # Three chunks and two steps; then, much later, a further prompt and two steps.
    set_clock([0, 1, 3, 7, 15, 1000, 1010, 1011])
    text = _generate(model, ids, cache, prefill_chunk_size=8, max_new_tokens=3)
    _generate(model, torch.cat([text, ids[:, :4]], dim=1), cache, max_new_tokens=3)
    timing = cache.timing()
    assert timing.prefill_s == 7 + 10
    assert timing.step_s == (8, 1)
    # The last token of an answer is read with what follows it.
    assert timing.tokens_in == ROWS * (PROMPT + 5)
    assert timing.tokens_out == ROWS * 4


@pytest.mark.parametrize("what", ["reset", "restore"])
def test_another_text_is_timed_anew(
    model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock, what: str
) -> None:
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    set_clock([0, 1, 3, 7, 15, 100, 200, 201, 203, 206])
    first = _generate(model, ids, cache)
    if what == "reset":
        cache.reset()
        _generate(model, ids, cache)
        assert cache.timing().prefill_s == 100
        assert cache.timing().step_s == (1, 2, 3)
    else:
        cache.restore(cache.snapshot())
        text = torch.cat([first, ids[:, :3]], dim=1)
        _generate(model, text, cache)
        assert cache.timing().prefill_s == 100
        assert cache.timing().tokens_in == ROWS * 4


def test_a_prompt_that_was_refused_is_not_timed(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", BUDGET, protect_prompt=True, recent=2, telemetry=True)
    with pytest.raises(ValueError, match="budget must be at least prompt"):
        model(distinct_tokens(ROWS, PROMPT), **cache_argument(cache))
    ids = distinct_tokens(ROWS, 8)
    for tokens in (ids, ids[:, :1], ids[:, :1]):
        model(tokens, **cache_argument(cache))
    assert cache.timing().tokens_in == ROWS * 8
    assert cache.timing().tokens_out == ROWS * 2


@pytest.mark.slow
def test_a_compiled_step_is_timed_and_is_the_same(make_model: Callable[..., Any]) -> None:
    model, ids = make_model(num_hidden_layers=1), distinct_tokens(ROWS, PROMPT)
    texts = []
    for telemetry in (False, True):
        torch._dynamo.reset()
        backend, cache = CountingBackend(), CompressedCache("h2o", BUDGET, telemetry=telemetry)
        options = {"compile_config": compiled(backend), "custom_generate": decode}
        texts.append(_generate(model, ids, cache, **options))
        assert backend.graphs == 1
    torch._dynamo.reset()
    assert torch.equal(*texts)
    assert len(cache.timing().step_s) == NEW - 2


def test_off_is_off(model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock) -> None:
    # A clock that cannot be read.
    set_clock([])
    cache = CompressedCache("h2o", BUDGET)
    _generate(model, ids, cache)
    assert not cache.observers and not cache.readers
    with pytest.raises(ValueError, match="telemetry must be True for timing, got False"):
        cache.timing()


def test_before_the_first_step_there_is_nothing_to_tell(
    model: LlamaForCausalLM, ids: Tensor
) -> None:
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    with pytest.raises(ValueError, match=r"after a decode step, got .* read 0 tokens"):
        cache.timing()
    model(ids, **cache_argument(cache))
    with pytest.raises(ValueError, match=f"after a decode step, got .* read {PROMPT} tokens"):
        cache.timing()


def test_drafts_are_refused(model: LlamaForCausalLM, ids: Tensor) -> None:
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    with pytest.raises(NotImplementedError, match="telemetry cannot tell drafted tokens"):
        _generate(model, ids[:1], cache, prompt_lookup_num_tokens=3)


# Around generate.


CACHES: dict[str, Callable[[Any], Any]] = {
    "compressed": lambda model: CompressedCache("h2o", BUDGET),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=PROMPT + NEW),
    "generate's own": lambda model: None,
}


@pytest.mark.parametrize("kind", CACHES)
def test_measure_is_exact_with_any_cache(
    model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock, kind: str
) -> None:
    cache = CACHES[kind](model)
    plain = _generate(model, ids, CACHES[kind](model))
    # The begin, and the logits of five tokens; or of the prompt, of four steps, and the end.
    prompt = [11] if kind == "compressed" else []
    set_clock([10, *prompt, 13, 14, 16, 20, 28])
    with measure(model) as m:
        text = _generate(model, ids, cache)
    assert torch.equal(text, plain)
    timing = m.timing
    assert m.runs == [timing]
    assert timing.prefill_s == 3
    assert timing.step_s == (1, 2, 4, 8)
    assert timing.decode_s == 15
    assert timing.tokens_per_s == ROWS * 4 / 15
    assert timing.tokens_in == ROWS * PROMPT
    assert timing.tokens_out == ROWS * NEW
    if kind == "compressed":
        assert timing.evicted_tokens == PROMPT + NEW - 1 - BUDGET
        assert timing.cache_bytes == cache.nbytes
    else:
        assert timing.evicted_tokens == 0
        # Keys and values of two layers of two heads, in float32.
        token = 2 * 2 * 2 * model.config.head_dim * 4
        if kind == "static":
            assert timing.cache_bytes >= ROWS * (PROMPT + NEW) * token
        else:
            assert timing.cache_bytes == ROWS * (PROMPT + NEW - 1) * token


def test_measure_adds_up_runs_and_counts_only_what_was_read(
    model: LlamaForCausalLM, ids: Tensor, set_clock: SetClock
) -> None:
    cache = CompressedCache("h2o", BUDGET)
    set_clock([0, 0.5, 1, 3, 7, 1000, 1000.5, 1010, 1011])
    with measure(model) as m:
        text = _generate(model, ids, cache, max_new_tokens=3)
        _generate(model, torch.cat([text, ids[:, :4]], dim=1), cache, max_new_tokens=2)
    first, second = m.runs
    assert (first.prefill_s, first.step_s) == (1, (2, 4))
    assert (second.prefill_s, second.step_s) == (10, (1,))
    assert second.tokens_in == ROWS * 5
    timing = m.timing
    assert (timing.prefill_s, timing.decode_s, timing.step_s) == (11, 7, (2, 4, 1))
    assert (timing.tokens_in, timing.tokens_out) == (ROWS * (PROMPT + 5), ROWS * 5)
    assert timing.tokens_per_s == pytest.approx(ROWS * 3 / 7)
    assert timing.evicted_tokens == cache.evicted_tokens == PROMPT + 8 - BUDGET
    assert timing.cache_bytes == cache.nbytes


def test_one_token_has_no_step(model: LlamaForCausalLM, ids: Tensor) -> None:
    with measure(model) as m:
        _generate(model, ids, None, max_new_tokens=1, use_cache=False)
    assert m.timing.step_s == () and m.timing.decode_s == 0
    assert m.timing.tokens_per_s is None
    assert m.timing.tokens_out == ROWS and m.timing.cache_bytes == 0


def test_measure_leaves_other_models_and_results_alone(
    make_model: Callable[..., Any], ids: Tensor
) -> None:
    model, other = make_model(), make_model()
    with pytest.raises(RuntimeError, match="of the user"), measure(model) as m:
        result = _generate(model, ids, None, return_dict_in_generate=True, output_scores=True)
        _generate(other, ids, None)
        raise RuntimeError("of the user")
    assert len(result.scores) == NEW
    assert len(m.runs) == 1
    assert "generate" not in vars(model)
    _generate(model, ids, None)
    assert len(m.runs) == 1


def test_a_step_compiles_once_under_measure(make_model: Callable[..., Any]) -> None:
    model, ids = make_model(num_hidden_layers=1), distinct_tokens(ROWS, PROMPT)
    torch._dynamo.reset()
    backend, cache = CountingBackend(), CompressedCache("h2o", BUDGET)
    options = {"compile_config": compiled(backend), "custom_generate": decode}
    with measure(model) as m:
        _generate(model, ids, cache, **options)
    torch._dynamo.reset()
    assert backend.graphs == 1
    assert len(m.timing.step_s) == NEW - 1


def test_measure_tells_what_drafts_brought(model: LlamaForCausalLM, ids: Tensor) -> None:
    cache, theirs = CompressedCache("h2o", BUDGET), DraftStatistics()
    options: dict[str, Any] = dict(custom_generate=lossless, adaptive=False, num_draft_tokens=2)
    with measure(model) as m:
        text = _generate(model, ids, cache, statistics=theirs, **options)
        cache.reset()
        _generate(model, ids, cache, **options)
    assert torch.equal(text, _generate(model, ids, DynamicCache(config=model.config)))
    first, second = m.runs
    assert first.drafts == theirs and theirs is not first.drafts
    assert first.drafts and second.drafts and m.timing.drafts
    assert m.timing.drafts.tokens == 2 * theirs.tokens == 2 * ROWS * (NEW - 1)
    assert first.tokens_in == ROWS * PROMPT and first.tokens_out == ROWS * NEW
    assert first.prefill_s > 0 and first.step_s == ()
    assert first.decode_s == first.drafts.drafting_s + first.drafts.verifying_s
    assert first.tokens_per_s == ROWS * (NEW - 1) / first.decode_s
    assert first.cache_bytes > cache.nbytes
    assert m.timing.decode_s == first.decode_s + second.decode_s


def test_the_token_that_ends_a_text_is_read_after_the_prompt(
    model: LlamaForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a loop that has some of its arguments already is known."""
    calls: list[int] = []
    read = Verifier.read

    def slow(self: Any, tokens: Tensor, *args: Any) -> Tensor:
        calls.append(tokens.shape[1])
        time.sleep(0.02)
        return read(self, tokens, *args)

    monkeypatch.setattr(Verifier, "read", slow)
    end = int(_generate(model, ids[:1], DynamicCache(config=model.config))[0, PROMPT + 2])
    drafting = functools.partial(lossless, num_draft_tokens=2, adaptive=False)
    options: dict[str, Any] = dict(custom_generate=drafting, eos_token_id=end, pad_token_id=0)
    with measure(model) as m:
        _generate(model, ids[:1], CompressedCache("h2o", BUDGET), **options)
    assert m.timing.drafts and m.timing.drafts.drafted
    assert calls[-1] == 1 and len(calls) == m.timing.drafts.row_verifications + 1
    assert m.timing.decode_s >= 0.02 * len(calls)


def test_what_measure_cannot_time_is_refused(model: LlamaForCausalLM, ids: Tensor) -> None:
    refused = pytest.raises(TypeError, match=r"model must be a transformers model .* got Linear")
    with refused, measure(torch.nn.Linear(1, 1)):
        pass
    with measure(model) as m:
        with pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens must be left out"):
            _generate(model, ids[:1], None, prompt_lookup_num_tokens=3)
        drafting: dict[str, Any] = dict(custom_generate=lossless, statistics=3)
        with pytest.raises(TypeError, match=r"statistics must be DraftStatistics\(\), got 3"):
            _generate(model, ids[:1], CompressedCache("h2o", BUDGET), **drafting)
        with pytest.raises(ValueError, match="nothing was generated"):
            _ = m.timing


# Files.


@pytest.fixture
def timing() -> Timing:
    return Timing(
        prefill_s=0.1,
        decode_s=0.3,
        tokens_in=7,
        tokens_out=3,
        tokens_per_s=2 / 0.3,
        evicted_tokens=2,
        cache_bytes=100,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        peak_rss_bytes=1 << 40,
        step_s=(0.1, 0.2),
    )


def test_what_is_printed_of_a_timing_is_short(timing: Timing) -> None:
    long = dataclasses.replace(timing, step_s=(0.01,) * 2048)
    assert len(repr(long)) < 340
    assert "tokens_per_s=" in repr(long) and "step_s" not in repr(long)


def test_json_has_every_field(timing: Timing, tmp_path: Path) -> None:
    path = tmp_path / "timing.json"
    timing.write_json(path)
    found = json.loads(path.read_text())
    assert found.pop("format") == 1
    assert Timing(**found | {"step_s": tuple(found["step_s"])}) == timing


def test_csv_has_a_header_and_a_row(timing: Timing, tmp_path: Path) -> None:
    path = tmp_path / "timing.csv"
    timing.write_csv(path)
    with open(path) as file:
        (row,) = csv.DictReader(file)
    assert tuple(map(float, row.pop("step_s").split())) == timing.step_s
    assert {name: float(text) if text else None for name, text in row.items()} == {
        name: value for name, value in vars(timing).items() if name != "step_s"
    }


def test_files_have_what_drafts_brought(timing: Timing, tmp_path: Path) -> None:
    drafts = DraftStatistics(tokens=9, row_verifications=4, drafted=10, accepted=5)
    drafted = dataclasses.replace(timing, drafts=drafts)
    drafted.write_json(tmp_path / "timing.json")
    found = json.loads((tmp_path / "timing.json").read_text())
    assert found["drafts"]["acceptance_rate"] == 0.5
    drafted.write_csv(tmp_path / "timing.csv")
    with open(tmp_path / "timing.csv") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["drafts"]) == drafts.to_json()


def test_of_several_the_most_bytes_count(timing: Timing) -> None:
    other = Timing(**vars(timing) | {"cache_bytes": 90, "peak_rss_bytes": None, "step_s": ()})
    both = total([timing, other])
    assert (both.cache_bytes, both.peak_rss_bytes) == (100, 1 << 40)
    assert both.peak_allocated_bytes is None
    assert both.step_s == timing.step_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiles", [False, True])
def test_on_cuda_events_and_peaks_are_read_after_the_run(
    make_model: Callable[..., Any], compiles: bool
) -> None:
    model, ids = make_model().cuda(), distinct_tokens(ROWS, PROMPT).cuda()
    cache = CompressedCache("h2o", BUDGET, telemetry=True)
    with measure(model) as m:
        _generate(model, ids, cache, disable_compile=not compiles)
    for timing, steps in ((m.timing, NEW - 1), (cache.timing(), NEW - 2)):
        assert len(timing.step_s) == steps
        assert all(0 < seconds < math.inf for seconds in (timing.prefill_s, *timing.step_s))
        assert timing.peak_allocated_bytes > cache.nbytes
        assert timing.peak_reserved_bytes >= timing.peak_allocated_bytes
