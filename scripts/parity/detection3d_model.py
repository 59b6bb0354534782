"""The whole three-task TaskPrompter of Cityscapes-3D at toy size: from the image to losses and gradients.

Computed in float64, stored in float32. The loss of the reference is that of its training, on labels.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from losses.cross_entropy import CrossEntropyLoss
from losses.detection3d.loss import Detection3DLoss
from losses.regression import L1Loss
from models.build import build_model
from models.heads.detection3d import Detection3DHead
from models.model import MultiTaskModel, Predictions
from models.released.taskprompter import TASKPROMPTER
from scripts.parity.base import Bound, Measure, absolute_error, scaled_error, stored_error
from scripts.parity.case import MODEL, Bounds, Case, System
from scripts.parity.compare import gradients_by_task
from scripts.parity.detection3d import LOSSES, NUM_CLASSES, boxes_of, head_options, options_of, outputs
from scripts.parity.taskprompter import BACKBONE_OPTIONS, OPTIONS

NO_DEPTH = -1.0
NORM = Bound(scaled_error, 1e-8, 1e-2)


def _detection(config: dict):
    return head_options(config["detection"], **options_of(config["detection"], config["image_size"][0]))


def _build(config: dict) -> MultiTaskModel:
    heads = {"det3d": partial(Detection3DHead, options=_detection(config))}
    semseg, depth, _ = config["num_output"]
    return build_model(
        "taskprompter", "swin", {"semseg": semseg, "depth": depth, "det3d": NUM_CLASSES}, tuple(config["image_size"]),
        label_size=tuple(config["dd_label_map_size"]), heads=heads,
        backbone_kwargs={name: config["backbone"][name] for name in BACKBONE_OPTIONS if name in config["backbone"]},
        model_kwargs={name: config[name] for name in OPTIONS if name in config})


def _compare_outputs(case: Case, run: str, out: Predictions, seen: dict[str, Tensor]) -> Iterator[Measure]:
    """Everything that the tasks give, and the four maps that the head of the detection gets."""
    got = {task: maps for task, maps in out.final.items() if isinstance(maps, Tensor)} | outputs(out.final["det3d"])
    for name, want in case.below(f"{run}.out.").items():
        yield case.measure("value", f"{run}.out.{name}", got[name], want)
    for name, want in case.below(f"{run}.mid.feat3d.level").items():
        yield case.measure("value", f"{run}.mid.feat3d.level{name}", seen[f"decoder[0][det3d][{name}]"], want)
    strides = case.model().heads["det3d"].strides
    yield Measure("strides", absolute_error(strides, case.config["detection"]["strides"]), 1e-12)


def _evaluation(case: Case) -> Iterator[Measure]:
    model = case.model().eval()
    seen = case.record(model)
    with torch.no_grad():
        out = model(case.image())
    yield from _compare_outputs(case, "eval", out, seen)


def _step(case: Case, model: MultiTaskModel, image: Tensor) -> tuple[Predictions, dict[str, Tensor]]:
    """A forward pass with batch statistics, and its losses."""
    out, config = model(image), case.config
    frame = {**config, "images": len(image)}
    loss = Detection3DLoss(_detection(config), NUM_CLASSES)
    labels = [boxes_of(frame, case.values, index) for index in range(len(image))]
    losses = {f"loss_{LOSSES.get(name, name)}": value for name, value in loss.parts(out.final["det3d"], labels).items()}
    losses |= {"semseg": CrossEntropyLoss()(out.final["semseg"], case.values["label.semseg"][:, None].float()),
               "depth": L1Loss(NO_DEPTH)(out.final["depth"], case.values["label.depth"]),
               "3ddet": loss(out.final["det3d"], labels)}
    losses["total"] = sum(weight * losses[task] for task, weight in config["loss_weights"].items())
    return out, losses


def _training(case: Case) -> Iterator[Measure]:
    model, image = case.model().train(), case.image().requires_grad_()
    seen = case.record(model)
    out, losses = _step(case, model, image)
    yield from _compare_outputs(case, "train", out, seen)
    for name, want in case.config["losses"].items():
        yield case.measure("loss", name, losses[name].detach(), torch.tensor(want, dtype=torch.float64))
    losses["total"].backward()
    yield case.measure("gradient", "grad image", image.grad, case.values["train.grad.image"])


def _norms(case: Case) -> Iterator[Measure]:
    model = case.model().train()
    _step(case, model, case.image())[1]["total"].backward()
    got = {name: grad.norm().item() for name, grad in gradients_by_task(model).items()}
    want = case.system.convert(case.table("norms"), case.tasks)
    yield Measure("parameters only here or only there", len(got.keys() ^ want.keys()))
    whole = case.config["gradient_norm_before_clipping"]
    yield NORM.measure("|all gradients|", np.linalg.norm(list(got.values())), whole, case.options)
    for name in got.keys() & want.keys():
        error = abs(got[name] - want[name]) / max(want[name], case.options.pick(1e-6, 1e-3) * whole)
        yield Measure(f"|grad {name}|", error, case.options.pick(NORM.float64, NORM.float32))


SYSTEM = System(
    released=("TaskPrompter",),
    fits=lambda config: {"detection", "backbone", "loss_weights"} <= config.keys(),
    build=_build,
    convert=lambda tensors, tasks: {TASKPROMPTER.rename(key): value for key, value in tensors.items()},
    groups={"outputs": (_evaluation, *MODEL), "training": (_training, *MODEL),
            "gradient norms": (_norms, *MODEL, "norms")},
    bounds=Bounds(value=Bound(stored_error, 1e-9, 5e-4), loss=Bound(scaled_error, 1e-9, 1e-4)))
checks = SYSTEM.checks
