"""Training losses against hand-computed numbers, the reference numbers, and their own invariances."""

import math

import pytest
import torch
from safetensors.torch import load_file

from evaluation.evaluator import TaskContext
from losses.balancing import build_balancing
from losses.cross_entropy import BalancedCrossEntropyLoss, CrossEntropyLoss
from losses.edge import BalancedBCELoss
from losses.load_balancing import load_balancing_loss
from losses.multi_task import MultiTaskLoss
from losses.regression import L1Loss, NormalsLoss
from tests.shared import golden
from utils.engine.tasks import TASKS

CHANNELS = {"semseg": 5, "depth": 1, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}
LOSSES = {"ce": (CrossEntropyLoss(), 4, 1), "balanced_ce": (BalancedCrossEntropyLoss(), 2, 1),
          "bce": (BalancedBCELoss(0.9), 1, 1), "hed": (BalancedBCELoss(None), 1, 1), "l1": (L1Loss(), 1, 1),
          "normals": (NormalsLoss(), 3, 3)}


def batch(seed: int, size: int, void_in: int | None = None) -> tuple[dict, dict]:
    """Random logits and labels of all six tasks; image `void_in` is entirely void, others partly."""
    gen = torch.Generator().manual_seed(seed)
    logits = {t: torch.randn(size, c, 6, 7, generator=gen, dtype=torch.float64) for t, c in CHANNELS.items()}
    labels = {}
    for task in CHANNELS:
        classes = {"semseg": 5, "human_parts": 7, "sal": 2, "edge": 2}.get(task)
        shape = (size, 3 if task == "normals" else 1, 6, 7)
        labels[task] = (torch.randn(shape, generator=gen) if classes is None
                        else torch.randint(classes, shape, generator=gen).float())
        void = torch.rand((size, 1, 6, 7), generator=gen) < torch.linspace(0.1, 0.6, size).view(-1, 1, 1, 1)
        if void_in is not None:
            void[void_in] = True
        labels[task] = torch.where(void, 255.0, labels[task])
    return logits, labels


def criterion(scheme: str, scope: str, **options) -> MultiTaskLoss:
    losses = {task: TASKS.load(task).loss(TaskContext(num_channels=c)) for task, c in CHANNELS.items()}
    weights = {"semseg": 1, "depth": 1, "human_parts": 2, "sal": 5, "normals": 10, "edge": 50}
    return MultiTaskLoss(losses, build_balancing(scheme, tuple(CHANNELS), weights), scope=scope, **options)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 9.0], [math.log(3), 0.0, 0.0]]).view(1, 2, 1, 3)
    label = torch.tensor([1.0, 0.0, 255.0]).view(1, 1, 1, 3)
    expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert CrossEntropyLoss()(logits, label).item() == pytest.approx(expected, rel=1e-6)


def test_balanced_cross_entropy_by_hand():
    logits = torch.zeros(1, 2, 1, 4)
    label = torch.tensor([0.0, 0.0, 1.0, 255.0]).view(1, 1, 1, 4)      # q = 2/3: weights 1/3 and 2/3
    expected = (2 * 1 / 3 + 2 / 3) * math.log(2) / 3
    assert BalancedCrossEntropyLoss()(logits, label).item() == pytest.approx(expected, rel=1e-6)


def test_edge_loss_by_hand():
    logits = torch.tensor([0.0, math.log(3), 5.0]).view(1, 1, 1, 3)
    label = torch.tensor([1.0, 0.0, 255.0]).view(1, 1, 1, 3)
    expected = (0.9 * math.log(2) + 0.1 * math.log(4)) / 2
    assert BalancedBCELoss(0.9)(logits, label).item() == pytest.approx(expected, rel=1e-6)
    hed = (0.5 * math.log(2) + 0.5 * math.log(4)) / 2
    assert BalancedBCELoss(None)(logits, label).item() == pytest.approx(hed, rel=1e-6)


def test_edge_loss_is_exact_for_large_logits():
    loss = BalancedBCELoss(1.0)(torch.full((1, 1, 1, 1), 30.0, dtype=torch.float64), torch.ones(1, 1, 1, 1))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-30)), rel=1e-9)


def test_l1_counts_pixels_not_channels():
    label = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    label[0, 2, 0, 1] = 255                                            # one void channel voids the pixel
    pred = torch.tensor([0.0, 5.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    assert NormalsLoss()(pred, label).item() == pytest.approx(2.0)
    assert L1Loss()(pred, label).item() == pytest.approx(6.0)


@pytest.mark.parametrize("ignore, expected", [(255, 1.5), (0, 2.0), (-1, 1.5), (None, 1.5)])
def test_l1_void_value(ignore, expected):
    label = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
    assert L1Loss(ignore)(torch.tensor([4.0, 1.0]).view(1, 1, 1, 2), label).item() == expected


@pytest.mark.parametrize("name", LOSSES)
def test_all_void_is_zero_with_zero_gradient(name):
    loss, channels, label_channels = LOSSES[name]
    logits = torch.randn(2, channels, 3, 4, requires_grad=True)
    value = loss(logits, torch.full((2, label_channels, 3, 4), 255.0))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype, result", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision_never_drops_below_float32(name, dtype, result):
    loss, channels, label_channels = LOSSES[name]
    logits = torch.randn(2, channels, 3, 4).to(torch.bfloat16).to(dtype)
    label = torch.zeros(2, label_channels, 3, 4)
    label[..., 0] = 1
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits, label)
    assert value.dtype == result
    assert value.item() == pytest.approx(loss(logits.double(), label).item(), rel=1e-5)


def test_class_outside_the_range_is_named():
    with pytest.raises(ValueError, match="label 4 does not exist.*4 classes"):
        CrossEntropyLoss()(torch.zeros(1, 4, 2, 2), torch.full((1, 1, 2, 2), 4.0))
    with pytest.raises(ValueError, match="label 2 does not exist"):
        BalancedCrossEntropyLoss()(torch.zeros(1, 2, 2, 2), torch.full((1, 1, 2, 2), 2.0))
    with pytest.raises(ValueError, match="equal B, H, W"):
        L1Loss()(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4))


