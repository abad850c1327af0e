"""Agreement with the full cache: what is measured, and the command."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.__main__ import main
from compressed_cache.eval.agreement.reader import Reader
from compressed_cache.eval.agreement.reading import Compared, read
from compressed_cache.eval.agreement.statistics import Document, summary
from compressed_cache.eval.agreement.text import Batch, Text, batch
from compressed_cache.eval.agreement.writing import write
from compressed_cache.eval.results.comparison import compare
from compressed_cache.eval.results.row import Agreement
from compressed_cache.eval.results.row import read as rows_of
from compressed_cache.reasoner import MODEL_PATH
from tests.conftest import distinct_tokens
from tests.families import FAMILIES, LINEAR, Family
from tests.results import make_agreement, typed

pytest.importorskip("lm_eval")
from compressed_cache.eval.sweep import processes, prompts, tasks
from compressed_cache.eval.sweep.cell import take
from compressed_cache.eval.sweep.folder import Folder
from compressed_cache.eval.sweep.group import MOST, Group, together
from compressed_cache.eval.sweep.plan import Cell, Plan

EASY = "reasoning_shipped_easy"
BUDGET, LENGTHS, LONGEST = 20, (9, 30, 17), 24


def text(prompt: list[int], answer: list[int], name: str = "0") -> Text:
    return Text(document=name, prompt=prompt, answer=answer, words="", weights="")


def texts_of(model: Any) -> list[Text]:
    """Prompts of unequal length with answers of unequal length."""
    asked = [distinct_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    answers = write(model, asked, limit=LONGEST, ends=set())
    lengths = (LONGEST, 11, 19)
    return [
        text(prompt, answer[:length], str(number))
        for number, (prompt, answer, length) in enumerate(zip(asked, answers, lengths, strict=True))
    ]


def makes(policy: str, budget: int = BUDGET, **options: Any) -> Callable[[], CompressedCache]:
    return lambda: CompressedCache(policy, budget, **options)


@pytest.fixture(scope="module")
def exact_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Float64: a tie that rounding breaks would be broken otherwise in another batch."""
    return make_model().double()


# What is measured.


def test_the_full_cache_agrees_with_itself(exact_model: LlamaForCausalLM) -> None:
    found = read(
        exact_model,
        batch(texts_of(exact_model), "cpu"),
        {
            "transformers": lambda: DynamicCache(config=exact_model.config),
            "full": makes("full"),
            "room for all": makes("h2o", 64),
        },
    )
    for name, own in found.items():
        assert isinstance(own, Compared)
        assert bool(own.same.all()), name
        limit = 0 if name == "transformers" else 1e-6
        assert float(own.divergence.max()) <= limit
        assert float(own.lost.abs().max()) <= limit


# As a decorator: inside, it would hold for whoever takes what is yielded.
@torch.no_grad()
def _alone(model: Any, one: Text, cache: Any) -> Iterator[Tensor]:
    """Log-probabilities before each token, of a text that is read alone."""
    logits = model(torch.tensor([one.prompt]), past_key_values=cache).logits
    for token in one.answer:
        yield logits[0, -1].double().log_softmax(dim=-1)
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "random"])
def test_a_padded_batch_gives_what_a_slow_loop_gives_for_each_text(
    policy: str, exact_model: LlamaForCausalLM
) -> None:
    texts = texts_of(exact_model)
    options: dict[str, Any] = dict(interval=1, recent=4)
    found = read(exact_model, batch(texts, "cpu"), {policy: makes(policy, **options)})[policy]
    assert isinstance(found, Compared)
    differ = 0
    for row, one in enumerate(texts):
        document = Document.of(one, found, row, BUDGET)
        full = _alone(exact_model, one, DynamicCache(config=exact_model.config))
        own = _alone(exact_model, one, makes(policy, **options)())
        for at, (reference, said) in enumerate(zip(full, own, strict=True)):
            likeliest = int(reference.argmax())
            assert document.same[at] == (int(said.argmax()) == likeliest)
            divergence = sum(
                math.exp(p) * (p - q)
                for p, q in zip(reference.tolist(), said.tolist(), strict=True)
            )
            assert document.divergence[at] == pytest.approx(divergence, abs=1e-5)
            lost = float(reference[likeliest] - said[likeliest])
            assert document.lost[at] == pytest.approx(lost, abs=1e-5)
            differ += not document.same[at]
    assert differ


