"""Every notebook runs from top to bottom, and its two files, .ipynb and .py, are one notebook."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT_S = 110  # of one cell; the whole has two minutes
MOST_BYTES = 200_000  # of a notebook with its outputs: it is read in a browser and kept in git


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.rstrip()) for cell in notebook.cells]


def test_each_notebook_has_both_files() -> None:
    assert NOTEBOOKS, f"no notebook in {FOLDER}"
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_files_hold_the_same_cells(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert cells_of(notebook) == cells_of(jupytext.read(path.with_suffix(".py"))), (
        f"{path.name} and its .py differ: run `jupytext --sync notebooks/{path.name}`"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_shows_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert path.stat().st_size < MOST_BYTES
    shown = str([cell.outputs for cell in code])
    for place in (str(FOLDER.parent), str(Path.home()), "/tmp/"):
        assert place not in shown, f"an output names a folder of the machine it ran on: {place}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))]:
        monkeypatch.delenv(name)
    notebook = jupytext.read(path.with_suffix(".py"))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=LIMIT_S, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the picture is missing"
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    if path.stem == "00_first_step":
        assert "the same bits in all 60 losses: True" in printed
        difference = float(printed.split("largest difference to the plain loop: ")[1].split()[0])
        assert difference < 1e-4, "losses of some units, in fp32"
    if path.stem == "03_checkpoints":
        assert "before the save, the same losses: True" in printed
        percent = float(printed.split("over all 60 steps, at most ")[1].split("%")[0])
        assert percent < 5, "bf16 weights and sums in another order, over 30 steps"
        assert "hidden folders after the next save: 0" in printed
