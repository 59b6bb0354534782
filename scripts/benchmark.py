"""Size, cost and speed of a configured model.

    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --count_only
    python scripts/benchmark.py --config_exp configs/example/bim_nyud.yml --repeats 10 [key=value ...]

GMACs: one unit per multiply-add of matrix products, convolutions and attention; a scan over L tokens of D channels
with state size N counts 9 L D N + L D, the convention of the Mamba decoders' papers. Counting runs on the meta
device and needs no memory. Times are medians; on CPU they compare two configurations on one machine and mean
little else.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision  # noqa: F401  torch knows its operators from the import on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.loader import build_train_loader
from data.tasks import TASKS
from models.ops import count_scan_flops
from utils.config import Config, load_config
from utils.distributed import pick_device
from utils.precision import autocast
from utils.schedule import build_optimizer
from utils.setup import build_split, model_from_config
from utils.train import build_criterion


def count(config: Config) -> list[tuple[str, str]]:
    """Parameters and multiply-adds of one image, part by part, without allocating anything."""
    with torch.device("meta"):
        model = model_from_config(config).eval()
        image = torch.empty(1, 3, *config.input_size)
    parts = {"encoder": model.encoder, "neck": model.neck, "decoder": model.decoder, "heads": model.heads}
    rows = [(f"parameters, {name}", f"{_parameters(part):,}") for name, part in parts.items() if part is not None]
    rows.append(("parameters, total", f"{_parameters(model):,}"))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})
    with torch.no_grad(), counter as products, count_scan_flops() as scans:
        model(image)
    encoder = products.get_flop_counts().get("MultiTaskModel.encoder", {})
    rows.append(("GMACs, encoder", f"{sum(encoder.values()) / 2e9:.1f}"))
    rows.append(("GMACs, scans", f"{scans.flops / 1e9:.1f} ({scans.calls} calls)"))
    rows.append(("GMACs, total", f"{products.get_total_flops() / 2e9:.1f}"))
    return rows


def _deform_conv_flops(feat: tuple, weight: tuple, *_, out_shape: tuple, **__) -> int:
    """Those of a convolution of this shape; sampling is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def measure(config: Config, repeats: int) -> list[tuple[str, str]]:
    """Median forward and training-step time, and peak memory, at trBatch images."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    model = model_from_config(config).to(device)
    optimizer, criterion = build_optimizer(config, model), build_criterion(config)
    batch = _random_batch(config, device)

    def forward() -> None:
        with torch.inference_mode(), autocast(device, config.precision):
            model(batch["image"])

    def step() -> None:
        with autocast(device, config.precision):
            out = model(batch["image"])
        criterion(out.final, batch, None, out.extra)["total"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rows = [("device", f"{_device_name(device)}, {config.precision}, {config.trBatch} image(s) of "
             f"{config.input_size[0]} x {config.input_size[1]}, {torch.get_num_threads()} thread(s)")]
    for name, run, training in (("forward", forward, False), ("training step", step, True)):
        model.train(training)
        seconds, peak = _median_time(run, repeats, device)
        rows += [(f"{name}, ms (median of {repeats})", f"{seconds * 1e3:.1f}"),
                 (f"{name}, images/s", f"{config.trBatch / seconds:.2f}"),
                 (f"{name}, peak memory GiB" + ("" if device.type == "cuda" else " (process)"), f"{peak / 2**30:.2f}")]
    return rows


def measure_loader(config: Config, batches: int) -> list[tuple[str, str]]:
    """Images per second of the training loader alone, after its workers have started."""
    loader = iter(build_train_loader(build_split(config, "train"), config.trBatch, config.nworkers))
    next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    rate = batches * config.trBatch / (time.perf_counter() - start)
    return [(f"loader, images/s ({config.nworkers} worker(s))", f"{rate:.1f}")]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _random_batch(config: Config, device: torch.device) -> dict[str, torch.Tensor]:
    size = config.label_size or config.input_size
    batch = {"image": torch.randn(config.trBatch, 3, *config.input_size, device=device)}
    for task in config.tasks:
        batch[task] = torch.randint(0, 2, (config.trBatch, TASKS[task].label_channels, *size), device=device).float()
    return batch


def _median_time(run: Callable[[], None], repeats: int, device: torch.device) -> tuple[float, int]:
    """Seconds and bytes; the first two calls are not counted."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    if device.type == "cuda":
        return statistics.median(times), torch.cuda.max_memory_allocated(device)
    import resource
    return statistics.median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Prints one two-column table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_exp", required=True, metavar="YAML")
    parser.add_argument("--count_only", action="store_true", help="parameters and GMACs only; nothing is run")
    parser.add_argument("--loader", action="store_true", help="also time the data loader (needs the data)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config_exp, args.overrides)
        rows: list[tuple[str, str]] = count(config)
        if not args.count_only:
            rows += measure(config, args.repeats)
        if args.loader:
            rows += measure_loader(config, args.repeats)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    width = max(len(name) for name, _ in rows)
    print(f"{args.config_exp} {' '.join(args.overrides)}")
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


if __name__ == "__main__":
    main()
