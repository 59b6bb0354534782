"""Metrics against hand-computed numbers, the reference numbers, and one process against several."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.boundary.edge_loss import EdgeLossMeter
from evaluation.boundary.edge_maps import crop_from_padding, save_edge_maps
from evaluation.delta_m import delta_m
from evaluation.depth import DepthMeter
from evaluation.evaluator import TaskContext
from evaluation.normals import NormalsMeter
from evaluation.saliency import THRESHOLDS, SaliencyMeter
from evaluation.segmentation import SegmentationMeter
from losses.edge import BalancedBCELoss
from tests.processes import on_ranks
from tests.shared import golden
from utils import distributed
from utils.engine.tasks import TASKS

CHANNELS = {"semseg": 5, "depth": 1, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def meter_of(task: str):
    return TASKS.load(task).build_evaluators(TaskContext(num_channels=CHANNELS[task]))[0]


def batch(task: str, seed: int, size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoded prediction and a partly void label."""
    gen = torch.Generator().manual_seed(seed)
    pred = TASKS.load(task).decode(torch.randn(size, CHANNELS[task], 6, 8, generator=gen), [])
    shape = (size, 3 if task == "normals" else 1, 6, 8)
    if task == "normals":
        label = torch.nn.functional.normalize(torch.randn(shape, generator=gen), dim=1)
    elif task == "depth":
        label = 0.5 + 4 * torch.rand(shape, generator=gen)
    else:
        label = torch.randint({"semseg": 5, "human_parts": 7}.get(task, 2), shape, generator=gen).float()
    return pred, torch.where(torch.rand((size, 1, 6, 8), generator=gen) < 0.2, 255.0, label)


def test_segmentation_by_hand():
    meter = SegmentationMeter(4)
    meter.update(column(0, 0, 1, 1, 2).long(), column(0, 1, 1, 1, 255))
    scores = meter.compute()
    assert [scores[f"IoU/{k}"] for k in range(4)] == pytest.approx([1 / 2, 2 / 3, 0, 0])
    assert scores["mIoU"] == pytest.approx((1 / 2 + 2 / 3) / 4)        # absent classes count 0
    assert scores["mIoU_present"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(3 / 4)


def test_segmentation_names_a_wrong_class():
    with pytest.raises(ValueError, match="label 3 does not exist: there are 3 classes"):
        meter = SegmentationMeter(3)
        meter.update(column(0).long(), column(3))
        meter.compute()


def test_depth_by_hand():
    meter = DepthMeter()
    meter.update(column(1.0, 4.0, 7.0), column(2.0, 3.0, 255.0))
    scores = meter.compute()
    assert scores["rmse"] == pytest.approx(1.0)
    assert scores["log_rmse"] == pytest.approx(math.sqrt((math.log(2) ** 2 + math.log(4 / 3) ** 2) / 2))
    assert scores["abs_rel"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["sq_rel"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert [scores[f"delta{k}"] for k in (1, 2, 3)] == [0.0, 0.5, 0.5]


def test_depth_floor_range_and_void():
    meter = DepthMeter(valid_range=(0, 80))
    meter.update(column(0.0, 1.0, 1.0, 1.0), column(1.0, 80.0, 0.0, -1.0))
    assert meter.state["num_valid"].item() == 1
    assert meter.compute()["log_rmse"] == pytest.approx(-math.log(1e-9))
    meter = DepthMeter(ignore=0)
    meter.update(column(1.0, 1.0), column(0.0, 4.0))
    assert meter.compute()["rmse"] == pytest.approx(3.0)


def test_normals_by_hand():
    pred = torch.tensor([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 0], [1, 0, 0]]).float().T.view(1, 3, 1, 5)
    label = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).repeat(1, 1, 1, 5)
    label[0, 1, 0, 4] = 255
    meter = NormalsMeter()
    meter.update(pred, label)                      # angles 0, 90, 180, 90 (zero length), void
    scores = meter.compute()
    assert scores["mean"] == pytest.approx(90) and scores["median"] == pytest.approx(90, abs=0.006)
    assert scores["rmse"] == pytest.approx(math.sqrt((2 * 90**2 + 180**2) / 4))
    assert scores["11.25"] == scores["22.5"] == scores["30"] == pytest.approx(25)


def test_normals_median_is_that_of_all_angles():
    meter, angles = NormalsMeter(), []
    for seed in range(3):
        pred, label = batch("normals", seed, 4)
        meter.update(pred, label)
        valid = (label != 255).all(1)
        cosine = (pred.double() * label.double()).sum(1)[valid].clamp(-1, 1)
        angles.append(torch.rad2deg(torch.arccos(cosine)))
    assert meter.compute()["median"] == pytest.approx(np.median(torch.cat(angles)), abs=0.0051)


def test_saliency_by_hand():
    meter = SaliencyMeter()
    meter.update(column(0.95, 0.7, 0.3, 0.1, 0.9), column(1, 0, 1, 0, 255))
    scores = meter.compute()

    def f(precision: float, recall: float) -> float:
        return 1.3 * precision * recall / (0.3 * precision + recall)

    assert scores["maxF_exact"] == pytest.approx(max(f(1 / 2, 1), f(2 / 3, 1), f(1 / 2, 1 / 2), f(1, 1 / 2)))
    # the double sigmoid's cuts are p >= 0.2007, 0.4055, 0.6190, 0.8473 and "all"
    assert scores["maxF"] == pytest.approx(max(f(1 / 2, 1), f(2 / 3, 1), f(1 / 2, 1 / 2), f(1, 1 / 2)))
    assert scores["mIoU"] == pytest.approx(2 / 3)
    assert scores["F1"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))


