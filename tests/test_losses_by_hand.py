"""Every training loss on a few pixels, against numbers computed by hand from its definition."""

import math

import pytest
import torch
from torch import Tensor, nn

from losses.balancing import build_balancing
from losses.cross_entropy import BalancedCrossEntropyLoss, CrossEntropyLoss
from losses.edge import BalancedBCELoss
from losses.load_balancing import load_balancing_loss
from losses.multi_task import MultiTaskLoss, images_of
from losses.regression import L1Loss, NormalsLoss

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def pixels(*columns: float | tuple[float, ...]) -> Tensor:
    """One image of one row: (1, C, 1, W) float64, a number or a tuple of C numbers per pixel."""
    columns = [column if isinstance(column, tuple) else (column,) for column in columns]
    return torch.tensor(columns, dtype=torch.float64).T.view(1, len(columns[0]), 1, -1)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-12)


# Cross entropy: p of class 0 is 3/4, 1/2 and 1/3 in the three pixels ----------------------------------------------

TWO = pixels((LN3, 0.0), (0.0, 0.0), (0.0, LN2))


@pytest.mark.parametrize(("label", "loss"), [
    ((0, 0, 0), (math.log(4 / 3) + LN2 + LN3) / 3),
    ((0, 1, 0), (math.log(4 / 3) + LN2 + LN3) / 3),
    ((1, 1, 1), (LN4 + LN2 + math.log(3 / 2)) / 3),
    ((0, 255, 255), math.log(4 / 3)),                      # one valid pixel: divided by 1
    ((255, 255, 1), math.log(3 / 2)),
    ((0, 255, 0), (math.log(4 / 3) + LN3) / 2),
    ((255, 255, 255), 0.0),
])
def test_cross_entropy(label, loss):
    assert CrossEntropyLoss()(TWO, pixels(*label)).item() == close(loss)


def test_cross_entropy_weighs_classes_but_divides_by_pixels():
    loss = CrossEntropyLoss(class_weight=(0.25, 3.0))(TWO, pixels(0, 1, 255))
    assert loss.item() == close((0.25 * math.log(4 / 3) + 3 * LN2) / 2)


@pytest.mark.parametrize("kind", [CrossEntropyLoss, BalancedCrossEntropyLoss])
def test_cross_entropy_ignores_the_given_index(kind):
    assert kind(ignore_index=-1)(TWO, pixels(-1, 0, 1)).item() == kind()(TWO, pixels(255, 0, 1)).item()
    assert kind(ignore_index=7)(TWO, pixels(0, 7, 1)).item() == kind()(TWO, pixels(0, 255, 1)).item()
    for label in (255, -1, 2):
        with pytest.raises(ValueError, match=rf"label {label} does not exist: this output has 2 classes \(0..1, 7 ="):
            kind(ignore_index=7)(TWO, pixels(0, label, 1))


def test_cross_entropy_is_pooled_over_the_batch():
    """Two images with one and two valid pixels: a mean over three pixels, not over two images."""
    logits, label = TWO.repeat(2, 1, 1, 1), torch.cat([pixels(0, 255, 255), pixels(255, 0, 0)])
    assert CrossEntropyLoss()(logits, label).item() == close((math.log(4 / 3) + LN2 + LN3) / 3)


@pytest.mark.parametrize(("label", "loss"), [
    ((0, 1, 1), (2 / 3 * math.log(4 / 3) + 1 / 3 * LN2 + 1 / 3 * math.log(3 / 2)) / 3),     # q = 1/3
    ((0, 0, 1), (1 / 3 * math.log(4 / 3) + 1 / 3 * LN2 + 2 / 3 * math.log(3 / 2)) / 3),     # q = 2/3
    ((0, 1, 255), (1 / 2 * math.log(4 / 3) + 1 / 2 * LN2) / 2),
    ((0, 0, 0), 0.0), ((1, 1, 1), 0.0), ((1, 255, 255), 0.0), ((0, 255, 255), 0.0),         # a single class
    ((255, 255, 255), 0.0),
])
def test_balanced_cross_entropy(label, loss):
    assert BalancedCrossEntropyLoss()(TWO, pixels(*label)).item() == close(loss)