def test_load_balancing_by_hand():
    even, skewed = torch.full((2, 4, 1, 1), 0.25), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert load_balancing_loss([[even, even]]).item() == 0
    assert load_balancing_loss([[skewed, skewed], [skewed]]).item() == pytest.approx(2 * 0.5 / 0.25)


def test_schemes_by_hand():
    logits, labels = batch(0, 2)
    weighted, logs = criterion("weighted_sum", "process"), criterion("log", "process")
    losses = weighted(logits, labels)
    parts = {task: losses[task].item() for task in CHANNELS}
    assert losses["total"].item() == pytest.approx(sum(weighted.balancing.weights[t] * v for t, v in parts.items()))
    expected = sum(logs.balancing.weights[t] * math.log(v + 1e-8) for t, v in parts.items())
    assert logs(logits, labels)["total"].item() == pytest.approx(expected)


def test_intermediate_and_extra_terms():
    logits, labels = batch(1, 2)
    other = {task: 0.5 * x for task, x in logits.items()}
    half = criterion("weighted_sum", "process", intermediate_weight=0.5)
    extra = {"balance": torch.tensor(3.0)}
    losses = half(logits, labels, other, extra)
    first, second = half(logits, labels)["total"], half(other, labels)["total"]
    assert losses["total"].item() == pytest.approx((first + 0.5 * second + 3).item())
    assert losses["inter/edge"] == half(other, labels)["edge"] and losses["balance"] == 3
    without = criterion("weighted_sum", "process", use_intermediate=False)(logits, labels, other)
    assert without["total"] == first and "inter/edge" not in without


@pytest.mark.parametrize("scheme", ["weighted_sum", "log"])
def test_image_scope_does_not_depend_on_the_split(scheme):
    logits, labels = batch(2, 4, void_in=1)
    loss = criterion(scheme, "image")
    leaves = {task: x.clone().requires_grad_() for task, x in logits.items()}
    whole = loss(leaves, labels, leaves)
    whole["total"].backward()
    parts, grads = [], {task: [] for task in CHANNELS}
    for i in range(4):                                                 # as four processes with one image each
        single = {task: x[i:i + 1].clone().requires_grad_() for task, x in logits.items()}
        total = loss(single, {task: x[i:i + 1] for task, x in labels.items()}, single)
        (total["total"] / 4).backward()
        parts.append(total)
        for task in CHANNELS:
            grads[task].append(single[task].grad)
    for key, value in whole.items():
        assert value.item() == pytest.approx(sum(part[key].item() for part in parts) / 4, rel=1e-12)
    for task in CHANNELS:
        torch.testing.assert_close(leaves[task].grad, torch.cat(grads[task]))
    pooled = criterion(scheme, "process")(logits, labels)["total"].item()
    assert pooled != pytest.approx(whole["total"].item())


def test_image_scope_equals_process_scope_for_one_image():
    logits, labels = batch(3, 1)
    image, process = (criterion("log", scope)(logits, labels) for scope in ("image", "process"))
    assert {k: v.item() for k, v in image.items()} == {k: v.item() for k, v in process.items()}


def test_mistakes_are_named():
    loss = {"edge": BalancedBCELoss()}
    fixed = build_balancing("weighted_sum", ["edge"], {"edge": 1})
    with pytest.raises(ValueError, match="unknown loss_scheme 'weightedsum'; did you mean 'weighted_sum'"):
        build_balancing("weightedsum", ["edge"], {"edge": 1})
    with pytest.raises(ValueError, match="loss_scope 'batch' is unknown; valid: process, image"):
        MultiTaskLoss(loss, fixed, scope="batch")
    with pytest.raises(ValueError, match="loss_weights lacks edge; given: sal"):
        build_balancing("log", ["edge"], {"sal": 1})
    with pytest.raises(ValueError, match="no prediction for task 'edge'; got: sal"):
        MultiTaskLoss(loss, fixed)({"sal": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="pos_weight 95"):
        BalancedBCELoss(95)


@pytest.mark.parametrize("name, scheme, weights", [
    ("nyud_weighted_sum", "weighted_sum", {"semseg": 1, "depth": 1, "normals": 10, "edge": 50}),
    ("nyud_log", "log", {}), ("pascal_log", "log", {})])
def test_published_totals_and_gradients(name, scheme, weights):
    data = load_file(golden("mtmamba") / f"losses_{name}.safetensors")
    tasks = [key.removeprefix("pred.") for key in data if key.startswith("pred.")]
    preds = {task: data[f"pred.{task}"].double().requires_grad_() for task in tasks}
    losses = {task: TASKS.load(task).loss(TaskContext(num_channels=preds[task].shape[1])) for task in tasks}
    result = MultiTaskLoss(losses, build_balancing(scheme, tasks, weights or dict.fromkeys(tasks, 1)))(
        preds, {task: data[f"label.{task}"].float() for task in tasks})
    result["total"].backward()
    for key in (*tasks, "total"):
        assert result[key].item() == pytest.approx(data[f"loss.{key}"].item(), rel=1e-7)
    for task in tasks:
        want = data[f"grad_total.pred.{task}"].double()
        torch.testing.assert_close(preds[task].grad, want, rtol=1e-6, atol=1e-9)
