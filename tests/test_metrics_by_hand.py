"""Every meter on a few pixels, against numbers computed by hand from its definition."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluation.normals
from evaluation.boundary.edge_loss import EdgeLossMeter
from evaluation.boundary.edge_maps import crop_from_padding, edge_maps, save_edge_maps
from evaluation.delta_m import delta_m
from evaluation.depth import DepthMeter
from evaluation.meter import Meter, ratio
from evaluation.normals import NormalsMeter
from evaluation.saliency import IMAGE_THRESHOLDS, THRESHOLDS, SaliencyMeter
from evaluation.segmentation import SegmentationMeter


def row(*values: float) -> Tensor:
    """One image of one row, (1, 1, 1, W) float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def vectors(*values: tuple[float, float, float]) -> Tensor:
    """One image of one row of vectors, (1, 3, 1, W) float64."""
    return torch.tensor(values, dtype=torch.float64).T.reshape(1, 3, 1, -1)


def scores(meter: Meter, *updates: tuple[Tensor, Tensor]) -> dict[str, float]:
    for pred, target in updates:
        meter.update(pred, target)
    return meter.compute()


# Segmentation --------------------------------------------------------------------------------------------------------

def test_segmentation_counts():
    meter = SegmentationMeter(5)
    result = scores(meter, (row(0, 0, 1, 1, 2, 0, 4), row(0, 1, 1, 1, 1, 0, 255)), (row(0, 2), row(1, 255)))
    assert {name: count.tolist() for name, count in meter.per_class().items()} == {
        "tp": [2, 2, 0, 0, 0], "fp": [2, 0, 1, 0, 0], "fn": [0, 3, 0, 0, 0]}
    assert meter.valid_pixels == 7
    assert result == pytest.approx({
        "IoU/0": 2 / 4, "IoU/1": 2 / 5, "IoU/2": 0, "IoU/3": 0, "IoU/4": 0, "mIoU": (2 / 4 + 2 / 5) / 5,
        "mIoU_present": (2 / 4 + 2 / 5) / 3,       # classes 0 and 1, and 2, which is predicted but nowhere labelled
        "pixel_accuracy": 4 / 7})


def test_a_class_is_present_where_it_is_labelled_or_predicted():
    labelled = scores(SegmentationMeter(4), (row(0, 0), row(0, 3)))
    predicted = scores(SegmentationMeter(4), (row(0, 3), row(0, 0)))
    assert labelled["mIoU_present"] == predicted["mIoU_present"] == pytest.approx((1 / 2 + 0) / 2)
    assert labelled["mIoU"] == predicted["mIoU"] == pytest.approx(1 / 8)


def test_segmentation_ignores_the_given_index_only():
    assert scores(SegmentationMeter(3, 1), (row(0, 0, 2), row(0, 1, 2)))["pixel_accuracy"] == 1
    assert scores(SegmentationMeter(3, -1), (row(0, 0, 2), row(0, -1, 2)))["pixel_accuracy"] == 1


@pytest.mark.parametrize(("pred", "target", "what"), [(row(3), row(0), "prediction 3"), (row(0), row(4), "label 4"),
                                                     (row(0), row(-1), "label -1")])
def test_a_class_that_does_not_exist_is_named(pred, target, what):
    for read in (SegmentationMeter.compute, SegmentationMeter.reduce):
        meter = SegmentationMeter(3)
        meter.update(pred, target)
        meter.update(row(1), row(1))
        with pytest.raises(ValueError, match=rf"{what} does not exist: there are 3 classes \(0..2, 255 = void\)"):
            read(meter)
    assert scores(SegmentationMeter(3), (row(2), row(2)))["pixel_accuracy"] == 1


# Depth ---------------------------------------------------------------------------------------------------------------

def test_depth_errors():
    """Errors of -1, 2 and -2 m at 2, 4 and 5 m; one pixel is void."""
    meter = DepthMeter()
    result = scores(meter, (row(1, 6, 100), row(2, 4, 255)), (row(3), row(5)))
    assert meter.valid_pixels == 3
    assert result == pytest.approx({
        "rmse": math.sqrt((1 + 4 + 4) / 3), "abs_rel": (1 / 2 + 2 / 4 + 2 / 5) / 3,
        "sq_rel": (1 / 2 + 4 / 4 + 4 / 5) / 3,
        "log_rmse": math.sqrt((math.log(2)**2 + math.log(6 / 4)**2 + math.log(5 / 3)**2) / 3),
        "delta1": 0, "delta2": 1 / 3, "delta3": 2 / 3})


