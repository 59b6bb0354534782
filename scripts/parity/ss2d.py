"""Four-route scan of a map: the three Mamba blocks of MTMamba (Lin et al., ECCV 2024), values and gradients.

The blocks are put together here from the reference's parameters: what is compared is `ss2d_core` alone.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.ops.scan_choice import set_scan_backend
from models.ops.ss2d import S6Weights, ss2d_core
from scripts.parity.base import Check, Folder, Measure, Options, scaled_error

NEEDED = {"in.x", "out.y", "param.x_proj_weight", "param.A_logs", "param.out_norm.weight"}


def checks(folder: Folder) -> Iterator[Check]:
    tables = {entry["name"]: path for path, entry in folder.records()}
    for path, keys in folder.arrays.items():
        if keys >= NEEDED:
            files = frozenset({path, tables.get(path.stem, path)})
            yield Check(path.stem, files, lambda options, path=path: _run(path, options))


def _run(path: Path, options: Options) -> Iterator[Measure]:
    data = load_file(path, device=options.device)
    leaves = {name.removeprefix("in."): value.to(options.dtype).requires_grad_()
              for name, value in data.items() if name.startswith(("in.", "param."))}
    set_scan_backend(options.scan_backend)
    try:
        y, merged = _block(leaves)
        grads = torch.autograd.grad((y * data["cot.y"].to(y.dtype)).sum(), list(leaves.values()))
    finally:
        set_scan_backend("auto")
    value, gradient = options.pick(1e-10, 5e-6), options.pick(1e-9, 2e-5)
    yield Measure("y", scaled_error(y, data["out.y"]), value)
    if "mid.merged_before_norm" in data:
        yield Measure("merged", scaled_error(merged, data["mid.merged_before_norm"]), value)
    for name, grad in zip(leaves, grads, strict=True):
        yield Measure(f"grad.{name}", scaled_error(grad, data[f"grad.{name}"]), gradient)


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