@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if LINEAR not in family.kinds and not family.vision],
    ids=lambda family: family.name,
)
def test_the_full_cache_writes_what_generate_writes(family: Family) -> None:
    model = family.make()
    asked = [distinct_tokens(1, length, seed=length)[0] % 150 + 1 for length in LENGTHS]
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in asked])
    written = write(model, [row.tolist() for row in asked], limit=12, ends=set())
    expected = model.generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=12, do_sample=False
    )
    assert written == expected[:, width:].tolist()


def test_writing_ends_with_the_token_that_ends_a_text(exact_model: LlamaForCausalLM) -> None:
    asked = [distinct_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    whole = write(exact_model, asked, limit=12, ends=set())
    end = whole[0][3]
    for row, full in zip(write(exact_model, asked, limit=12, ends={end}), whole, strict=True):
        until = full.index(end) + 1 if end in full else 12
        assert row == full[:until]


def test_a_policy_that_fails_does_not_stop_the_others(exact_model: LlamaForCausalLM) -> None:
    found = read(
        exact_model,
        batch(texts_of(exact_model), "cpu"),
        {"prompt": makes("h2o", protect_prompt=True), "h2o": makes("h2o", recent=4)},
    )
    assert isinstance(found["prompt"], ValueError)
    assert isinstance(found["h2o"], Compared)
    only = read(exact_model, batch(texts_of(exact_model), "cpu"), {"x": makes("none")})
    assert "unknown policy" in str(only["x"])


def test_out_of_memory_is_the_error_of_one_policy(
    exact_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Reader.step

    def runs_out(reader: Reader, tokens: Tensor) -> Tensor:
        if isinstance(next(iter(reader._cache.values())), CompressedCache):
            raise torch.OutOfMemoryError("no memory")
        return step(reader, tokens)

    monkeypatch.setattr(Reader, "step", runs_out)
    one = batch(texts_of(exact_model), "cpu")
    caches = {"h2o": makes("h2o"), "full": lambda: DynamicCache(config=exact_model.config)}
    found = read(exact_model, one, caches)
    assert isinstance(found["h2o"], torch.OutOfMemoryError)
    assert isinstance(found["full"], Compared)


def test_tokens_that_cannot_be_count_nothing(exact_model: LlamaForCausalLM) -> None:
    head = exact_model.lm_head

    def forbid(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([3]), -torch.inf)

    handle = head.register_forward_hook(forbid)
    try:
        one = batch(texts_of(exact_model), "cpu")
        found = read(exact_model, one, {"h2o": makes("h2o", recent=4)})["h2o"]
    finally:
        handle.remove()
    assert isinstance(found, Compared)
    assert bool(found.divergence.isfinite().all())


# What a row says.


def _document(same: list[int], late: int, name: str = "0") -> Document:
    return Document(
        name=name,
        prompt_tokens=5,
        late=late,
        same=[bool(one) for one in same],
        divergence=[1.0 - one for one in same],
        lost=[2.0 - 2 * one for one in same],
    )


@pytest.mark.parametrize(
    ("prompt", "budget", "late"),
    [
        # Before token i, prompt + i tokens were read.
        (5, 8, 4),
        (8, 8, 1),
        (9, 8, 1),
        # The first token comes from the whole prompt.
        (50, 8, 1),
        (5, 14, 10),
        (5, 15, 10),
        (5, None, 10),
    ],
)
def test_late_positions_begin_where_the_budget_is_exceeded(
    prompt: int, budget: int | None, late: int
) -> None:
    compared = Compared(torch.ones(1, 12, dtype=torch.bool), *torch.zeros(2, 1, 12))
    found = Document.of(text([1] * prompt, [2] * 10), compared, 0, budget)
    assert found.late == late
    assert len(found.same) == 10


def test_documents_count_the_same_however_long_they_are() -> None:
    found = summary([_document([1, 0, 0, 0, 1, 1, 1, 1, 1], 1, "a"), _document([1, 1], 1, "b")])
    assert found["agreements"] == {"a": 5 / 8, "b": 1}
    assert found["agreement"] == pytest.approx(13 / 16)
    assert found["agreement_se"] == pytest.approx(3 / 16)
    assert found["divergence"] == pytest.approx(3 / 16)
    assert found["lost"] == pytest.approx(3 / 8)
    assert (found["late_positions"], found["late_documents"]) == (9, 2)
    assert found["early_agreement"] == 1
    assert found["first_difference"] == pytest.approx((1 + 2) / 2)
    assert found["identical"] == 0.5


def test_where_nothing_is_late_there_is_no_agreement() -> None:
    found = summary([_document([1, 1, 1], 3)])
    assert found["agreement"] is None and found["divergence"] is None and found["lost"] is None
    assert (found["late_positions"], found["late_documents"], found["agreements"]) == (0, 0, {})
    assert found["early_agreement"] == 1
    assert found["first_difference_se"] is None


def test_two_policies_are_compared_by_their_late_positions() -> None:
    rows = [
        make_agreement(policy="h2o", agreements={"a": 0.9, "b": 0.8}),
        make_agreement(policy="snapkv", agreements={"a": 0.7, "b": 0.6}),
        make_agreement(policy="h2o", budget=512, agreement=None, agreements={}),
        make_agreement(policy="snapkv", budget=512, agreement=None, agreements={}),
        make_agreement(policy="full", budget=None, agreement=None, agreements={}),
    ]
    (found,) = compare(rows, "h2o", "snapkv")
    assert (found.budget, found.measure, found.better) == (64, "agreement", (2, 0))
    assert found.difference == pytest.approx(0.2)
    with pytest.raises(ValueError, match="rows of 'full' must have evicted something"):
        compare(rows, "full", "h2o")


# The command.

PLAN = Plan(
    model="shipped",
    tasks=[EASY],
    policies=["full", "h2o", "random"],
    budgets=[48, 64],
    seeds=1,
    limit=3,
    gen_kwargs={"max_gen_toks": 40},
    batch_size=2,
    measure="agreement",
)


def arguments(out: Path, **changes: str | None) -> list[str]:
    """The command for :data:`PLAN`; None leaves an option out."""
    options: dict[str, str | None] = {
        "model": "shipped",
        "task": EASY,
        "policies": "h2o,random",
        "budgets": "48,64",
        "limit": "3",
        "max-new-tokens": "40",
        "batch-size": "2",
        "out": str(out),
    }
    return typed("agree", options, **changes)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Cells run in this process; the names of those that ran together, in their order."""
    ran: list[list[str]] = []

    def run(
        plan: Plan, phases: Iterable[Iterable[Group]], folder: Folder, **options: Any
    ) -> Iterator[Cell]:
        for phase in phases:
            for group in phase:
                ran.append([cell.name for cell in group.cells])
                partials = [folder.begin(cell) for cell in group.cells]
                take(plan, group, partials)
                for cell, partial in zip(group.cells, partials, strict=True):
                    folder.publish(cell, partial)
                    yield cell

    monkeypatch.setattr(processes, "run", run)
    return ran


def essence(out: Path) -> dict[str, Any]:
    """What does not depend on when a row was measured, and on what ran beside."""
    keys = ("agreement", "divergence", "lost", "first_difference", "early_agreement")
    return {
        f"{row.policy} {row.budget} {key}": getattr(row, key)
        for row in rows_of(out)
        if isinstance(row, Agreement)
        for key in keys
        if getattr(row, key) is not None
    }


def test_the_command_measures_resumes_and_is_compared_and_reported(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(out)) == 0
    names = [f"{EASY}.{policy}.{b}.0" for policy in ("h2o", "random") for b in (48, 64)]
    assert groups == [[f"{EASY}.full.0"], names]
    printed = capsys.readouterr().out
    assert re.search(r"full\.0: 3 texts of 40 tokens after prompts of 40, 100\.0% agree", printed)
    assert re.search(
        r"h2o\.48\.0: 9\d\.\d% ± \d\.\d of \d+ late positions agree \(3 of 3 texts\), diverg",
        printed,
    )
    rows = rows_of(out)
    assert [row.policy for row in rows] == ["full", "h2o", "h2o", "random", "random"]
    full, *others = [row for row in rows if isinstance(row, Agreement)]
    assert (full.late_positions, full.agreement, full.early_agreement) == (0, None, 1)
    for row in others:
        assert row.budget and row.late_positions == 3 * (40 - (row.budget + 1 - 40))
        assert row.early_agreement == 1 and row.weights == full.weights
        assert row.agreement is not None and 0.5 < row.agreement < 1
        assert ("recent" if row.policy == "h2o" else "seed") in row.options
    sample = json.loads((out / "cells" / names[0] / "samples.jsonl").read_text().splitlines()[0])
    assert sample["late"] == 9 and len(sample["same"]) == len(sample["lost"]) == 40

    # A killed one goes on: what is there is neither written nor read again.
    before = essence(out)
    shutil.rmtree(out / "cells" / names[2])
    texts = out / "cells" / f"{EASY}.full.0" / "texts.jsonl"
    written = texts.stat().st_mtime_ns
    groups.clear()
    assert main(arguments(out)) == 0
    assert groups == [[names[2]]]
    assert texts.stat().st_mtime_ns == written
    assert essence(out) == pytest.approx(before, rel=1e-5)

    capsys.readouterr()
    assert main(["compare", str(out), "--policies=h2o,random"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[2].startswith(f"| agreement | shipped | {EASY} | 48 | 3 | 1 |")
    page = tmp_path / "page.html"
    assert main(["report", str(out), f"--out={page}"]) == 0
    html = page.read_text()
    assert "Agreement with the full cache" in html and "Agreement of policies beside" in html
    assert "Accuracy against budget" not in html


@pytest.mark.slow
def test_a_sweep_asks_for_the_same(groups: list[list[str]], tmp_path: Path) -> None:
    typed = arguments(tmp_path / "sweep", policies="h2o", max_new_tokens=None, task=None)
    more = ["--measure=agreement", f"--tasks={EASY}", "--gen-kwargs=max_gen_toks=40"]
    assert main(["sweep", *typed[1:], *more]) == 0
    # One batch for all, which rounds otherwise.
    assert main(arguments(tmp_path / "agree", policies="h2o", batch_size="3")) == 0
    found, expected = essence(tmp_path / "sweep"), essence(tmp_path / "agree")
    assert {name.rpartition(" ")[0] for name in found} == {"full None", "h2o 48", "h2o 64"}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_file_of_paragraphs_is_gone_on_with(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_text("oil 9p plus tax 1\ntin 3p\n \n\n\negg 2p plus tax 1 is 3 so\n")
    assert prompts.of_file(file) == ["oil 9p plus tax 1\ntin 3p", "egg 2p plus tax 1 is 3 so"]
    out = tmp_path / "out"
    typed = arguments(out, task=None, text=str(file), limit=None, policies="h2o", budgets="8,400")
    assert main([*typed, "--policy-args=recent=2"]) == 0
    captured = capsys.readouterr()
    assert "h2o.400.0: NOTHING WAS EVICTED, no prompt and text is longer than" in captured.out
    assert "nothing was evicted in 1 of 3 rows" in captured.err
    assert "(text-my prompts.txt at 400). Use smaller --budgets" in captured.err
    assert [(row.task, row.documents) for row in rows_of(out)] == [("text-my prompts.txt", 2)] * 3
    # Another text of the same name is another plan.
    file.write_text("oil 9p plus tax 1")
    assert main([*typed, "--policy-args=recent=2"]) == 1
    assert "holds another plan: prompts" in capsys.readouterr().err


def test_a_full_cache_that_fails_leaves_the_others_to_do(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("egg 2p " * 3000)
    out = tmp_path / "out"
    assert main(arguments(out, task=None, text=str(file), policies="h2o", budgets="48")) == 1
    captured = capsys.readouterr()
    assert "failed, ValueError: paragraph 0-" in captured.out
    assert "Allow less (--max-new-tokens" in captured.out
    assert "1 cells wait for the texts of the full cache, which failed" in captured.err
    assert groups == [["text-long.txt.full.0"]]


def test_one_policy_that_fails_is_recorded_and_the_rest_go_on(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its last layers have less than the budget.
    typed = arguments(tmp_path, policies="pyramidkv,random", budgets="48")
    assert main([*typed, "--policy-args=pyramidkv:protect_prompt=true"]) == 1
    captured = capsys.readouterr()
    assert "pyramidkv.48.0: failed, ValueError: budget must be at least prompt" in captured.out
    assert "1 of 3 cells failed" in captured.err
    assert [f"{row.policy} {row.budget}" for row in rows_of(tmp_path)] == ["full None", "random 48"]
    # Of a process of its own, that goes to its log.
    assert "Traceback" in captured.err


def test_texts_of_other_weights_are_refused(groups: list[list[str]], tmp_path: Path) -> None:
    assert main(arguments(tmp_path, policies="h2o", budgets="48")) == 0
    path = tmp_path / "cells" / f"{EASY}.full.0" / "texts.jsonl"
    lines = [json.loads(line) | {"weights": "0" * 16} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(tmp_path / "cells" / f"{EASY}.h2o.48.0")
    assert main(arguments(tmp_path, policies="h2o", budgets="48")) == 1
    error = json.loads((tmp_path / "cells" / f"{EASY}.h2o.48.0" / "error.json").read_text())
    assert "must have the weights that wrote the texts, 0000000000000000, got" in error["error"]


def test_a_folder_of_another_model_or_measure_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Folder(tmp_path).open(PLAN):
        pass
    other = tmp_path / "model"
    shutil.copytree(MODEL_PATH, other, ignore=shutil.ignore_patterns("calibration"))
    assert main(arguments(tmp_path, model=str(other))) == 1
    assert f"holds another plan: model shipped there, {other} here" in capsys.readouterr().err
    typed = ["sweep", *arguments(tmp_path, max_new_tokens=None, task=None)[1:], f"--tasks={EASY}"]
    assert main([*typed, "--gen-kwargs=max_gen_toks=40"]) == 1
    assert "measure agreement there, accuracy here" in capsys.readouterr().err


def test_texts_that_are_not_whole_are_refused(
    groups: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, policies="full", budgets=None)) == 0
    folder = tmp_path / "cells" / f"{EASY}.full.0"
    (folder / "texts.jsonl").write_text("{")
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan |= {"policies": ["full", "h2o"], "budgets": [48]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    capsys.readouterr()
    assert main(arguments(tmp_path, policies="h2o", budgets="48")) == 1
    said = capsys.readouterr().err
    assert "texts.jsonl must hold the texts of the full cache" in said
    assert f"Remove {folder} to have them written again" in said


WRONG: dict[str, tuple[dict[str, str | None], str]] = {
    "no tokens": ({"max_new_tokens": "0"}, r"--max-new-tokens must be >= 1, got 0"),
    "no file": ({"task": None, "text": "/nowhere"}, r"--text /nowhere: No such file"),
    "an unknown task": ({"task": "reasoning_gsm8"}, r"--tasks: unknown task 'reasoning_gsm8'"),
    "an unknown policy": ({"policies": "h20"}, r"unknown policy 'h20'.*Did you mean 'h2o'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_before_anything_runs(
    changes: dict[str, str | None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All tasks of lm_eval take seconds to read.
    monkeypatch.setattr(tasks, "HARNESS", tmp_path)
    out = tmp_path / "out"
    assert main(arguments(out, **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not out.exists()


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe"])
def test_a_file_without_text_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a"
    file.write_bytes(content)
    assert main(arguments(tmp_path / "out", task=None, text=str(file))) == 2
    assert f"{file} must " in capsys.readouterr().err


def test_a_chat_template_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not AutoTokenizer.from_pretrained(MODEL_PATH).chat_template
    assert main([*arguments(tmp_path / "out"), "--chat"]) == 2
    assert re.search(
        r"--apply-chat-template: the tokenizer of .* has no chat template", capsys.readouterr().err
    )


def test_agreement_takes_no_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = arguments(tmp_path / "out", max_new_tokens=None, task=None)
    more = ["--measure=agreement", f"--tasks={EASY}", "--gen-kwargs=do_sample=true"]
    assert main(["sweep", *typed[1:], *more]) == 2
    assert "--gen-kwargs must have max_gen_toks alone with --measure agreement, got do_sample" in (
        capsys.readouterr().err
    )


def test_a_task_or_a_text_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["--task=a", "--text=b"]):
        with pytest.raises(SystemExit):
            main(["agree", "--model=shipped", "--policies=h2o", *wrong])
    with pytest.raises(SystemExit) as ended:
        main(["agree", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each paragraph, divided from the next by a blank line, is a prompt" in said
    assert "Late positions are those where prompt and text so far are longer" in said


def test_groups_keep_all_processes_at_work() -> None:
    cells = [cell for cell in PLAN.cells() if cell.policy != "full"] * 5
    sizes = [len(group.cells) for group in together(cells, (), processes=1)]
    assert sum(sizes) == len(cells) == 20 and max(sizes) == MOST
    assert [len(group.cells) for group in together(cells[:4], (), processes=2)] == [2, 2]
    assert list(together([], (), processes=2)) == []


def test_a_batch_is_padded_on_both_sides() -> None:
    found = batch([text([5, 6, 7], [8]), text([9], [1, 2])], "cpu")
    assert isinstance(found, Batch)
    assert found.ids.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert found.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found.answers.tolist() == [[8, 0], [1, 2]]
    assert found.lengths.tolist() == [1, 2]