@pytest.mark.parametrize(("factor", "deltas"), [
    (1.25, (0, 1, 1)), (1.2499, (1, 1, 1)), (1.25**2, (0, 0, 1)), (1.5624, (0, 1, 1)), (1.25**3, (0, 0, 0)),
    (1.9531, (0, 0, 1)), (1.0, (1, 1, 1))])
def test_delta_is_strict_and_symmetric(factor, deltas):
    for pred, target in ((row(factor), row(1)), (row(1), row(factor))):
        result = scores(DepthMeter(), (pred, target))
        assert tuple(result[f"delta{k}"] for k in (1, 2, 3)) == deltas


@pytest.mark.parametrize("pred", [0.0, -1.0])
def test_a_depth_that_is_not_positive_counts_as_a_nanometre(pred):
    result = scores(DepthMeter(), (row(pred), row(1)))
    assert result["rmse"] == pytest.approx(1 - 1e-9, abs=1e-12)
    assert result["log_rmse"] == pytest.approx(9 * math.log(10))
    assert result["delta3"] == 0


@pytest.mark.parametrize(("kwargs", "valid"), [
    ({}, 6), ({"valid_range": (0, 80)}, 2), ({"valid_range": (0.5, 81)}, 4), ({"ignore": 0}, 6), ({"ignore": None}, 7),
    ({"ignore": 79, "valid_range": (0, 80)}, 1), ({"ignore": None, "valid_range": (-1, 300)}, 6)])
def test_valid_depth_lies_strictly_in_the_range(kwargs, valid):
    meter = DepthMeter(**kwargs)
    meter.update(row(1, 1, 1, 1, 1, 1, 1), row(-1, 0, 1, 79, 80, 80.5, 255))
    assert meter.valid_pixels == valid


# Normals -------------------------------------------------------------------------------------------------------------

def at(*degrees: float, length: float = 1.0) -> Tensor:
    """Vectors at these angles from the x axis."""
    return vectors(*((length * math.cos(math.radians(d)), length * math.sin(math.radians(d)), 0) for d in degrees))


def x_axis(number: int, length: float = 1.0) -> Tensor:
    return vectors(*[(length, 0, 0)] * number)


@pytest.mark.parametrize(("degrees", "median"), [
    ((10.004, 20.004, 60.004), 20), ((10.004, 20.004, 40.004, 90.004), 30), ((33.004,), 33), ((7.004, 8.004), 7.5),
    ((1.004, 2.004, 3.004, 100.004, 170.004), 3), ((0,), 0.005), ((180,), 179.995)])
def test_the_median_is_the_middle_angle(degrees, median):
    """Exact to half a bin of 0.01 degrees."""
    shuffled = degrees[1:] + degrees[:1]
    assert scores(NormalsMeter(), (at(*shuffled), x_axis(len(degrees))))["median"] == pytest.approx(median, abs=0.0051)


def test_the_median_is_of_all_updates():
    updates = [(at(d), x_axis(1)) for d in (80, 10, 20, 90, 30)]
    assert scores(NormalsMeter(), *updates)["median"] == pytest.approx(30, abs=0.0051)


@pytest.mark.parametrize("convention", ["atan2", "arccos"])
def test_mean_rmse_and_shares(convention):
    meter = NormalsMeter(convention=convention)
    target = x_axis(6)
    target[0, 2, 0, 5] = 255                               # one void channel voids the pixel
    result = scores(meter, (at(5, 11.2, 11.3, 22.6, 30.1, 0, length=7), target), (at(22.4, 29.9, 100), x_axis(3)))
    degrees = np.array([5, 11.2, 11.3, 22.6, 30.1, 22.4, 29.9, 100])
    assert meter.valid_pixels == 8
    assert result["mean"] == pytest.approx(degrees.mean()) and result["median"] == pytest.approx(22.5, abs=0.0051)
    assert result["rmse"] == pytest.approx(math.sqrt((degrees**2).mean()))
    assert [result[share] for share in ("11.25", "22.5", "30")] == [100 * 2 / 8, 100 * 4 / 8, 100 * 6 / 8]


