"""Small wrong changes to the library, each of which some test must catch.

    python -m tests.mutants               runs all of them and writes tests/mutants.json
    python -m tests.mutants recent horizon     runs those whose names have one of these in them
    python -m tests.mutants --check       only looks whether each snippet is where it should be
    python -m tests.mutants --list        prints their names and tests
    python -m tests.mutants --innocent    runs the tests that caught one over what is not changed

The library is changed in a copy, never where it is. A mutant that survives is a hole in the tests:
whoever takes tests away runs those mutants again that these tests were to catch.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOUND = Path(__file__).with_suffix(".json")
# What a mutant may take; one that loops for ever is caught too.
_LIMIT = 600


class Mutant(NamedTuple):
    """One wrong change."""

    name: str
    file: str
    """Below ``compressed_cache``."""
    old: str
    """Occurs once in it."""
    new: str
    tests: str
    """What should catch it, as pytest takes it, below ``tests``."""


class Runner:
    """Runs mutants, each in a process of its own, in one copy of the tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, self.folder, symlinks=True, ignore=_left_out)

    def run(self, mutant: Mutant) -> dict[str, Any]:
        """Which test caught it, None where none did, and after how many seconds."""
        path = self.folder / "compressed_cache" / mutant.file
        original, started = path.read_text(), time.perf_counter()
        report = self.folder / "caught.json"
        report.unlink(missing_ok=True)
        try:
            self._write(path, mutated(mutant, original))
            process = multiprocessing.get_context("fork").Process(
                target=_test, args=(self.folder, mutant.tests, report)
            )
            process.start()
            process.join(_LIMIT)
            if process.is_alive():
                process.kill()
                process.join()
                caught = "nothing: it did not end"
            else:
                caught = json.loads(report.read_text()) if report.exists() else "nothing: a crash"
        finally:
            self._write(path, original)
        return {"caught_by": caught, "seconds": round(time.perf_counter() - started)}

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Python tells changes by size and second.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


_runner: Runner


def _left_out(folder: str, names: list[str]) -> list[str]:
    made = {"__pycache__"} | ({"build", "dist", "demo_results"} if folder == str(ROOT) else set())
    return [name for name in names if name.startswith(".") or name in made]


class _Recorder:
    """A plugin of pytest."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        self.passed += report.passed and report.when == "call"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"nothing: {report.nodeid} cannot be imported")


def _test(folder: Path, tests: str, report: Path) -> None:
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    with (folder / "log.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        import pytest

        recorder = _Recorder()
        arguments = [
            f"tests/{part}" if part.partition("::")[0].endswith(".py") else part
            for part in shlex.split(tests)
        ]
        # What was imported for all cannot be rewritten again, and has no asserts of ours.
        quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        fixed = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0", *quiet]
        pytest.main([*fixed, *arguments], plugins=[recorder])
        caught = recorder.failed[0] if recorder.failed else None
        if not caught and not recorder.passed:
            caught = "nothing: no test ran"
    report.write_text(json.dumps(caught))
    os._exit(0)


def mutated(mutant: Mutant, text: str) -> str:
    """The text of a file with the change made.

    Raises:
        ValueError: the snippet is not there, or more than once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: its snippet occurs {found} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def problems() -> Iterator[str]:
    """What is wrong with the table itself."""
    names = [mutant.name for mutant in MUTANTS]
    yield from sorted(f"{name}: twice" for name in set(names) if names.count(name) > 1)
    for mutant in MUTANTS:
        path = ROOT / "compressed_cache" / mutant.file
        if not path.exists():
            yield f"{mutant.name}: {mutant.file} is not there"
            continue
        try:
            mutated(mutant, path.read_text())
        except ValueError as error:
            yield str(error)
        for part in shlex.split(mutant.tests):
            file = part.partition("::")[0]
            if file.endswith(".py") and not (ROOT / "tests" / file).exists():
                yield f"{mutant.name}: tests/{file} is not there"


