"""What the tests of the harness share."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import lm_eval
import lm_eval.tasks
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH

DATA = Path(__file__).parents[2] / "shared" / "data"


def manager(**metadata: Any) -> TaskManager:
    """Knows this project's tasks only, which saves reading lm_eval's thousands."""
    return TaskManager(include_path=str(PATH), include_defaults=False, metadata=metadata)


def leave_out_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that must let lm_eval look for all tasks: its thousands take half a minute."""
    walk = TaskIndex._iter_yaml_files

    def without_theirs(root: Path) -> Any:
        return iter(()) if root == Path(lm_eval.tasks.__file__).parent else walk(root)

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(without_theirs))


def evaluate(tasks: list[str], model: Any = "hf", **options: Any) -> dict[str, Any]:
    """``simple_evaluate``; ``metadata`` and ``model_args`` as on the command line."""
    metadata = options.pop("metadata", {})
    if isinstance(model, str):
        options["model_args"] = {"pretrained": str(MODEL_PATH)} | options.get("model_args", {})
        options.setdefault("device", "cpu")
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager(**options.get("model_args", {}), **metadata),
        bootstrap_iters=0 if not options.pop("stderr", False) else 100,
        **options,
    )
    assert results is not None
    return results


def replies(results: dict[str, Any], task: str) -> list[list[str]]:
    """The replies to each document, in the order of documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0] for sample in samples]


class Scripted(LM):
    """A model that replies by a function of the prompt."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__()
        self.reply = reply

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self.reply(request.args[0]) for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


@contextmanager
def messages(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What lm_eval's loggers say, which do not reach pytest's."""
    heard: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
