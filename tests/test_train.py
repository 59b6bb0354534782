"""Training end to end: files, resume, processes, accumulation, interruption."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from losses.multi_task import MultiTaskLoss
from tests.conftest import launch
from tests.processes import run_main
from tests.shared import ROOT
from utils.engine.config import load_config
from utils.engine.train import train

NYUD = str(ROOT / "configs" / "bim_nyud.yml")
QUIET = ["model_kwargs.drop_path_rate=0", "backbone_kwargs.drop_path_rate=0"]      # no randomness in the forward pass
PASCAL = str(ROOT / "configs" / "bim_pascal.yml")


def rows(run_dir: Path, kind: str) -> list[dict]:
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("config_file", [NYUD, PASCAL])
def test_a_run_leaves_everything_in_one_folder(tiny, config_file):
    config = load_config(config_file, [*tiny, "eval_at_start=true", "tensorboard=true"])
    results = train(config, resume=False)
    assert set(results) == set(config.tasks)
    written = {p.name for p in config.run_dir.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "last.pt", "best.pt", "tb", "results"} <= written
    assert [row["step"] for row in rows(config.run_dir, "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(config.run_dir, "eval")] == [0, 3, 6]
    assert load_config(config.run_dir / "config.yaml") == config
    untrained, *_, trained = (row["normals/mean"] for row in rows(config.run_dir, "eval"))
    assert trained < untrained
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, resume=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_equals_uninterrupted(tiny, tmp_path, workers):
    """Bit for bit, with stochastic depth, a moving average and augmentation on."""
    extra = ["checkpoint_interval=4", "ema_decay=0.9", "model_kwargs.drop_path_rate=0.5", f"nworkers={workers}"]
    whole = load_config(NYUD, [*tiny, *extra, "version_name=whole"])
    train(whole, resume=False)
    half = load_config(NYUD, [*tiny, *extra, "version_name=half"])
    half.run_dir.mkdir(parents=True)
    shutil.copy(whole.run_dir / "step_4.pt", half.run_dir / "last.pt")
    torch.manual_seed(12345)                              # whatever happened before must not matter
    train(half, resume=True)
    a, b = (torch.load(c.run_dir / "last.pt", weights_only=True) for c in (whole, half))
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert a["metrics"] == b["metrics"] and a["step"] == b["step"] == 6
    for kept in rows(half.run_dir, "train"):
        twin = next(row for row in rows(whole.run_dir, "train") if row["step"] == kept["step"])
        assert kept["loss/total"] == twin["loss/total"]


def test_accumulation_equals_a_larger_batch(tiny):
    """With losses per image, two passes of 2 images are one of 4 (float32: 1e-5)."""
    one = load_config(NYUD, [*tiny, *QUIET, "trBatch=4", "version_name=one"])
    two = load_config(NYUD, [*tiny, *QUIET, "trBatch=2", "global_batch=4", "version_name=two"])
    train(one, resume=False)
    train(two, resume=False)
    for a, b in zip(rows(one.run_dir, "train"), rows(two.run_dir, "train"), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)


def test_two_processes_equal_one(tiny):
    """The same losses at the same global batch (1e-5 relative), and every launcher's command line works."""
    base = ["--run_mode", "train", "--config_exp", NYUD, *tiny, *QUIET]
    train(load_config(NYUD, [*tiny, *QUIET, "trBatch=4", "version_name=one"]), resume=False)
    for launcher, processes in (("torchrun", 2), ("launch", 1)):
        done = launch([*base, f"trBatch={4 // processes}", f"version_name={launcher}"], processes, launcher)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = Path(next(item for item in tiny if item.startswith("out_dir=")).removeprefix("out_dir="))
    one = rows(runs / "one", "train")
    for name in ("torchrun", "launch"):
        for a, b in zip(one, rows(runs / name, "train"), strict=True):
            assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
            assert a["loss/semseg"] == pytest.approx(b["loss/semseg"], rel=1e-5)


def test_evaluation_does_not_depend_on_the_number_of_processes(tiny):
    """5 test images on 1, 2 and 3 ranks: counts are integers, so those scores are equal; sums agree to 1e-9."""
    config = load_config(NYUD, [*tiny, "max_iter=2"])
    train(config, resume=False)
    results = []
    for processes in (1, 2, 3):
        out = config.run_dir / f"infer{processes}"
        run_main(["--run_mode", "infer", "--trained_model", str(config.run_dir / "last.pt"), "--output", str(out),
                  "valBatch=1"], processes)
        results.append(json.loads((out / "results.json").read_text())["scores"])
        assert len(list((out / "edge").glob("*.png"))) == 5
    for other in results[1:]:
        assert other["semseg"]["mIoU"] == results[0]["semseg"]["mIoU"]
        for task, scores in results[0].items():
            assert other[task] == pytest.approx(scores, rel=1e-9)


def test_interrupt_saves_and_resumes(tiny, tmp_path):
    """Ctrl-C finishes the update, writes last.pt and leaves with an exit code that is not 0."""
    arguments = ["--run_mode", "train", "--config_exp", NYUD, *tiny, "max_iter=100000", "val_interval=100000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *arguments], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "runs" / "bim_nyud" / "log.txt"
    while process.poll() is None and not (log.exists() and "step 2/" in log.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and "Traceback" not in output, output
    assert "continue with --resume" in output
    stopped = torch.load(log.parent / "last.pt", weights_only=True)["step"]
    config = load_config(NYUD, [*tiny, f"max_iter={stopped + 1}"])
    train(config, resume=True)
    assert torch.load(log.parent / "last.pt", weights_only=True)["step"] == stopped + 1


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, monkeypatch):
    config = load_config(NYUD, [*tiny, "optimizer_kwargs.lr=1e-3", "val_interval=2"])
    original, calls = MultiTaskLoss.forward, []

    def poisoned(self, *args):
        calls.append(1)
        out = original(self, *args)
        return {**out, "depth": out["depth"] * float("nan")} if len(calls) == 4 else out

    monkeypatch.setattr(MultiTaskLoss, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="step 4: loss 'depth' is nan"):
        train(config, resume=False)
    kept = torch.load(config.run_dir / "last.pt", weights_only=True)
    assert kept["step"] == 2 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_log_line_has_its_columns(tiny):
    """step, loss with its parts, lr, gradient norm, speed, memory, time to go."""
    config = load_config(NYUD, [*tiny, "max_iter=2", "val_interval=2"])
    train(config, resume=False)
    lines = [line for line in (config.run_dir / "log.txt").read_text().splitlines() if " step 2/2 " in line]
    number = r"-?[0-9.e+-]+"
    columns = re.search(rf"step 2/2  loss {number} \(semseg {number} depth {number} normals {number} edge {number}\)  "
                        rf"lr {number}  grad {number}  {number} it/s  {number} img/s  mem ([0-9.]+)G  eta 0s$",
                        lines[0])
    assert columns, lines[0]
    assert 0.1 <= float(columns[1]) < 100                   # a process with PyTorch in it


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny, precision):
    config = load_config(NYUD, [*tiny, f"precision={precision}", "max_iter=2"])
    results = train(config, resume=False)
    assert results["depth"]["rmse"] > 0


def test_global_batch_must_fit(tiny):
    with pytest.raises(ValueError, match=r"global_batch 3 is not a multiple of trBatch 2 x 1 process\(es\) = 2"):
        train(load_config(NYUD, [*tiny, "global_batch=3"]), resume=False)
    with pytest.raises(ValueError, match="12 training images do not fill one update of 16"):
        train(load_config(NYUD, [*tiny, "trBatch=16"]), resume=False)