def test_shares_are_strictly_below(monkeypatch):
    """A zero prediction is exactly 90 degrees off, so a limit of 90 shows it; nothing else is exact in radians."""
    monkeypatch.setattr(evaluation.normals, "SHARES_DEG", (90.0, 90.001, 30.0))
    result = scores(NormalsMeter(), (vectors((0, 0, 0)), x_axis(1)))
    assert (result["mean"], result["90"], result["90.001"]) == (90.0, 0, 100)


def test_conventions_differ_in_the_length_of_the_label():
    assert scores(NormalsMeter(), (at(0), x_axis(1, 0.5)))["mean"] == 0
    arccos = scores(NormalsMeter(convention="arccos"), (at(0, 0, 180), vectors((0.5, 0, 0), (1.1, 0, 0), (1.1, 0, 0))))
    assert arccos["mean"] == pytest.approx((60 + 0 + 180) / 3)          # the dot product is clipped to -1..1
    with pytest.raises(ValueError, match="normals convention 'cos' is unknown; valid: atan2, arccos"):
        NormalsMeter(convention="cos")


def test_small_angles_are_exact():
    assert scores(NormalsMeter(), (at(1e-5), x_axis(1)))["mean"] == pytest.approx(1e-5, rel=1e-6)
    assert scores(NormalsMeter(), (at(60, length=1e-3), x_axis(1)))["mean"] == pytest.approx(60)


def test_normals_ignore_the_given_value():
    meter = NormalsMeter(ignore=0)
    meter.update(at(10, 10), vectors((1, 0, 0), (255, 1, 1)))
    assert meter.valid_pixels == 1                         # the first has two channels of 0


# Saliency ------------------------------------------------------------------------------------------------------------

def f_measure(precision: float, recall: float) -> float:
    return 1.3 * precision * recall / (0.3 * precision + recall)


def test_saliency_thresholds():
    assert THRESHOLDS.tolist() == pytest.approx([0.05 * k for k in range(1, 20)], abs=1e-6)
    assert IMAGE_THRESHOLDS.tolist() == pytest.approx([0.2 + 0.05 * k for k in range(15)], abs=1e-6)
    assert THRESHOLDS.dtype == torch.float32


def test_both_variants_of_max_f():
    """Salient 0.9 and 0.5, the rest 0.6 and 0.45. The double sigmoid cuts at 0.2007, 0.4055, 0.6190 and 0.8473 only."""
    meter = SaliencyMeter()
    result = scores(meter, (row(0.9, 0.6), row(1, 0)), (row(0.5, 0.45, 0.99), row(1, 0, 255)))
    assert meter.valid_pixels == 4
    assert result["maxF_exact"] == pytest.approx(max(f_measure(2 / 3, 1), f_measure(1, 1 / 2), f_measure(1 / 2, 1)))
    assert result["maxF"] == pytest.approx(max(f_measure(1, 1 / 2), f_measure(2 / 4, 1)))
    only = scores(SaliencyMeter(), (row(0.5, 0.45, 0.1), row(1, 0, 0)))
    assert only["maxF_exact"] == 1.0 and only["maxF"] == pytest.approx(f_measure(1 / 2, 1))
    assert scores(SaliencyMeter(), (row(0.5, 0.41, 0.40, 0.1), row(1, 1, 0, 0)))["maxF"] == 1.0


def test_max_f_pools_pixels_over_the_set():
    """A pooled precision and recall, not a mean of the images' values."""
    one, two = (row(0.9, 0.9, 0.9, 0.9), row(1, 0, 0, 0)), (row(0.9, 0.0, 0.0, 0.0), row(1, 1, 1, 1))
    result = scores(SaliencyMeter(), one, two)
    assert result["maxF_exact"] == pytest.approx(f_measure(2 / 5, 2 / 5))
    assert result["maxF"] == pytest.approx(f_measure(5 / 8, 1))        # the double sigmoid accepts everything at 0.5