def test_saliency_thresholds_are_inclusive():
    meter = SaliencyMeter()
    meter.update(THRESHOLDS.view(1, 1, 1, -1), torch.ones(1, 1, 1, len(THRESHOLDS)))
    assert meter.state["tp_exact"].tolist() == list(range(19, 0, -1))


def test_saliency_mean_iou_counts_empty_images_as_one():
    meter = SaliencyMeter()
    meter.update(torch.zeros(2, 1, 1, 2), torch.tensor([[0.0, 0.0], [255.0, 255.0]]).view(2, 1, 1, 2))
    assert meter.compute()["mIoU"] == 1.0 and meter.state["num_images"].item() == 1


def test_edge_loss_is_the_double_sigmoid():
    gen = torch.Generator().manual_seed(0)
    prob = torch.randn(3, 1, 4, 5, generator=gen).sigmoid()
    label = torch.randint(2, (3, 1, 4, 5), generator=gen).float()
    label[0, :, :2] = 255
    meter = EdgeLossMeter(0.9)
    for i in range(3):                                                 # batches of one
        meter.update(prob[i:i + 1], label[i:i + 1])
    whole = BalancedBCELoss(0.9)(prob.double(), label)
    assert meter.compute()["loss"] == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("task", CHANNELS)
def test_all_void(task):
    pred, label = batch(task, 0, 2)
    meter = meter_of(task)
    meter.update(pred, torch.full_like(label, 255.0))
    scores = meter.compute()
    zero = {"mIoU", "maxF", "maxF_exact"} if task != "sal" else {"maxF", "maxF_exact"}
    assert all(value == 0 if key in zero or key.startswith("IoU/") else math.isnan(value)
               for key, value in scores.items()), scores
    assert meter_of(task).compute().keys() == scores.keys()            # without any update


@pytest.mark.parametrize("task", CHANNELS)
def test_batching_does_not_matter(task):
    together, single = meter_of(task), meter_of(task)
    pred, label = batch(task, 1, 5)
    together.update(pred, label)
    for i in range(5):
        single.update(pred[i:i + 1], label[i:i + 1])
    assert together.compute() == pytest.approx(single.compute(), rel=1e-12)
    single.reset()
    single.update(pred, label)
    assert together.compute() == single.compute()


def test_reduce_only_once():
    meter = meter_of("edge")
    meter.reduce()                                                     # no process group: nothing to add
    with pytest.raises(AssertionError, match="reduce"):
        meter.reduce()
    with pytest.raises(AssertionError, match="reset"):
        meter.update(*batch("edge", 0))


def _process(rank: int, shares: list[list[int]], folder: Path) -> None:
    scores = {}
    with distributed.process_group(torch.device("cpu")):
        for task in CHANNELS:
            meter = meter_of(task)
            for seed in shares[rank]:
                meter.update(*batch(task, seed))
            meter.reduce()
            scores[task] = meter.compute()
    (folder / f"{rank}.json").write_text(json.dumps(scores))


def test_processes_with_uneven_shares_equal_one(tmp_path):
    shares = [[0, 1, 2], [3], []]                                      # the last process sees no image at all
    on_ranks(_process, 3, shares, tmp_path)
    expected = {}
    for task in CHANNELS:
        meter = meter_of(task)
        for seed in range(4):
            meter.update(*batch(task, seed))
        expected[task] = meter.compute()
    for rank in range(3):
        scores = json.loads((tmp_path / f"{rank}.json").read_text())
        for task in CHANNELS:
            assert scores[task] == pytest.approx(expected[task], rel=1e-12)


def test_delta_m_by_hand():
    better = {"semseg": True, "depth": False}
    gain = delta_m({"semseg": 0.55, "depth": 0.45}, {"semseg": 0.5, "depth": 0.5}, better)
    assert gain == pytest.approx(10.0)
    with pytest.raises(ValueError, match="same tasks twice"):
        delta_m({"semseg": 1.0}, {"depth": 1.0}, {"semseg": True})
    with pytest.raises(ValueError, match="figure of semseg is 0"):
        delta_m({"semseg": 1.0}, {"semseg": 0.0}, {"semseg": True})


def test_edge_maps_are_cropped_and_truncated(tmp_path):
    prob = torch.full((1, 1, 5, 6), 0.999)
    prob[0, 0, 1, 1] = 0.5                         # offset floor((5 - 2) / 2), floor((6 - 3) / 2)
    (path,) = save_edge_maps(prob, [{"name": "a.b", "size": (2, 3)}], tmp_path / "edge")
    assert path == tmp_path / "edge" / "a.b.png"
    assert np.asarray(Image.open(path)).tolist() == [[127, 254, 254], [254, 254, 254]]
    with pytest.raises(ValueError, match="7 x 3 cannot be cut"):
        crop_from_padding(np.zeros((5, 6)), (7, 3))


def test_saved_edges_match_the_reference(tmp_path):
    with np.load(golden("metrics") / "save_edge.npz") as data:
        prob = TASKS.load("edge").decode(torch.from_numpy(data["logits"]), [])
        sizes = map(tuple, data["sizes"].tolist())
        meta = [{"name": name, "size": size} for name, size in zip("abc", sizes, strict=True)]
        for path in save_edge_maps(prob, meta, tmp_path):
            assert np.array_equal(np.asarray(Image.open(path)), data[f"png_{path.stem}"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task", CHANNELS)
def test_gpu_equals_cpu(task):
    on_cpu, on_gpu = meter_of(task), meter_of(task)
    pred, label = batch(task, 1, 5)
    on_cpu.update(pred, label)
    on_gpu.update(pred.cuda(), label.cuda())
    assert on_gpu.compute() == pytest.approx(on_cpu.compute(), rel=1e-6)
