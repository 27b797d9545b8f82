"""docs/quickstart.ipynb, executed as a user would, in a folder of its own.

Without --full the first training, which takes most of the time, sees a fifth of the images.
"""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs_and_its_results_are_plausible(tmp_path, monkeypatch, full):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    if not full:
        (first,) = (cell for cell in book.cells if "data.limit_train=2000" in cell.source)
        first.source = first.source.replace("data.limit_train=2000", "data.limit_train=400")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    text = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
    assert not [line for lines in text for line in lines.splitlines() if "Error" in line]
    kinds = [{kind for out in cell.outputs for kind in out.get("data", {})} for cell in code]
    assert sum("image/png" in found for found in kinds) == 2
    assert (tmp_path / "photos-onnx/model.onnx").is_file()
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 101
    assert (tmp_path / "runs/photos/status.json").read_text().count('"complete"') == 1
