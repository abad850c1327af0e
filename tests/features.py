"""What each policy can do with what ``generate`` can do, tried on a tiny model.

``python -m tests.features`` tries all of it and writes ``features.json``, of which
``python -m bench.pages`` makes the table of ``docs/features.md``.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.every_policy import COMBINATIONS, statistics
from compressed_cache import CompressedCache, compress, lossless
from compressed_cache.policies import POLICIES
from compressed_cache.policies.capabilities import ReadsTwice, find
from compressed_cache.reasoner.tokenizer import build_tokenizer
from compressed_cache.stores import memory
from compressed_cache.stores.growing import GrowingStore
from compressed_cache.stores.slots import SlotStore
from compressed_cache.versions import cache_argument
from compressed_cache.wording import markdown
from tests.compiling import CountingBackend, compiled
from tests.conftest import make_llama
from tests.parallel import CASES

FILE = Path(__file__).with_name("features.json")
EVERY = (*POLICIES, *COMBINATIONS)
YES = "yes"
BUDGET, PROMPT, NEW = 40, 48, 12
QUESTION = 4
"""Tokens after a context that is read twice."""


class Trial:
    """A policy, and texts to try it on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = make_llama()
        self.options: dict[str, Any] = statistics(name, self.model)
        if POLICIES.get(name, POLICIES["h2o"])().evicts:
            self.options |= dict(recent=8, protect_prompt=False)
        generator = torch.Generator().manual_seed(1)
        rows = [torch.randperm(399, generator=generator)[:PROMPT] + 1 for _ in range(2)]
        self.ids = torch.stack(rows)

    def cache(self, budget: int = BUDGET) -> CompressedCache:
        return CompressedCache(self.name, budget, **self.options)

    def generate(
        self, cache: CompressedCache, ids: Tensor, mask: Tensor | None = None, **more: Any
    ) -> list[list[int]]:
        """The new tokens of each row; a context that must be is compressed before."""
        mask = torch.ones_like(ids) if mask is None else mask
        if find(cache.policy, ReadsTwice) and not cache.get_seq_length():
            chunk = {name: more[name] for name in more if name == "prefill_chunk_size"}
            context = dict(attention_mask=mask[:, :-QUESTION], tokenizer=build_tokenizer())
            compress(self.model, ids[:, :-QUESTION], cache, **context, **chunk)
        arguments: dict[str, Any] = {**cache_argument(cache), "attention_mask": mask, **more}
        output: Any = self.model.generate(ids, max_new_tokens=NEW, do_sample=False, **arguments)
        return output[:, ids.shape[1] :].tolist()


def padded(trial: Trial) -> None:
    """Rows of a padded batch are what they are alone."""
    ids, mask = trial.ids.clone(), torch.ones_like(trial.ids)
    ids[0, :7] = mask[0, :7] = 0
    together = trial.generate(trial.cache(), ids, mask)
    for row, padding in enumerate((7, 0)):
        alone = trial.generate(trial.cache(), ids[row : row + 1, padding:])
        assert alone == together[row : row + 1]


def compiles(trial: Trial) -> None:
    """A compiled step gives the tokens of an eager one."""
    torch._dynamo.reset()
    backend = CountingBackend()
    expected = trial.generate(trial.cache(), trial.ids)
    got = trial.generate(trial.cache(), trial.ids, compile_config=compiled(backend))
    torch._dynamo.reset()
    assert got == expected
    assert backend.graphs >= 1


def chunks(trial: Trial) -> None:
    """A prompt read in chunks, held whole, gives the tokens of one that is read at once."""
    if own := [reason for part, reason in _BY_THE_FIRST_CHUNK.items() if part in trial.name]:
        trial.generate(trial.cache(), trial.ids, prefill_chunk_size=16)
        raise ValueError(own[0])
    room = 20 * PROMPT  # some layers of pyramidkv have a tenth of it
    expected = trial.generate(trial.cache(room), trial.ids)
    assert trial.generate(trial.cache(room), trial.ids, prefill_chunk_size=16) == expected
    trial.generate(trial.cache(), trial.ids, prefill_chunk_size=16)


_BY_THE_FIRST_CHUNK = {
    "think": "It runs, but the channels that all of a prompt keeps are those of its first chunk.",
}


def drafts(trial: Trial) -> None:
    """Prompt lookup gives the tokens of decoding alone."""
    ids = trial.ids[:1] % 20 + 1
    expected = trial.generate(trial.cache(), ids)
    assert trial.generate(trial.cache(), ids, prompt_lookup_num_tokens=4) == expected


