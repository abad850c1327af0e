"""Run by `torchrun` in two processes: generates under each policy and saves what came out.

torchrun --nproc-per-node 2 tests/parallel_script.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, CompileConfig

from compressed_cache import CompressedCache
from compressed_cache.calibration import files
from compressed_cache.policies import SLOTTED
from tests.statistics import load_or_make_up

warnings.simplefilter("ignore")
files.load = load_or_make_up
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
ids = torch.load(folder / "ids.pt")
mask = (ids != 0).long()
results = {}
compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
compiled._compile_all_devices = True
NAMES = (*SLOTTED, "snapkv+chunkkv", "h2o+chunkkv")
for policy, options in [*((name, {}) for name in NAMES), ("tova", {"compile_config": compiled})]:
    cache = CompressedCache(policy, 16, interval=3, recent=8, protect_prompt=False)
    text = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=24,
        do_sample=False,
        **options,
    )
    results[policy, bool(options)] = text, [layer.positions for layer in cache.layers]
torch.save(results, folder / f"rank{distributed.get_rank()}.pt")
distributed.barrier()
distributed.destroy_process_group()