def test_saliency_per_image():
    """At the threshold 0.5, the best, image 1 has IoU 1/3, P 1/2 and R 1/2, image 2 has 2/3, 2/3 and 1."""
    first, second = (row(0.6, 0.6, 0.1, 0.1), row(1, 0, 1, 0)), (row(0.6, 0.6, 0.6, 0.1), row(1, 1, 0, 255))
    result = scores(SaliencyMeter(), first, second)
    precision, recall = (1 / 2 + 2 / 3) / 2, (1 / 2 + 1) / 2
    assert result["mIoU"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert result["F1"] == pytest.approx(2 * precision * recall / (precision + recall))
    batched = tuple(torch.cat(maps) for maps in zip(first, second, strict=True))
    assert scores(SaliencyMeter(), batched) == pytest.approx(result)


def test_image_thresholds_are_exclusive_and_end_at_90_percent():
    """A salient pixel at exactly 0.2 never counts; above 0.9 it always does."""
    at_first = IMAGE_THRESHOLDS[0].item()
    assert scores(SaliencyMeter(), (row(at_first), row(1)))["mIoU"] == 0
    assert scores(SaliencyMeter(), (row(at_first + 1e-6), row(1)))["mIoU"] == 1
    meter = SaliencyMeter()
    meter.update(row(0.91), row(1))
    assert meter.state["sum_iou"].tolist() == [1] * 15


def test_saliency_ignores_the_given_index_and_counts_only_ones():
    meter = SaliencyMeter(ignore_index=-1)
    meter.update(row(0.9, 0.9, 0.9), row(1, -1, 255))
    assert meter.valid_pixels == 2 and meter.state["positives"].item() == 1


def test_void_pixels_and_void_images_count_nowhere():
    meter = SaliencyMeter()
    void = torch.cat([row(0.9, 0.9), row(0.9, 0.9)]), torch.cat([row(255, 255), row(1, 255)])
    assert scores(meter, void)["mIoU"] == 1 and meter.state["num_images"].item() == 1
    assert meter.valid_pixels == 1 == meter.state["positives"].item()


# Boundary loss -------------------------------------------------------------------------------------------------------

def test_boundary_loss_is_that_of_a_second_sigmoid():
    """0.95 y softplus(-p) + 0.05 (1 - y) softplus(p) of the probability p, pooled over pixels."""
    meter = EdgeLossMeter()
    result = scores(meter, (row(0.0, 1.0, 0.5), row(1, 0, 255)), (row(1.0), row(1)))
    parts = 0.95 * math.log(2) + 0.05 * math.log1p(math.e) + 0.95 * math.log1p(math.exp(-1))
    assert result["loss"] == pytest.approx(parts / 3) and meter.valid_pixels == 3
    perfect = scores(EdgeLossMeter(), (row(1.0, 0.0), row(1, 0)))["loss"]
    assert perfect == pytest.approx(0.0347 + 0.263 / 2, abs=1e-4)


def test_boundary_loss_options():
    weighted = scores(EdgeLossMeter(0.5, -1), (row(0.0, 0.3, 0.0), row(1, -1, 0)))["loss"]
    assert weighted == pytest.approx(0.5 * math.log(2))
    balanced = scores(EdgeLossMeter(None), (row(0.0, 0.0, 0.0, 0.0), row(1, 0, 0, 0)))["loss"]
    assert balanced == pytest.approx((3 / 4 + 3 / 4) * math.log(2) / 4)


# What all meters share -----------------------------------------------------------------------------------------------

METERS = {"segmentation": (SegmentationMeter(2), row(1), row(1)), "depth": (DepthMeter(), row(1), row(1)),
          "normals": (NormalsMeter(), x_axis(1), x_axis(1)), "saliency": (SaliencyMeter(), row(0.9), row(1)),
          "edge": (EdgeLossMeter(), row(0.9), row(1))}


@pytest.mark.parametrize("name", METERS)
def test_an_update_reads_nothing_back_from_the_device(name):
    """On the meta device there is nothing to read: whatever waits for a value fails."""
    meter, pred, target = METERS[name]
    meter.reset()
    batch = (maps.expand(2, -1, 3, 4).to("meta") for maps in (pred, target))
    meter.update(*batch)
    assert {value.device.type for value in meter.state.values()} == {"meta"}
    meter.reset()


@pytest.mark.parametrize("name", METERS)
def test_reset_starts_anew(name):
    meter, pred, target = METERS[name]
    meter.reset()
    empty = meter.compute()
    meter.update(pred, target)
    assert meter.valid_pixels == 1 and meter.compute() != empty
    meter.reduce()
    meter.reset()
    assert meter.valid_pixels == 0 and meter.compute() == pytest.approx(empty, nan_ok=True)
    meter.update(pred, target)


def test_a_ratio_without_a_denominator_is_nan():
    assert ratio(3, 4) == 0.75 and math.isnan(ratio(1, 0)) and math.isnan(ratio(0, 0))


# Gain and boundary files ---------------------------------------------------------------------------------------------

def test_delta_m_is_the_mean_relative_gain_in_percent():
    better = {"a": True, "b": False, "c": True}
    assert delta_m({"a": 60, "b": 4, "c": 10}, {"a": 50, "b": 5, "c": 20}, better) == pytest.approx(
        (20 + 20 - 50) / 3)
    with pytest.raises(ValueError, match=r"no direction \(higher is better\) for \['d'\]; known: \['a', 'b', 'c'\]"):
        delta_m({"d": 1}, {"d": 1}, better)
    with pytest.raises(ValueError, match=r"same tasks twice, got \[\] and \[\]"):
        delta_m({}, {}, better)


def test_edge_maps_truncate_and_crop_the_centre(tmp_path):
    prob = torch.arange(20).view(1, 1, 4, 5) / 20
    (picture,) = edge_maps(prob, [{"name": "x", "size": (2, 2)}])
    assert picture.dtype == np.uint8                       # rows 1 and 2, columns 1 and 2: 255 k / 20, truncated
    assert picture.tolist() == [[int(255 * k / 20) for k in ks] for ks in ((6, 7), (11, 12))]
    assert edge_maps(torch.ones(1, 1, 2, 3), [{"size": (2, 3)}])[0].tolist() == [[255] * 3] * 2
    with pytest.raises(ValueError, match="1 edge maps and 2 entries"):
        edge_maps(prob, [{}, {}])
    (tmp_path / "edge").mkdir()                            # a second call writes into the same folder
    assert save_edge_maps(prob, [{"name": "x", "size": (2, 2)}], tmp_path / "edge") == [tmp_path / "edge" / "x.png"]


def test_a_prediction_that_is_not_a_number_is_named():
    prob = torch.full((3, 1, 2, 2), 0.5)
    prob[1:, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"probability of b, \? is not a number \(NaN\)"):
        edge_maps(prob, [{"name": "a", "size": (2, 2)}, {"name": "b", "size": (2, 2)}, {"size": (2, 2)}])


@pytest.mark.parametrize("size", [(5, 4), (4, 6)])
def test_an_image_larger_than_its_frame_cannot_be_cut(size):
    with pytest.raises(ValueError, match=f"image of {size[0]} x {size[1]} cannot be cut from a map of 4 x 5"):
        crop_from_padding(np.zeros((4, 5)), size)
    assert crop_from_padding(np.arange(4 * 5).reshape(4, 5), (1, 4)).tolist() == [[5, 6, 7, 8]]


def test_one_salient_pixel_is_enough_for_a_recall():
    """Precision and recall of the images' own counts: one pixel, found, is 1 of 1."""
    meter = SaliencyMeter()
    target = torch.zeros(1, 1, 2, 2)
    target[0, 0, 0, 0] = 1
    meter.update(target * 0.95, target)
    assert meter.compute()["F1"] == 1.0 and meter.compute()["mIoU"] == 1.0


def test_an_odd_offset_and_an_odd_side_are_cut_out_exactly():
    padded = np.arange(5 * 8).reshape(5, 8)
    assert crop_from_padding(padded, (3, 5)).tolist() == padded[1:4, 1:6].tolist()
    assert crop_from_padding(padded, (2, 3)).tolist() == padded[1:3, 2:5].tolist()
