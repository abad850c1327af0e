"""The options of each command. Nothing here loads torch, so that help comes at once."""

import argparse
import os
from typing import Any

from compressed_cache import __version__

_EVAL = """\
lm_eval with the tasks and the policies of this package. All options are those of lm_eval's run,
which `compressed-cache eval run --help` lists, but for --include_path, which is filled in.

What decides about the cache stands in --model_args, beside pretrained=:

  kv_press=NAME             a policy, see `compressed-cache policies`; without it the cache is
                            transformers' own; kv_policy=NAME says the same
  kv_budget=N               slots per key/value head and layer; one for each layer: 256/128/...
  kv_interval=N             decode steps between two rankings
  kv_sinks=N                first tokens that are never evicted
  kv_recent=N               newest tokens that are never evicted
  kv_protect_prompt=BOOL    whether the prompt is never evicted
  kv_lossless=BOOL          whether it only drafts what a full cache verifies
  kv_OPTION=VALUE           an option of the policy itself, see `compressed-cache policies NAME`

What is left out has the default of the policy. The value none means None.
"""
_EVAL_EXAMPLE = """\
example:
  compressed-cache eval --model hf --tasks reasoning_gsm8k \\
      --model_args pretrained=MODEL,kv_press=snapkv,kv_budget=256
"""


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and with ``eval`` what is lm_eval's."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "eval" and rest[:1] in (["-h"], ["--help"]):
        options.parser.print_help()
        parser.exit()
    if rest and options.command != "eval":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="compressed-cache",
        description="A fixed budget for the key-value cache of Hugging Face transformers: "
        "evaluates policies, collects what some of them need, and shows the results.",
        epilog="`compressed-cache COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, more: str = "", **options: Any) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}. {more}".strip()
        options = {"description": description} | options
        return commands.add_parser(name, help=text, **options)

    _add_demo_options(
        add(
            "demo",
            "accuracy, speed and memory of policies on the shipped model",
            "With --model a model of yours instead.",
        )
    )
    evaluate = add(
        "eval",
        "lm_eval with this project's tasks; takes lm_eval's own options",
        description=_EVAL,
        epilog=_EVAL_EXAMPLE,
        usage="compressed-cache eval [OPTIONS OF LM_EVAL]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Behind `run` or `ls` it is lm_eval's own.
        add_help=False,
    )
    evaluate.set_defaults(parser=evaluate)
    _add_calibrate_options(
        add(
            "calibrate",
            "collects the statistics of a model that some policies need",
            "`compressed-cache policies NAME` says whether a policy does.",
        )
    )
    _add_sweep_options(
        add(
            "sweep",
            "lm_eval for many tasks, policies, budgets and seeds; resumes where it stopped",
            "Each combination is a cell and gives a row of results.jsonl in the folder.",
        )
    )
    _add_agree_options(
        add(
            "agree",
            "how often policies would say what the full cache says; needs no right answers",
            "The full cache first decodes greedily after each prompt. Then each policy reads these "
            "texts token by token, and what it would have said next is compared with what the full "
            "cache says there. Late positions are those where "
            "prompt and text so far are longer than the budget. The folder is that of a sweep: "
            "killed, it resumes where it stopped, and compare and report read it.",
        )
    )
    compare = add(
        "compare",
        "two policies of a sweep on the same documents",
        "Prints their scores, the difference with its 95% bootstrap interval, and the p-value of "
        "an exact McNemar test.",
    )
    compare.add_argument("results", help="a sweep's folder, or its results.jsonl")
    compare.add_argument(
        "--policies",
        type=_settings,
        required=True,
        help="two, e.g. h2o,snapkv or h2o,h2o:recent=16",
    )
    _add_report_options(
        add(
            "report",
            "results of any kind as one HTML page",
            "The page needs no network and nothing beside it.",
        )
    )
    add("model", "prints the folder of the shipped model", "It takes the place of a hub's name.")
    _add_catalogue_options(
        add("policies", "every policy and modifier: what it does, needs and holds, and its options")
    )
    _add_catalogue_options(add("presses", "what to type here for a press of kvpress"))
    return parser


def _names(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _settings(text: str) -> list[str]:
    """Policies, each of them with options or without: ``h2o,h2o:recent=16,interval=8``."""
    found: list[list[str]] = []
    for part in _names(text):
        name, is_option, _ = part.partition("=")
        if is_option and ":" not in name and found:
            found[-1].append(part)
        else:
            policy, _, option = part.partition(":")
            found.append([policy, *([option] if option else [])])
    for policy, *options in found:
        bad = [option for option in options if not all(option.partition("=")[::2])]
        if not policy or "=" in policy or bad:
            raise argparse.ArgumentTypeError(
                "must be policies with commas between, each of which may have options, "
                f"POLICY:OPTION=VALUE,OPTION=VALUE, got {text!r}"
            )
    return [f"{policy}:{','.join(sorted(rest))}" if rest else policy for policy, *rest in found]


def _numbers(text: str) -> list[int]:
    parts = _names(text)
    if strange := [part for part in parts if not part.lstrip("-").isdecimal()]:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between, e.g. 128,256, got {strange[0]!r}"
        )
    return [int(part) for part in parts]


def _add_calibrate_options(calibrate: argparse.ArgumentParser) -> None:
    add = calibrate.add_argument
    add("--model", required=True, help="a hub or local model")
    add("--policy", required=True, help="the policy that needs them")
    add("--out", required=True, help="the safetensors file to write")
    add("--text", action="append", help="a text file; may be repeated (default: a small own text)")
    add("--tokens", type=int, default=50_000, help="tokens read at most (default: %(default)s)")
    add("--device", default="cpu", help="e.g. cuda (default: %(default)s)")


