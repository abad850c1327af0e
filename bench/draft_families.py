"""Whether ``lossless`` leaves long texts as they are, on every family of models.

    python -m bench.draft_families

A tiny model of each family of ``docs/models.md``, with random weights in float32, writes greedily
with a DynamicCache and with ``lossless``. ``python -m bench.real_models page`` says in
``docs/results.md`` what came of it.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm
from transformers import DynamicCache

from bench.results_page import DRAFT_FAMILIES
from compressed_cache import CompressedCache, DraftStatistics, lossless
from compressed_cache.versions import cache_argument
from tests.families import FAMILIES, LINEAR, Family

BATCHES = (1, 8)
PROMPT, TOKENS = 32, 512
POLICY, BUDGET = "snapkv", 64
POSITIONS = 1024


@dataclass(frozen=True)
class FamilyDrafts:
    """One row: a family at a batch size."""

    family: str
    batch: int
    tokens: int
    """Of each text."""
    policy: str
    budget: int
    same: int
    """Texts that are those of the DynamicCache, token for token."""
    acceptance: float | None
    refusal: str
    """Why it was refused; empty: it was not."""
    torch: str


def main(arguments: list[str] | None = None) -> None:
    """Measures all anew."""
    argparse.ArgumentParser(
        prog="python -m bench.draft_families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    rows = [measure(family, batch) for family in tqdm(FAMILIES) for batch in BATCHES]
    lines = [json.dumps(asdict(row)) + "\n" for row in rows]
    DRAFT_FAMILIES.write_text("".join(lines))


def measure(family: Family, batch: int) -> FamilyDrafts:
    """Writes as many texts in both ways."""
    settings = family.settings | {"max_position_embeddings": POSITIONS}
    model = replace(family, settings=settings, dtype=torch.float32).make()
    ids = torch.randint(1, 160, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if LINEAR not in family.kinds:
        mask[0, : PROMPT // 4] = 0
    statistics = DraftStatistics()
    options = {"input_ids": ids, "attention_mask": mask, "do_sample": False}
    options |= {"max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    same, refusal = 0, ""
    try:
        text = model.generate(
            **options,
            **cache_argument(CompressedCache(POLICY, BUDGET)),
            custom_generate=lossless,
            adaptive=False,
            statistics=statistics,
        )
    except NotImplementedError as error:
        refusal = str(error)
    else:
        full = model.generate(**options, **cache_argument(DynamicCache(config=model.config)))
        same = int((text == full).all(dim=1).sum())
    return FamilyDrafts(
        family=family.name,
        batch=batch,
        tokens=TOKENS,
        policy=POLICY,
        budget=BUDGET,
        same=same,
        acceptance=None if refusal else statistics.acceptance_rate,
        refusal=refusal,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