@pytest.mark.parametrize("channels", [1, 3])
def test_balanced_cross_entropy_is_for_two_classes(channels):
    with pytest.raises(ValueError, match=f"needs 2 channels .*got {channels}"):
        BalancedCrossEntropyLoss()(torch.zeros(1, channels, 1, 1), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("kind", [CrossEntropyLoss, BalancedCrossEntropyLoss])
def test_a_class_label_has_one_channel(kind):
    with pytest.raises(ValueError, match=r"one channel .* got shape \(1, 2, 1, 3\)"):
        kind()(TWO, torch.zeros(1, 2, 1, 3))


@pytest.mark.parametrize(("logits", "label"), [((2, 3, 4), (2, 3, 4)), ((1, 1, 2, 2, 2), (1, 1, 2, 2, 2)),
                                               ((1, 1, 2, 3), (1, 1, 2, 2)), ((1, 1, 2, 2), (1, 1, 2, 3)),
                                               ((2, 1, 2, 2), (1, 1, 2, 2)), ((1, 1, 2, 2), (2, 1, 2, 2))])
def test_shapes_must_agree(logits, label):
    with pytest.raises(ValueError, match=r"L1Loss: logits .* must be \(B, n, H, W\) and \(B, C, H, W\)"):
        L1Loss()(torch.zeros(logits), torch.zeros(label))


# Boundaries: softplus of the logits is ln 2, ln 4, ln 4/3 ----------------------------------------------------------

EDGE = pixels(0.0, LN3, -LN3)


@pytest.mark.parametrize(("weight", "label", "loss"), [
    (0.9, (1, 0, 0), (0.9 * LN2 + 0.1 * LN4 + 0.1 * math.log(4 / 3)) / 3),
    (0.9, (0, 1, 1), (0.1 * LN2 + 0.9 * math.log(4 / 3) + 0.9 * LN4) / 3),
    (0.9, (1, 255, 255), 0.9 * LN2),
    (0.9, (0, 255, 0), (0.1 * LN2 + 0.1 * math.log(4 / 3)) / 2),
    (0.9, (0.5, 255, 255), (0.45 + 0.05) * LN2),                                 # a label between the classes
    (0.0, (1, 0, 0), (LN4 + math.log(4 / 3)) / 3), (1.0, (1, 0, 0), LN2 / 3),
    (None, (1, 0, 0), (2 / 3 * LN2 + 1 / 3 * LN4 + 1 / 3 * math.log(4 / 3)) / 3),            # w = 2/3
    (None, (1, 0, 255), (1 / 2 * LN2 + 1 / 2 * LN4) / 2), (None, (1, 255, 255), 0.0),
])
def test_edge_loss(weight, label, loss):
    assert BalancedBCELoss(weight)(EDGE, pixels(*label)).item() == close(loss)


def test_edge_loss_weighs_95_to_5_unless_told():
    assert BalancedBCELoss()(EDGE, pixels(1, 0, 255)).item() == close((0.95 * LN2 + 0.05 * LN4) / 2)


def test_edge_loss_ignores_the_given_index():
    assert BalancedBCELoss(0.9, ignore_index=-1)(EDGE, pixels(1, -1, 0)).item() == close(
        (0.9 * LN2 + 0.1 * math.log(4 / 3)) / 2)


@pytest.mark.parametrize("weight", [-0.5, -1, 1.5, 2])
def test_edge_weight_is_a_share(weight):
    with pytest.raises(ValueError, match=rf"pos_weight {weight} of the edge loss must lie in \[0, 1\]"):
        BalancedBCELoss(weight)


@pytest.mark.parametrize(("logits", "label"), [(2, 2), (2, 1), (1, 2)])
def test_edge_loss_has_one_channel(logits, label):
    with pytest.raises(ValueError, match=rf"one channel each, got \(1, {logits}, 1, 3\) and \(1, {label}, 1, 3\)"):
        BalancedBCELoss()(torch.zeros(1, logits, 1, 3), torch.zeros(1, label, 1, 3))


# Regression --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ignore", "label", "loss"), [
    (255, (1, 4, 2), (1 + 2 + 4) / 3), (255, (1, 255, 2), (1 + 4) / 2), (255, (255, 4, 255), 2.0),
    (255, (255, 255, 255), 0.0), (0, (0, 4, 2), (2 + 4) / 2), (0, (255, 4, 2), (253 + 2 + 4) / 3),
    (-1, (1, -1, 2), (1 + 4) / 2), (None, (255, 0, -1), (253 + 2 + 7) / 3),
])
def test_l1(ignore, label, loss):
    assert L1Loss(ignore)(pixels(2, 2, 6), pixels(*label)).item() == close(loss)


