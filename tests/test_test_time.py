"""Averages at test time against numbers worked out by hand, and the same scores from networks that cannot tell."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.labels import DisparityLabel
from data.loader import collate
from tests.watched_run import answers, experiment
from utils.engine.build import model_from_config
from utils.engine.config_groups import AtTestTime
from utils.engine.predict import infer
from utils.engine.predictor import Predictor
from utils.engine.tasks import TASKS
from utils.engine.test_time import AveragedPass, averaged
from utils.options import OptionError

SIZE = (8, 12)


def scripted(*outputs: dict[str, Tensor]):
    """A network that gives these answers one after the other, the last one from then on; and the images it saw."""
    left, seen = list(outputs), []

    def forward(image: Tensor) -> dict[str, Tensor]:
        seen.append(image)
        return left.pop(0) if len(left) > 1 else left[0]

    return forward, seen


def averaging(forward, task: str, settings: AtTestTime, rules=None, frame=SIZE):
    rules = {task: rules or TASKS.load(task).label}
    return lambda image: TASKS.load(task).decode(AveragedPass(forward, settings, rules, frame, frame)(image)[task], [])


def constant(*channels: float, size=SIZE) -> Tensor:
    return torch.tensor(channels).reshape(1, -1, 1, 1).expand(1, -1, *size)


def test_a_mirrored_answer_is_mirrored_back_and_normals_point_the_other_way():
    image = torch.rand(1, 3, *SIZE)
    vectors = torch.nn.functional.normalize(torch.randn(1, 3, *SIZE), dim=1)
    mirrored = vectors.flip(-1) * torch.tensor([-1.0, 1, 1]).reshape(3, 1, 1)
    forward, seen = scripted({"normals": vectors}, {"normals": 7 * mirrored})            # lengths do not count
    assert torch.allclose(averaging(forward, "normals", AtTestTime(flip=True))(image), vectors, atol=1e-6)
    assert torch.equal(seen[0], image) and torch.equal(seen[1], image.flip(-1)) and len(seen) == 2
    metres = 9 * torch.rand(1, 1, *SIZE)
    forward, _ = scripted({"depth": metres}, {"depth": metres.flip(-1) + 1})
    assert torch.allclose(averaging(forward, "depth", AtTestTime(flip=True))(image), metres + 0.5)


@pytest.mark.parametrize("rules, enlarged", [(None, 1.5), (DisparityLabel(), 6.0)])
def test_in_an_enlarged_image_things_are_nearer(rules, enlarged):
    """As the training's random scales teach it: half the depth, twice the disparity."""
    forward, seen = scripted({"depth": constant(3.0)}, {"depth": constant(enlarged)})
    image = constant(0.0, 0.0, 0.0)
    found = averaging(forward, "depth", AtTestTime(scales=(1.0, 2.0)), rules)(image)
    assert torch.allclose(found, constant(3.0)) and len(seen) == 1 + 9              # 3 x 3 windows of half the side


def test_metres_vectors_and_probabilities_are_averaged_not_raw_outputs():
    """Two weak votes for class 0 and a strong one for class 1."""
    looks = AtTestTime(scales=(1.0, 0.75, 0.5))
    image = constant(0.0, 0.0, 0.0)
    of_classes = [constant(3.0, 0), constant(3.0, 0), constant(-10.0, 0)]
    for task in ("semseg", "human_parts"):
        forward, _ = scripted(*({task: logits} for logits in of_classes))
        assert (averaging(forward, task, looks)(image) == 0).all()
    forward, _ = scripted(*({"sal": logits} for logits in of_classes))
    background = (2 / (1 + math.exp(-3)) + 1 / (1 + math.exp(10))) / 3
    assert torch.allclose(averaging(forward, "sal", looks)(image), constant(1 - background))
    forward, _ = scripted(*({"edge": constant(logit)} for logit in (3.0, 3.0, -10.0)))
    assert torch.allclose(averaging(forward, "edge", looks)(image), constant(background))
    forward, _ = scripted(*({"depth": constant(metres)} for metres in (2.0, -4.0, 1.0)))     # nothing is behind us
    assert torch.allclose(averaging(forward, "depth", looks)(image), constant((2 + 0 + 0.5) / 3))


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS.load(task).average is not None])
def test_a_single_answer_survives_every_row(task):
    row = TASKS.load(task)
    output = torch.randn(2, row.num_channels or 5, *SIZE)
    average = row.average
    assert torch.allclose(row.decode(average.raw(average.values(output)), []), row.decode(output, []), atol=1e-6)


# ------------------------------------------------------------ windows


@pytest.mark.parametrize("side, overlap, starts", [(20, 0.5, [0, 4, 8, 12]), (20, 0, [0, 6, 12]), (8, 0.5, [0]),
                                                   (9, 0, [0, 1]), (21, 0.5, [0, 3, 6, 10, 13])])
def test_windows_are_spread_evenly_and_touch_both_borders(side, overlap, starts):
    from utils.engine.test_time import _starts
    assert _starts(side, 8, overlap) == starts


