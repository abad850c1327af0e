"""The notebook runs from its first cell to its last, and is stored with what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"
CELLS: list[dict[str, Any]] = [
    cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
]


def _printed(cell: dict[str, Any]) -> list[str]:
    return [line for output in cell["outputs"] for line in output.get("text", [])]


def _pictures(cell: dict[str, Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_the_notebook_is_stored_as_it_was_executed_from_the_top() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert not [o for cell in CELLS for o in cell["outputs"] if o["output_type"] == "error"]
    assert sum(map(_pictures, CELLS)) == 2


@pytest.mark.slow
def test_the_notebook_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    names: dict[str, Any] = {}
    for cell in CELLS:
        shown: list[Any] = []
        monkeypatch.setattr(pyplot, "show", lambda shown=shown: shown.append(pyplot.gcf()))
        exec("".join(cell["source"]), names)
        assert len(shown) == _pictures(cell)
        for figure in shown:
            figure.canvas.draw()
            pyplot.close(figure)
        # Another processor may round a token into another.
        assert len(capsys.readouterr().out.splitlines()) == len(_printed(cell))
    accuracies = {setting: accuracy for setting, (accuracy, _) in names["results"].items()}
    assert accuracies["full", None] == 1 and accuracies["h2o", 190] > accuracies["random", 190]
