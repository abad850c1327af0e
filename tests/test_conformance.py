"""What presses and policies keep is compared, explained and put into tables."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.conformance import __main__ as command
from bench.conformance import page, setting, undoing
from bench.conformance.agreement import Agreement, Kept, agreement, explain
from bench.conformance.here import Here
from bench.conformance.pairs import PAIRS, UNCOMPARED, Pair
from bench.conformance.there import Refused
from bench.kvpress import ENVIRONMENT
from compressed_cache.eval.catalogue.presses import KVPRESS, PRESSES
from tests.reference.kvzip import kept_afterwards, repeated, score_context
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules

KNORM = Pair("KnormPress()", '"knorm"', "told")
PAGE = "before\n<!-- conformance:begin -->\nformer\n<!-- conformance:end -->\nafter\n"


def test_heads_and_positions_are_counted_over_cuts_and_layers() -> None:
    ours = [[[[0, 1, 2], [0, 4]], [[5, 6], [7]]], [[[1], [2]], [[3], [4]]]]
    theirs = [[[[0, 1, 2], [4, 5]], [[5, 6], [7, 8, 9]]], [[[1], [2]], [[3], [4]]]]
    assert agreement(ours, theirs) == Agreement(8, 6, 14, 11)
    assert agreement(ours[1:], theirs[1:]).is_complete
    assert not agreement(ours, theirs).is_complete


def test_what_was_not_cut_as_often_is_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        agreement([[[[0]]], [[[0]]]], [[[[0]]]])
    with pytest.raises(ValueError, match="shorter"):
        agreement([[[[0], [1]]]], [[[[0]]]])


def _runs(*needed: str) -> Any:
    """Two heads that are equal once all of these are undone, and a list that notes each run."""
    calls: list[tuple[str, ...]] = []

    def run(undone: tuple[str, ...]) -> Agreement:
        calls.append(undone)
        return Agreement(2, 2, 10, 10) if set(needed) <= set(undone) else Agreement(2, 1, 10, 7)

    return run, calls


def test_causes_are_those_that_are_missed() -> None:
    run, _ = _runs("order", "angles")
    found = explain(run, ["passed on", "order", "angles"])
    assert found.causes == ("order", "angles")
    assert found.undone.is_complete and not found.as_is.is_complete


def test_nothing_is_undone_where_all_is_equal() -> None:
    run, calls = _runs()
    assert explain(run, ["order"]) == (Agreement(2, 2, 10, 10), Agreement(2, 2, 10, 10), ())
    assert calls == [()]


def test_undoing_what_does_not_help_is_no_cause() -> None:
    run, calls = _runs("something else")
    found = explain(run, ["order", "angles"])
    assert found.causes == () and found.undone == found.as_is
    assert calls == [(), ("order", "angles")]


def test_causes_of_which_each_suffices_are_all_named() -> None:
    def run(undone: tuple[str, ...]) -> Agreement:
        return Agreement(1, bool(undone), 4, 4 if undone else 1)

    assert explain(run, ["order", "ties"]).causes == ("order", "ties")


def test_a_cause_may_be_that_one_side_keeps_more() -> None:
    def run(undone: tuple[str, ...]) -> Agreement:
        return Agreement(1, 1, 4, 4) if "rounding" in undone else Agreement(1, 0, 5, 4)

    assert explain(run, ["ties", "rounding"]).causes == ("rounding",)


class There:
    """Keeps what it is told to for each case."""

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    def kept(self, pair: Pair, case: Any, undone: tuple[str, ...]) -> Sequence[Kept]:
        return self._kept(case, undone)


def _rows(here: Any, there: Any) -> dict[str, list[dict[str, Any]]]:
    sides: list[Any] = [There(here), There(there)]
    rows = command.compared(KNORM, *sides)
    prefill = [row for row in rows if row["interval"] is None]
    return {"prefill": prefill, "decoding": rows[len(prefill) :]}


def test_a_row_says_what_remains_and_why() -> None:
    rows = _rows(
        lambda case, undone: [[[[1, 2]]]],
        lambda case, undone: [[[[1, 2] if "order" in undone else [1, 3]]]],
    )
    assert len(rows["prefill"]) == 9 and len(rows["decoding"]) == 3
    # What can be undone in decode steps only is not in the way of a prompt.
    for row in rows["prefill"]:
        assert row["causes"] == ["told"]
        assert row["as_is"] == row["undone"] == Agreement(1, 0, 2, 1)._asdict()
    for row in rows["decoding"]:
        assert row["causes"] == [undoing.CAUSES["order"]]
        assert row["undone"]["equal_heads"] == 1


def test_a_difference_that_nobody_told_of_is_not_explained() -> None:
    sides: list[Any] = [There(lambda *_: [[[[1]]]]), There(lambda *_: [[[[2]]]])]
    rows = command.compared(KNORM._replace(why=""), *sides)
    assert {cause for row in rows for cause in row["causes"]} == {"not explained"}
    rows = command.compared(KNORM._replace(why_decoding="another"), *sides)
    assert [row["causes"] for row in rows[-4:]] == [["told"], *[["another"]] * 3]


def test_refusals_are_told() -> None:
    def refused(case: Any, undone: Any) -> Sequence[Kept]:
        raise Refused("AssertionError: no")

    def unknown(case: Any, undone: Any) -> Sequence[Kept]:
        raise ValueError("unknown policy. And more")

    rows = _rows(unknown, lambda case, undone: [[[[1]]]])
    assert rows["prefill"][0]["causes"] == ["refused here (unknown policy)"]
    rows = _rows(lambda case, undone: [[[[1]]]], refused)
    assert rows["decoding"][0]["causes"] == ["refused there (AssertionError: no)"]
    assert rows["decoding"][0]["as_is"] is None


def _row(interval: int | None, as_is: Agreement | None, undone: Any, *causes: str) -> page.Row:
    return {
        "press": "KnormPress()",
        "here": '"knorm"',
        "interval": interval,
        "as_is": as_is and as_is._asdict(),
        "undone": undone and undone._asdict(),
        "causes": list(causes),
    }


def test_tables_show_sums_what_is_undone_and_each_cause_once() -> None:
    some, all_ = Agreement(8, 6, 1000, 999), Agreement(8, 8, 1000, 1000)
    rows = [
        _row(None, all_, all_),
        _row(None, some, some, "told"),
        _row(None, some, some, "told"),
        _row(1, None, None, "refused there (no)"),
        _row(8, some, all_, "undone", "told"),
    ]
    text = page.filled(PAGE, {"versions": {"kvpress": "1", "torch": "2"}, "rows": rows})
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    assert "kvpress 1, torch 2." in text
    # Not 100%: that would be all.
    assert '| `KnormPress()` | `"knorm"` | 20 of 24 (99% of positions) | told |' in text
    assert "| press | here | cut every 1 | cut every 8 | causes |" in text
    assert (
        '| `KnormPress()` | `"knorm"` | refused | 6 of 8 (99% of positions) → **8 of 8** | '
        "refused there (no); undone; told |"
    ) in text
    assert f"- `RandomPress`: {UNCOMPARED['RandomPress']}." in text


def test_what_never_ran_is_told_below_a_table() -> None:
    ran = _row(8, Agreement(1, 1, 1, 1), Agreement(1, 1, 1, 1))
    never = [_row(n, None, None, "refused there (no)") | {"press": "FinchPress()"} for n in (1, 8)]
    half = [_row(n, None, None, "refused there (no)") | {"press": "Half()"} for n in (1, 8)]
    half[1] |= {name: ran[name] for name in ("as_is", "undone")}
    text = page.tables({"versions": {}, "rows": [ran, *never, *half]})
    assert "| `FinchPress()`" not in text
    assert '- `FinchPress()`, here `"knorm"`: refused there (no).' in text
    assert "| `Half()`" in text and "- `Half()`" not in text


def test_the_page_shows_what_the_command_found() -> None:
    document = json.loads(command.RESULTS.read_text())
    assert page.filled(page.PAGE.read_text(), document) == page.PAGE.read_text()
    compared = {(row["press"], row["here"]) for row in document["rows"]}
    assert compared == {(pair.press, pair.here) for pair in PAIRS}
    causes = {cause for row in document["rows"] for cause in row["causes"]}
    assert "not explained" not in causes


def test_each_cause_that_is_undone_is_told_of_on_the_page() -> None:
    assert set(undoing.PREFILL) | set(undoing.DECODING) == set(undoing.CAUSES)
    for cause in undoing.CAUSES.values():
        assert f"| {cause} |" in page.PAGE.read_text()


def test_every_press_with_a_counterpart_is_compared_or_said_not_to_be() -> None:
    told = {press.name for press in PRESSES if press.origin == KVPRESS and press.here}
    run = {name for name in told if any(f"{name}(" in pair.press for pair in PAIRS)}
    assert told == run | set(UNCOMPARED)
    assert not run & set(UNCOMPARED)
    assert len({(pair.press, pair.here) for pair in PAIRS}) == len(PAIRS)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    return Here(setting.make(tmp_path_factory.mktemp("setting")))


def test_what_is_kept_here_is_the_budget_of_the_press(here: Here) -> None:
    case = setting.PrefillCase(100, 0.7)
    (kept,) = here.kept(KNORM, case, ())
    assert [[len(head) for head in layer] for layer in kept] == [[30, 30]] * 4
    norms = here.setting.model.model.layers[0].self_attn
    with torch.no_grad():
        states = here.setting.model.model.layers[0].input_layernorm(
            here.setting.model.model.embed_tokens(torch.tensor(setting.text(case)))
        )
        lengths = norms.k_proj(states).unflatten(-1, (2, 12)).norm(dim=-1)
    for head in range(2):
        assert kept[0][head] == sorted(lengths[:, head].argsort()[:30].tolist())


def test_a_budget_may_be_that_of_the_counterpart(here: Here) -> None:
    pair = Pair("", '"knorm", budget=[tokens, 5, int(tokens * ratio), 7]')
    (kept,) = here.kept(pair, setting.PrefillCase(100, 0.25), ())
    assert [len(layer[0]) for layer in kept] == [100, 5, 25, 7]


def test_a_prompt_read_in_blocks_is_cut_after_each(here: Here) -> None:
    newest = Pair("", '"streaming_llm", sinks=0', block=16)
    (kept,) = here.kept(newest, setting.PrefillCase(100, 0.7), ())
    assert kept == [[list(range(70, 100))] * 2] * 4
    (blocks,), (whole,) = (
        here.kept(Pair("", '"keydiff"', block=block), setting.PrefillCase(100, 0.7), ())
        for block in (16, 0)
    )
    assert blocks[0] != whole[0]


def test_a_prompt_is_repeated_in_the_words_of_the_press(here: Here) -> None:
    pair = Pair("", '"kvzip+adakv", floor=0.0, sinks=4, repeat_chunk=16, **wordings')
    case = setting.PrefillCase(40, 0.5)
    (kept,) = here.kept(pair, case, ())
    encode = partial(here.setting.tokenizer.encode, add_special_tokens=False)
    first, later, suffix = map(encode, [*setting.WORDINGS.values(), setting.SUFFIX])
    reference, ids = ReferenceLlama(here.setting.model), setting.text(case)
    words: Any = dict(first=first, later=later, suffix=suffix)
    parts = repeated(ids, sinks=4, chunk=16, overlap=8, **words)
    scores = score_context(reference, ids, parts, sinks=4)
    rules = Rules(case.kept, 1, sinks=4)
    (expected,) = kept_afterwards(reference, ids, scores, [], rules, floor=0.0)
    assert kept == [[list(head) for head in layer] for layer in expected]


@pytest.mark.parametrize("interval", setting.INTERVALS)
def test_what_a_cut_has_left_is_told(here: Here, interval: int) -> None:
    newest = Pair("", '"streaming_llm", sinks=4')
    cuts = here.kept(newest, setting.DecodingCase(interval), ())
    assert len(cuts) == 96 // interval - 1
    for index, layers in enumerate(cuts, start=1):
        end = 100 + index * interval
        assert layers == [[[0, 1, 2, 3, *range(end - 96, end)]] * 2] * 4


def test_silent_layers_pass_no_attention_on(here: Here) -> None:
    pair, case = Pair("", '"knorm"'), setting.DecodingCase(24)
    loud, silent = here.kept(pair, case, ()), here.kept(pair, case, ("passed on",))
    assert [cut[0] for cut in loud] == [cut[0] for cut in silent]
    assert loud != silent
    # The hooks are gone.
    other = Here(here.setting)
    assert other.kept(pair, case, ()) == loud


@pytest.mark.slow
@pytest.mark.skipif(not (ENVIRONMENT / "installed").exists(), reason="kvpress is not installed")
def test_the_command_compares_and_writes(tmp_path: Path) -> None:
    out, text = tmp_path / "out.json", tmp_path / "page.md"
    text.write_text(PAGE)
    arguments = ["--out", str(out), "--page", str(text)]
    command.main(["--only", "KnormPress()", *arguments])
    rows = json.loads(out.read_text())["rows"]
    pair = [row for row in rows if row["press"] == "KnormPress()"]
    assert len(pair) == 12
    assert all(row["undone"]["equal_heads"] == row["undone"]["heads"] for row in pair)
    assert "**72 of 72**" in text.read_text()
    # The others keep their rows.
    command.main(["--only", "StreamingLLMPress", *arguments])
    assert [row for row in json.loads(out.read_text())["rows"] if row in rows] == rows


def test_help_does_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "kvpress", SimpleNamespace())
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "--only" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--only", "NoSuchPress"])
    assert "NoSuchPress" in capsys.readouterr().err