def test_overlapping_windows_are_weighted_by_their_distance_to_the_border():
    frame = (2, 4)
    forward, seen = scripted({"depth": constant(8.0, size=frame)}, {"depth": constant(16.0, size=frame)})
    image = torch.rand(1, 3, 2, 6)
    found = averaging(forward, "depth", AtTestTime(windows=True), frame=frame)(image)
    assert torch.allclose(found, torch.tensor([8, 8, 10, 14, 16, 16.0]).expand(1, 1, 2, 6))
    assert torch.equal(seen[0], image[..., :4]) and torch.equal(seen[1], image[..., 2:])


@pytest.mark.parametrize("size", [(20, 30), (5, 30), (20, 7), (3, 5), SIZE])
@pytest.mark.parametrize("settings", [AtTestTime(windows=True), AtTestTime(windows=True, overlap=0.2, flip=True)])
def test_a_network_that_looks_at_single_pixels_sees_the_same_through_windows(size, settings):
    image = torch.rand(2, 3, *size)
    found = averaging(lambda x: {"edge": 4 * x[:, :1] - 2}, "edge", settings)(image)
    assert torch.allclose(found, (4 * image[:, :1] - 2).sigmoid(), atol=1e-6)


def of_pixels(rgb: Tensor) -> dict[str, Tensor]:
    """Classes and metres of single pixels."""
    ramp = torch.linspace(0, 1, 40, dtype=rgb.dtype).reshape(1, -1, 1, 1)
    return {"semseg": -(ramp - rgb[:, :1]).square() * 1e3, "depth": 5 * rgb[:, 1:2]}


def test_images_larger_than_the_network_are_scored_through_windows(example_root, tmp_path):
    results = []
    for overrides in (["image_size=[64, 96]"], ["image_size=[32, 64]", "test_time={windows: true, flip: true}"]):
        config = experiment(example_root, tmp_path, "report=false", *overrides)
        torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
        with answers(of_pixels):
            results.append(infer(config, tmp_path / "any.pt", tmp_path / "out"))
    assert results[0]["depth"]["valid_pixels"] > 0.9 * 5 * 64 * 96
    for task, scores in results[0].items():
        assert results[1][task] == pytest.approx(scores, rel=1e-5)
    about = json.loads((tmp_path / "out" / "results.json").read_text())
    assert about["test_time"]["windows"] and about["test_time"]["flip"] and about["split"] == "NYUD test"
    with pytest.raises(ValueError, match="does not fit into the frame of 32 x 64; .*test_time.windows=true"):
        infer(experiment(example_root, tmp_path, "image_size=[32, 64]"), tmp_path / "any.pt", tmp_path / "out")


def test_images_of_different_sizes_are_scored_one_by_one():
    samples = [{"image": torch.zeros(3, 5, width), "meta": {}} for width in (7, 9)]
    with pytest.raises(ValueError, match="different sizes .height x width: 5 x 7, 5 x 9.; .* valBatch=1"):
        collate(samples, {})


def test_a_photograph_is_not_shrunk_where_windows_slide(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "test_time.windows=true", "task_dictionary={include_depth: true}")
    torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
    predictor = Predictor(config, tmp_path / "any.pt", torch.device("cpu"))
    pictures = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((150, 70), (64, 200))]
    with answers(of_pixels):
        predictions = predictor.predict(pictures)
    for picture, prediction in zip(pictures, predictions, strict=True):
        assert np.allclose(prediction["depth"].array, 5.0 * picture[..., 1] / 255, atol=1e-5)


# ------------------------------------------------------------ what is refused


def test_a_task_whose_predictions_cannot_be_averaged_is_refused_before_the_first_step(example_root, tmp_path,
                                                                                      monkeypatch):
    from utils.engine.train import train
    monkeypatch.setitem(TASKS, "depth", dataclasses.replace(TASKS.load("depth"), average=None))
    config = experiment(example_root, tmp_path, "test_time.flip=true")
    with pytest.raises(ValueError, match="test_time cannot average predictions of depth, whose row has no `average`"):
        train(config, resume=False)
    assert not list(config.run_dir.rglob("*.pt"))
    forward, _ = scripted({})
    assert averaged(forward, experiment(example_root, tmp_path)) is forward        # nothing asked for, nothing done


@pytest.mark.parametrize("options, words", [
    (dict(scales=()), "different numbers in"), (dict(scales=(1.0, 1.0)), "different numbers in"),
    (dict(scales=(0.0, 1.0)), "different numbers in"), (dict(overlap=1.0), "a share in"),
])
def test_impossible_options(options, words):
    with pytest.raises(OptionError, match=words):
        AtTestTime(**options)


def test_held_out_images_need_a_training_that_held_some_out(example_root, tmp_path):
    with pytest.raises(ValueError, match="--split held_out: .* held no images out"):
        infer(experiment(example_root, tmp_path), tmp_path / "any.pt", tmp_path / "out", split="held_out")
