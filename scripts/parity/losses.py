"""Training losses: value and gradient of every loss, of the combined schemes and of the load balancing."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losses.cross_entropy import BalancedCrossEntropyLoss, CrossEntropyLoss
from losses.edge import BalancedBCELoss
from losses.load_balancing import load_balancing_loss
from losses.regression import L1Loss, NormalsLoss
from scripts.parity.base import Bound, Check, Folder, Measure, NotCovered, Options, entry_error, scaled_error
from scripts.parity.program import losses_and_gradients

Loss = Callable[[Tensor, Tensor], Tensor]
Tensors = Mapping[str, Tensor]


def _old_bce(params: dict) -> Loss:
    """Multi-Task-Learning-PyTorch: labels are cut at one half, no void."""
    loss = BalancedBCELoss(params["pos_weight"])
    return lambda logits, label: loss(logits, (label >= 0.5).to(label.dtype))


def _old_normals(params: dict) -> Loss:
    """Multi-Task-Learning-PyTorch: mean over the elements of the valid pixels."""
    loss = NormalsLoss(params["ignore"])
    return lambda logits, label: loss(logits, label) / label.shape[1]


KINDS: dict[str, Callable[[dict], Loss]] = {
    "cross_entropy": lambda p: CrossEntropyLoss(p["ignore"], p.get("class_weight")),
    "cross_entropy_balanced": lambda p: BalancedCrossEntropyLoss(p["ignore"]),
    "balanced_bce": lambda p: BalancedBCELoss(p["pos_weight"], p["ignore"]),
    "l1": lambda p: (NormalsLoss if p.get("normalize") else L1Loss)(p["ignore"]),
    "mtl_balanced_bce": _old_bce,
    "mtl_l1_normals": _old_normals,
}


def checks(folder: Folder) -> Iterator[Check]:
    for table, entry in folder.records():
        if "params" in entry and {"logits", "target"} <= entry.keys():
            keys, run = (f"logits/{entry['logits']}", f"target/{entry['target']}"), _single
            data = folder.holding(keys)
        elif {"preds", "targets", "weights", "out"} <= entry.keys():
            data, run = folder.holding([f"logits/{key}" for key in entry["preds"].values()]), _scheme
        elif "cv" in entry.get("out", {}):
            gates = (p for p, keys in folder.arrays.items() if any(map(_GATES.match, keys)))
            data, run = next(gates, None), _load_balancing
        else:
            continue
        files = frozenset({table} if data is None else {table, data})
        yield Check(entry["name"], files, partial(_run, run, entry, data))


def _run(run: Callable, entry: dict, path: Path | None, options: Options) -> Iterator[Measure]:
    if path is None:
        raise ValueError("no .npz file beside the table holds the arrays of this case")
    with np.load(path) as arrays:
        data = {name: torch.from_numpy(array) for name, array in arrays.items()}
    yield from run(entry, data, options)


# The references' cross entropies and class shares are rounded to float32 even in float64 runs, hence 2e-7.
VALUE, GRADIENT = Bound(scaled_error, 2e-7, 2e-6), Bound(entry_error, 2e-7, 1e-4)
LOG_TOTAL = Bound(lambda got, want: scaled_error(got, want) * min(1.0, abs(want)), 2e-7, 2e-6)  # a sum that may vanish


def _single(entry: dict, data: Tensors, options: Options) -> Iterator[Measure]:
    kind = entry["params"]["kind"]
    if kind not in KINDS:
        raise NotCovered(f"no loss of kind '{kind}'")
    logits = data[f"logits/{entry['logits']}"].to(options.dtype).requires_grad_()
    value = KINDS[kind](entry["params"])(logits, data[f"target/{entry['target']}"])
    want = entry["value_f64" if options.dtype == torch.float64 else "value_f32"]
    yield VALUE.measure("value", value, want, options)
    grad = torch.autograd.grad(value, logits)[0]
    if f"grad/{entry['name']}" in data:
        yield GRADIENT.measure("grad", grad, data[f"grad/{entry['name']}"], options)


def _scheme(entry: dict, data: Tensors, options: Options) -> Iterator[Measure]:
    tasks, scale = entry["tasks"], entry.get("inter_scale")
    final = {t: data[f"logits/{entry['preds'][t]}"].to(options.dtype) for t in tasks}
    inter = {t: scale * x for t, x in final.items()} if scale is not None else {}
    labels = {t: data[f"target/{entry['targets'][t]}"] for t in tasks}
    losses, gradients = losses_and_gradients(final, labels, entry["weights"], options, inter,
                                             scheme="log" if entry["log"] else "weighted_sum")
    for key, want in entry["out"].items():
        bound = LOG_TOTAL if entry["log"] and key == "total" else VALUE
        yield bound.measure(key, losses[key.replace("inter_", "inter/", 1)], want, options)
    prefix = f"scheme/{entry['name'].removeprefix('scheme_')}"
    for name, grad in gradients.items():
        place = f"grad_{name}" if name.startswith("inter/") else f"grad/{name}"
        yield GRADIENT.measure(place, grad, data[f"{prefix}/{place}"], options)


_GATES = re.compile(r"[^/]*cv/(?P<layer>.+)/[^/]+$")                   # <..cv>/<router>/<layer>/<task>


def _load_balancing(entry: dict, data: Tensors, options: Options) -> Iterator[Measure]:
    layers: dict[str, list[Tensor]] = {}
    for key in data:
        if match := _GATES.match(key):
            layers.setdefault(match["layer"], []).append(data[key].to(options.dtype))
    out = entry["out"]
    cv = load_balancing_loss(layers.values())
    others = sum(value for name, value in out.items() if name not in ("cv", "total"))
    for name, got in (("cv", cv), ("total", others + entry["weight"] * cv)):
        yield Measure(name, scaled_error(got, out[name]), options.pick(1e-10, 2e-6))
