"""Selective scan: values, last state and all gradients of the recurrence."""

from collections.abc import Iterator

import torch
from safetensors.torch import load_file

from models.ops.selective_scan import selective_scan
from scripts.parity.base import Check, Folder, Measure, Options, scaled_error

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def checks(folder: Folder) -> Iterator[Check]:
    flags = {entry["name"]: (path, entry) for path, entry in folder.records() if "delta_softplus" in entry}
    for path, keys in folder.arrays.items():
        if {"in.u", "in.delta", "in.A", "in.B", "in.C", "out.y"} <= keys:
            table, entry = flags.get(path.stem, (None, None))
            files = frozenset({path} if table is None else {path, table})
            yield Check(path.stem, files, lambda options, path=path, entry=entry: _run(path, entry, options))


def _run(path, entry: dict | None, options: Options) -> Iterator[Measure]:
    if entry is None:
        raise ValueError(f"no JSON file beside {path.name} says delta_softplus for a case of that name")
    data = {name: tensor.to(options.device) for name, tensor in load_file(path).items()}
    inputs = {name: data[f"in.{name}"].to(options.dtype).requires_grad_()
              for name in INPUTS if f"in.{name}" in data}
    y, last_state = selective_scan(**inputs, delta_softplus=entry["delta_softplus"], return_last_state=True,
                                   backend=options.scan_backend)
    tolerance = options.pick(1e-10, 2e-6)
    yield Measure("y", scaled_error(y, data["out.y"]), tolerance)
    if "out.last_state" in data:
        yield Measure("last_state", scaled_error(last_state, data["out.last_state"]), tolerance)
    if "cot.y" not in data:
        return
    grads = torch.autograd.grad((y * data["cot.y"].to(y.dtype)).sum(), list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        yield Measure(f"grad.{name}", scaled_error(grad, data[f"grad.{name}"]), options.pick(1e-9, 1e-5))