def test_l1_sums_channels_and_divides_by_pixels():
    pred, label = pixels((1, 2, 3), (0, 0, 0), (4, 4, 4)), pixels((0, 0, 0), (1, 1, 1), (255, 0, 0))
    assert L1Loss()(pred, label).item() == close((1 + 2 + 3 + 3) / 2)
    assert L1Loss(0)(pred, label).item() == close(3.0)     # only the second pixel has no channel of 0


def test_normals_loss_scales_the_prediction_to_unit_length():
    label = pixels((1, 0, 0), (0, 0, 1), (0, 1, 0))
    pred = pixels((0.3, 0.4, 0), (0, 0, 20), (0, 0, 0))    # (0.6, 0.8, 0), (0, 0, 1), and nothing to scale
    assert NormalsLoss()(pred, label).item() == close((0.4 + 0.8 + 0 + 1) / 3)
    label[:, :, 0, 2] = torch.tensor([0.0, 255.0, 0.0])
    assert NormalsLoss()(pred, label).item() == close(1.2 / 2)
    assert NormalsLoss(0)(pred, pixels((1, 2, 2), (0, 0, 1), (1, 1, 0))).item() == close(0.4 + 1.2 + 2)


def test_normals_loss_uses_the_label_as_stored():
    assert NormalsLoss()(pixels((5, 0, 0)), pixels((0.5, 0, 0))).item() == close(0.5)


def test_regression_wants_one_shape():
    with pytest.raises(ValueError, match=r"L1Loss needs prediction and label of one shape, got \(1, 2, 1, 3\) and"):
        L1Loss()(torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 1, 3))


# Load balancing ----------------------------------------------------------------------------------------------------

def test_load_balancing_pools_tasks_and_samples():
    """Mean load (0.5, 0.3, 0.2) of four samples of two tasks: variance 0.07 / 3 (unbiased), mean 1/3."""
    first = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.6, 0.2]], dtype=torch.float64)
    second = torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.2, 0.4]], dtype=torch.float64).view(2, 3, 1, 1)
    deviation = ((0.5 - 1 / 3)**2 + (0.3 - 1 / 3)**2 + (0.2 - 1 / 3)**2) / 2
    assert load_balancing_loss([[first, second]]).item() == close(deviation * 9)
    assert load_balancing_loss([[first, second]] * 3).item() == close(3 * deviation * 9)


def test_load_balancing_needs_two_experts_and_a_layer():
    with pytest.raises(ValueError, match=r"at least 2 experts, got gates \(4, 1\)"):
        load_balancing_loss([[torch.ones(4, 1)]])
    with pytest.raises(ValueError, match="at least one routing layer"):
        load_balancing_loss([])


def test_load_balancing_never_drops_below_float32():
    assert load_balancing_loss([[torch.ones(1, 2, dtype=torch.bfloat16)]]).dtype == torch.float32
    assert load_balancing_loss([[torch.ones(1, 2, dtype=torch.float64)]]).dtype == torch.float64


# Schemes: losses that are the mean of the valid predictions --------------------------------------------------------

class MeanOfValid(nn.Module):
    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        valid = label != 255
        return torch.where(valid, logits, 0).sum() / valid.sum().clamp_min(1)


WEIGHTS = {"a": 2.0, "b": 5.0}
NO_VOID = {"a": torch.zeros(2, 1, 1, 2), "b": torch.zeros(2, 1, 1, 2)}


def combined(scheme: str = "weighted_sum", *args, **kwargs) -> MultiTaskLoss:
    balancing = build_balancing(scheme, tuple(WEIGHTS), WEIGHTS)
    return MultiTaskLoss({"a": MeanOfValid(), "b": MeanOfValid()}, balancing, *args, **kwargs)


def two_images(a: tuple[float, float], b: tuple[float, float]) -> dict[str, Tensor]:
    """Task -> (2, 1, 1, 2): every pixel of the first and the second image has this value."""
    return {"a": torch.tensor(a).double().view(2, 1, 1, 1).repeat(1, 1, 1, 2),
            "b": torch.tensor(b).double().view(2, 1, 1, 1).repeat(1, 1, 1, 2)}


