"""What is compared of a case and of a model of full size; see `case` for the names of arrays."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.swin import DERIVED_BUFFERS
from models.blocks.stacked import split_by_task
from models.model import MultiTaskModel, Predictions
from models.released import RELEASED, recognise
from scripts.parity.base import Measure, absolute_error
from scripts.parity.case import Case
from scripts.parity.program import parameters

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", *DERIVED_BUFFERS)


def outputs(case: Case, run: str = "eval.", kinds: Sequence[str] = ("out", "inter")) -> Iterator[Measure]:
    yield from predictions(case, case.predict(), run, "value", kinds)


def predictions(case: Case, out: Predictions, run: str, kind: str,
                kinds: Sequence[str] = ("out", "inter")) -> Iterator[Measure]:
    for name, maps in (("out", out.final), ("inter", out.intermediate)):
        for task, want in case.below(f"{run}{name}.").items() if name in kinds else ():
            yield case.measure(kind, f"{run}{name}.{task}", maps[task], want)


def inside(case: Case, prefix: str = "eval.mid.") -> Iterator[Measure]:
    """Maps inside the network, in evaluation mode."""
    model = case.model().eval()
    seen = case.record(model)
    with torch.no_grad():
        model(case.image())
    for name, want in case.below(prefix).items():
        if reason := case.system.uncovered(case.config, name):
            yield Measure(name, uncovered=reason)
        else:
            yield case.measure("inside", name, case.find(name, seen), want)


class Step(NamedTuple):
    model: MultiTaskModel
    image: Tensor
    out: Predictions
    seen: dict[str, Tensor]
    loss: Tensor


def forward(case: Case, prepare: Callable[[MultiTaskModel], None] = lambda model: None, **changes) -> Step:
    """A forward pass with batch statistics, of a model `prepare`d and built with `changes`."""
    model, image = case.model(**changes).train(), case.image().requires_grad_()
    prepare(model)
    seen = case.record(model)
    out, fixed = model(image), case.below("train.fixed.")
    parts = [(logits * fixed.get(f"{kind}.{task}", fixed.get(task)).to(logits.dtype)).mean()
             for kind, maps in (("out", out.final), ("inter", out.intermediate)) for task, logits in maps.items()]
    return Step(model, image, out, seen, torch.stack(parts).sum())


def training(case: Case, run: str = "train.", **changes) -> Iterator[Measure]:
    """Predictions, maps inside, loss, gradients and batch statistics of one pass in training mode."""
    step = forward(case, **changes)
    yield from predictions(case, step.out, run, "train")
    for name, want in case.below(f"{run}mid.").items():
        yield case.measure("train", f"{run}{name}", case.find(name, step.seen), want)
    yield from loss_and_gradients(case, step, run)
    yield from buffers(case, step.model, run)


def loss_and_gradients(case: Case, step: Step, run: str) -> Iterator[Measure]:
    """After `forward`; runs the backward pass. Of parameters without a gradient there must be none."""
    step.loss.backward()
    want = case.values[f"{run}loss"]
    yield case.measure("loss", f"{run}loss", step.loss.reshape(want.shape), want)
    yield Measure("parameters without a gradient", sum(p.grad is None for p in step.model.parameters()))
    gradients = gradients_by_task(step.model)
    published = case.below(f"{run}grad.")
    if "image" in published:
        yield case.measure("gradient", "grad image", step.image.grad, published.pop("image"))
    for name, got, want in case.paired(published, gradients):
        yield case.measure("gradient", f"grad {name}", got, want)


def gradients_by_task(model: nn.Module) -> dict[str, Tensor]:
    """Gradients after a backward pass, under the keys of the state dict."""
    return split_by_task(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def buffers(case: Case, model: nn.Module, run: str) -> Iterator[Measure]:
    """Batch statistics after the pass."""
    for name, got, want in case.paired(case.below(f"{run}after."), split_by_task(model, dict(model.named_buffers()))):
        yield case.measure("after", f"after {name}", got, want)


def gradient_norms(case: Case) -> Iterator[Measure]:
    """Norms of all gradients, relative; one that is zero but for rounding is compared with the norm of all.

    The table has the original's keys, and None for what its loss does not depend on.
    """
    norms, step = case.table("norms"), forward(case)
    step.loss.backward()
    dead = dead_keys(norms)
    got = {name: grad.norm().item() for name, grad in gradients_by_task(step.model).items()}
    want = case.system.convert({key: norm for key, norm in norms.items() if norm is not None and key not in dead},
                               case.tasks)
    yield Measure("parameters only here or only there", len(got.keys() ^ want.keys()))
    unused = {key for key, norm in norms.items() if norm is None}
    yield Measure("unused there but not left out here", len(unused - dead))
    floor = case.options.pick(1e-6, 1e-3) * float(np.linalg.norm(list(want.values())))
    limit = case.options.pick(case.system.bounds.gradient.float64, case.system.bounds.gradient.float32)
    for name in got.keys() & want.keys():
        yield Measure(f"|grad {name}|", abs(got[name] - want[name]) / max(want[name], floor), limit)


# ------------------------------------------------------------ models of full size


def dead_keys(names: Collection[str]) -> set[str]:
    """Those of layers that ours do not have, as no output depends on them."""
    kind = RELEASED[recognise(names)]
    return {key for key in names if kind.is_dead(key)} | set(kind.dead_keys(names))


def keys(model: nn.Module, shapes: Mapping[str, Sequence[int]], tasks: Sequence[str], total: int,
         unused: int | None = None, joined: int = 0, counted: bool = True) -> Iterator[Measure]:
    """The model's state dict against the original's keys and shapes, and the number of parameters.

    total: the original's, with those without effect where they are `counted`; unused: the number of these, where it
    says so; joined: keys of the original that become part of others.
    """
    kind, dead = RELEASED[recognise(shapes)], dead_keys(shapes)
    published = kind.convert({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, tuple(tasks))
    theirs = {key: tuple(value.shape) for key, value in published.items()}
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    yield Measure("keys that fall together", abs(len(shapes) - len(dead) - joined - len(theirs)))
    yield Measure("keys only here or only there", len(own.keys() ^ theirs.keys()))
    yield Measure("other shapes", sum(own[key] != theirs[key] for key in own.keys() & theirs.keys()))
    lost = sum(math.prod(shapes[key]) for key in dead if not key.endswith(BUFFERS))
    yield difference("parameters", parameters(model) + lost * counted, total)
    if unused is not None:
        yield difference("parameters without effect", lost, unused)


def difference(name: str, got: float, want: float, limit: float = 0.0) -> Measure:
    return Measure(name, absolute_error(got, want), limit)
