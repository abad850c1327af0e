"""The task class behind all YAML files of this folder."""

from collections.abc import Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from compressed_cache.tasks import rows
from compressed_cache.tasks.benchmarks import BENCHMARKS
from compressed_cache.tasks.record import Record, Reply

# As in the study, whose 100 documents per dataset are the first of this order.
_SHUFFLE_SEED = 42


class ReasoningTask(ConfigurableTask):
    """A generative task, graded by its final answer, that also reports what the cache did.

    Beside the harness's own keys, ``metadata`` knows: ``benchmark`` (which entry of
    :data:`BENCHMARKS`), ``hint`` (what to do if the hub refuses), ``steps`` (of the shipped model's
    problems). Users may give ``--metadata`` ``data_dir`` (a folder of local rows, NAME.jsonl),
    ``rows`` (which of the documents in their order: ``"50:100"`` are those after the first 50) and
    ``repeats`` (replies per document, for avg@k and pass@k).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        config = dict(config)
        config.pop("class", None)
        metadata = config["metadata"]
        config["repeats"] = _repeats(metadata.get("repeats", config.get("repeats", 1)))
        # Without it the harness searches the hub for metrics of these names.
        config["process_results"] = ReasoningTask.process_results
        self.name = metadata["benchmark"]
        self.benchmark = BENCHMARKS[self.name]
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Loads, checks and shuffles the rows; called by the harness."""
        split = self.config.test_split
        table = datasets.Dataset.from_list(self._rows(split, dataset_kwargs or {}))
        table = table.shuffle(seed=_SHUFFLE_SEED)
        table = table.select(_range(self.config.metadata.get("rows", ":"), len(table)))
        self.dataset = datasets.DatasetDict({split: table})

    def _rows(self, split: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        metadata = self.config.metadata
        if "steps" in metadata:
            return rows.shipped_rows(metadata["steps"])
        folder = rows.data_folder(metadata)
        if folder is not None:
            return rows.local_rows(folder / f"{self.name}.jsonl", self.benchmark)
        path, name = self.config.dataset_path, self.config.dataset_name
        try:
            return rows.hub_rows(path, name, split, self.benchmark, **arguments)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.config.task}: the hub does not give {path}. {str(error).rstrip('.')}. "
                f"{metadata.get('hint', '')} Without the hub: put its rows into {self.name}.jsonl "
                f"and name the folder, --metadata data_dir=FOLDER or {rows.FOLDER_VARIABLE}=FOLDER."
            ) from None

    def doc_to_target(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """The right answer."""
        return self.benchmark.gold(doc)

    def process_results(
        self, doc: dict[str, Any], results: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """Grades all replies to one document.

        Args:
            doc: the row.
            results: one list of ``repeats`` replies.
        """
        (replies,) = results
        answers = [self.benchmark.answer(reply) for reply in replies]
        grades = [
            self.benchmark.grade(answer, doc) if answer is not None else {} for answer in answers
        ]
        scores = [grade.get("accuracy", 0.0) for grade in grades]
        accuracy = _mean(scores)
        metrics: dict[str, Any] = {
            "accuracy": accuracy,
            "accuracy_low": accuracy,
            "accuracy_high": accuracy,
            "answered": _mean([answer is not None for answer in answers]),
        }
        if self.name == "drop":
            metrics["f1"] = _mean([grade.get("f1", 0.0) for grade in grades])
        if len(replies) > 1:
            metrics["pass@k"] = max(scores)
        records = [reply.record for reply in replies if isinstance(reply, Reply) and reply.record]
        # Without kv_ arguments nothing was counted.
        return metrics | _costs(records, scores) if records else metrics


def _costs(records: Sequence[Record], scores: Sequence[float]) -> dict[str, Any]:
    right = [record.tokens for record, score in zip(records, scores, strict=True) if score == 1]
    return {
        "tokens": _mean([record.tokens for record in records]),
        "tokens_right": _mean(right) if right else None,
        "truncated": _mean([record.truncated for record in records]),
        "evicted_tokens": _mean([record.evicted_tokens for record in records]),
        "evicted_share": _mean([record.evicted_share for record in records]),
        "held_tokens": _mean([record.held_tokens for record in records]),
        "cache_bytes": _mean([record.cache_bytes for record in records]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _repeats(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"repeats must be a whole number from 1, got {value!r}")
    return value


def _range(value: Any, count: int) -> range:
    """The documents that ``rows`` names, of so many."""
    start, colon, stop = str(value).partition(":")
    if colon and all(not part or part.isdecimal() for part in (start, stop)):
        chosen = range(count)[int(start or 0) : int(stop or count)]
        if chosen:
            return chosen
    raise ValueError(
        f'rows must be FIRST:END, such as "50:100", with some of {count} documents between them, '
        f"got {value!r}"
    )
