"""What the calibrate command does with its options."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressed_cache.calibration.recording import chunks, collect
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.policies import statistics_file as files
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.wording import nearest

CORPUS = Path(__file__).parent / "corpus.txt"
WALKS = 60
STEPS = (6, 10, 20, 40)


def run(options: argparse.Namespace) -> int:
    """Collects the statistics of a policy and writes them to a file."""
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    except OSError as error:
        print(f"--model {options.model}: {error}", file=sys.stderr)
        return 1
    model.eval().to(options.device)
    texts = _texts(options.model, options.text)
    pieces = chunks((tokenizer(text).input_ids for text in texts), limit=options.tokens)
    try:
        layers = collect(model, tqdm(pieces, unit="chunk", disable=None), options.policy)
    except (NotImplementedError, ValueError) as error:
        print(f"--model {options.model}: {error}", file=sys.stderr)
        return 1
    out = Path(options.out)
    tokens = sum(map(len, pieces))
    files.save(
        out,
        policy=options.policy,
        model="shipped" if _is_shipped(options.model) else options.model,
        config=model.config.get_text_config(),
        tokens=tokens,
        layers=layers,
    )
    print(f"{len(layers)} layers, {tokens} tokens, {out.stat().st_size} bytes: {out}")
    return 0


def _problem(options: argparse.Namespace) -> str | None:
    if options.policy not in STATISTICS:
        return (
            f"--policy must be one of {', '.join(STATISTICS)}, the others need no statistics, got "
            f"{options.policy!r}{nearest(options.policy, STATISTICS)}"
        )
    if options.tokens < 1:
        return f"--tokens must be >= 1, got {options.tokens}"
    missing = [path for path in options.text or [] if not Path(path).is_file()]
    return f"--text must name files, got {missing}" if missing else None


def _is_shipped(model: str) -> bool:
    return Path(model).resolve() == MODEL_PATH.resolve()


def _texts(model: str, paths: list[str] | None) -> Iterator[str]:
    if paths:
        yield from (Path(path).read_text(encoding="utf-8") for path in paths)
    elif _is_shipped(model):
        from compressed_cache.reasoner.problems import make_problem

        for seed in range(WALKS):
            problem = make_problem(seed, STEPS[seed % len(STEPS)], split="training")
            yield f"{problem.prompt} {problem.trace}"
    else:
        yield CORPUS.read_text(encoding="utf-8")