def run(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Runs mutants, as many at a time as there are jobs."""
    # On its way in, torch would import the library from where it is.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch

    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    assert "compressed_cache" not in sys.modules
    # Triton decides when it is imported whether it interprets its kernels.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for name in ("numpy", "transformers.generation", "pytest", "hypothesis"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that torch and transformers are imported once for all.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, context, _begin, (Path(folder),)) as pool:
            running = {pool.submit(_run, mutant): mutant for mutant in mutants}
            for future in as_completed(running):
                yield running[future], future.result()


def _begin(folder: Path) -> None:
    """Gives a process a copy of the tree."""
    global _runner
    _runner = Runner(folder / str(os.getpid()))


def _run(mutant: Mutant) -> dict[str, Any]:
    return _runner.run(mutant)


def was_caught(result: dict[str, Any] | None) -> bool:
    """Whether a test failed."""
    return result is not None and "::" in (result["caught_by"] or "")


def main() -> int:
    """Runs the mutants that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all")
    parser.add_argument("--check", action="store_true", help="only check the table")
    parser.add_argument("--list", action="store_true", help="print the table")
    parser.add_argument("--innocent", action="store_true", help="run what caught one, unchanged")
    parser.add_argument("--missing", action="store_true", help="only those that were not caught")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args()
    if wrong := list(problems()):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    chosen = [
        mutant
        for mutant in MUTANTS
        if (not options.names or any(part in mutant.name for part in options.names))
        and not (options.missing and was_caught(found.get(mutant.name)))
    ]
    if options.list:
        print("\n".join(f"{mutant.name}: {mutant.tests}" for mutant in chosen))
    if options.check or options.list:
        return 0
    if options.innocent:
        import pytest

        caught = (found[mutant.name]["caught_by"] for mutant in chosen)
        return pytest.main(["-q", *sorted({one for one in caught if one and "::" in one})])
    survived = []
    for mutant, result in run(chosen, options.jobs):
        found[mutant.name] = result
        known = [one.name for one in MUTANTS if one.name in found]
        FOUND.write_text(json.dumps({name: found[name] for name in known}, indent=1) + "\n")
        if not was_caught(result):
            survived.append(mutant.name)
        told = result["caught_by"] or "SURVIVED"
        print(f"{mutant.name}: {told} ({result['seconds']} s)", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    if survived:
        print(f"survived: {', '.join(survived)}", file=sys.stderr)
    return 1 if survived else 0


_LONG = "test_reference.py -k test_an_interval_longer"
_BLOCKS = (
    "test_reference.py test_modifiers.py -k '(test_library_keeps and +chunk) or keeps_its_share'"
)
_MATRIX = "test_reference.py -k 'test_library_keeps and {}'"

MUTANTS = (
    # Steps on slots.
    Mutant(
        "recent tokens as dear as a protected prompt",
        "ops/eviction.py",
        "oldest_recent, RECENT_SCORE)",
        "oldest_recent, torch.inf)",
        "test_slots.py test_cache.py",
    ),
    Mutant(
        "a default of recent refuses a protected prompt",
        "hf/checks.py",
        "recent = eviction.least_recent",
        "recent = eviction.recent",
        "test_cache.py",
    ),
    Mutant(
        "a default of recent is the same as the value given",
        "policies/eviction_config.py",
        "least_recent = max(recent or 0, kept)",
        "least_recent = kept",
        "test_cache.py",
    ),
    Mutant(
        "streaming heads have no more slots than duo_attention says",
        "policies/methods/duo_attention.py",
        "few = min(budget, max(few, first + recent + 1))",
        "pass",
        "test_budgets.py -k streaming",
    ),
    Mutant(
        "first tokens of streaming heads go before a default of recent",
        "stores/bound_policy.py",
        "return torch.maximum(protected[:, None], first)",
        "return protected",
        "test_budgets.py -k streaming",
    ),
    Mutant(
        "a default of recent holds in lazy layers",
        "stores/lazy.py",
        "few = (prefix + bound.eviction.least_recent + 1)",
        "few = (prefix + bound.eviction.recent + 1)",
        "test_simlayerkv.py",
    ),
    Mutant(
        "a lazy layer keeps no sinks",
        "stores/lazy.py",
        "torch.where(self._is_lazy, prefix.clamp(min=self._lazy.sinks), prefix)",
        "prefix.clone()",
        "test_simlayerkv.py",
    ),
    Mutant(
        "criticalkv protects the last tokens of each block",
        "policies/methods/criticalkv.py",
        "next_position=slots.text_end,",
        "next_position=slots.next_position,",
        "test_reference.py -k 'test_library_keeps and criticalkv+chunk'",
    ),
    Mutant(
        "vase gives no votes to the last tokens of each block",
        "policies/methods/vase.py",
        "slots.oldest_recent[:, None, None]",
        "(slots.next_position - slots.recent)[:, None, None]",
        "test_reference.py -k 'test_library_keeps and vase+chunk'",
    ),
    Mutant(
        "snapkv pools the last tokens of each block on their own",
        "policies/methods/snapkv.py",
        "slots.oldest_recent[:, None, None]",
        "(slots.next_position - slots.recent)[:, None, None]",
        "test_reference.py -k 'test_library_keeps and snapkv+chunk'",
    ),
    Mutant(
        "kvzip: a question is of the prompt",
        "second_pass.py",
        'before.counter | {"is_first_prompt": False}',
        "before.counter",
        "test_kvzip.py -k after_a_protected",
    ),
    Mutant(
        "a modifier with scores of its own is taken for attention",
        "policies/modifier.py",
        "            cls.scores_attention = False\n",
        "            pass\n",
        "test_combinations.py -k 'says_so or something_else'",
    ),
    Mutant(
        "recent is one more",
        "ops/eviction.py",
        "oldest_recent = (next_position - recent)",
        "oldest_recent = (next_position - recent - 1)",
        "test_slots.py",
    ),
    Mutant(
        "recent is one less",
        "ops/eviction.py",
        "oldest_recent = (next_position - recent)",
        "oldest_recent = (next_position - recent + 1)",
        "test_slots.py",
    ),
    Mutant(
        "the first token after the prefix is protected",
        "ops/eviction.py",
        "protected = positions < _of_heads(protected_prefix)",
        "protected = positions <= _of_heads(protected_prefix)",
        "test_slots.py",
    ),
    Mutant(
        "what a policy always keeps ranks with what is protected",
        "ops/eviction.py",
        ".clamp(max=HIGHEST_SCORE)",
        "",
        "test_slots.py",
    ),
    Mutant(
        "what is not a number stays longest",
        "ops/eviction.py",
        "masked_fill(scores.isnan(), -torch.inf)",
        "masked_fill(scores.isnan(), torch.inf)",
        "test_properties.py -k 'not_a_number and k_proj and (knorm or h2o)'",
    ),
    Mutant(
        "of equals the newest goes in a step",
        "ops/eviction.py",
        "positions.masked_fill(scores != lowest, _NO_POSITION).argmin(",
        "positions.masked_fill(scores != lowest, -1).argmax(",
        "test_slots.py test_reference.py -k 'slot or equal_scores'",
    ),
    Mutant(
        "of equals the newest goes in a ranking",
        "ops/eviction.py",
        "by_position = positions.argsort(dim=-1, stable=True)",
        "by_position = positions.argsort(dim=-1, stable=True, descending=True)",
        "test_slots.py test_reference.py -k 'rank or equal_scores'",
    ),
    Mutant(
        "a long interval ends with what is protected for good",
        "ops/eviction.py",
        "num_slots = (~for_good).sum(dim=-1, keepdim=True)",
        "num_slots = torch.full_like(order[..., :1], order.shape[2])",
        _LONG,
    ),
    Mutant(
        "victims come from the prefix too",
        "ops/eviction.py",
        "order = sort_slots(scores, positions.masked_fill(for_good, _NO_POSITION))",
        "order = sort_slots(scores, positions)",
        _LONG,
    ),
    Mutant(
        "the worst are kept of a prompt",
        "ops/eviction.py",
        "kept = sort_slots(scores, positions)[..., -count:]",
        "kept = sort_slots(scores, positions)[..., :count]",
        "test_slots.py",
    ),
    Mutant(
        "the mean of the pooling leaves out what is missing at the ends",
        "ops/eviction.py",
        "avg_pool1d(held_values, kernel_size, 1, kernel_size // 2)",
        "avg_pool1d(held_values, kernel_size, 1, kernel_size // 2, False, False)",
        "test_slots.py",
    ),
    Mutant(
        "recent tokens are neighbours of those that are pooled",
        "policies/methods/snapkv.py",
        "slots.positions.masked_fill(~before, -1),",
        "slots.positions.masked_fill(~before & False, -1),",
        _MATRIX.format("snapkv and b14 and r4"),
    ),
    Mutant(
        "snapkv always pools by the mean",
        "policies/methods/snapkv.py",
        "reduce=self.pool,",
        'reduce="mean",',
        _MATRIX.format("snapkv and b14 and r4"),
    ),
    Mutant(
        "the window of morphkv is one longer",
        "policies/methods/morphkv.py",
        "(slots.next_position - self.window)[:, None, None]",
        "(slots.next_position - self.window - 1)[:, None, None]",
        _MATRIX.format("morphkv and b14"),
    ),
    Mutant(
        "rows of morphkv are shared with the window",
        "policies/methods/morphkv.py",
        "voted = (old & (slots.positions >= 0))",
        "voted = (slots.positions >= 0)",
        _MATRIX.format("morphkv and b14"),
    ),
    Mutant(
        "neighbours are those of the slots",
        "ops/eviction.py",
        "order = positions.argsort(dim=-1, stable=True)\n    sorted_held",
        "order = torch.arange(positions.shape[2]).expand_as(positions)\n    sorted_held",
        "test_slots.py",
    ),
    Mutant(
        "open victims are those of all slots",
        "ops/eviction.py",
        "ages.where(is_open, 0),",
        "ages,",
        "test_budgets.py -k 'list_of_lists and h2o-13'",
    ),
    Mutant(
        "the first open token is protected",
        "ops/eviction.py",
        "protected_prefix=protected_prefix + 1,",
        "protected_prefix=protected_prefix + 2,",
        "test_budgets.py -k 'list_of_lists and h2o-13'",
    ),
    # Attention.
    Mutant(
        "a query of a further prompt does not see itself",
        "ops/attention.py",
        "visible = (held >= 0) & (held <= own)",
        "visible = (held >= 0) & (held < own)",
        "test_turns.py -k 'test_turns_with and h2o'",
    ),
    Mutant(
        "a window is one longer in a further prompt",
        "ops/attention.py",
        "visible = visible & (held > own - window)",
        "visible = visible & (held >= own - window)",
        "test_masks.py -k 'images or counted_in_tokens'",
    ),
    Mutant(
        "logits are not soft-capped",
        "ops/attention.py",
        "return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()",
        "return logits",
        "test_families.py -k 'Gemma-2 or (Gemma and 2 and budget_for_everything)'",
    ),
    Mutant(
        "sinks take no share in a step",
        "ops/attention.py",
        "weights = _softmax(logits, transform.sink_logits(logits))",
        "weights = _softmax(logits, None)",
        "test_families.py -k 'GPT and budget_for_everything'",
    ),
    Mutant(
        "sinks take no share in a further prompt",
        "ops/attention.py",
        "weights = masked_softmax(logits, visible, transform.sink_logits(logits))",
        "weights = masked_softmax(logits, visible)",
        "test_turns.py test_attentions.py test_kernels.py -k 'GPT or (rows and True)'",
    ),
    Mutant(
        "one query too few is looked at",
        "ops/attention.py",
        "max(0, length - last)",
        "max(0, length - last + 1)",
        _MATRIX.format("(tova or lagged_attention) and b14-s0-r0"),
    ),
    Mutant(
        "what is not a number takes the softmax with it",
        "ops/attention.py",
        "visible = visible & ~logits.isnan()",
        "visible = visible & True",
        "test_kernels.py -k test_a_broken_key_leaves",
    ),
    # Masks.
    Mutant(
        "columns are positions, whatever is padding",
        "ops/masks.py",
        "    order = (~real).to(torch.int8).argsort(dim=1, stable=True)\n    index",
        "    order = torch.arange(real.shape[1]).expand_as(real)\n    index",
        "test_masks.py -k 'columns_count_padding'",
    ),
    Mutant(
        "a bias is read as padding",
        "ops/masks.py",
        "return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min",
        "return mask if mask.dtype == torch.bool else mask >= 0",
        "test_masks.py -k finite_bias",
    ),
    Mutant(
        "padding of a 4-D mask is not seen",
        "ops/masks.py",
        "        real = is_visible(own).any(dim=1)\n",
        "        real = torch.ones_like(is_visible(own).any(dim=1))\n",
        "test_padding.py -k test_masks_of_all",
    ),
    Mutant(
        "every mask of a first prompt is taken for causal",
        "ops/masks.py",
        "    if mask is None or mask.own is None:\n        return True\n    length",
        "    if True:\n        return True\n    length",
        "test_masks.py -k 'attention_that_took_place'",
    ),
    Mutant(
        "a mask hides what is after a window by its columns",
        "ops/masks.py",
        "shown = shown | (is_far & seen[1])",
        "shown = shown",
        "test_masks.py -k counted_in_tokens",
    ),
    Mutant(
        "hidden tokens keep their positions",
        "ops/masks.py",
        "return torch.where(stays, stays.cumsum(dim=1) - 1, -1)",
        "return torch.where(stays, torch.arange(stays.shape[1]), -1)",
        "test_masks.py -k 'hidden_columns and h2o'",
    ),
    # Rings.
    Mutant(
        "a ring is written one place on in a step",
        "ops/rings.py",
        "place = (position % ring.shape[dim])",
        "place = ((position + 1) % ring.shape[dim])",
        _MATRIX.format("snapkv and b14-s0-r0"),
    ),
    Mutant(
        "a ring is written one place on by a prompt",
        "ops/rings.py",
        "place = (next_position[:, None] + before) % window",
        "place = (next_position[:, None] + before + 1) % window",
        _MATRIX.format("snapkv and b14-s0-r0"),
    ),
    Mutant(
        "padding is written into a ring",
        "ops/rings.py",
        "ring.scatter_(3, index, torch.where(real, new, ring.gather(3, index)))",
        "ring.scatter_(3, index, new)",
        "test_turns.py test_padding.py -k '(padded_second or batch_generate) and snapkv'",
    ),
    Mutant(
        "a ring forgets which places are empty once tokens moved",
        "ops/rings.py",
        "return found.clamp(max=window - 1), found < window",
        "return found.clamp(max=window - 1), found <= window",
        "test_masks.py -k queries_of_hidden",
    ),
    # Tokens.
    Mutant(
        "padding overwrites a slot",
        "ops/tokens.py",
        "        new = where_real(real, new, memory.gather(dim, index))\n",
        "        pass\n",
        "test_masks.py -k 'rows_that_end_early and h2o'",
    ),
    Mutant(
        "padding counts in what a policy remembers",
        "ops/tokens.py",
        "    return new if real is None else torch.where("
        "real.view(-1, *[1] * (new.dim() - 1)), new, old)",
        "    return new",
        "test_masks.py -k 'rows_that_end_early and h2o'",
    ),
    # Rotation.
    Mutant(
        "queries are not moved with their keys",
        "ops/rerotation.py",
        "(own - missing)[:, :, None]",
        "(own - 0 * missing)[:, :, None]",
        "test_layout.py -k test_a_further_prompt_sees_what_the_model_sees",
    ),
    Mutant(
        "keys are turned the other way",
        "ops/rotary.py",
        "signs[first], signs[second] = -1.0, 1.0",
        "signs[first], signs[second] = 1.0, -1.0",
        "test_rotary.py -k 'turns_them and Llama'",
    ),
    Mutant(
        "all channels rotate",
        "ops/rotary.py",
        'rotated = int(dim * parameters.get("partial_rotary_factor", 1.0))',
        "rotated = dim",
        "test_rotary.py -k 'turns_them and GLM'",
    ),
    Mutant(
        "the scaling of YaRN is left out",
        "ops/rotary.py",
        "return torch.where(self.partners == _channels(self.partners), 1.0, self.scaling)",
        "return torch.ones_like(self.signs)",
        "test_calibration.py test_rotary.py -k 'turns_them or means_and'",
    ),
    # Sums of attention.
    Mutant(
        "a query adds to the token after it",
        "ops/attention_sums.py",
        "dtype=torch.bool).triu(1)",
        "dtype=torch.bool).triu(2)",
        "test_kernels.py -k 'test_attention_sums and blocks'",
    ),
    Mutant(
        "attention beside sums begins at the padding",
        "ops/attention_sums.py",
        "(weights @ values[row, head, seen])",
        "(weights @ values[row, head, :end])",
        "test_first_prompt.py -k output_and_sums",
    ),
    Mutant(
        "one pass leaves out dropout",
        "hf/first_prompt.py",
        'and not arguments.get("dropout")',
        "",
        "test_first_prompt.py -k where_one_pass",
    ),
    Mutant(
        "sums are not averaged over a group",
        "ops/attention_sums.py",
        "return (totals / groups).float()",
        "return totals.float()",
        "test_kernels.py -k 'test_attention_sums and blocks'",
    ),
    Mutant(
        "sinks leave their share to the tokens in sums",
        "ops/attention_sums.py",
        "weights.mul_(share)",
        "pass",
        "test_kernels.py -k 'test_attention_sums and blocks'",
    ),
    # Kernels.
    Mutant(
        "kernel: recent is one less",
        "ops/kernels/decode.py",
        "position >= next_position - recent,",
        "position > next_position - recent,",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: what a policy always keeps ranks with what is protected",
        "ops/kernels/decode.py",
        "tl.minimum(score, _HIGHEST_SCORE)",
        "score",
        "test_kernels.py -k always_keeps",
    ),
    Mutant(
        "kernel: of equals the first slot goes",
        "ops/kernels/decode.py",
        "own = (position + 1) * capacity + slots",
        "own = slots.to(tl.int64)",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: empty slots are seen",
        "ops/kernels/decode.py",
        "visible = (position >= 0) & (slots != slot_here)",
        "visible = exists & (slots != slot_here)",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: what goes is seen beside the new token",
        "ops/kernels/decode.py",
        "visible = (position >= 0) & (slots != slot_here)",
        "visible = position >= 0",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: what a new token receives is not recorded",
        "ops/kernels/decode.py",
        "recorded = tl.where(is_new[None, :], new_logit[:, None], logit)",
        "recorded = logit",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: each part sees the new token",
        "ops/kernels/decode.py",
        "is_here = (slot >= begin) & (slot < end)",
        "is_here = slot >= 0",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: padding takes a slot",
        "ops/kernels/decode.py",
        "slot = tl.where(tl.load(reals + row) != 0, slot, -1)",
        "slot = slot",
        "test_kernels.py -k test_padding",
    ),
    Mutant(
        "kernel: parts are added up without their maxima",
        "ops/kernels/decode.py",
        "total = total * mine + tl.load(totals + own) * theirs",
        "total = total + tl.load(totals + own)",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: a part that is not the last one adds up",
        "ops/kernels/decode.py",
        "== expected - 1",
        "== 0",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: parts that are done are still counted in the next step",
        "ops/kernels/decode.py",
        "tl.store(arrived, 0)",
        "pass",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: padding is counted",
        "ops/kernels/decode.py",
        "tl.where((which > 0) | (slot >= 0), 1, 0)",
        "1",
        "test_kernels.py -k test_padding",
    ),
    Mutant(
        "kernel: a new token inherits what its slot received",
        "ops/kernels/decode.py",
        "held = tl.where(slots == slot, 0.0, held)",
        "held = held",
        "test_kernels.py -k 'test_decode_step or test_padding'",
    ),
    Mutant(
        "kernel: sinks take no share",
        "ops/kernels/decode.py",
        "total = total * tl.exp(peak - above) + tl.exp(sink - above)",
        "total = total * tl.exp(peak - above)",
        "test_kernels.py -k test_decode_step_with_sinks",
    ),
    Mutant(
        "kernel: one part alone is no softcap",
        "ops/kernels/decode.py",
        "logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))",
        "logit = logit",
        "test_kernels.py -k test_decode_step_with_sinks",
    ),
    Mutant(
        "kernel: padding adds to sums",
        "ops/kernels/attention_sums.py",
        "visible = (columns[None, :] >= padding) & (logit == logit)",
        "visible = logit == logit",
        "test_kernels.py -k 'test_attention_sums and kernel'",
    ),
    Mutant(
        "kernel: sums begin after the padding",
        "ops/kernels/attention_sums.py",
        "range(padding // BLOCK * BLOCK, start, BLOCK)",
        "range(tl.cdiv(padding, BLOCK) * BLOCK, start, BLOCK)",
        "test_kernels.py -k 'test_attention_sums and kernel'",
    ),
    Mutant(
        "kernel: keys of the diagonal are not masked",
        "ops/kernels/attention_sums.py",
        "visible &= columns[None, :] <= rows[:, None]",
        "visible &= columns[None, :] <= rows[:, None] + 1",
        "test_kernels.py -k 'test_attention_sums and kernel'",
    ),
    Mutant(
        "kernel: sums are not averaged over a group",
        "ops/kernels/attention_sums.py",
        "total / GROUPS",
        "total",
        "test_kernels.py -k 'test_attention_sums and kernel'",
    ),
    # Calls that fail.
    Mutant(
        "a refused call stays counted",
        "step_counter.py",
        "self.restore(self._before)",
        "pass",
        "test_failed_calls.py -k 'refused_call or is_refused'",
    ),
    Mutant(
        "a text that a failed call has left half read goes on in recurrent layers",
        "hf/announced_calls.py",
        "                self.is_torn = True\n",
        "                self.is_torn = False\n",
        "test_failed_calls.py",
    ),
    Mutant(
        "recurrent layers remember a first prompt that was refused",
        "hf/announced_calls.py",
        "                self.reset_linear_layers()\n",
        "                pass\n",
        "test_failed_calls.py",
    ),
    # The plain store.
    Mutant(
        "the phase of an interval is not set back",
        "stores/ranking.py",
        "self.counts[:, 2].zero_()",
        "pass",
        _MATRIX.format("(h2o or knorm) and r0-i3"),
    ),
    Mutant(
        "the first victim goes again and again",
        "stores/ranking.py",
        "return self.victims.index_select(2, self.phase)",
        "return self.victims[:, :, :1]",
        _MATRIX.format("(h2o or knorm) and r0-i3"),
    ),
    Mutant(
        "padding moves on the position of its row",
        "stores/slots.py",
        "self.next_position.sub_((~real).long())",
        "pass",
        "test_masks.py -k 'rows_that_end_early and h2o'",
    ),
    Mutant(
        "a new token inherits what its slot received",
        "stores/slots.py",
        "put(state, slot, state.new_zeros(()).expand(*slot.shape, *state.shape[3:]), real)",
        "pass",
        _MATRIX.format("h2o and b14"),
    ),
    Mutant(
        "weights that are no numbers are added up",
        "stores/ranking.py",
        "weights = weights.detach().nan_to_num(0.0)",
        "weights = weights.detach()",
        "test_properties.py -k 'not_a_number and h2o'",
    ),
    Mutant(
        "dropped tokens keep their slots",
        "stores/ranking.py",
        "            positions.masked_fill_(self.owned(gone), -1)\n",
        "",
        "test_rpc.py",
    ),
    Mutant(
        "the notes of new tokens are dropped",
        "stores/slots.py",
        "put(self.tokens.notes, slot, self.laid_out(new.notes), real)",
        "pass",
        _MATRIX.format("gkv"),
    ),
    Mutant(
        "notes are revised in rows that are padded",
        "stores/ranking.py",
        "where_real(real, notes, self.tokens.notes)",
        "where_real(None, notes, self.tokens.notes)",
        "test_masks.py -k 'rows_that_end_early and gkv'",
    ),
    Mutant(
        "notes are revised where nothing is evicted",
        "stores/bound_policy.py",
        "torch.where(evicts.unsqueeze(-1), notes, slots.notes)",
        "notes",
        "test_masks.py test_reference.py -k '(rows_that_end_early or keeps) and gkv'",
    ),
    Mutant(
        "notes are revised one token late",
        "stores/ranking.py",
        "keepdim=True) + incoming > self.room()",
        "keepdim=True) + incoming > self.room() + 1",
        _MATRIX.format("gkv"),
    ),
    Mutant(
        "a pool revises notes by the slots of its first head",
        "stores/pool.py",
        "return eviction.per_head(self.bound.head_budgets, self.owners)",
        "return eviction.per_head(self.bound.head_budgets[:1] * 2, self.owners)",
        "test_budgets.py -k 'list_of_lists and gkv'",
    ),
    Mutant(
        "a policy does not know a prompt from a step",
        "stores/ranking.py",
        "prompt = self.bound.revise(self.view(tokens, is_prompt=True), evicts)",
        "prompt = self.bound.revise(self.view(tokens), evicts)",
        "test_combinations.py -k each_phase",
    ),
    Mutant(
        "evicted prompt tokens are not merged",
        "stores/slots.py",
        "            self.merge(self.tokens.positions >= 0, "
        "(tokens.keys, tokens.values, gone), None)\n",
        "            pass\n",
        "test_reference.py -k merging",
    ),
    Mutant(
        "what was held has gradients",
        "stores/traced.py",
        "return gradients.constant(held, *traced) if _has_past(store) else held",
        "return held",
        "test_gradients.py",
    ),
    # Memory.
    Mutant(
        "a reset cache still has gradients",
        "stores/memory.py",
        "        self.has_gradients = False\n        for name",
        "        for name",
        "test_gradients.py",
    ),
    Mutant(
        "slots that double lose what they held",
        "stores/growing.py",
        "        tokens_held.copy_into(self.tokens, slice(0, sizes.capacity))\n",
        "",
        "test_cache.py -k full_grows",
    ),
    Mutant(
        "an eager step reads one slot too few of a text that grows",
        "stores/growing.py",
        "is_compiling() else self.in_use)",
        "is_compiling() else self.in_use - 1)",
        "test_growing.py",
    ),
    Mutant(
        "a step that is not announced finds the size of the text before",
        "cache.py",
        " or not torch.compiler.is_compiling())",
        ")",
        "test_growing.py",
    ),
    Mutant(
        "slots double one token late",
        "stores/growing.py",
        "if sizes is None or capacity <= sizes.capacity:",
        "if sizes is None or capacity <= 2 * sizes.capacity:",
        "test_cache.py -k full_grows",
    ),
    Mutant(
        "the prompt shrinks by nothing when tokens are hidden",
        "stores/memory.py",
        "for count in (self.next_position, self.prompt_length):",
        "for count in (self.next_position,):",
        "test_masks.py -k something_is_hidden",
    ),
    Mutant(
        "hidden tokens stay in the ring of queries",
        "stores/memory.py",
        "self.query_positions.copy_(own.gather(1, place).masked_fill(~found, -1))",
        "self.query_positions.copy_(own.gather(1, place))",
        "test_masks.py -k queries_of_hidden",
    ),
    Mutant(
        "prompts are not protected",
        "stores/memory.py",
        "            self.protected_prefix.copy_(eviction.protected(length, self.bound.budget))\n",
        "            pass\n",
        "test_cache.py -k 'protected_prompt and h2o'",
    ),
    Mutant(
        "sinks that come after a short prompt are overwritten",
        "ops/eviction.py",
        "first + (step - first) % (num_slots - first)",
        "step % num_slots",
        "test_cache.py -k behind_a_short_prompt",
    ),
    Mutant(
        "of a prompt that does not fit all but the recent is protected",
        "policies/eviction_config.py",
        "half = min(budget // 2, budget - self.least_recent - 1)",
        "half = budget - self.least_recent - 1",
        "test_cache.py -k yields",
    ),
    Mutant(
        "a prompt that fits is protected by half",
        "policies/eviction_config.py",
        "fits = prompts + self.recent < budget",
        "fits = prompts + self.recent < 0",
        "test_cache.py -k 'protected_prompt and h2o'",
    ),
    Mutant(
        "rows that are chosen are not moved",
        "stores/memory.py",
        "tensor.copy_(held[name][rows.to(tensor.device)])",
        "tensor.copy_(held[name][(0 * rows).to(tensor.device)])",
        "test_turns.py -k 'repeated_and_chosen and h2o'",
    ),
    # Prompts.
    Mutant(
        "a chunk does not count",
        "stores/prefill.py",
        "    store.counts[:, 1] += key.shape[2]\n",
        "",
        "test_turns.py -k 'test_chunks_with'",
    ),
    Mutant(
        "a further prompt starts at 0",
        "stores/prefill.py",
        "inputs.positions(store.next_position[:, None])",
        "inputs.positions(0)",
        "test_turns.py -k 'test_turns_with and h2o'",
    ),
    Mutant(
        "a row of padding ages what was seen",
        "stores/prefill.py",
        "saw = (count > 0)",
        "saw = (count >= 0)",
        "test_masks.py -k 'rows_that_end_early and tova'",
    ),
    Mutant(
        "every prompt is protected, not only the first",
        "stores/prefill.py",
        "    if is_first_prompt:\n        _observe_queries",
        "    if True:\n        _observe_queries",
        "test_turns.py -k test_only_the_first_prompt",
    ),
    Mutant(
        "sinks alone are protected of a prompt",
        "stores/prefill.py",
        "store.protect_prefix(store.next_position)",
        "store.protect_prefix(None)",
        "test_cache.py -k 'protected_prompt and h2o'",
    ),
    Mutant(
        "a later prompt adds to the statistics of the first",
        "stores/prefill.py",
        "    if is_first_prompt:\n        _observe_queries(store, inputs",
        "    _observe_queries(store, query, positions)\n"
        "    if is_first_prompt:\n        (store, inputs",
        "test_expected_attention.py -k change_nothing",
    ),
    Mutant(
        "a later chunk does not add to the statistics",
        "stores/prefill.py",
        "        _observe_queries(store, inputs.query.detach(), positions)\n",
        "",
        "test_expected_attention.py -k in_chunks",
    ),
    Mutant(
        "a block is ranked by the statistics of the whole prompt",
        "stores/prompt_blocks.py",
        "                query_state=bound.observe_queries(nothing, grouped, block.positions),\n",
        "",
        "test_reference.py -k 'expected_attention+chunk and b14'",
    ),
    Mutant(
        "what is made of queries is neither saved nor forgotten",
        "stores/memory.py",
        "for name, value in self.query_state.items()}",
        "for name, value in ()}",
        "test_expected_attention.py -k saved_chosen",
    ),
    # Steps.
    Mutant(
        "the ring of channels is read one token late",
        "stores/decode_step.py",
        "store.whole_keys(written=1)",
        "store.whole_keys()",
        _MATRIX.format("think and b14"),
    ),
    Mutant(
        "leverage of values is left out",
        "policies/methods/curdkv.py",
        "self._leverage(in_order).prod(dim=0)",
        "self._leverage(in_order)[0]",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "leverage is no share of a window",
        "policies/methods/curdkv.py",
        "return _shares(windows).flatten(-2)",
        "return windows.flatten(-2)",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "windows of leverage are one token too long",
        "policies/methods/curdkv.py",
        "window = self.local_window or num_slots",
        "window = self.local_window + 1 if self.local_window else num_slots",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "windows of leverage are formed in the order of slots",
        "policies/methods/curdkv.py",
        "slots.positions.masked_fill(~counted, last).argsort",
        "(~counted).long().argsort",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "windows of leverage begin with empty slots",
        "policies/methods/curdkv.py",
        "slots.positions.masked_fill(~counted, last).argsort",
        "slots.positions.argsort",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "the matrix of leverage is drawn at every ranking",
        "policies/methods/curdkv.py",
        ", redraw=False",
        "",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "leverage spares one sink more",
        "policies/methods/curdkv.py",
        "slots.positions < self.num_sinks",
        "slots.positions <= self.num_sinks",
        "test_reference.py -k curdkv",
    ),
    Mutant(
        "a broken key spoils its window",
        "policies/methods/curdkv.py",
        "counted = sizes.isfinite().all(dim=0) & (slots.positions >= 0)",
        "counted = slots.positions >= 0",
        "test_curdkv.py",
    ),
    Mutant(
        "votes are drawn as they were cast",
        "policies/methods/vase.py",
        "kernel_size=self.kernel_size",
        "kernel_size=1",
        "test_reference.py -k vase",
    ),
    Mutant(
        "large values are a share of what is not recent",
        "policies/methods/vase.py",
        "int(self.large_share * budget)",
        "int(self.large_share * (budget - slots.recent))",
        "test_reference.py -k vase",
    ),
    Mutant(
        "statistics may be no numbers",
        "policies/statistics_file.py",
        "        check_finite(path, name, tensor)\n",
        "        pass\n",
        "test_expected_attention.py -k no_numbers",
    ),
    Mutant(
        "gates may be no numbers",
        "policies/gate_file.py",
        "check_finite(path, f",
        "print(path, f",
        "test_gates.py -k of_another_model",
    ),
    Mutant(
        "large values are a share of the least budget",
        "policies/methods/vase.py",
        "for budget in slots.budgets]",
        "for budget in [slots.budget]]",
        "test_budgets.py -k 'list_of_lists and vase'",
    ),
    Mutant(
        "the newest of kvzip are half of the least budget",
        "policies/methods/kvzip.py",
        "for budget in slots.budgets]",
        "for budget in [slots.budget]]",
        "test_kvzip.py -k kept_tokens",
    ),
    Mutant(
        "sinks do not count as large",
        "policies/methods/vase.py",
        ".masked_fill(sinks, torch.inf)",
        "",
        "test_reference.py -k vase",
    ),
    Mutant(
        "a protected prompt counts as large",
        "policies/methods/vase.py",
        "protected_prefix.clamp(max=_SINKS)",
        "protected_prefix",
        "test_reference.py -k vase",
    ),
    Mutant(
        "all that goes is merged",
        "policies/methods/merging.py",
        "self.merge_fraction == 1 or",
        "True or",
        "test_reference.py -k merging",
    ),
    Mutant(
        "one more than the fraction is merged",
        "policies/methods/merging.py",
        "- 1).clamp(min=0)",
        "+ 1).clamp(max=cosine.shape[2] - 1)",
        "test_reference.py -k merging",
    ),
    Mutant(
        "those that resemble least are merged",
        "policies/methods/merging.py",
        "enough & (cosine >= ranked",
        "enough & (cosine <= ranked",
        "test_reference.py -k merging",
    ),
    Mutant(
        "what is merged counts as held",
        "stores/decode_step.py",
        "store.merge(held.scatter(2, slot, False), (key, value, present), real)",
        "store.merge(held, (key, value, present), real)",
        "test_reference.py -k merging",
    ),
    Mutant(
        "the weights of a fused step are not shown",
        "stores/decode_step.py",
        'record = "total" if bound.adds_attention else "nothing"',
        'record = "nothing"',
        "test_kernels.py -k 'with_and_without and h2o'",
    ),
    # Pools.
    Mutant(
        "a pool knows its heads in another order",
        "stores/pool.py",
        "self.owners[:, :, places] = kept // length",
        "self.owners[:, :, places] = kept % self.num_heads",
        "test_budgets.py -k 'test_adakv_keeps and h2o'",
    ),
    Mutant(
        "query heads of a pool stand in another order",
        "stores/pool.py",
        "heads.expand(-1, -1, self.sizes.groups, -1).flatten(1, 2)",
        "heads.expand(-1, -1, self.sizes.groups, -1).transpose(1, 2).flatten(1, 2)",
        "test_budgets.py -k 'test_adakv_keeps and h2o'",
    ),
    Mutant(
        "the floor of a head leaves no room for what comes",
        "stores/pool.py",
        "count=self.bound.floor - incoming)",
        "count=self.bound.floor)",
        "test_budgets.py -k 'test_adakv_keeps and h2o'",
    ),
    Mutant(
        "the prefix of a pool is that of one head",
        "stores/pool.py",
        "protected_prefix=self.protected_prefix * self.num_heads,",
        "protected_prefix=self.protected_prefix,",
        "test_budgets.py -k 'test_adakv_keeps and h2o'",
    ),
    Mutant(
        "slots left over by a short prompt are the first head's",
        "stores/pool.py",
        "            self.owners[:, :, start : start + budget] = head\n",
        "",
        "test_budgets.py -k uniform_budget_and_keeps",
    ),
    # Lazy layers.
    Mutant(
        "a lazy row closes one slot too few",
        "stores/lazy.py",
        "place < place.shape[2] - self.room(), CLOSED",
        "place < place.shape[2] - self.room() - 1, CLOSED",
        "test_simlayerkv.py -k 'judged_for_itself'",
    ),
    Mutant(
        "closed slots are written to",
        "stores/lazy.py",
        "self.tokens.positions != CLOSED,",
        "self.tokens.positions >= CLOSED,",
        "test_simlayerkv.py -k 'judged_for_itself or closed_slots'",
    ),
    Mutant(
        "a lazy layer is judged by one token more",
        "stores/lazy.py",
        "last = lengths - (lazy.slots - lazy.sinks)",
        "last = lengths - (lazy.slots - lazy.sinks) - 1",
        "test_simlayerkv.py -k 'test_lazy_layers_keep or from_its_share'",
    ),
    # Prompts off the device.
    Mutant(
        "outliers are fetched too",
        "stores/offloaded.py",
        "self.is_listed.copy_(is_context & ~stays)",
        "self.is_listed.copy_(is_context)",
        "test_shadowkv.py -k 'that_of_the_reference'",
    ),
    Mutant(
        "the mean of a group decides what is fetched",
        "stores/offloaded.py",
        "wanted = shares.sum(dim=3).amax(dim=2)",
        "wanted = shares.sum(dim=3).mean(dim=2)",
        "test_shadowkv.py -k 'that_of_the_reference'",
    ),
    Mutant(
        "one local chunk too few",
        "stores/offloaded.py",
        "(count // size - self.numbers.local_chunks)",
        "(count // size - self.numbers.local_chunks + 1)",
        "test_shadowkv.py -k 'that_of_the_reference'",
    ),
    Mutant(
        "rebuilt keys are not turned",
        "stores/offloaded.py",
        "return self._rotary.rotate(straight, positions).to(self.tokens.keys.dtype)",
        "return straight.to(self.tokens.keys.dtype)",
        "test_shadowkv.py -k 'that_of_the_reference or full_attention'",
    ),
    # Channels, blocks, calls.
    Mutant(
        "one recent token less has all its channels",
        "stores/pruned.py",
        "is_recent = positions >= (next_position - size)",
        "is_recent = positions > (next_position - size)",
        "test_layout.py -k 'old_keys_without or hold_the_channels'",
    ),
    Mutant(
        "the least channels stay",
        "stores/pruned.py",
        "scores.argsort(dim=-1, descending=True, stable=True)",
        "scores.argsort(dim=-1, stable=True)",
        "test_layout.py test_reference.py -k 'hold_the_channels or think'",
    ),
    Mutant(
        "a block is ranked with what is before it",
        "stores/prompt_blocks.py",
        "torch.where(own >= start, own, -1)",
        "torch.where(own >= 0, own, -1)",
        _BLOCKS,
    ),
    Mutant(
        "recent tokens are those of each block",
        "policies/view.py",
        "return self.next_position if self.prompt_end is None else self.prompt_end",
        "return self.next_position",
        _BLOCKS,
    ),
    Mutant(
        "drafts rank at once",
        "stores/call.py",
        "inputs.token(token, counter.ranks_at(token))",
        "inputs.token(token, counter.ranks_at(0))",
        "test_modes.py -k 'drafts_change_nothing and h2o'",
    ),
    Mutant(
        "compiled reading ranks at once",
        "hf/drafter.py",
        "cache.counter.ranks_at(token)",
        "cache.counter.ranks_at(0)",
        "test_lossless.py -k compiled",
    ),
    Mutant(
        "positions of what is chosen anew begin with one",
        "stores/refresh.py",
        "real.cumsum(dim=1) - 1",
        "real.cumsum(dim=1)",
        "test_lossless.py -k refreshed",
    ),
    Mutant(
        "steps after a refresh do not rank anew",
        "hf/drafter.py",
        "self.cache.counter.rank_anew()",
        "pass",
        "test_lossless.py -k after_a_refresh",
    ),
    # A policy at one layer.
    Mutant(
        "the floor of a head is rounded down",
        "stores/bound_policy.py",
        "self.floor = math.ceil(",
        "self.floor = math.floor(",
        "test_budgets.py -k rounded_up",
    ),
    Mutant(
        "the floor of a head is a binary fraction",
        "stores/bound_policy.py",
        "Fraction(str(sharing.head_floor))",
        "Fraction(sharing.head_floor)",
        "test_budgets.py -k rounded_up",
    ),
    Mutant(
        "protected tokens are dropped",
        "stores/bound_policy.py",
        "return gone & (scores < eviction.HIGHEST_SCORE)",
        "return gone",
        "test_combinations.py -k cannot_drop",
    ),
    Mutant(
        "what a policy always keeps is dropped",
        "stores/bound_policy.py",
        "(scores < eviction.HIGHEST_SCORE)",
        "(scores < torch.inf)",
        "test_combinations.py -k is_not_dropped",
    ),
    # Policies.
    Mutant(
        "a part is shown the oldest queries",
        "policies/capabilities.py",
        "newest = slots.query_positions.argsort(dim=1, descending=True)",
        "newest = slots.query_positions.argsort(dim=1)",
        "test_combinations.py -k each_part",
    ),
    Mutant(
        "a part is shown the notes of another",
        "policies/capabilities.py",
        "first += before.needs.notes",
        "first += 0",
        "test_combinations.py -k each_part",
    ),
    Mutant(
        "sinks take no room from recent",
        "policies/eviction_config.py",
        "        room -= sinks\n",
        "",
        "test_errors.py -k defaults_leave_room",
    ),
    Mutant(
        "a budget without a free slot is taken",
        "policies/eviction_config.py",
        "least = sinks + recent + 1\n",
        "least = sinks + recent\n",
        "test_errors.py -k bad_arguments",
    ),
    Mutant(
        "the smallest remainder gets the slot left over",
        "policies/budgets.py",
        "key=lambda index: shares[index] - exact[index]",
        "key=lambda index: exact[index] - shares[index]",
        "test_budgets.py -k fall_on_a_line",
    ),
    Mutant(
        "sliding layers have a share of the slots",
        "policies/budgets.py",
        'if getattr(config, "sliding_window", None) is None:',
        "if True:",
        "test_budgets.py -k 'full_attention_only or sliding_layers'",
    ),
    Mutant(
        "rkv spares no near-duplicate",
        "policies/methods/rkv.py",
        "as_shares(total - less.float(), slots, counted)",
        "as_shares(total, slots, counted)",
        _MATRIX.format("rkv and b14-s0-r0"),
    ),
    Mutant(
        "snapkv sees after its queries",
        "policies/methods/window_votes.py",
        "return (held >= 0) & (held <= slots.query_positions[:, None, :, None])",
        "return (held >= 0).expand(-1, -1, slots.query_positions.shape[1], -1)",
        _MATRIX.format("snapkv and b14-s0-r0"),
    ),
    Mutant(
        "think chooses by evicted keys too",
        "stores/pruned.py",
        "kept = (positions >= 0) & (place >= place.shape[2] - self.room())",
        "kept = positions >= 0",
        "test_layout.py test_reference.py -k 'channels or think'",
    ),
    Mutant(
        "a prompt is ranked without the queries of its keys",
        "stores/prefill.py",
        "scores, tokens = prompt_blocks.rank(store, query, tokens, positions)",
        "scores, tokens = prompt_blocks.rank(store, query * 0, tokens, positions)",
        "test_layout.py test_reference.py -k 'channels or think'",
    ),
    Mutant(
        "the first stage of criticalkv is that of the mean budget",
        "policies/methods/criticalkv.py",
        "if slots.floor is not None:\n            count",
        "if False:\n            count",
        "test_budgets.py -k criticalkv",
    ),
    Mutant(
        "the first stage of criticalkv is below the floor",
        "policies/methods/criticalkv.py",
        ".long().clamp(min=slots.floor)",
        ".long()",
        "test_budgets.py -k criticalkv",
    ),
    Mutant(
        "criticalkv shares slots without a floor",
        "policies/methods/criticalkv.py",
        "tokens_of_heads(base, slots.positions, floor=slots.floor, count=count)",
        "tokens_of_heads(base, slots.positions, floor=0, count=count)",
        "test_budgets.py -k criticalkv",
    ),
    Mutant(
        "criticalkv ranks heads that share slots each on its own",
        "policies/methods/criticalkv.py",
        "return places(*as_one_head(scores, slots.positions)).view_as(scores)",
        "return places(scores, slots.positions)",
        "test_budgets.py -k criticalkv",
    ),
    Mutant(
        "the second stage of criticalkv goes by the scores alone",
        "policies/methods/criticalkv.py",
        "by_both = by_base.gather(-1, order)",
        "by_both = by_base",
        "test_budgets.py -k criticalkv",
    ),
    Mutant(
        "the first stage of criticalkv has no order of its own",
        "policies/methods/criticalkv.py",
        "order = weighted.masked_fill(first, torch.inf).argsort(dim=-1, stable=True)",
        "order = weighted.argsort(dim=-1, stable=True)",
        "test_budgets.py -k first_stage_is_all",
    ),
    Mutant(
        "heads with a budget each have the first stage of the least",
        "policies/methods/criticalkv.py",
        "int(budget * self.first_stage_ratio) for budget in",
        "int(slots.budget * self.first_stage_ratio) for _ in",
        "test_budgets.py -k 'list_of_lists and criticalkv'",
    ),
    Mutant(
        "a segment of ams may be shorter than the least",
        "policies/methods/ams.py",
        "shortest = mass.shape[-1], self.min_segment_length",
        "shortest = mass.shape[-1], 1",
        "test_ams.py",
    ),
    Mutant(
        "ams splits no segment",
        "policies/methods/ams.py",
        "(since % self.max_segment_length == 0)",
        "(since < 0)",
        "test_ams.py",
    ),
    Mutant(
        "ams cuts by what each segment has of the text, not of the mass",
        "policies/methods/ams.py",
        "(total / self.segment_mass).floor()",
        "(total * 0 + (place + 1) / length / self.segment_mass).floor()",
        "test_ams.py",
    ),
    Mutant(
        "quotas of ams go by length",
        "policies/methods/ams.py",
        "part = segments.mass / (segments.mass.sum(",
        "part = segments.lengths / (segments.lengths.sum(",
        "test_ams.py",
    ),
    Mutant(
        "ams gives each segment no slots of its own",
        "policies/methods/ams.py",
        "least = segments.lengths.clamp(max=self.min_keep_per_segment)",
        "least = segments.lengths.clamp(max=0)",
        "test_ams.py",
    ),
    Mutant(
        "ams hands out from the last segment on",
        "policies/methods/ams.py",
        "(last & (last.cumsum(dim=-1) <= left))",
        "(last & (last.flip(-1).cumsum(dim=-1).flip(-1) <= left))",
        "test_ams.py",
    ),
    Mutant(
        "ams takes the last slot of a segment",
        "policies/methods/ams.py",
        "floor = torch.where(rest < 0, least.clamp(max=1), least)",
        "floor = torch.zeros_like(least)",
        "test_ams.py",
    ),
    Mutant(
        "ams forgets the mass of earlier rankings",
        "policies/methods/ams.py",
        "self.credit_decay * slots.notes[..., -2]",
        "0.0 * slots.notes[..., -2]",
        "test_ams.py",
    ),
    Mutant(
        "what ams remembers stays where its token was",
        "stores/slots.py",
        "tokens.gather(best).copy_into(self.tokens",
        "tokens.gather(best)._replace(notes=tokens.notes[:, :, :count]).copy_into(self.tokens",
        "test_reference.py -k 'test_library_keeps and snapkv+ams'",
    ),
    Mutant(
        "ams mixes by the average alone",
        "policies/methods/ams.py",
        "self.mix_beta * mass + (1 - self.mix_beta) *",
        "0.0 * mass +",
        "test_ams.py",
    ),
    Mutant(
        "the window of ams is one longer",
        "policies/methods/ams.py",
        "first = slots.next_position[:, None, None] - window",
        "first = slots.next_position[:, None, None] - window - 1",
        "test_ams.py",
    ),
    Mutant(
        "ams counts queries before its window",
        "policies/methods/ams.py",
        "seen = slots.query_positions[:, None] >= first",
        "seen = slots.query_positions[:, None] >= first - 99",
        "test_reference.py -k 'test_library_keeps and snapkv+ams'",
    ),
    Mutant(
        "the window of ams has the largest mass of its own head",
        "policies/methods/ams.py",
        "votes.amax(dim=(1, 2), keepdim=True)",
        "votes.amax(dim=2, keepdim=True)",
        "test_ams.py",
    ),
    Mutant(
        "the window of ams has the largest mass of all rows",
        "policies/methods/ams.py",
        "votes.amax(dim=(1, 2), keepdim=True)",
        "votes.amax()",
        "test_ams.py",
    ),
    Mutant(
        "empty slots are a part of the text to ams",
        "policies/methods/ams.py",
        "place = index - empty",
        "place = index",
        "test_ams.py",
    ),
    Mutant(
        "the first token that reaches a multiple ends no segment of ams",
        "policies/methods/ams.py",
        "masked_fill(place <= 1, 0.0)",
        "masked_fill(place <= 0, 0.0)",
        "test_ams.py",
    ),
    Mutant(
        "ams keeps of a prompt what stays in a step",
        "policies/methods/ams.py",
        "return kept if slots.is_prompt else",
        "return",
        "test_reference.py -k 'test_library_keeps and +ams and i3'",
    ),
    Mutant(
        "ams counts no incoming tokens",
        "policies/methods/ams.py",
        "(kept - slots.interval)",
        "(kept - 1)",
        "test_ams.py",
    ),
    Mutant(
        "ams gives all heads the quotas of the least budget",
        "policies/methods/ams.py",
        "slots.budgets,",
        "(slots.budget,),",
        "test_budgets.py -k 'list_of_lists and ams'",
    ),
    Mutant(
        "a segment of ams keeps one more than its quota",
        "policies/methods/ams.py",
        "first = (segments.ends - quotas).gather(-1, segment)\n",
        "first = (segments.ends - quotas).gather(-1, segment) - 1\n",
        "test_ams.py",
    ),
    Mutant(
        "think chooses by one query less",
        "policies/methods/think.py",
        "last = slice(-self.think_window, None)",
        "last = slice(1 - self.think_window, None)",
        "test_layout.py test_reference.py -k 'channels or think'",
    ),
    Mutant(
        "the first queries of a prompt count",
        "policies/methods/expected_attention.py",
        "(own >= self.n_sinks)",
        "(own >= 0)",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "one of the first queries too few counts",
        "policies/methods/expected_attention.py",
        "(own >= self.n_sinks)",
        "(own > self.n_sinks)",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "queries of a prompt stay turned",
        "policies/methods/expected_attention.py",
        "rotary.rotate(part, -own[:, None, None])",
        "rotary.rotate(part, 0 * own[:, None, None])",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "queries of a prompt are not turned ahead",
        "policies/methods/expected_attention.py",
        "straight @ mean_rotation.mT",
        "straight",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "queries of a prompt are turned the other way",
        "policies/methods/expected_attention.py",
        "straight @ mean_rotation.mT",
        "straight @ mean_rotation",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "a covariance is about zero",
        "policies/methods/expected_attention.py",
        "torch.where(counted, queries - own_mean.unsqueeze(-2), 0.0)",
        "torch.where(counted, queries, 0.0)",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "a covariance is of a sample",
        "policies/methods/expected_attention.py",
        "centred.mT @ centred / number[..., None]",
        "centred.mT @ centred / (number[..., None] - 1).clamp(min=1)",
        "test_expected_attention.py -k behind_its_first",
    ),
    Mutant(
        "chunks of different means have too small a covariance",
        "policies/methods/expected_attention.py",
        " + share * (1 - share) * between",
        "",
        "test_expected_attention.py -k in_chunks",
    ),
    Mutant(
        "a later chunk counts as much as all before",
        "policies/methods/expected_attention.py",
        "share = (more / (count + more).clamp(min=1))",
        "share = (more / (more + more).clamp(min=1))",
        "test_expected_attention.py -k in_chunks",
    ),
    Mutant(
        "a broken query counts",
        "policies/methods/expected_attention.py",
        " & straight.isfinite().all(dim=-1)",
        "",
        "test_expected_attention.py -k no_number",
    ),
    Mutant(
        "the variance of logits counts as a whole",
        "policies/methods/expected_attention.py",
        "scaling**2 / 2 * variance",
        "scaling**2 * variance",
        "test_reference.py -k 'expected_attention and b14-s0'",
    ),
    Mutant(
        "the covariance of a file is not turned ahead",
        "policies/methods/expected_attention.py",
        "(mean_rotation @ covariance @ mean_rotation.mT).float()",
        "covariance.float()",
        "test_expected_attention.py -k keep_the_tokens",
    ),
    Mutant(
        "caote forgets what is always kept",
        "policies/methods/caote.py",
        ".masked_fill(always, torch.inf)",
        "",
        "test_reference.py -k 'expected_attention+caote'",
    ),
    Mutant(
        "criticalkv forgets what is always kept",
        "policies/methods/criticalkv.py",
        ".masked_fill(always, torch.inf)",
        "",
        "test_reference.py -k 'expected_attention+criticalkv'",
    ),
    Mutant(
        "criticalkv ranks what is always kept last in its first half",
        "policies/methods/criticalkv.py",
        "base.masked_fill(~(usable | always), -torch.inf)",
        "base.masked_fill(~usable, -torch.inf)",
        "test_reference.py -k 'expected_attention+criticalkv'",
    ),
    Mutant(
        "query heads of the hub are grouped the other way",
        "policies/hub_files.py",
        ".unflatten(0, (-1, context.groups))",
        ".unflatten(0, (context.groups, -1)).transpose(0, 1)",
        "test_expected_attention.py -k keep_the_tokens",
    ),
    Mutant(
        "queries of the hub are not scaled",
        "policies/hub_files.py",
        "(part * scales[name])",
        "part",
        "test_expected_attention.py -k scales_what",
    ),
    Mutant(
        "layers of the hub are in reverse",
        "policies/hub_files.py",
        "tensors[name][layer]",
        "tensors[name][-1 - layer]",
        "test_expected_attention.py -k 'keep_the_tokens or filters'",
    ),
    Mutant(
        "a file of the hub may be of any shape",
        "policies/hub_files.py",
        "if found != expected:",
        "if len(found) != len(expected):",
        "test_expected_attention.py -k another_shape",
    ),
    Mutant(
        "a covariance of the hub may be of any shape",
        "policies/hub_files.py",
        " and all(other == [*first, first[-1]] for other in others)",
        "",
        "test_expected_attention.py -k no_known_form",
    ),
    # transformers.
    Mutant(
        "columns of the full cache are in another order where holes close",
        "hf/full_cache.py",
        "argsort(dim=1, stable=True)",
        "argsort(dim=1, stable=True, descending=True)",
        "test_lossless.py -k full_cache_holds",
    ),
    Mutant(
        "what a row takes back of the full cache is seen",
        "hf/full_cache.py",
        "new = torch.arange(most, device=count.device) < count[:, None]",
        "new = torch.arange(most, device=count.device) <= count[:, None]",
        "test_lossless.py -k full_cache_holds",
    ),
    Mutant(
        "a compiled call of the full cache writes after its columns",
        "hf/full_cache.py",
        "columns = torch.arange(length, length + tokens, device=self.real.device)",
        "columns = torch.arange(length + 1, length + 1 + tokens, device=self.real.device)",
        "test_lossless.py -k full_cache_holds",
    ),
    Mutant(
        "criteria remember what a row has not",
        "hf/row_texts.py",
        "ended[row] if row in rows else was for",
        "ended[row] for",
        "test_lossless.py -k that_remember",
    ),
    Mutant(
        "drafts are read as a prompt",
        "hf/attention_hook.py",
        "with cache.assisted(tokens):",
        "if True:",
        "test_modes.py -k 'drafts_change_nothing and h2o'",
    ),
    Mutant(
        "drafts follow a text that is read again",
        "drafting.py",
        "return tokens - seen if seen else None",
        "return None",
        "test_modes.py -k 'drafts_change_nothing_of_a_later_turn and h2o'",
    ),
    Mutant(
        "a new token before drafts is a prompt",
        "drafting.py",
        "prompt = 0 if cache.takes_step(prompt) else prompt",
        "pass",
        "test_modes.py -k 'drafts_change_nothing_of_a_later_turn and h2o'",
    ),
    Mutant(
        "what follows drafts is taken for drafting",
        "drafting.py",
        "        finally:\n            self.stop_drafting()\n",
        "        finally:\n            pass\n",
        "test_modes.py -k may_follow_drafts",
    ),
    Mutant(
        "a draft that nobody decided on stays",
        "drafting.py",
        "self._drafting.take_back(self, self._drafting.tokens)",
        "pass",
        "test_modes.py -k broken_off",
    ),
    Mutant(
        "texts are not announced",
        "hf/attention_hook.py",
        '            cache.expect_text(tokens, known, inputs.get("attention_mask"))\n',
        "            pass\n",
        "test_used_cache.py -k new_text",
    ),
    Mutant(
        "other tokens than were read are not refused",
        "hf/columns.py",
        "        checks.check_text_held(is_other & differs.all(dim=1, keepdim=True), seen)\n",
        "",
        "test_used_cache.py -k another_token",
    ),
    Mutant(
        "tokens of the loop are not remembered",
        "hf/decode_loop.py",
        "        cache.columns.hold_text(ids[:, : cache.get_seq_length()])\n",
        "        pass\n",
        "test_used_cache.py -k 'another_token and decode and 22'",
    ),
    Mutant(
        "rows that are not held are chosen",
        "hf/checks.py",
        "bool(((-held <= rows) & (rows < held)).all())",
        "True",
        "test_used_cache.py -k 'rows_that_are_not_held'",
    ),
    Mutant(
        "a bool mask is added to logits",
        "hf/first_prompt.py",
        "own = masks.additive(own, inputs.query.dtype)",
        "pass",
        "test_masks.py -k obeys_a_bool_mask",
    ),
    Mutant(
        "a row that ended has one more token",
        "hf/columns.py",
        "later < (next_position - known.sum(dim=1))[:, None]",
        "later <= (next_position - known.sum(dim=1))[:, None]",
        "test_loop.py -k cannot_be_shown_as_text",
    ),
    Mutant(
        "columns of chosen rows stay where they were",
        "hf/columns.py",
        "self.known = self.known[rows.to(self.known.device)]",
        "pass",
        "test_turns.py -k repeated_and_chosen",
    ),
    Mutant(
        "watchers are not told of hidden tokens",
        "hf/announced_calls.py",
        '            self.notify("attention_mask")\n',
        "",
        "test_trace.py -k hides_what_was_read",
    ),
    Mutant(
        "what a mask hid is forgotten",
        "hf/announced_calls.py",
        "        self.columns.known = real.expand(len(next_position), -1)\n",
        "",
        "test_masks.py -k 'shown_again or hidden_columns'",
    ),
    Mutant(
        "the token that ends a row is padding",
        "hf/decode_loop.py",
        "padding.write(real)",
        "padding.write(unfinished)",
        "test_loop.py -k 'holds_what_it_holds_alone and h2o'",
    ),
    Mutant(
        "rows that ended go on",
        "hf/decode_loop.py",
        "tokens = torch.where(unfinished, tokens, pad.to(ids.device))",
        "pass",
        "test_loop.py -k 'those_of_generate and h2o and ends'",
    ),
    Mutant(
        "a text with nothing new is taken",
        "hf/checks.py",
        "if seen and tokens <= seen:",
        "if seen and tokens < seen:",
        "test_used_cache.py -k new_text",
    ),
    Mutant(
        "a protected prompt leaves no free slot",
        "hf/checks.py",
        "least = longest + recent + 1",
        "least = longest + recent",
        "test_errors.py -k leaves_no_room",
    ),
    Mutant(
        "a call that failed half way is not noticed",
        "hf/checks.py",
        "    if layer.progress != expected:\n",
        "    if False:\n",
        "test_failed_calls.py -k failed_half_way",
    ),
    # Drafts, snapshots, steps.
    Mutant(
        "crop takes back one token less",
        "drafting.py",
        "before, kept = self.before, had - tokens",
        "before, kept = self.before, min(had, had - tokens + 1)",
        "test_modes.py -k 'crop and h2o'",
    ),
    Mutant(
        "what a draft overwrote is gone",
        "drafting.py",
        "        cache.hold(before)\n",
        "",
        "test_modes.py -k 'crop and h2o'",
    ),
    Mutant(
        "a file has no columns",
        "snapshot.py",
        "            tensors[_COLUMNS] = self.columns\n",
        "            pass\n",
        "test_turns.py -k file_knows",
    ),
    Mutant(
        "a file has no soft-capping",
        "snapshot.py",
        'described["scaling"], described["softcap"], tensors.pop("sinks", None)',
        'described["scaling"], None, tensors.pop("sinks", None)',
        "test_turns.py -k file_knows",
    ),
    Mutant(
        "the slots are ranked one step late",
        "step_counter.py",
        "self.ranks = self.steps % self.interval == 0",
        "self.ranks = self.steps % self.interval == 1 % self.interval",
        _MATRIX.format("h2o and r0-i3"),
    ),
    Mutant(
        "a further prompt does not begin an interval",
        "step_counter.py",
        "            self.steps = 0\n            self.ranks = True\n",
        "",
        "test_turns.py test_modes.py test_budgets.py -k 'second or question or crop'",
    ),
    # KVzip.
    Mutant(
        "kvzip: the mean of the group for its maximum",
        "second_pass.py",
        "weights.amax(dim=(2, 3))",
        "weights.mean(dim=2).amax(dim=2)",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: the softmax leaves out the sinks",
        "second_pass.py",
        "torch.where(asked < lengths, asked, -1)",
        "torch.where((asked < lengths) & (asked >= self.start), asked, -1)",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: what is repeated sees what comes after it",
        "second_pass.py",
        "asked, -1), own]",
        "asked, -1), own.clamp(max=0)]",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: padding moves what is scored",
        "second_pass.py",
        "(asked + columns - lengths)",
        "(asked + 0 * lengths)",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: a chunk is one token off",
        "second_pass.py",
        "(offset >= 0) & (offset < self.length)",
        "(offset > 0) & (offset < self.length)",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: what was repeated is not taken back",
        "second_pass.py",
        "            whole.restore(before)\n",
        "",
        "test_kvzip.py",
    ),
    Mutant(
        "kvzip: recurrent layers read the padding of what is repeated",
        "second_pass.py",
        "alike(tokens) if whole.is_recurrent else",
        "alike(tokens) if whole is None else",
        "test_kvzip.py -k recurrent_layers",
    ),
    Mutant(
        "the pipeline pads questions for recurrent layers",
        "integrations/pipeline.py",
        "by_length=cache.is_recurrent",
        "by_length=False",
        "test_pipeline.py -k recurrent_layers",
    ),
    Mutant(
        "kvzip: images of an earlier text move positions",
        "second_pass.py",
        "            module.rope_deltas = None\n",
        "            pass\n",
        "test_kvzip.py -k images",
    ),
    Mutant(
        "a chunk of one token is a step",
        "cache.py",
        "self._is_filled and not self.counter.in_parts",
        "self._is_filled",
        "test_turns.py -k 'last_chunk_of_one_token'",
    ),
    Mutant(
        "a turn of one token is no step",
        "hf/announced_calls.py",
        "self.counter.in_parts, self.announced = tokens > 1, tokens",
        "self.counter.in_parts, self.announced = True, tokens",
        "test_turns.py -k turn_of_one_token",
    ),
    Mutant(
        "a share of the prompt is that of its first part",
        "cache.py",
        "self.settle(self.announced or tokens - steps)",
        "self.settle(tokens - steps)",
        "test_compression_ratio.py",
    ),
    Mutant(
        "the interval of another prompt's budget",
        "cache.py",
        "self.eviction, self.counter.interval = eviction, eviction.interval",
        "self.eviction = eviction",
        "test_compression_ratio.py",
    ),
    Mutant(
        "kvzip: sinks are not protected at the cut",
        "second_pass.py",
        "        store.protect_prefix(store.prompt_length)\n",
        "",
        "test_kvzip.py -k kept_tokens",
    ),
    Mutant(
        "kvzip: the end of the turn is left out",
        "policies/methods/kvzip.py",
        "[*before, *quoted, *after, *context[start:stop]]",
        "[*before, *quoted, *context[start:stop]]",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: sinks are repeated",
        "policies/methods/kvzip.py",
        "range(sinks, len(context), self.repeat_chunk)",
        "range(0, len(context), self.repeat_chunk)",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: a quotation reaches beyond the chunk before",
        "policies/methods/kvzip.py",
        "overlap = min(self.repeat_overlap, self.repeat_chunk) if made else 0",
        "overlap = min(self.repeat_overlap, start) if made else 0",
        "test_kvzip.py -k scores_are",
    ),
    Mutant(
        "kvzip: the newest are one token more",
        "policies/methods/kvzip.py",
        "[budget // 2 for budget",
        "[budget // 2 + 1 for budget",
        "test_kvzip.py -k kept_tokens",
    ),
    Mutant(
        "kvzip: older new tokens stay",
        "policies/methods/kvzip.py",
        "_NEW = -1.0",
        "_NEW = 0.5",
        "test_kvzip.py -k kept_tokens",
    ),
    Mutant(
        "kvzip: a prompt is read without a second pass",
        "hf/checks.py",
        "    if find(policy, ReadsTwice):\n        raise ValueError(",
        "    if False:\n        raise ValueError(",
        "test_kvzip.py -k without_the_second",
    ),
    Mutant(
        "kvzip: any model may go on",
        "second_pass.py",
        "            own.module.bind(other.module.module)\n",
        "            pass\n",
        "test_kvzip.py -k only_the_model",
    ),
    # Gates over hidden states.
    Mutant(
        "gates have another activation",
        "policies/methods/learned_gate.py",
        '"gelu": functional.gelu',
        '"gelu": functional.silu',
        "test_gates.py -k noted",
    ),
    Mutant(
        "a row that begins late has the channels of its padding",
        "stores/prefill.py",
        "    store.choose_late_channels(query.detach(), key.detach(), positions)\n",
        "",
        "test_layout.py -k first_chunks_are_padding",
    ),
    Mutant(
        "how ratings are rounded depends on the shape of the call",
        "policies/methods/learned_gate.py",
        'hidden, last = hidden.double(), ""',
        'hidden, last, gate = hidden.float(), "", {n: part.float() for n, part in gate.items()}',
        "test_gates.py -k calls_of_every_shape",
    ),
    Mutant(
        "a rating decays one step too far",
        "policies/methods/learned_gate.py",
        "(slots.next_position[:, None, None] - slots.positions)",
        "(slots.next_position[:, None, None] + 1 - slots.positions)",
        "test_reference.py -k 'learned_gate and keeps_the_tokens'",
    ),
    Mutant(
        "a rating that decays is not made a logarithm",
        "policies/methods/learned_gate.py",
        "functional.logsigmoid(rating) if self.decay else rating",
        "rating",
        "test_reference.py -k 'learned_gate and keeps_the_tokens'",
    ),
    Mutant(
        "gates are those of the first heads",
        "policies/gate_file.py",
        "gate[name][heads]",
        "gate[name][: context.heads]",
        "test_gates.py -k some_of_the_heads",
    ),
    Mutant(
        "gates may be of more heads",
        "policies/gate_file.py",
        '"2.weight": [heads, inner]',
        '"2.weight": [len(gate["2.weight"]), inner]',
        "test_gates.py -k another_model",
    ),
    Mutant(
        "drafted tokens have the hidden state of the first",
        "stores/inputs.py",
        "self.hidden_states[:, tokens]",
        "self.hidden_states[:, : query.shape[2]]",
        "test_modes.py -k learned_gate",
    ),
    Mutant(
        "hidden states of one part of a policy are left out",
        "policies/needs.py",
        "self.hidden_states or other.hidden_states",
        "self.hidden_states",
        "test_gates.py -k one_phase",
    ),
    Mutant(
        "hidden states keep their gradients",
        "hf/module_inputs.py",
        "hidden.detach()",
        "hidden",
        "test_gates.py -k gradients",
    ),
    Mutant(
        "hooks outlive the cache",
        "hf/module_inputs.py",
        "            hook.handle.remove()\n",
        "            pass\n",
        "test_gates.py -k hooks",
    ),
    Mutant(
        "hooks are gone with the first cache",
        "hf/module_inputs.py",
        "        if not hook.readers:\n",
        "        if True:\n",
        "test_gates.py -k hooks",
    ),
    Mutant(
        "hidden states of any module will do",
        "hf/checks.py",
        "shown is None or shown.module is not module",
        "shown is None",
        "test_gates.py -k another_module",
    ),
    # Sweeps and the harness.
    Mutant(
        "a sweep that goes on leaves out a cell",
        "eval/sweep/command.py",
        "return [cell for cell in asked.cells() if is_open(outcomes[cell.name])]",
        "return [cell for cell in asked.cells() if is_open(outcomes[cell.name])][1:]",
        "test_sweep.py -k 'dry_run or to_do_again'",
    ),
    Mutant(
        "half a row stays when a sweep was killed",
        "eval/sweep/folder.py",
        "            _write(path, whole)\n",
        "            pass\n",
        "test_sweep.py -k whole_again",
    ),
    Mutant(
        "full runs once for each budget",
        "eval/sweep/plan.py",
        'for budget in ([None] if policy_of(setting) == "full" else self.budgets)',
        "for budget in self.budgets",
        "test_sweep.py -k full_runs_once",
    ),
    Mutant(
        "the first token of a long prompt counts as late",
        "eval/agreement/statistics.py",
        "min(max(1, budget + 1 - prompt), length)",
        "min(max(0, budget + 1 - prompt), length)",
        "test_agree.py -k late_positions",
    ),
    Mutant(
        "the divergence is the other way round",
        "eval/agreement/reading.py",
        "share = reference.exp()",
        "share = own.exp()",
        "test_agree.py -k slow_loop",
    ),
    Mutant(
        "a text read in a batch has the positions of its columns",
        "eval/agreement/reader.py",
        "self._position = mask.sum(dim=1, keepdim=True)",
        "self._position = mask.sum(dim=1, keepdim=True) * 0 + self._seen",
        "test_agree.py -k slow_loop",
    ),
)


if __name__ == "__main__":
    sys.exit(main())
