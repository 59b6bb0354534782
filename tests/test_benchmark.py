"""The counted sizes are those of the specification: BIM's on both data sets, MTMamba's as published; two checkouts."""

from pathlib import Path

import pytest
import torch

from scripts.benchmark import main, random_batch
from scripts.side_by_side import compared_with
from tests.conftest import TINY
from tests.shared import ROOT
from utils.engine.config import load_config
from utils.engine.cost import count


@pytest.mark.parametrize(("name", "parameters", "gmacs", "encoder_gmacs"), [
    ("bim_nyud", 295_860_129, 452.9, 202.5),
    ("bim_pascal", 320_856_598, 522.5, 205.6),
    ("mtmamba_plus_nyud", 315_021_249, 522.3, 202.5),
    ("demt_nyud", 32_070_259, 120.7, 22.3),            # the original: 129.1, some without effect
    ("baselines/fcn_nyud_hrnet18", 4_515_556, 17.5, 7.7),
])
def test_parameters_and_multiply_adds(name, parameters, gmacs, encoder_gmacs):
    rows = dict(count(load_config(ROOT / "configs" / f"{name}.yml")))
    assert rows["parameters, total"] == f"{parameters:,}"
    assert float(rows["GMACs, total"]) == pytest.approx(gmacs, abs=0.15)
    assert float(rows["GMACs, encoder"]) == pytest.approx(encoder_gmacs, abs=0.15)


def test_labels_that_are_no_maps_say_that_nothing_is_there():
    config = load_config(ROOT / "configs" / "example" / "bim_cityscapes3d.yml", ["trBatch=2"])
    batch = random_batch(config, torch.device("cpu"))
    assert [len(boxes.labels) for boxes in batch["det3d"]] == [0, 0]
    assert batch["det3d"][0].image_size.tolist() == [128, 256] and batch["semseg"].shape == (2, 1, 128, 256)


def test_a_checkout_beside_itself():
    row, = compared_with(ROOT, [Path("configs/bim_nyud.yml")], TINY, repeats=1)
    assert row["experiment"] == "bim_nyud" and row["step there, MiB"] == row["step here, MiB"] != "0"
    assert 0.1 < float(row["processor time of a step there / here"]) < 10


def test_a_folder_that_is_no_checkout_says_so(tmp_path, capsys):
    assert main(["--compare", "configs/bim_nyud.yml", "--against", str(tmp_path)]) != 0
    assert f"no training step could be measured in {tmp_path}" in capsys.readouterr().err
