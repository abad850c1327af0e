"""What the calibrate command does with its options."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from compressed_cache.calibration.recording import chunks, collect
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.hf.loading import load
from compressed_cache.policies import statistics_file as files
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tensorfile import check_folder
from compressed_cache.wording import nearest

CORPUS = Path(__file__).parent / "corpus.txt"
WALKS = 60
STEPS = (6, 10, 20, 40)


def run(options: argparse.Namespace) -> int:
    """Collects the statistics of a policy and writes them to a file."""
    if problem := _problem(options):
        print(problem, file=sys.stderr)
        return 2
    out = Path(options.out)
    try:
        check_folder(out.parent)
    except OSError as error:
        print(f"--out {out}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        tokenizer, model = load(options.model, device=options.device)
    except ValueError as error:
        print(f"--model {options.model}: {error}", file=sys.stderr)
        return 1
    texts = _texts(options.model, options.text)
    pieces = chunks((tokenizer(text).input_ids for text in texts), limit=options.tokens)
    done: list[list[int]] = []
    try:
        read = _until_interrupted(pieces, done)
        shown = tqdm(read, total=len(pieces), unit="chunk", disable=None)
        layers = collect(model, shown, options.policy)
    except (NotImplementedError, ValueError) as error:
        print(f"--model {options.model}: {error}", file=sys.stderr)
        return 1
    tokens = sum(map(len, done))
    files.save(
        out,
        policy=options.policy,
        model="shipped" if _is_shipped(options.model) else options.model,
        config=model.config.get_text_config(),
        tokens=tokens,
        layers=layers,
    )
    print(f"{len(layers)} layers, {tokens} tokens, {out.stat().st_size} bytes: {out}")
    if len(done) < len(pieces):
        print(f"stopped after {len(done)} of {len(pieces)} chunks", file=sys.stderr)
        return 130
    return 0


def _until_interrupted(pieces: Iterable[list[int]], done: list[list[int]]) -> Iterator[list[int]]:
    """The pieces, up to the one at which Ctrl-C is pressed; a second Ctrl-C ends the program.

    A piece that was broken off would be in the sums of some layers only.
    """
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in pieces:
            if stopping.is_set():
                return
            yield piece
            done.append(piece)
    finally:
        signal.signal(signal.SIGINT, before)


def _problem(options: argparse.Namespace) -> str | None:
    if options.policy not in STATISTICS:
        return (
            f"--policy must be one of {', '.join(STATISTICS)}, the others need no statistics, got "
            f"{options.policy!r}{nearest(options.policy, STATISTICS)}"
        )
    if options.tokens < 1:
        return f"--tokens must be >= 1, got {options.tokens}"
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"--device must be one that torch finds here, got {options.device!r}: {reason}"
    if Path(options.out).is_dir():
        return f"--out must name a file, got the folder {options.out}"
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