def items(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


FINAL, INTER = two_images((1, 3), (0.5, 1.5)), two_images((4, 8), (2, 6))


@pytest.mark.parametrize(("scheme", "scope", "final", "inter"), [
    ("weighted_sum", "process", 2 * 2 + 5 * 1, 2 * 6 + 5 * 4),
    ("weighted_sum", "image", (2 * 1 + 5 * 0.5 + 2 * 3 + 5 * 1.5) / 2, (2 * 4 + 5 * 2 + 2 * 8 + 5 * 6) / 2),
    ("log", "process", 2 * LN2 + 5 * 0, 2 * math.log(6) + 5 * LN4),
    ("log", "image", (2 * 0 - 5 * LN2 + 2 * LN3 + 5 * math.log(1.5)) / 2,
     (2 * LN4 + 5 * LN2 + 2 * math.log(8) + 5 * math.log(6)) / 2),
])
def test_schemes_and_scopes(scheme, scope, final, inter):
    without = items(combined(scheme, scope=scope)(FINAL, NO_VOID))
    assert without == pytest.approx({"a": 2, "b": 1, "total": final}, abs=1e-6)
    both = {"a": 2, "b": 1, "inter/a": 6, "inter/b": 4}
    assert items(combined(scheme, scope=scope)(FINAL, NO_VOID, INTER)) == pytest.approx(
        {**both, "total": final + inter}, abs=1e-6)        # the intermediate weight is 1 unless told
    assert items(combined(scheme, 0.25, scope)(FINAL, NO_VOID, INTER)) == pytest.approx(
        {**both, "total": final + inter / 4}, abs=1e-6)
    assert items(combined(scheme, scope=scope, use_intermediate=False)(FINAL, NO_VOID, INTER)) == without


def test_the_weighted_sum_over_the_process_is_what_runs_unless_told():
    assert items(combined()(FINAL, NO_VOID)) == items(combined("weighted_sum", 1.0, "process")(FINAL, NO_VOID))


def test_scopes_differ_where_images_have_unequal_void():
    """Image 1 has one valid pixel, image 2 has two: pooled 1, 3, 3 over three pixels, or the mean of 1 and 3."""
    labels = {"a": torch.tensor([[0.0, 255.0], [0.0, 0.0]]).view(2, 1, 1, 2), "b": NO_VOID["b"]}
    assert combined()(FINAL, labels)["a"].item() == close(7 / 3)
    assert combined(scope="image")(FINAL, labels)["a"].item() == close(2)


def test_some_tasks_may_have_no_intermediate_prediction():
    losses = items(combined()(FINAL, NO_VOID, {"b": INTER["b"]}))
    assert losses == pytest.approx({"a": 2, "b": 1, "inter/b": 4, "total": 9 + 5 * 4})


@pytest.mark.parametrize("scheme", ["weighted_sum", "log"])
def test_extra_terms_are_added_as_they_are(scheme):
    total = combined(scheme)(FINAL, NO_VOID)["total"].item()
    losses = items(combined(scheme)(FINAL, NO_VOID, extra={"x": torch.tensor(0.5), "y": torch.tensor(-2.0)}))
    assert (losses["x"], losses["y"], losses["total"]) == (0.5, -2.0, close(total - 1.5))


def test_the_log_of_no_loss_is_finite():
    nothing = two_images((0, 0), (0, 0))
    assert combined("log")(nothing, NO_VOID)["total"].item() == close(7 * math.log(1e-8))


def test_missing_maps_are_named():
    with pytest.raises(ValueError, match="no prediction for task 'b'; got: a"):
        combined()({"a": FINAL["a"]}, NO_VOID)
    with pytest.raises(ValueError, match="no label for task 'a'; got: none"):
        combined()(FINAL, {})
    with pytest.raises(ValueError, match="loss_weights lacks a, b; given: -"):
        build_balancing("log", ("a", "b"), {})


def test_a_batch_is_taken_apart_image_by_image():
    """Tensors, sequences with one entry per image, dictionaries of either."""
    maps, boxes = torch.arange(6.0).reshape(3, 2), ["a", "b", "c"]
    assert [part.tolist() for part in images_of(maps)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert list(images_of(boxes)) == [["a"], ["b"], ["c"]]
    parts = images_of({"maps": maps, "boxes": boxes})
    assert len(parts) == 3 and parts[1]["maps"].tolist() == [[2, 3]] and parts[1]["boxes"] == ["b"]
