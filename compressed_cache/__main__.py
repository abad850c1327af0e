"""``python -m compressed_cache``: the commands."""

import argparse
import os
import sys
from pathlib import Path

from compressed_cache.wording import missing


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m compressed_cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="accuracy, speed and memory of policies on the shipped model"
    )
    _add_demo_options(demo)
    commands.add_parser(
        "eval",
        help="lm_eval with this project's tasks; takes lm_eval's own options",
        add_help=False,
    )
    calibrate = commands.add_parser(
        "calibrate", help="collects the statistics of a model that some policies need"
    )
    _add_calibrate_options(calibrate)
    sweep = commands.add_parser(
        "sweep", help="lm_eval for many tasks, policies, budgets and seeds; goes on where it was"
    )
    _add_sweep_options(sweep)
    agree = commands.add_parser(
        "agree",
        help="how often policies would say what the full cache says; needs no right answers",
    )
    _add_agree_options(agree)
    compare = commands.add_parser("compare", help="two policies of a sweep on the same documents")
    compare.add_argument("results", help="a sweep's folder, or its results.jsonl")
    compare.add_argument("--policies", type=_names, required=True, help="e.g. h2o,snapkv")
    report = commands.add_parser("report", help="results of any kind as one HTML page")
    _add_report_options(report)
    commands.add_parser("model", help="prints the folder of the shipped model")
    catalogue = {
        "policies": "every policy and modifier: what it does, needs and holds, and its options",
        "presses": "what to type here for a press of kvpress",
    }
    for command, text in catalogue.items():
        _add_catalogue_options(commands.add_parser(command, help=text))
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "eval":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
    return run[options.command](options, rest)


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


def _add_calibrate_options(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument("--model", required=True, help="a hub or local model")
    calibrate.add_argument("--policy", required=True, help="the policy that needs them")
    calibrate.add_argument("--out", required=True, help="the safetensors file to write")
    calibrate.add_argument(
        "--text", action="append", help="a text file; may be repeated (default: a small own text)"
    )
    calibrate.add_argument("--tokens", type=int, default=50_000, help="tokens read at most")
    calibrate.add_argument("--device", default="cpu", help="e.g. cuda")


def _add_report_options(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "results",
        nargs="+",
        help="folders of sweeps, results.jsonl, eviction traces, timings, or JSON results",
    )
    report.add_argument("--out", default="report.html", help="the page to write")
    report.add_argument(
        "--layers",
        type=_numbers,
        help="those of which traces are drawn, e.g. 0,13,27 (default: first, middle and last)",
    )


def _add_catalogue_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one of them alone, in full")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--json", action="store_true", help="all that is known, as JSON")
    written.add_argument("--markdown", action="store_true", help="as a table of the documentation")


def _names(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _numbers(text: str) -> list[int]:
    parts = _names(text)
    if strange := [part for part in parts if not part.lstrip("-").isdecimal()]:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between, e.g. 128,256, got {strange[0]!r}"
        )
    return [int(part) for part in parts]


def _add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    add = sweep.add_argument
    add("--tasks", type=_names, required=True, help="e.g. reasoning_gsm8k,reasoning_logic")
    add("--out", required=True, help="the folder of the sweep")
    add(
        "--measure",
        choices=["accuracy", "agreement"],
        default="accuracy",
        help="of answers, or of each token with the full cache, see agree (default: accuracy)",
    )
    add("--batch-size", type=int, default=1)
    add("--gen-kwargs", default="", help="e.g. do_sample=true,max_gen_toks=16384")
    add("--limit", type=int, help="documents per task at most")
    _add_options_of_cells(sweep)
    sweep.set_defaults(text=None, max_new_tokens=None)


def _add_agree_options(agree: argparse.ArgumentParser) -> None:
    agree.description = (
        "The full cache writes the most likely token again and again behind each prompt, once. "
        "Then each policy reads these texts token by token, and what it would have said next is "
        "compared with what the full cache says there. Late positions are those where prompt and "
        "text so far are longer than the budget. The folder is that of a sweep: killed, it goes "
        "on where it was, and compare and report read it."
    )
    add = agree.add_argument
    what = agree.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", "--tasks", dest="tasks", type=_names, help="e.g. reasoning_gsm8k")
    what.add_argument(
        "--text",
        metavar="FILE",
        help="a text file instead: each paragraph, divided from the next by a blank line, is a "
        "prompt that the model goes on with",
    )
    add("--out", default="agreement_results", help="the folder (default: agreement_results)")
    add("--batch-size", type=int, default=8, help="texts read at a time (default: 8)")
    add(
        "--max-new-tokens",
        type=int,
        help="of each text (default: the task's own limit; 256 with --text)",
    )
    add("--limit", type=int, help="prompts per task at most")
    _add_options_of_cells(agree)


def _add_options_of_cells(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a hub or local model, or shipped")
    add("--policies", type=_names, required=True, help="e.g. full,h2o,snapkv+caote")
    add("--budgets", type=_numbers, default=[], help="e.g. 128,256; full needs none")
    add("--seeds", type=int, default=1, help="how many: 3 means 0, 1 and 2")
    add(
        "--policy-args",
        action="append",
        default=[],
        help="of all policies but full: interval=8,protect_prompt=true; of one: h2o:recent=16; "
        "may be repeated",
    )
    add("--model-args", default="", help="further ones of lm_eval's hf, e.g. max_length=32768")
    add("--dtype", help="of the weights, e.g. bfloat16")
    add("--apply-chat-template", "--chat", action="store_true")
    add("--metadata", default="{}", help="of tasks, as JSON, e.g. '{\"repeats\": 16}'")
    add("--retry-failed", action="store_true", help="also run cells again that have an error")
    add("--dry-run", action="store_true", help="print the plan and an estimate, and do nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--processes", type=int, help="one per GPU unless given, or else one")
    where.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster; auto for this one")
    add("--gpus-per-cell", type=float, help="with --ray, e.g. 0.5; 1 unless given, if it has any")


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--problems", type=int, default=40, help="held-out problems per row")
    demo.add_argument("--seed", type=int, default=0, help="first seed of the problems")
    demo.add_argument("--budgets", type=_numbers, default=None, help="e.g. 180,280")
    demo.add_argument(
        "--policies",
        type=_names,
        default=None,
        help="e.g. full,random,snapkv+caote; nine of them unless given",
    )
    demo.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    demo.add_argument("--out", default="demo_results", help="folder for demo.json and demo.png")
    demo.add_argument(
        "--model", help="a hub or local model instead: how often policies say what it would say"
    )
    demo.add_argument("--prompt", help="with --model: a text it continues instead")
    demo.add_argument("--max-new-tokens", type=int, default=256, help="with --model")


if __name__ == "__main__":
    sys.exit(main())
