"""The notebooks in docs/ run, cell by cell, and their last expressions can be shown."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.shared import ROOT
from tests.test_predict_files import NYUD
from tests.watched_run import experiment
from utils.engine.build import model_from_config


def run(notebook: Path) -> tuple[dict, list]:
    """The names that the notebook leaves, and what each code cell shows."""
    names, shown = {"__name__": "__main__"}, []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), f"{notebook.name}, cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)
        shown.append(None if last is None else
                     eval(compile(ast.Expression(last.value), f"{notebook.name}, cell {number}", "eval"), names))
    return names, shown


def test_predictions_from_python(tmp_path, monkeypatch, capsys):
    config = experiment(tmp_path, tmp_path, *NYUD)
    torch.save({"model": model_from_config(config).state_dict(), "config": config.to_dict()}, tmp_path / "best.pt")
    monkeypatch.setenv("CHECKPOINT", str(tmp_path))
    (tmp_path / "docs").mkdir()
    (tmp_path / "main.py").touch()                          # the notebook looks for the folder that holds it
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr("sys.path", sys.path[:])            # the notebook puts that folder first
    names, shown = run(ROOT / "docs" / "predict.ipynb")
    assert "fcn on swin" in repr(shown[0]) and "512 x 512 pixels: semseg, depth" in repr(shown[1])
    printed = capsys.readouterr().out
    assert "depth        (512, 512)      float32  m" in printed
    assert "left out: file not found: no_such_file.jpg" in printed
    assert isinstance(shown[3], Image.Image) and shown[4]._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "docs" / "predictions" / "panels" / "astronaut.png").is_file() and shown[-1] == 3
    assert sorted(os.listdir(tmp_path / "docs")) == ["predictions", "result.npy", "result.png"]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    """So a change of a cell is all that a change shows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and all({"cell_type", "id", "metadata", "source"} <= cell.keys()
                                            for cell in content["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in content["cells"]
               if cell["cell_type"] == "code")
