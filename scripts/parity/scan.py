"""Selective scan: values, last state and all gradients of the recurrence; and the four-route scan of a map.

The second are the three Mamba blocks of MTMamba (Lin et al., ECCV 2024), put together here from the reference's
parameters: what is compared is `ss2d_core` alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.ops.scan_choice import set_scan_backend
from models.ops.selective_scan import selective_scan
from models.ops.ss2d import S6Weights, ss2d_core
from scripts.parity.base import Bound, Check, Folder, Measure, Options, scaled_error

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BLOCK = {"in.x", "out.y", "param.x_proj_weight", "param.A_logs", "param.out_norm.weight"}
SCAN, SCAN_GRADIENT = Bound(scaled_error, 1e-10, 2e-6), Bound(scaled_error, 1e-9, 1e-5)
ROUTES, ROUTES_GRADIENT = Bound(scaled_error, 1e-10, 5e-6), Bound(scaled_error, 1e-9, 2e-5)


def scan_checks(folder: Folder) -> Iterator[Check]:
    return _checks(folder, {"in.u", "in.delta", "in.A", "in.B", "in.C", "out.y"}, _scan)


def route_checks(folder: Folder) -> Iterator[Check]:
    return _checks(folder, BLOCK, _routes)


def _checks(folder: Folder, needed: set[str], run: Callable) -> Iterator[Check]:
    """Files that have these arrays; the tables beside them have entries of the same names."""
    entries = {entry["name"]: (path, entry) for path, entry in folder.records()}
    for path, keys in folder.arrays.items():
        if keys >= needed:
            table, entry = entries.get(path.stem, (path, {}))
            yield Check(path.stem, frozenset({path, table}), partial(run, path, entry))


def _scan(path: Path, entry: dict, options: Options) -> Iterator[Measure]:
    if "delta_softplus" not in entry:
        raise ValueError(f"no JSON file beside {path.name} says delta_softplus for a case of that name")
    data = load_file(path, device=options.device)
    inputs = {name: data[f"in.{name}"].to(options.dtype).requires_grad_()
              for name in INPUTS if f"in.{name}" in data}
    y, last_state = selective_scan(**inputs, delta_softplus=entry["delta_softplus"], return_last_state=True,
                                   backend=options.scan_backend)
    yield SCAN.measure("y", y, data["out.y"], options)
    if "out.last_state" in data:
        yield SCAN.measure("last_state", last_state, data["out.last_state"], options)
    if "cot.y" not in data:
        return
    grads = torch.autograd.grad((y * data["cot.y"].to(y.dtype)).sum(), list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        yield SCAN_GRADIENT.measure(f"grad.{name}", grad, data[f"grad.{name}"], options)


def _routes(path: Path, entry: dict, options: Options) -> Iterator[Measure]:
    data = load_file(path, device=options.device)
    leaves = {name.removeprefix("in."): value.to(options.dtype).requires_grad_()
              for name, value in data.items() if name.startswith(("in.", "param."))}
    set_scan_backend(options.scan_backend)
    try:
        y, merged = _block(leaves)
        grads = torch.autograd.grad((y * data["cot.y"].to(y.dtype)).sum(), list(leaves.values()))
    finally:
        set_scan_backend("auto")
    yield ROUTES.measure("y", y, data["out.y"], options)
    if "mid.merged_before_norm" in data:
        yield ROUTES.measure("merged", merged, data["mid.merged_before_norm"], options)
    for name, grad in zip(leaves, grads, strict=True):
        yield ROUTES_GRADIENT.measure(f"grad.{name}", grad, data[f"grad.{name}"], options)


def _block(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output of the block and the sum of its four routes, both channels-last."""
    p = {name.removeprefix("param."): value for name, value in leaves.items()}
    weights = S6Weights(p["x_proj_weight"], p["dt_projs_weight"], p["dt_projs_bias"],
                        p["A_logs"].unflatten(0, (4, -1)), p["Ds"].unflatten(0, (4, -1)))  # (4, D, ..)
    width = len(p["out_norm.weight"])
    projected = F.linear(p["x"], p["in_proj.weight"])                  # (B, H, W, D), with a gate 2 D
    x = projected[..., :width].permute(0, 3, 1, 2)                     # (B, D, H, W)
    x = F.silu(F.conv2d(x, p["conv2d.weight"], p["conv2d.bias"], padding=1, groups=width)).permute(0, 2, 3, 1)
    source = F.linear(p["x_cross"], p["in_proj_cross.weight"]) if "x_cross" in p else None     # (B, H, W, D)
    merged = ss2d_core(x, weights, source)
    y = F.layer_norm(merged, (width,), p["out_norm.weight"], p["out_norm.bias"])
    if "out_proj.weight" in p:
        y = F.linear(y * F.silu(projected[..., width:]), p["out_proj.weight"])
    return y, merged
