"""Everything that can be added is added here from outside: the files of docs/extending.md, as printed, and trained."""

import importlib
import re
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DATASETS
from data.labels import LabelRules
from data.spec import LabelSpec
from evaluation.evaluator import Evaluator, Score
from losses.balancing import BALANCING
from models.backbones import BACKBONES, BackboneEntry
from models.decoders import DECODERS
from models.necks import NECKS
from tests.shared import ROOT
from utils.engine.config import load_config
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.predict import infer, predict
from utils.engine.schedules import SCHEDULES
from utils.engine.tasks import TASKS
from utils.engine.tasks.task import Task
from utils.engine.train import train
from utils.engine.views import View
from utils.options import ConfigError

BLOCKS = {match[1]: match[2] for match in re.finditer(r"```python\n# (?:\w+/)*(\w+)\.py[^\n]*\n(.*?)```",
                                                      (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"),
                                                      re.DOTALL)}
THREE_STEPS = ["max_iter=3", "val_interval=3"]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """outside(name): the page's file of that name as a module that lies outside this repository."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> str:
        (tmp_path / f"page_{name}.py").write_text(BLOCKS[name], encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"page_{name}", raising=False)
        importlib.invalidate_caches()
        return f"page_{name}"
    return write


def run(tiny: list[str], *arguments: str, without: str = "-") -> dict:
    """Three training steps of a tiny experiment, less the arguments that start with `without`."""
    kept = [a for a in tiny if not a.startswith(without)]
    return train(load_config(ROOT / "configs" / "bim_nyud.yml", [*kept, *THREE_STEPS, *arguments]), resume=False)


def test_every_door_has_its_file_on_the_page():
    assert set(BLOCKS) == {"albedo", "bias", "my_rooms", "plain", "strided", "narrow", "imtl_l", "rmsprop",
                           "exponential"}


def test_decoder(outside, tiny, monkeypatch):
    monkeypatch.setitem(DECODERS, "plain", f"{outside('plain')}:PlainDecoder")
    assert run(tiny, "model=plain", "model_kwargs={width: 8}", without="model_kwargs")["depth"]["rmse"] > 0


def test_options_of_an_entry_are_checked_before_its_module_is_imported(outside, tiny, monkeypatch):
    monkeypatch.setitem(DECODERS, "plain", f"{outside('plain')}:PlainDecoder")
    for value, message in (("0", "'model_kwargs.width' must be a whole number of at least 1, got 0"),
                           ("wide", "'model_kwargs.width' must be a whole number, got 'wide'")):
        with pytest.raises(ConfigError, match=message):
            run(tiny, "model=plain", f"model_kwargs={{width: {value}}}", without="model_kwargs")
    assert "page_plain" not in sys.modules


def test_backbone(outside, tiny, monkeypatch):
    monkeypatch.setitem(BACKBONES, "strided", BackboneEntry(f"{outside('strided')}:Strided"))
    assert run(tiny, "backbone=strided", "backbone_kwargs={width: 8}", without="backbone")["depth"]["rmse"] > 0


def test_neck(outside, tiny, monkeypatch):
    monkeypatch.setitem(NECKS, "narrow", f"{outside('narrow')}:Narrow")
    arguments = ("model=multi_scale", "model_kwargs={channels: 8}", "neck=narrow", "neck_kwargs={width: 6}")
    assert run(tiny, *arguments, without="model_kwargs")["depth"]["rmse"] > 0


def test_optimizer(outside, tiny, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", f"{outside('rmsprop')}:RMSprop")
    with pytest.raises(ConfigError, match="'optimizer_kwargs.weight_decay' of optimizer 'rmsprop'; known: lr, alpha"):
        run(tiny, "optimizer=rmsprop")
    arguments = ("optimizer=rmsprop", "optimizer_kwargs=null", "optimizer_kwargs.lr=1e-4", "optimizer_kwargs.alpha=0.9")
    assert run(tiny, *arguments, without="optimizer_kwargs")["depth"]["rmse"] > 0


def test_schedule(outside, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(SCHEDULES, "exponential", f"{outside('exponential')}:Exponential")
    run(tiny, "scheduler=exponential", "scheduler_kwargs={last: 0.125}", "version_name=exponential")
    lines = (tmp_path / "runs" / "exponential" / "metrics.jsonl").read_text().splitlines()
    rates = [float(match[1]) for line in lines if (match := re.search(r'"lr": ([0-9.e-]+)', line))]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_learned_loss_balancing_is_saved_and_resumed(outside, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(BALANCING, "imtl_l", f"{outside('imtl_l')}:ImpartialLosses")
    arguments = [*tiny, "loss_kwargs.loss_scheme=imtl_l", "loss_kwargs.scheme_kwargs={start: 0.5}", "max_iter=4",
                 "val_interval=2"]
    path = ROOT / "configs" / "bim_nyud.yml"
    straight = load_config(path, [*arguments, "version_name=straight"])
    train(straight, resume=False)
    stopped = load_config(path, [*arguments, "version_name=stopped", "epochs=1", "checkpoint_interval=2"])
    train(replace(stopped, max_iter=2), resume=False)
    train(load_config(path, [*arguments, "version_name=stopped", "checkpoint_interval=2"]), resume=True)
    once, twice = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True)
                   for name in ("straight", "stopped"))
    learned = once["criterion"]
    assert len(learned) == 4 and all(value != 0.5 for value in learned.values())
    assert set(learned) == set(twice["criterion"])
    with pytest.raises(ValueError, match="loss_kwargs.loss_scheme: 'imtl_l' -> 'log'"):
        train(load_config(path, [*arguments, "version_name=stopped", "loss_kwargs.loss_scheme=log",
                                 "loss_kwargs.scheme_kwargs={}", "max_iter=6"]), resume=True)


def write_rooms(root, size=(64, 96), number=6) -> None:
    """A data set in the page's layout, with an albedo and a list of points beside what the page names."""
    folder, rng = root / "MyRooms", np.random.default_rng(0)
    for name in ("rgb", "labels", "depth", "albedo", "points"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("\n".join(f"{split}{i}" for i in range(number)), encoding="utf-8")
        for i in range(number):
            pictures = {"rgb": ("jpg", rng.integers(0, 256, (*size, 3)).astype(np.uint8)),
                        "labels": ("png", rng.integers(0, 13, size).astype(np.uint8)),
                        "albedo": ("png", rng.integers(0, 256, size).astype(np.uint8)),
                        "depth": ("png", rng.integers(500, 9000, size).astype(np.uint16))}
            for name, (ending, pixels) in pictures.items():
                Image.fromarray(pixels).save(folder / name / f"{split}{i}.{ending}")
            np.save(folder / "points" / f"{split}{i}.npy", rng.uniform(0, 60, (i % 3, 2)))


@pytest.fixture
def rooms(outside, tiny, tmp_path, monkeypatch):
    """rooms(task, channels, source): arguments of a run on the page's data set with one task more."""
    write_rooms(tmp_path)
    rooms = importlib.import_module(outside("my_rooms")).MyRooms

    def arguments(task: str | None = None, channels: int = 1, source: object = None) -> list[str]:
        spec = rooms
        if task is not None:
            spec = replace(spec, labels={**spec.labels, task: LabelSpec(source.files, source.read, channels)})
        monkeypatch.setitem(DATASETS, "MyRooms", spec)
        on = ", ".join(f"include_{name}: true" for name in spec.tasks)
        kept = [a for a in tiny if not a.startswith(("db_root", "model_kwargs"))]
        return [*kept, *THREE_STEPS, f"db_root={tmp_path}", "train_db_name=MyRooms", "val_db_name=MyRooms",
                "task_dictionary={" + on + "}", "version_name=rooms"]
    return arguments


def load(arguments: list[str], *more: str, model: str = "model_kwargs={msst_depth: 1, d_state: 2}"):
    base = ROOT / "configs" / "_base_" / "bim.yml"
    return load_config(base, [*arguments, model, *more])


def test_data_set(rooms):
    results = train(load(rooms()), resume=False)
    assert set(results) == {"semseg", "depth"} and results["depth"]["rmse"] > 0


def test_task(rooms, outside, tmp_path, monkeypatch):
    from data.spec import Source
    from utils.files import read_table
    monkeypatch.setitem(TASKS, "albedo", f"{outside('albedo')}:ALBEDO")
    table = np.arange(256, dtype=np.float32) / 256 + 1e-3
    read = Source(("albedo/{id}.png",), partial(read_table, table=table))
    config = load(rooms("albedo", 1, read))
    assert train(config, resume=False)["albedo"]["rmse"] > 0
    predict(config, config.run_dir / "last.pt", tmp_path / "MyRooms" / "rgb" / "val0.jpg", tmp_path / "out")
    assert np.load(tmp_path / "out" / "raw" / "albedo" / "val0.npy").shape == (64, 96, 1)


def test_evaluator(outside, tiny, monkeypatch):
    bias = importlib.import_module(outside("bias")).BiasMeter
    depth = TASKS.load("depth")
    monkeypatch.setitem(TASKS, "depth", replace(depth, evaluators=(*depth.evaluators, bias)))
    scores = run(tiny)["depth"]
    assert np.isfinite(scores["bias"]) and scores["rmse"] > 0
    from utils.engine.results import format_table
    assert "depth bias m v" in format_table({"x": {"depth": scores}})


# A task whose label is no map: a list of points of any length per image -----------------------------------------


class PointLabel(LabelRules):
    """(N, 2) positions (x, y) in pixels; N differs from image to image and may be 0."""

    def fit(self, label, size):
        return label

    def resize(self, label, size):
        raise AssertionError("not asked for in this test")

    def scale(self, label, size, factor):
        return label * factor

    def crop(self, label, top, left, size):
        return label - np.array([left, top])

    def flip(self, label):
        return label * np.array([-1, 1])

    def pad(self, label, frame):
        return label

    def to_tensor(self, label):
        return torch.from_numpy(np.ascontiguousarray(label, np.float32))


class PointLoss(torch.nn.Module):
    """Mean absolute difference of the map's mean and the number of points, over the images."""

    def forward(self, output, label):
        counts = torch.tensor([float(len(points)) for points in label])
        return (output.mean(dim=(1, 2, 3)) - counts).abs().mean()


class CountEvaluator(Evaluator):
    """count: how many points the labels hold."""

    scores = (Score("count", "points", higher_is_better=True, decimals=0),)

    def __init__(self):
        self.count = 0

    @classmethod
    def for_task(cls, context):
        return cls()

    def update(self, prediction, target, meta=()):
        assert isinstance(target, list) and len(target) == len(meta)
        self.count += sum(len(points) for points in target)

    def reduce(self):
        pass

    def compute(self):
        return {"count": float(self.count)}


@pytest.mark.parametrize("scope", ["process", "image"])
def test_a_label_that_is_no_map(rooms, tmp_path, monkeypatch, scope):
    from data.spec import Source
    view = View(picture=lambda points, context, rgb: rgb, legend=lambda points, context: [],
                key=lambda context: [], write=lambda path, points, context: path, raw_format=lambda context: "none")
    task = Task(num_channels=1, label=PointLabel(), loss=lambda context: PointLoss(),
                decode=lambda output, meta: output, evaluators=(CountEvaluator,), view=view)
    monkeypatch.setitem(TASKS, "points", task)
    config = load(rooms("points", 1, Source(("points/{id}.npy",), np.load)), f"loss_kwargs.loss_scope={scope}",
                  "loss_kwargs.loss_scheme=weighted_sum")
    results = train(config, resume=False)
    assert results["points"]["count"] == sum(i % 3 for i in range(6))
    assert infer(config, config.run_dir / "last.pt", tmp_path / "infer")["points"] == results["points"]
    assert predict(config, config.run_dir / "last.pt", tmp_path / "MyRooms" / "rgb" / "val0.jpg", tmp_path / "out")


def test_every_task_has_its_switch():
    switches = load_config(ROOT / "configs" / "bim_nyud.yml").to_dict()["task_dictionary"]
    assert set(switches) == {f"include_{name}" for name in TASKS} | {"edge_w"}


def test_modules_of_the_page_are_plain_files(outside):
    assert isinstance(importlib.import_module(outside("exponential")), ModuleType)
