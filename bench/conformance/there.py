"""What a press keeps, in a process of the environment of kvpress."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.conformance.agreement import Kept
from bench.conformance.pairs import Pair
from bench.conformance.setting import Case, PrefillCase, Setting, text


class Refused(Exception):
    """A press cannot do what it was asked for; says in its own words why."""


class There:
    """Asks a process that runs presses, line by line.

    Args:
        command: starts it.
        setting: model and statistics.
    """

    def __init__(self, command: list[str], setting: Setting) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        settings = {
            "config": setting.model.config.to_diff_dict(),
            "dtype": str(setting.model.dtype).removeprefix("torch."),
            "weights": str(setting.weights),
            "statistics": dict(setting.statistics),
        }
        self.versions: dict[str, str] = self._ask(settings)["versions"]

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
        answer = self._ask(request)
        if "refused" in answer:
            raise Refused(answer["refused"])
        cuts = answer["kept"]
        return cuts if isinstance(case, PrefillCase) else cuts[:-1]

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            pass

    def _ask(self, request: object) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            status = self._process.returncode
            raise RuntimeError(f"the process of kvpress ended early, with status {status}")
        return json.loads(answer)


def command(python: Path) -> list[str]:
    """Runs presses with this interpreter."""
    # Isolated, or files beside it would be found in place of packages.
    return [str(python), "-I", str(Path(__file__).with_name("kvpress_process.py"))]
