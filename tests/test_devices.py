"""More than one device: layers on several of them, heads shared by processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from tests.conftest import distinct_tokens, held
from tests.parallel import CASES, RULES


def _padded() -> torch.Tensor:
    ids = distinct_tokens(3, 30)
    ids[0, :11] = ids[2, :3] = 0
    return ids


@pytest.mark.slow
def test_two_processes_with_half_of_the_heads_keep_and_say_what_one_does(
    make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model, ids = make_model(num_key_value_heads=4, num_attention_heads=8).double(), _padded()
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    root = Path(__file__).parents[1]
    script = Path(__file__).with_name("parallel_script.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(tmp_path)],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    processes = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert list(processes[0]) == list(CASES)
    for label, (policy, own) in CASES.items():
        cache = CompressedCache(policy, **RULES | own)
        mask = (ids != 0).long()
        expected = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False
        )
        for rank, results in enumerate(processes):
            text, positions = results[label]
            assert torch.equal(text, expected), label
            for layer in range(2):
                heads = cache.layers[layer].held().positions[:, 2 * rank : 2 * rank + 2]
                assert _kept(positions[layer]) == _kept(heads), label


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "full"])
def test_layers_may_be_anywhere(
    make_model: Callable[..., LlamaForCausalLM], policy: str, tmp_path: Path
) -> None:
    """One layer in memory, one that is fetched from a disk for each pass."""
    ids, mask = _padded(), (_padded() != 0).long()
    texts = []
    for places in (None, {"model.layers.1": "disk", "model.layers.0": "cpu"}):
        model = make_model()
        if places is not None:
            rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
            places = {**places, **rest, "lm_head": "cpu"}
            model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
        cache = CompressedCache(policy, 16, protect_prompt=False)
        text = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False
        )
        texts.append((text, [held(cache, layer, 1) for layer in range(2)]))
    assert torch.equal(texts[0][0], texts[1][0])
    assert texts[0][1] == texts[1][1]


def _kept(positions: torch.Tensor) -> list[list[list[int]]]:
    """Row by row and head by head, in order."""
    return [[sorted(p for p in head if p >= 0) for head in row] for row in positions.tolist()]
