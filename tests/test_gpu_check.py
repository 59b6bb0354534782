"""scripts/gpu_check.py on a CPU: every step runs to its end with tiny sizes, and none takes another with it."""

import json

import pytest
import torch

from models.ops import SCAN_BACKENDS
from scripts import gpu_check, gpu_right, gpu_speed
from scripts.gpu_report import Check, Report
from scripts.measuring import markdown
from utils.table import Table


@pytest.fixture
def short(monkeypatch):
    """Fewer cases, updates and timings."""
    monkeypatch.setattr(gpu_speed, "FIRST", gpu_speed.FIRST[2:3])
    monkeypatch.setattr(gpu_speed, "OTHERS", [("BIM", 1, "fp32")])
    monkeypatch.setattr(gpu_speed, "MODELS", {key: gpu_speed.MODELS[key] for key in ("BIM", "example BIM")})
    monkeypatch.setattr(gpu_speed, "SECONDS", {"cpu": 0})
    monkeypatch.setattr(gpu_speed, "OPTIONS", gpu_speed.OPTIONS[:1])
    monkeypatch.setattr(gpu_right, "PRECISIONS", ("bf16",))
    quick = {name: entry for name, entry in SCAN_BACKENDS.items() if name != "triton"}   # interpreted, token by token
    monkeypatch.setattr(gpu_right, "SCAN_BACKENDS", Table(SCAN_BACKENDS.kind, quick))
    for module in (gpu_speed, gpu_right):
        monkeypatch.setattr(module, "UPDATES", 2)
    monkeypatch.setattr(gpu_speed, "WARM_UPS", 1)
    monkeypatch.setattr(gpu_right, "WARM_UPS_DDP", 1)


def rows(out, step):
    return [json.loads(line) for line in (out / f"{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", gpu_check.STEPS)
def test_every_step_runs(short, tmp_path, step):
    assert gpu_check.main(["--step", step, "--out", str(tmp_path), "--device", "cpu"]) == 0
    found = rows(tmp_path, step)
    assert found and not [row for row in found if "wrong" in row]
    assert markdown(found).count("\n") == len(found) + 1


@pytest.mark.parametrize("model", gpu_speed.MODELS)
def test_every_model_has_a_tiny_form(model, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_speed, "SECONDS", {"cpu": 0})
    monkeypatch.setattr(gpu_speed, "UPDATES", 1)
    gpu_speed.speed_row(Report(tmp_path, "one"), torch.device("cpu"), model, "precision=fp32")
    row, = rows(tmp_path, "one")
    assert row["ms"] > 0 and row["images"] >= 1


def test_a_difference_is_told(short, monkeypatch, tmp_path):
    """Of losses, of scan kernels and of precisions."""
    errors, real = iter([0.0, 1e-3, 0.0, 1e-5, 0.0]), gpu_speed.trajectory

    def shifted(config, timed=True):
        losses, *others = real(config, timed)
        return losses + next(errors), *others

    monkeypatch.setattr(gpu_speed, "trajectory", shifted)
    gpu_check.main(["--step", "recorded", "--out", str(tmp_path), "--device", "cpu"])
    row, = rows(tmp_path, "recorded")
    assert row["wrong"] == "a recorded update gives other losses" and row["apart, warm-ups"] > 1e-4 > row["noise"] > 0
    exact = {"y": torch.ones(2, 3, 1, 4), "u": torch.ones(2, 3, 1, 4)}
    near = {key: value * (1 + 1e-5) for key, value in exact.items()}
    for found, again, wrong in ((near, near, "the error of y is above its limit"), (exact, near, "two runs differ")):
        (tmp_path / "kernels.jsonl").unlink(missing_ok=True)
        gpu_right._kernel_row(Report(tmp_path, "kernels"), found, again, exact, what="triton")
        assert rows(tmp_path, "kernels")[0]["wrong"] == wrong


def test_a_step_that_fails_or_lasts_takes_no_other_with_it(monkeypatch, tmp_path, capsys):
    steps = {"absent": Check("a step that the process does not know", 60, gpu_speed.card),
             "card": Check("the card", 0.3, gpu_speed.card), "late": Check("after the budget", 60, gpu_speed.card)}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(gpu_check, "LEAST", 1)
    clock = iter([0, 0, 0, 5, 5, 5, 6, 100, 100, 100])
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    assert gpu_check.main(["--out", str(tmp_path), "--budget", "60", "--device", "cpu"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"]["absent"][0]["wrong"] == "ended with code 1: KeyError: 'absent'"
    assert report["steps"]["card"][0]["wrong"] == "ended at its limit of 0 s"
    assert report["steps"]["late"][0]["wrong"] == "not run: 60 s are over"
    assert (tmp_path / "report.md").read_text().count("## ") == 3
    assert gpu_check.main(["--only", "cards", "--out", str(tmp_path)]) == 1
    assert "--only cards: the steps are absent, card, late" in capsys.readouterr().err


def test_what_fails_in_an_attempt_is_a_row(tmp_path):
    report = Report(tmp_path, "step")
    for name in ("first", "second"):
        with report.attempt(name):
            raise RuntimeError("out of\nmemory")
    assert [row["what"] for row in rows(tmp_path, "step")] == ["first", "second"]
    assert rows(tmp_path, "step")[0]["wrong"] == "RuntimeError: out of memory"
