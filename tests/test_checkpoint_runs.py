"""Run checkpoints: what is written comes back, nothing is lost, foreign files are told apart."""

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.engine.checkpoint import atomic_path, load_model, read_checkpoint, save_checkpoint


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def run_state():
    """A checkpoint with every kind of entry a training run stores."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 10)
    return {"model": model.state_dict(), "ema": None, "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "rng": [{"torch": torch.get_rng_state(), "python": random.getstate()}],
            "step": 7, "epoch": 1, "config": {"model": "bim", "tasks": ("semseg", "depth"), "lr": 1e-4},
            "metrics": {"depth": {"rmse": float("nan")}}, "git": "abc"}


def test_run_checkpoint_round_trip(tmp_path):
    state = run_state()
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    back = read_checkpoint(tmp_path / "run" / "last.pt")
    assert set(back) == set(state)
    torch.testing.assert_close(back["model"], dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(back["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert torch.equal(back["rng"][0]["torch"], state["rng"][0]["torch"])
    assert back["rng"][0]["python"] == state["rng"][0]["python"]
    assert back["config"] == state["config"] and back["step"] == 7 and back["git"] == "abc"
    assert os.listdir(tmp_path / "run") == ["last.pt"]


@pytest.mark.parametrize("entry, message", [
    ({"metrics": {"rmse": np.float64(0.5)}}, r"state\['metrics'\]\['rmse'\] is a numpy.float64"),
    ({"config": {"out": Path("x")}}, r"state\['config'\]\['out'\] is a pathlib"),
    ({"rng": [1, np.zeros(2)]}, r"state\['rng'\]\[1\] is a numpy.ndarray"),
])
def test_values_that_would_not_load_again_are_refused_when_saving(tmp_path, entry, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "last.pt", run_state() | entry)
    assert not list(tmp_path.iterdir())


def write_then_fail(state, file):
    file.write(b"half a file")
    raise OSError(28, "No space left on device")


def test_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, run_state())
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", write_then_fail)
    with pytest.raises(OSError, match=r"^cannot write .*last\.pt: No space left on device$"):
        save_checkpoint(path, run_state() | {"step": 8})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_file_appears_under_its_name_only_when_complete(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"1")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": prefixed("module.", state)},
    lambda state: {"model": prefixed("_orig_mod.module.", state)},
    lambda state: {"model": prefixed("module._orig_mod.", state)},
    lambda state: {"state_dict": dict(state), "epoch": 3}, dict])
def test_files_of_other_training_code_are_read(tmp_path, wrap, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(wrap(model.state_dict()), tmp_path / "checkpoint.pth.tar")
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with caplog.at_level(logging.INFO):
        load_model(other, read_checkpoint(tmp_path / "checkpoint.pth.tar")["model"], "checkpoint.pth.tar")
    assert torch.equal(other[0].weight, model[0].weight)
    assert caplog.messages == ["checkpoint.pth.tar: loaded 7 / missing 0 / unexpected 0"]


def test_submodule_called_module_keeps_its_name():
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    load_model(model, model.state_dict(), "x.pt")


def test_checkpoint_of_another_model_says_what_it_holds():
    model = torch.nn.ModuleDict({"heads": torch.nn.Linear(4, 3), "depth": torch.nn.Linear(4, 1)})
    state = {"heads.weight": torch.zeros(2, 4), "heads.bias": torch.zeros(3),
             "normals.weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError) as caught:
        load_model(model, state, "runs/a/best.pt",
                   file_config={"model": "bim", "backbone": "swin_large", "lr": 1},
                   yaml_config={"model": "invpt", "backbone": "vit_large",
                                "task_dictionary": {"include_semseg": True, "include_edge": False, "edge_w": 0.95}})
    assert str(caught.value) == (
        "runs/a/best.pt holds model bim, backbone swin_large but the configuration asks for model invpt, "
        "backbone vit_large, tasks semseg: 2 missing in the file (depth.weight, depth.bias); 1 unknown "
        "to the model (normals.weight); 1 of another shape (heads.weight: file (2, 4), model (3, 4))")


def test_missing_run_checkpoint_lists_the_folder(tmp_path):
    (tmp_path / "best.pt").touch()
    (tmp_path / "log.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name}_; the folder holds .*\b{tmp_path.name}\b"):
        read_checkpoint(tmp_path.with_name(f"{tmp_path.name}_"))            # a run whose name is mistyped
    with pytest.raises(FileNotFoundError, match=r"last.pt; the folder holds best.pt$"):
        read_checkpoint(tmp_path / "last.pt")
