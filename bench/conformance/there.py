"""What a press keeps, in a process of the environment of kvpress."""

from pathlib import Path
from typing import Any

from bench.conformance.agreement import Kept
from bench.conformance.pairs import Pair
from bench.conformance.setting import Case, PrefillCase, Setting, text
from bench.kvpress import KvpressProcess, isolated


class Refused(Exception):
    """A press cannot do what it was asked for; says in its own words why."""


class There:
    """Asks a process that runs presses, line by line.

    Args:
        command: starts it.
        setting: model and statistics.
    """

    def __init__(self, command: list[str], setting: Setting) -> None:
        self._process = KvpressProcess(command)
        settings = {
            "config": setting.model.config.to_diff_dict(),
            "dtype": str(setting.model.dtype).removeprefix("torch."),
            "weights": str(setting.weights),
            "statistics": dict(setting.statistics),
            "tokenizer": setting.tokenizer.name_or_path,
        }
        self.versions: dict[str, str] = self._process.ask(settings)["versions"]

    def kept(self, pair: Pair, case: Case, undone: tuple[str, ...]) -> list[Kept]:
        """What is held right after each cut, but the last of a text that is read token by token.

        Raises:
            Refused: the press, or kvpress.
            RuntimeError: the process ended early; what it wrote to stderr says why.
        """
        request: dict[str, Any] = {
            "press": pair.press,
            "attention": pair.attention,
            "ids": text(case),
            "prompt": case.prompt,
            "ratio": None,
            "interval": None,
            "undone": undone,
        }
        request |= case._asdict()
        answer = self._process.ask(request)
        if "refused" in answer:
            raise Refused(answer["refused"])
        cuts = answer["kept"]
        return cuts if isinstance(case, PrefillCase) else cuts[:-1]

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def command(python: Path) -> list[str]:
    """Runs presses with this interpreter."""
    return isolated(python, Path(__file__).with_name("kvpress_process.py"))
