"""Size, cost and speed of a configured model.

    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --count_only
    python scripts/benchmark.py --config_exp configs/example/bim_nyud.yml --repeats 10 [key=value ...]
    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --profile precision=bf16 compile=true
    python scripts/benchmark.py --compare configs/bim_nyud.yml configs/mtmamba_nyud.yml --set backbone=swin_tiny

GMACs: one unit per multiply-add of matrix products, convolutions and attention; a scan over L tokens of D channels
with state size N counts 9 L D N + L D, the convention of the Mamba decoders' papers. Counting runs on the meta
device and needs no memory. Times are medians; on CPU they compare two configurations on one machine and mean
little else. --compare prints one table of several experiments: on a GPU times, on a CPU the
ratios of processor time to the first; memory is the peak beyond the weights.
"""

import argparse
import gc
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
from models.ops.selective_scan import count_scan_flops
from scripts import bench_scan
from utils.distributed import pick_device
from utils.engine.build import build_split, model_from_config, prepare_for_training
from utils.engine.config import Config, load_config
from utils.engine.schedule import build_optimizer
from utils.engine.tasks import TASKS
from utils.engine.train import build_criterion
from utils.precision import autocast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


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


class Step:
    """A configured model with random data: what a forward pass and a training step run."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, pick_device(config.device)
        torch.manual_seed(0)
        self.model = model_from_config(config).to(self.device)
        prepare_for_training(self.model, config)
        self.optimizer, self.criterion = build_optimizer(config, self.model), build_criterion(config)
        self.batch = _random_batch(config, self.device)

    @torch.inference_mode()
    def forward(self) -> None:
        self.model.eval()
        with autocast(self.device, self.config.precision):
            self.model(self.batch["image"])

    def train(self) -> None:
        self.model.train()
        with autocast(self.device, self.config.precision):
            out = self.model(self.batch["image"])
        self.criterion(out.final, self.batch, out.intermediate, out.extra)["total"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(config: Config, repeats: int) -> list[tuple[str, str]]:
    """Median forward and training-step time, and peak memory, at trBatch images."""
    step = Step(config)
    on_gpu = step.device.type == "cuda"
    options = {"compiled": config.compile, "channels last": config.channels_last,
               f"{config.activation_checkpointing} recomputed": config.activation_checkpointing != "none"}
    used = ", ".join([config.precision, *(name for name, on in options.items() if on)])
    rows = [("device", f"{_device_name(step.device)}, {used}, {config.trBatch} image(s) of "
             f"{config.input_size[0]} x {config.input_size[1]}, {torch.get_num_threads()} thread(s)")]
    for name, run in (("forward", step.forward), ("training step", step.train)):
        seconds, peak = _median_time(run, repeats, step.device)
        rows += [(f"{name}, ms (median of {repeats})", f"{seconds * 1e3:.1f}"),
                 (f"{name}, images/s", f"{config.trBatch / seconds:.2f}"),
                 (f"{name}, peak memory GiB" + ("" if on_gpu else " (process)"), f"{peak / 2**30:.2f}")]
    return rows


def profile(config: Config, steps: int = 3) -> str:
    """Where the time of a training step goes: PyTorch's table of operators, by their own time."""
    step = Step(config)
    step.train()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            step.train()
    return found.key_averages().table(sort_by=f"self_{step.device.type}_time_total", row_limit=20)


# GMACs of the original systems: as their authors publish them (MTMamba++, InvPT, DeMT), or as counted on them.
ORIGINAL_GMACS = {
    "bim_nyud": 452.9, "bim_pascal": 522.5, "mtmamba_plus_nyud": 524, "mtmamba_plus_pascal": 609,
    "mtmamba_nyud": 537.7, "mtmamba_pascal": 627.6, "mtmamba_cityscapes": 754.3, "mtmamba_plus_cityscapes": 745.1,
    "invpt_nyud": 597.5, "invpt_pascal": 668.1, "invpt_nyud_vit_base": 341, "invpt_pascal_vit_base": 405,
    "taskprompter_nyud": 839.7, "taskprompter_pascal": 496.6, "taskprompter_pascal_vit_base": 1153.4,
    "taskprompter_cityscapes": 1943.6, "mlore_nyud": 1405.8, "mlore_pascal": 826.6, "mlore_pascal_vit_base": 909.5,
    "mlore_pascal_vit_small": 122.2, "bridgenet_nyud": 463.5, "bridgenet_nyud_vit_large": 627.6,
    "bridgenet_nyud_vit_base": 369.2, "bridgenet_nyud_internimage_b": 346.7, "bridgenet_pascal": 692.0,
    "bridgenet_pascal_vit_base": 427.7, "bridgenet_pascal_internimage_l": 526.2,
    "bridgenet_pascal_internimage_b": 405.1, "demt_nyud": 100.7, "demt_nyud_swin_small": 121.05,
    "demt_nyud_swin_base": 153.65, "demt_nyud_hrnet18": 22.07, "demt_pascal": 94.5, "demt_pascal_swin_small": 112.3,
    "demt_pascal_swin_base": 143.0,
}


def compare(entries: list[str], overrides: list[str], repeats: int, count_only: bool) -> str:
    """A markdown table: size and cost of each experiment beside the original's, time and memory of its step."""
    table, first = [], None
    for entry in entries:
        name, _, own = entry.partition("@")
        path, options = Path(name), [*overrides, *filter(None, own.split(","))]
        config = load_config(path, options)
        cost = dict(count(config))
        official = path.resolve().parent in (CONFIGS, CONFIGS / "backbones") and not options
        original = ORIGINAL_GMACS.get(path.stem, "") if official else ""
        row = {"experiment": f"{path.stem} {own}".strip(), "backbone": config.backbone,
               "parameters": cost["parameters, total"], "GMACs": cost["GMACs, total"], "the original": str(original)}
        if not count_only:
            step = Step(config)
            runs = {"forward": step.forward, "step": step.train}
            if step.device.type == "cuda":
                times = {name: _median_time(run, repeats, step.device) for name, run in runs.items()}
                row |= {f"{name}, ms": f"{seconds * 1e3:.1f}" for name, (seconds, _) in times.items()}
                row |= {f"{name}, GiB": f"{peak / 2**30:.2f}" for name, (_, peak) in times.items()}
            else:
                costs = bench_scan.measure(runs, repeats)
                first = first or costs
                row |= {f"{name} / first": f"{cost.cpu_ms / first[name].cpu_ms:.2f}" for name, cost in costs.items()}
                row |= {f"{name}, GiB": f"{cost.mib / 2**10:.2f}" for name, cost in costs.items()}
            del step, runs
            gc.collect()
        table.append(row)
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config_exp", metavar="YAML")
    what.add_argument("--compare", nargs="+", metavar="YAML[@key=value,...]", help="one table of these experiments")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides for all of --compare")
    parser.add_argument("--count_only", action="store_true", help="parameters and GMACs only; nothing is run")
    parser.add_argument("--profile", action="store_true", help="where the time of a training step goes, by operator")
    parser.add_argument("--loader", action="store_true", help="also time the data loader (needs the data)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        if args.compare:
            print(compare(args.compare, [*args.set, *args.overrides], args.repeats, args.count_only))
            return
        config = load_config(args.config_exp, args.overrides)
        if args.profile:
            print(profile(config))
            return
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
