"""The mean of several checkpoints: its tensors by hand, what reads it, and what has no mean."""

import re

import pytest
import torch

from scripts.average_checkpoints import main
from tests.watched_run import experiment, stored
from utils.engine.build import model_from_config
from utils.engine.predict import infer


def write(path, config, seed: int, **more):
    torch.manual_seed(seed)
    model = model_from_config(config)
    torch.save({"model": model.state_dict(), "config": config.to_dict(), "step": seed, **more}, path)
    return {key: value.double() for key, value in model.state_dict().items()}


def test_every_tensor_is_the_mean_and_the_file_is_a_model(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "boundary_infer=off")
    states = [write(tmp_path / f"{seed}.pt", config, seed) for seed in range(3)]
    files, out = [str(tmp_path / f"{seed}.pt") for seed in range(3)], tmp_path / "soup.pt"
    assert main([*files, "--out", str(out)]) == 0
    soup = stored(out)
    for key, value in soup["model"].items():
        assert torch.equal(value, (sum(state[key] for state in states) / 3).to(value.dtype)), key
    assert soup["averaged"] == files and soup["config"] == config.to_dict() and "optimizer" not in soup
    results = infer(config, out, tmp_path / "infer")
    assert results["depth"]["rmse"] > 0
    assert '"selection": "mean of 3 checkpoints"' in (tmp_path / "infer" / "results.json").read_text()


def test_the_moving_average_is_taken_where_there_is_one(example_root, tmp_path):
    config = experiment(example_root, tmp_path)
    raw = [write(tmp_path / f"{seed}.pt", config, seed) for seed in range(2)]
    ema = {"n_averaged": torch.tensor(5), **{f"module.{key}": value + 1 for key, value in raw[1].items()}}
    write(tmp_path / "1.pt", config, 1, ema=ema)
    key = "heads.depth.weight"
    for weights, shift in (("ema", 0.5), ("last", 0.0)):
        out = tmp_path / f"{weights}.pt"
        assert main([str(tmp_path / "0.pt"), str(tmp_path / "1.pt"), "--out", str(out), "--weights", weights]) == 0
        expected = (raw[0][key] + raw[1][key]) / 2 + shift
        assert torch.allclose(stored(out)["model"][key].double(), expected, atol=1e-6)


@pytest.mark.parametrize("second, words", [
    ("backbone_kwargs.embed_dim=16", "holds another model than .*of another shape"),
    ("model=multi_scale", "holds another model than"),
    ("train_db_name=PASCALContext val_db_name=PASCALContext task_dictionary.include_depth=false",
     "holds another model than"),
    ("image_size=[96,96]", r"image_size \[64, 96\] -> \[96, 96\]"),
])
def test_different_models_have_no_mean(example_root, tmp_path, capsys, second, words):
    write(tmp_path / "a.pt", experiment(example_root, tmp_path), 0)
    write(tmp_path / "b.pt", experiment(example_root, tmp_path, *second.split()), 1)
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--out", str(tmp_path / "c.pt")]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "c.pt").exists()


def test_one_checkpoint_is_no_average_and_nothing_is_overwritten(example_root, tmp_path, capsys):
    write(tmp_path / "a.pt", experiment(example_root, tmp_path), 0)
    assert main([str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")]) == 1
    assert "two checkpoints or more" in capsys.readouterr().err
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "a.pt"), "--out", str(tmp_path / "a.pt")]) == 1
    assert "is there already" in capsys.readouterr().err
