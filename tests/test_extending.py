"""The README's examples of a new decoder and a new data set are run as they are printed."""

import re
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from data.base import DatasetSpec, MultiTaskDataset, Source, read_image
from data.datasets import DATASETS, build_dataset
from data.files import class_table, read_depth, read_table
from models.build import build_model
from models.decoder import Decoder, DecoderOutput
from models.decoders import DECODERS
from models.decoders.options import DecoderOptions
from tests.shared import ROOT
from utils.engine.config import TaskDictionary, load_config
from utils.engine.tasks import TASKS, tasks_named
from utils.engine.train import train


def readme_code(first_line: str) -> dict:
    """Names that the README's Python block with this line defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [block] = [block for block in blocks if first_line in block]
    names = {"dataclass": dataclass, "nn": nn, "Decoder": Decoder, "DecoderOutput": DecoderOutput, "partial": partial,
             "DecoderOptions": DecoderOptions,
             "Source": Source, "MultiTaskDataset": MultiTaskDataset, "DatasetSpec": DatasetSpec,
             "read_image": read_image, "read_depth": read_depth, "read_table": read_table, "class_table": class_table,
             "__name__": __name__}
    exec(block, names)
    return names


@pytest.fixture
def plain_decoder(monkeypatch):
    monkeypatch.setitem(DECODERS, "plain", readme_code("class PlainDecoder")["PlainDecoder"])


def test_a_new_decoder_trains(plain_decoder, tiny):
    arguments = [a for a in tiny if not a.startswith("model_kwargs")]
    config = load_config(ROOT / "configs" / "bim_nyud.yml", [*arguments, "model=plain", "model_kwargs={width: 8}"])
    assert train(config, resume=False)["depth"]["rmse"] > 0


def test_a_new_decoder_runs_on_any_backbone(plain_decoder):
    tiny_vit = {"embed_dim": 16, "depth": 4, "num_heads": 2}
    model = build_model("plain", "vit", {"depth": 1}, (64, 96), backbone_kwargs=tiny_vit, model_kwargs={"width": 4})
    assert model(torch.zeros(1, 3, 64, 96)).final["depth"].shape == (1, 1, 64, 96)


def test_a_new_data_set_loads(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "MyRooms", readme_code("class MyRooms")["MyRooms"])
    for folder, pixels in {"rgb": np.full((8, 9, 3), 50, np.uint8), "labels": np.full((8, 9), 12, np.uint8),
                           "depth": np.full((8, 9), 1500, np.uint16)}.items():
        (tmp_path / "MyRooms" / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "MyRooms" / folder / f"a.{'jpg' if folder == 'rgb' else 'png'}"), pixels)
    (tmp_path / "MyRooms" / "train.txt").write_text("a\n")
    [sample] = build_dataset("MyRooms", tmp_path, "train", tasks_named(["semseg", "depth"]))
    assert sample["semseg"].shape == (8, 9, 1) and sample["semseg"].max() == 12
    assert sample["depth"].max() == pytest.approx(1.5)


def test_every_task_has_its_switch():
    switches = {name for name in TaskDictionary.__dataclass_fields__ if name.startswith("include_")}
    assert switches == {f"include_{name}" for name in TASKS}
