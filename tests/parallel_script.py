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
from compressed_cache.policies import gate_file
from compressed_cache.policies import statistics_file as files
from tests.made_up_statistics import load_or_make_up, load_or_make_up_gate
from tests.parallel import CASES, RULES

warnings.simplefilter("ignore")
files.load = load_or_make_up
gate_file.load = load_or_make_up_gate
folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
ids = torch.load(folder / "ids.pt")
mask = (ids != 0).long()
results = {}
compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
compiled._compile_all_devices = True
for label, (policy, own) in CASES.items():
    cache = CompressedCache(policy, **RULES | own)
    options = {"compile_config": compiled} if label.endswith("compiled") else {}
    text = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=24,
        do_sample=False,
        **options,
    )
    results[label] = text, [layer.held().positions for layer in cache.layers]
torch.save(results, folder / f"rank{distributed.get_rank()}.pt")
distributed.barrier()
distributed.destroy_process_group()