def verified(trial: Trial) -> None:
    """Drafts that the full cache verifies give its text."""
    ids, mask = trial.ids.clone(), torch.ones_like(trial.ids)
    ids[0, :7] = mask[0, :7] = 0
    expected: Any = trial.model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    with warnings.catch_warnings(action="error", category=UserWarning):
        try:
            got = trial.generate(
                trial.cache(), ids, mask, custom_generate=lossless, num_draft_tokens=3
            )
        except UserWarning as warning:
            reason = str(warning)
            raise ValueError(reason[0].upper() + reason[1:]) from warning
    assert got == expected[:, PROMPT:].tolist()


def snapshots(trial: Trial) -> None:
    """A snapshot and a file go on as the cache would have."""
    cache = trial.cache()
    text = torch.cat([trial.ids, torch.tensor(trial.generate(cache, trial.ids))], dim=1)
    snapshot = cache.snapshot()
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache.safetensors")
        loaded = CompressedCache.load(Path(folder) / "cache.safetensors")
    expected = trial.generate(cache, text)
    cache.restore(snapshot)
    assert trial.generate(cache, text) == trial.generate(loaded, text) == expected


def parallel(trial: Trial) -> None:
    """Told by what ``tests/parallel.py`` runs in two processes."""
    if trial.name not in {policy for policy, _ in CASES.values()}:
        own = [part for part in _OF_A_PROCESS if part in trial.name]
        raise ValueError(_OF_A_PROCESS[own[0]] if own else "It is not tested in two processes.")


_OF_A_PROCESS = {
    "adakv": "It runs, but heads share slots with those of their own process only.",
    "ams": "It runs, but the largest mass is that of the heads of the same process.",
}


def kernel(trial: Trial) -> None:
    """Told by whether a layer would take its steps in the Triton kernel if it were on CUDA."""
    served = SimpleNamespace(serves=lambda sizes: True)
    cache = trial.cache()
    with mock.patch.object(memory, "operators", served), torch.no_grad():
        if find(cache.policy, ReadsTwice):
            context = dict(tokenizer=build_tokenizer())
            compress(trial.model, trial.ids[:, :-QUESTION], cache, **context)
        else:
            trial.model(trial.ids, **cache_argument(cache))
    (store, *_) = cache.stores()
    if not store.is_fused:
        raise ValueError(_step_in_torch(store))


def _step_in_torch(store: Any) -> str:
    if type(store) not in (SlotStore, GrowingStore):
        kind = type(store).__name__
        return f"PyTorch takes its steps, because slots are laid out otherwise (`{kind}`)."
    if store.bound.rerotates:
        return "PyTorch takes its steps, because keys are turned in each of them."
    return "PyTorch takes its steps, because nothing is evicted."


FEATURES: Mapping[str, Callable[[Trial], None]] = {
    "padded batch": padded,
    "compiled": compiles,
    "chunks": chunks,
    "drafts": drafts,
    "lossless": verified,
    "snapshot, file": snapshots,
    "tensor parallel": parallel,
    "CUDA kernel": kernel,
}


def tried(name: str) -> dict[str, str]:
    """Of each feature ``yes``, or why not; AssertionError where something is wrong."""
    trial, found = Trial(name), {}
    for feature, attempt in FEATURES.items():
        try:
            attempt(trial)
            found[feature] = YES
        except (NotImplementedError, ValueError) as error:
            found[feature] = str(error)
    return found


def statistics_of(name: str) -> str:
    """Files that a policy cannot do without."""
    if "weights" in (needed := statistics(name, make_llama())):
        return "trained gates"
    return "a file" if needed else "none"


def table(path: Path = FILE) -> str:
    """A row for each policy, of question marks where it was not tried, then the reasons."""
    found: dict[str, dict[str, str]] = json.loads(path.read_text())
    reasons: list[str] = []
    rows = []
    for name in EVERY:
        shown, cells = [f"`{name}`"], found.get(name)
        if cells is None:
            rows.append([*shown, *["?"] * (len(FEATURES) + 1)])
            continue
        for feature in FEATURES:
            if cells[feature] == YES:
                shown.append(YES)
                continue
            if cells[feature] not in reasons:
                reasons.append(cells[feature])
            shown.append(f"no ({reasons.index(cells[feature]) + 1})")
        rows.append([*shown, cells["calibration"]])
    lines = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    header = ["policy", *FEATURES, "calibration"]
    return "\n".join([markdown(header, rows), "", *lines])


def main(arguments: list[str] | None = None) -> None:
    """Writes ``features.json``."""
    parser = argparse.ArgumentParser(prog="python -m tests.features", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=EVERY, default=EVERY, metavar="NAME")
    options = parser.parse_args(arguments)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in options.only:
        found[name] = {**tried(name), "calibration": statistics_of(name)}
    FILE.write_text(
        json.dumps({name: found[name] for name in EVERY if name in found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
