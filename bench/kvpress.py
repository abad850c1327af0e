"""The package kvpress, which needs an older transformers and so an environment of its own."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contenders import BUDGET, Generation

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = FOLDER.parent / ".venv-kvpress"
VERSIONS = {"kvpress": "0.5.5", "transformers": "5.2.0"}  # the newest, and the newest it allows


def environment() -> Path:
    """The interpreter of kvpress' environment, which is made where it is missing or outdated.

    Raises:
        subprocess.CalledProcessError: where it cannot be made, as without a network.
    """
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    here = importlib.metadata.version("torch").partition("+")[0]
    packages = [f"{name}=={version}" for name, version in {"torch": here, **VERSIONS}.items()]
    if not installed.exists() or installed.read_text().split() != packages:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        installed.write_text("\n".join(packages))
    return python


@dataclass(frozen=True)
class PressSetting:
    """How a ``DecodingPress`` scores tokens, and after how many it evicts."""

    scorer: str
    interval: int
    budget: int = BUDGET

    def __str__(self) -> str:
        return f"kvpress DecodingPress ({self.scorer}, every {self.interval} tokens)"


class KvpressProcess:
    """A process in kvpress' environment that answers each line of JSON with one."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: object) -> dict[str, Any]:
        """The answer.

        Raises:
            RuntimeError: the process ended early; what it wrote to stderr says why.
        """
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            status = self._process.returncode
            raise RuntimeError(f"the process of kvpress ended early, with status {status}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        with self._process:
            pass


def isolated(python: Path, script: Path) -> list[str]:
    """The command that runs a script; files beside it are not found in place of packages."""
    return [str(python), "-I", str(script)]


class KvpressGeneration:
    """A text that a process in kvpress' environment continues, timed token by token there.

    All of it is one call of ``generate``, held up between the rounds: a second call would take the
    length of the cut cache for what has been read, and read the rest of the text again.

    Args:
        python: interpreter of that environment.
        press: what bounds the cache, or ``None`` for ``DynamicCache`` as it is.
        like: whose model and text so far are taken over.

    Raises:
        RuntimeError: if the process ends early; what it wrote to stderr says why.
    """

    def __init__(self, python: Path, press: PressSetting | None, like: Generation) -> None:
        self.held_tokens = 0
        """The most that a layer has held after a step."""
        self._process = KvpressProcess(isolated(python, FOLDER / "kvpress_process.py"))
        settings = {
            "config": like.model.config.to_diff_dict(),
            "dtype": str(like.model.dtype).removeprefix("torch."),
            "device": like.model.device.type,
            "threads": torch.get_num_threads(),
            "ids": like.ids.tolist(),
            "press": press and asdict(press),
        }
        self._ask(settings)

    def continue_by(self, tokens: int) -> list[float]:
        """Generates ``tokens`` tokens after an untimed first one; seconds of each."""
        return self._ask(tokens)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def _ask(self, request: object) -> list[float]:
        told = self._process.ask(request)
        self.held_tokens = told["held_tokens"]
        return told["seconds"]