def _add_report_options(report: argparse.ArgumentParser) -> None:
    add = report.add_argument
    add(
        "results",
        nargs="+",
        help="folders of sweeps, results.jsonl, eviction traces, timings, or JSON results",
    )
    add("--out", default="report.html", help="the page to write (default: %(default)s)")
    add(
        "--layers",
        type=_numbers,
        help="those of which traces are drawn, e.g. 0,13,27 (default: first, middle and last)",
    )


def _add_catalogue_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one of them alone, in full (default: a line each)")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--json", action="store_true", help="all that is known, as JSON")
    written.add_argument("--markdown", action="store_true", help="as a table in Markdown")


def _add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    add = sweep.add_argument
    add(
        "--tasks",
        type=_names,
        required=True,
        help="e.g. reasoning_gsm8k,reasoning_logic, or those of lm_eval in which the model writes "
        "something, e.g. gsm8k,ruler,longbench",
    )
    add("--out", required=True, help="the folder of the sweep")
    add(
        "--measure",
        choices=["accuracy", "agreement"],
        default="accuracy",
        help="of answers, or of each token with the full cache, see agree (default: %(default)s)",
    )
    add("--batch-size", type=int, default=1, help="prompts at a time (default: %(default)s)")
    add(
        "--gen-kwargs",
        default="",
        help="e.g. do_sample=true,max_gen_toks=16384 (default: those of the task)",
    )
    add("--limit", type=int, help="documents per task at most (default: all)")
    _add_options_of_cells(sweep)
    sweep.set_defaults(text=None, max_new_tokens=None)


def _add_agree_options(agree: argparse.ArgumentParser) -> None:
    add = agree.add_argument
    what = agree.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", "--tasks", dest="tasks", type=_names, help="e.g. reasoning_gsm8k")
    what.add_argument(
        "--text",
        metavar="FILE",
        help="a text file instead: each paragraph, divided from the next by a blank line, is a "
        "prompt that the model goes on with",
    )
    add("--out", default="agreement_results", help="the folder (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="texts read at a time (default: %(default)s)")
    add(
        "--max-new-tokens",
        type=int,
        help="of each text (default: the task's own limit; 256 with --text)",
    )
    add("--limit", type=int, help="prompts per task at most (default: all)")
    _add_options_of_cells(agree)


def _add_options_of_cells(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a hub or local model, or shipped")
    add(
        "--policies",
        type=_settings,
        required=True,
        help="e.g. full,h2o,snapkv+caote; several settings of one: h2o,h2o:recent=16,interval=8",
    )
    add(
        "--grid",
        action="append",
        default=[],
        metavar="OPTION=VALUES",
        help="a setting for each value: recent=8,16 of all policies but full, h2o:recent=8,16 of "
        "one; may be repeated, for all combinations (default: none)",
    )
    add("--budgets", type=_numbers, default=[], help="e.g. 128,256; full needs none")
    add("--seeds", type=int, default=1, help="how many: 3 means 0, 1 and 2 (default: %(default)s)")
    add(
        "--policy-args",
        action="append",
        default=[],
        help="of all policies but full: interval=8,protect_prompt=true; of one: h2o:recent=16; "
        "may be repeated (default: those of each policy)",
    )
    add(
        "--model-args",
        default="",
        help="further ones of lm_eval's hf, e.g. max_length=32768 (default: none)",
    )
    add("--dtype", help="of the weights, e.g. bfloat16 (default: as the model was saved)")
    add(
        "--apply-chat-template",
        "--chat",
        action="store_true",
        help="puts the chat template of the model around each prompt",
    )
    add(
        "--metadata",
        default="{}",
        help="of tasks, as JSON, e.g. '{\"repeats\": 16}' (default: %(default)s)",
    )
    add("--retry-failed", action="store_true", help="also run cells again that have an error")
    add("--dry-run", action="store_true", help="print the plan and an estimate, and do nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--processes", type=int, help="cells at a time (default: one per GPU, or else one)"
    )
    where.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster; auto for this one (default: no Ray)"
    )
    add(
        "--gpus-per-cell",
        type=float,
        help="with --ray, e.g. 0.5 (default: 1 if the cluster has any)",
    )
    add(
        "--minutes-per-cell",
        type=float,
        help="a cell that takes longer, the loading of the model included, is ended and recorded "
        "as failed (default: no limit)",
    )


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    add = demo.add_argument
    add("--problems", type=int, default=40, help="held-out problems per row (default: %(default)s)")
    add("--seed", type=int, default=0, help="first seed of the problems (default: %(default)s)")
    add(
        "--budgets",
        type=_numbers,
        help="slots per head, e.g. 180,280, which is the default; 96,160 with --model",
    )
    add(
        "--policies",
        type=_names,
        help="e.g. full,random,snapkv+caote (default: nine of them)",
    )
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes (default: one per CPU, four at most; here %(default)s)",
    )
    add(
        "--out",
        help="folder for demo.json and demo.png, or with --model the folder of agree (default: "
        "demo_results); nothing is written with --prompt",
    )
    add(
        "--model",
        help="a hub or local model: how often policies say what it would say (default: the "
        "shipped one, and problems)",
    )
    add("--prompt", help="with --model: a text it continues (default: prompts of this package)")
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        help="of each text, with --model (default: %(default)s)",
    )
