"""What people of other repositories type: the lines of docs/coming_from.md are lines of this program."""

import re
import shlex
import shutil
import subprocess

import pytest
import torch

from scripts.download_pretrained import main as download
from tests.shared import ROOT
from utils.engine.arguments import parse_arguments

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
TYPED = [row[1] if "same" in row[-1] else row[-1] for row in ROWS]
LINES = [line for cell in TYPED for line in re.findall(r"`([^`]*main\.py [^`]*)`", cell)]


@pytest.mark.parametrize("line", LINES)
def test_command_lines_are_understood(line):
    words = shlex.split(line.replace("... ", "python "))
    args = parse_arguments(words[next(i for i, word in enumerate(words) if word.endswith("main.py")) + 1:], None)
    assert args.run_mode in ("train", "infer", "predict")
    if (ROOT / str(args.config_exp)).parent != ROOT:
        assert (ROOT / args.config_exp).is_file()


def test_the_page_has_lines_and_files():
    assert len(LINES) >= 6
    for path in re.findall(r"\]\(([\w./]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_run_sh_fetches_and_checks(tmp_path):
    """With a stand-in for the Python that it calls: one call for each backbone, Swin-L by default; failures told."""
    folder = tmp_path / "pretrained_ckpts"
    folder.mkdir()
    shutil.copy(ROOT / "pretrained_ckpts" / "run.sh", folder)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD $@"\n[ "$2" != bad ]\n')
    python.chmod(0o755)

    def run(*names):
        return subprocess.run(["bash", str(folder / "run.sh"), *names], cwd=tmp_path, capture_output=True, text=True)

    assert run().stdout == f"{folder} ../scripts/download_pretrained.py swin_large --out . --check\n"
    done = run("bad", "swin_tiny")
    assert done.returncode == 1 and "swin_tiny" not in done.stdout


def test_a_file_that_does_not_fit_is_told(tmp_path, monkeypatch, capsys):
    from models.build import build_backbone
    whole = build_backbone("swin_tiny", (64, 64)).state_dict()
    monkeypatch.setattr("scripts.download_pretrained.download_weights", lambda tag: whole)
    assert download(["swin_tiny", "--out", str(tmp_path), "--check"]) == 0
    assert "missing 0" in capsys.readouterr().out
    [file] = tmp_path.iterdir()
    file.unlink()
    monkeypatch.setattr("scripts.download_pretrained.download_weights", lambda tag: {"norm.weight": torch.zeros(3)})
    assert download(["swin_tiny", "--out", str(tmp_path), "--check"]) == 1
    assert "does not fit this" in capsys.readouterr().err
