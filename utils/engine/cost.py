"""What a configured model costs: parameters and multiply-adds, part by part, and the time of a forward pass."""

import math
import statistics
import time
from typing import NamedTuple

import torch
import torchvision  # noqa: F401  torch knows its operators from the import on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.ops.selective_scan import count_scan_flops
from utils.engine.build import model_from_config
from utils.engine.config import Config
from utils.meta import meta_device
from utils.precision import autocast

REPEATS = 5


class Counts(NamedTuple):
    """Parameters of every part and of all ("total"); multiply-adds of one image in units of 10^9; number of scans."""

    parameters: dict[str, int]
    encoder: float
    scans: float
    scan_calls: int
    total: float


def counted(config: Config) -> Counts:
    """Parameters and multiply-adds of one image, without allocating anything."""
    with meta_device():
        model = model_from_config(config).eval()
        image = torch.empty(1, 3, *config.input_size)
    parts = {name: getattr(model, name) for name in ("encoder", "neck", "decoder", "heads")} | {"total": model}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})
    with torch.no_grad(), counter as products, count_scan_flops() as scans:
        model(image)
    encoder = products.get_flop_counts().get("MultiTaskModel.encoder", {})
    return Counts(parameters, sum(encoder.values()) / 2e9, scans.flops / 1e9, scans.calls,
                  products.get_total_flops() / 2e9)


def count(config: Config) -> list[tuple[str, str]]:
    """`counted`, as rows of words."""
    counts = counted(config)
    return [*((f"parameters, {name}", f"{number:,}") for name, number in counts.parameters.items()),
            ("GMACs, encoder", f"{counts.encoder:.1f}"),
            ("GMACs, scans", f"{counts.scans:.1f} ({counts.scan_calls} calls)"),
            ("GMACs, total", f"{counts.total:.1f}")]


def _deform_conv_flops(feat: tuple, weight: tuple, *_, out_shape: tuple, **__) -> int:
    """Those of a convolution of this shape; sampling is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@torch.inference_mode()
def forward_ms(model: nn.Module, config: Config, device: torch.device) -> float:
    """Milliseconds of a forward pass of one image, the median of several after one that warms up."""
    image, times = torch.zeros(1, 3, *config.input_size, device=device), []
    training = model.training
    model.eval()
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        with autocast(device, config.precision):
            model(image)
        wait()
        times.append(time.perf_counter() - start)
    model.train(training)
    return 1e3 * statistics.median(times[1:])
