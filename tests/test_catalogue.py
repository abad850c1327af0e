"""The catalogue tells what the policies are, and where a press of kvpress is found."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.conformance.pairs import PAIRS
from bench.every_policy import COMBINATIONS, EVERY, statistics
from bench.kvpress import ENVIRONMENT
from compressed_cache import CompressedCache, compress
from compressed_cache.__main__ import main
from compressed_cache.eval.catalogue import entries, entry, page
from compressed_cache.eval.catalogue.docstrings import text_of
from compressed_cache.eval.catalogue.entries import Entry
from compressed_cache.eval.catalogue.presses import FORK, KVPRESS, PRESSES, PressEquivalent
from compressed_cache.policies import MODIFIERS, POLICIES, Policy, split_name
from compressed_cache.policies.capabilities import ReadsTwice
from compressed_cache.reasoner.tokenizer import build_tokenizer
from tests.conftest import distinct_tokens

ENTRIES = {entry.name: entry for entry in entries.every()}
EVICTING = [entry for entry in entries.policies() if entry.evicts]


def test_every_policy_and_modifier_has_an_entry() -> None:
    assert list(ENTRIES) == [*POLICIES, *MODIFIERS]
    tables = page.tables(entries.every())
    for name, one in ENTRIES.items():
        assert f"[`{name}`]({one.file})" in tables


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_nothing_is_left_unsaid(entry: Entry) -> None:
    assert entry.summary.endswith(".")
    assert entry.file.endswith(f"/{entry.name}.py")
    assert entry.name == "full" or entry.papers
    assert entry.name == "full" or re.match(r"Differs .*\.$", entry.deviations)
    for option in entry.options:
        assert option.meaning.endswith("."), option.name
    for text in (entry.summary, entry.deviations, *(o.meaning for o in entry.options)):
        assert "``" not in text and ":class:" not in text and "\n" not in text


def test_needs_follow_from_what_a_policy_asks_for() -> None:
    needs = {name: entry.needs for name, entry in ENTRIES.items()}
    assert needs["random"] == needs["knorm"] == needs["keydiff"] == ()
    assert needs["h2o"] == ("attention of every query",)
    assert needs["tova"] == ("attention of every step",)
    assert needs["snapkv"] == ("last 32 queries",)
    assert needs["caote"] == ("values",)
    rotary = "rotary position embedding"
    assert needs["expected_attention"] == ("queries of the first prompt", "values", rotary)
    assert needs["triattention"] == (rotary, "calibration")
    assert needs["learned_gate"] == ("hidden states", "trained gates")
    for_each_head = [
        name
        for name, kind in POLICIES.items()
        if kind.scores_attention and not (kind().needs.all_heads or kind.same_for_all_heads)
    ]
    assert list(ENTRIES["caote"].works_on[:3]) == for_each_head[:3]


@pytest.mark.parametrize("entry", EVICTING, ids=[entry.name for entry in EVICTING])
def test_state_is_what_a_cache_allocates(entry: Entry, model: LlamaForCausalLM) -> None:
    def nbytes(policy: str, budget: int) -> int:
        cache = CompressedCache(policy, budget, interval=1, protect_prompt=False)
        if issubclass(POLICIES[policy], ReadsTwice):
            compress(model, distinct_tokens(1, 20), cache, tokenizer=build_tokenizer())
        else:
            model(distinct_tokens(1, 20), past_key_values=cache)
        return cache.nbytes

    few, many = (nbytes(entry.name, b) - nbytes("random", b) for b in (128, 192))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    assert many - few == layers * heads * 64 * entry.bytes_per_slot
    window = POLICIES[entry.name]().needs.queries
    # Two query heads per key/value head, of 12 float32 numbers; positions are shared by the heads.
    ring = layers * window * (2 * heads * 12 * 4 + 8)

    # A count, a mean and a covariance.
    def moments(dim: int) -> int:
        return 4 * (1 + dim + dim * dim) * (entry.name == "expected_attention")

    of_queries = ring + layers * 2 * heads * moments(12)
    assert few - layers * heads * 128 * entry.bytes_per_slot == of_queries
    expected = window * (entries.HEAD_DIM * 2 + 8) + moments(entries.HEAD_DIM)
    assert entry.bytes_per_query_head == expected


# What think leaves out of a key depends on the length of the key, which here is another.
@pytest.mark.parametrize("name", [name for name in MODIFIERS if name != "think"])
def test_state_of_a_modifier_is_what_a_cache_allocates(name: str, model: LlamaForCausalLM) -> None:
    entry = ENTRIES[name]
    base = entry.works_on[0]

    def nbytes(policy: str, budget: int) -> int:
        options = statistics(policy, model)
        cache = CompressedCache(policy, budget, interval=1, protect_prompt=False, **options)
        model(distinct_tokens(1, 20), past_key_values=cache)
        return cache.nbytes

    few, many = (nbytes(f"{base}+{name}", b) - nbytes(base, b) for b in (128, 192))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    assert many - few == layers * heads * 64 * entry.bytes_per_slot


def test_a_docstring_falls_into_its_parts() -> None:
    class Example(Policy):
        """Keeps ``few``
        tokens.

        One (https://a.org/1), two (https://a.org/2, https://a.org/1). Differs in one point: it is
        like :class:`~compressed_cache.policies.methods.rkv.RKV`.
        """

    text = text_of(Example)
    assert text.summary == "Keeps `few` tokens."
    assert text.papers == ("https://a.org/1", "https://a.org/2")
    assert text.deviations == "Differs in one point: it is like `RKV`."


def test_the_command_prints_all_or_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line and line[0] != " "] == list(ENTRIES)
    assert all(len(line) <= 100 for line in printed.splitlines() if "http" not in line)
    assert main(["policies", "snapkv"]) == 0
    assert "kernel_size: int = 5" in capsys.readouterr().out
    assert main(["policies", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in read] == list(ENTRIES)
    assert main(["policies", "snapvk"]) == 2
    assert "Did you mean 'snapkv'?" in capsys.readouterr().err
    said = "(compressed-cache presses has others)"
    assert main(["policies", "h2o+nope"]) == 2
    assert re.search(rf"unknown .* 'nope', .* {re.escape(said)}", capsys.readouterr().err)
    assert main(["presses", "nope"]) == 2
    assert "(compressed-cache policies has others)" in capsys.readouterr().err
    for several in ("h2o+caote", "h2o/CAOTE", "H2OPress+caote"):
        assert main(["policies", several, "--json"]) == 0
        read = json.loads(capsys.readouterr().out)
        assert [entry["name"] for entry in read] == ["h2o", "caote"]
    assert main(["policies", "--markdown"]) == 0
    assert "| [`snapkv`]" in capsys.readouterr().out


def test_what_the_command_reads_is_what_the_classes_say() -> None:
    assert entry.FILE.read_text() == entry.text(entries.every())
    # As JSON has no tuples, a default that is one would be told as a list.
    assert entry.read() == entries.every()


@pytest.mark.parametrize("name", ["snapkv", "knorm", "caote"])
def test_markdown_of_one_is_of_that_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", name, "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\| \[`(\w+)`\]", printed, re.MULTILINE) == [name]
    assert ENTRIES[name].deviations in printed
    assert all(option.meaning in printed for option in ENTRIES[name].options)
    assert main(["policies", "snapvk", "--markdown"]) == 2
    for spelling in (name.upper(), (POLICIES | MODIFIERS)[name].__name__):
        assert main(["policies", spelling, "--markdown"]) == 0
        assert capsys.readouterr().out == printed
    assert main(["presses", "SnapKVPress", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert set(re.findall(r"^\| `(\w+)`", printed, re.MULTILINE)) == {"SnapKVPress"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["policies snapkv", "presses SnapKVPress", "--help"])
def test_a_look_into_a_table_does_not_wait_for_torch(arguments: str) -> None:
    program = (
        "import sys\n"
        "from compressed_cache.__main__ import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_finds_a_press(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presses", "SnapKVPress"]) == 0
    printed = capsys.readouterr().out
    assert 'CompressedCache("snapkv", window=64, kernel_size=5, budget=...)' in printed
    assert "[fork]" in printed and "[kvpress 0.5]" in printed
    assert main(["presses", "RestoreKVPress"]) == 0
    assert "not here\n    needs trained adapters" in capsys.readouterr().out
    assert main(["presses", "snapkvpress"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["presses", "SnapVKPress"]) == 2
    assert "Did you mean 'SnapKVPress'?" in capsys.readouterr().err
    assert main(["presses", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(PRESSES)


@pytest.mark.parametrize("press", PRESSES, ids=[f"{p.origin}-{p.name}" for p in PRESSES])
def test_what_is_to_be_typed_makes_a_cache(press: PressEquivalent) -> None:
    assert press.here or press.note
    if press.here:
        budget = "" if "budget=" in press.here else ", budget=4096"
        cache = eval(f"CompressedCache({press.here}{budget})")
        assert cache.policy.label == press.here.split('"')[1]


def _options(call: str) -> dict[str, Any]:
    """Those of a call, by name, that are written as numbers or texts."""
    (statement,) = ast.parse(f"call({call})").body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    return {
        keyword.arg: keyword.value.value
        for keyword in statement.value.keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant)
    }


def test_presses_have_the_options_with_which_they_are_compared() -> None:
    rows = {row.name: _options(row.here) for row in PRESSES if row.origin == KVPRESS}
    pairs: dict[str, tuple[str, dict[str, Any]]] = {}
    for pair in reversed(PAIRS):
        name, _, arguments = pair.press.removesuffix(")").partition("(")
        # Those around another press are shown around another one, and these find theirs elsewhere.
        if "Press(" not in arguments and name not in ("FinchPress", "DuoAttentionPress"):
            pairs[name] = arguments, _options(pair.here)
    for name, (arguments, options) in pairs.items():
        assert set(options) <= set(rows[name]), name
        if not arguments:
            assert options.items() <= rows[name].items(), name
        for option in {"recent", "fit_prompt"} & set(options):
            assert options[option] == rows[name][option], name
    # The newest of the press counts beside the recent ones here.
    assert "n_recent=17" in pairs["SimLayerKVPress"][0]
    assert pairs["SimLayerKVPress"][1]["lazy_recent"] == 17 - 1
    assert rows["SimLayerKVPress"]["lazy_recent"] == 1024 - 1


def test_presses_are_named_once_and_in_order() -> None:
    for origin in (KVPRESS, FORK):
        names = [press.name for press in PRESSES if press.origin == origin]
        assert names == sorted(set(names), key=str.lower)


@pytest.mark.slow
@pytest.mark.skipif(not (ENVIRONMENT / "installed").exists(), reason="kvpress is not installed")
def test_arguments_are_those_of_kvpress() -> None:
    program = (
        "import inspect, json, kvpress\n"
        "told = {}\n"
        "for name in dir(kvpress):\n"
        "    if name.endswith('Press') and inspect.isclass(getattr(kvpress, name)):\n"
        "        given = inspect.signature(getattr(kvpress, name)).parameters.values()\n"
        "        told[name] = {p.name: repr(p.default) for p in given}\n"
        "print(json.dumps(told))"
    )
    command = [str(ENVIRONMENT / "bin" / "python"), "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    none = repr(inspect.Parameter.empty)
    ours = {press.name: press for press in PRESSES if press.origin == KVPRESS}
    assert set(ours) == set(theirs)
    for name, arguments in theirs.items():
        wanted = {
            argument: "" if default == none else default
            for argument, default in arguments.items()
            if argument != "compression_ratio" and argument[0] != "_" and "factory" not in default
        }
        call = ast.parse(f"f({_keywords(ours[name].arguments)})", mode="eval").body
        assert isinstance(call, ast.Call)
        told = {k.arg: repr(ast.literal_eval(k.value)) for k in call.keywords}
        assert told == {argument: repr(default) for argument, default in wanted.items()}, name


def _keywords(arguments: str) -> str:
    """Each argument with its default as text; one made by a factory is left out."""
    parts = [part.partition("=") for part in arguments.split(", ") if part]
    return ", ".join(f"{name}={value!r}" for name, _, value in parts if "(...)" not in value)


def test_all_that_exists_is_measured() -> None:
    once = [name for name, kind in POLICIES.items() if not issubclass(kind, ReadsTwice)]
    assert EVERY[: len(once)] == tuple(once)
    assert {part for name in COMBINATIONS for part in split_name(name)[1]} == set(MODIFIERS)
    for name in EVERY:
        CompressedCache(name, 184)


def test_policies_that_need_statistics_get_them_for_a_benchmark(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model()
    ids = torch.arange(1, 40)[None]
    for name in (
        "h2o",
        "qfilter",
        "triattention",
        "expected_attention",
        "learned_gate",
        "h2o+duo_attention",
    ):
        cache = CompressedCache(name, 16, protect_prompt=False, **statistics(name, model))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.evicted_tokens == 39 - 16
    assert statistics("h2o", model) == statistics("expected_attention", model) == {}
