"""``compressed-cache``, or ``python -m compressed_cache``: the commands."""

import argparse
import os
import sys
from pathlib import Path

from compressed_cache.eval.options import parse
from compressed_cache.wording import missing


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options, rest = parse(arguments)
    run = {
        "demo": _demo,
        "eval": _eval,
        "calibrate": _calibrate,
        "sweep": _sweep,
        "agree": _agree,
        "compare": _compare,
        "report": _report,
        "model": _model,
        "policies": _catalogue,
        "presses": _catalogue,
    }
    try:
        status = run[options.command](options, rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on, as with `| head`; what is left must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        from compressed_cache.eval.demo.command import run

        return run(options)
    except ModuleNotFoundError as error:
        return _missing(error, "eval" if error.name == "lm_eval" else "demo")


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        return _missing(error, "eval")
    from compressed_cache.integrations.harness.adapter import is_refusal
    from compressed_cache.integrations.harness.autoload import install
    from compressed_cache.tasks import PATH

    if any(option.partition("=")[0] == "--include_path" for option in rest):
        print(
            "--include_path must be left out, eval fills it in. Name a task of your own by its "
            "file, --tasks mine.yaml, or use lm_eval itself.",
            file=sys.stderr,
        )
        return 2
    install()
    sys.argv = ["lm_eval", *rest, "--include_path", str(PATH)]
    try:
        cli_evaluate()
    except Exception as error:
        if not is_refusal(error):
            raise
        print(error, file=sys.stderr)
        return 1
    return 0


def _calibrate(options: argparse.Namespace, rest: list[str]) -> int:
    from compressed_cache.calibration.command import run

    return run(options)


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        from compressed_cache.eval.sweep.command import run
    except ModuleNotFoundError as error:
        return _missing(error, "eval")
    return run(options)


def _agree(options: argparse.Namespace, rest: list[str]) -> int:
    options.measure, options.gen_kwargs = "agreement", ""
    if options.text:
        # No task has such a name, and no file of a folder begins with a dot.
        options.tasks = [f"text-{Path(options.text).name}"]
        if options.max_new_tokens is None:
            options.max_new_tokens = 256
    if options.max_new_tokens is not None:
        options.gen_kwargs = f"max_gen_toks={options.max_new_tokens}"
    return _sweep(options, rest)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        from compressed_cache.eval.results.command import compare
    except ModuleNotFoundError as error:
        return _missing(error, "eval")
    return compare(options)


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    # Before what reads them is imported, which takes seconds.
    if absent := [path for path in options.results if not Path(path).exists()]:
        print(f"{absent[0]} must be readable, got: No such file or directory", file=sys.stderr)
        return 2
    try:
        from compressed_cache.eval.report.command import run
    except ModuleNotFoundError as error:
        return _missing(error, "report")
    return run(options)


def _model(options: argparse.Namespace, rest: list[str]) -> int:
    from compressed_cache.reasoner import MODEL_PATH

    print(MODEL_PATH)
    return 0


def _catalogue(options: argparse.Namespace, rest: list[str]) -> int:
    from compressed_cache.eval.catalogue import command

    return getattr(command, options.command)(options)


def _missing(error: ModuleNotFoundError, extra: str) -> int:
    print(missing(error.name, extra), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
