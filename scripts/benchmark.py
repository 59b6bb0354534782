"""Size, cost and speed of a configured model.

    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --count_only
    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --count_kernels
    python scripts/benchmark.py --config_exp configs/example/bim_nyud.yml --repeats 10 [key=value ...]
    python scripts/benchmark.py --config_exp configs/bim_nyud.yml --profile precision=bf16 compile=true
    python scripts/benchmark.py --compare configs/bim_nyud.yml configs/mtmamba_nyud.yml --set backbone=swin_tiny

GMACs: one unit per multiply-add of matrix products, convolutions and attention; a scan over L tokens of D channels
with state size N counts 9 L D N + L D, the convention of the Mamba decoders' papers. Counting runs on the meta device
and needs no memory. Times are medians; on CPU they compare two configurations on one machine and mean little else.
--compare prints one table of several experiments: on a GPU times, on a CPU the ratios of processor time to the first;
memory is the peak beyond the weights. With --against DIR the other side is another checkout of this program.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import measuring
from scripts.command_line import Command
from scripts.kernel_count import kernel_rows
from scripts.side_by_side import compared_with
from utils.batches import to_device
from utils.distributed import pick_device
from utils.engine.build import build_criterion, model_from_config, prepare_for_training
from utils.engine.config import Config, load_config
from utils.engine.cost import count
from utils.engine.evaluate import forward_pass
from utils.engine.run import build_optimizer
from utils.engine.tasks import TASKS
from utils.engine.update import WARM_UPS, Outcome, build_update

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Step:
    """A configured model with random data: what a forward pass and a training step run."""

    def __init__(self, config: Config) -> None:
        self.config, self.device, self.accumulate, self.ema = config, pick_device(config.device), 1, None
        torch.manual_seed(0)
        with self.device:                                            # weights are drawn there
            self.model = self.wrapped = model_from_config(config)
        prepare_for_training(self.model, config)
        self.criterion = build_criterion(config, self.model).to(self.device)
        self.optimizer = build_optimizer(config, self.model, self.criterion)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.batch = random_batch(config, self.device)
        self.predict = forward_pass(self.model, config, self.device)
        update, self.update = build_update(self)
        update.set_lr(config.optimizer_kwargs.lr)

    @torch.inference_mode()
    def forward(self) -> None:
        self.model.eval()
        self.predict(self.batch["image"])

    def train(self) -> Outcome:
        self.model.train()
        return self.update([self.batch])

    def costs(self, repeats: int) -> dict[str, measuring.Cost]:
        """Median times and peak memory of a forward pass and a training step."""
        warm_ups = WARM_UPS if self.config.cuda_graph else 1         # the next call is recorded, which takes memory
        return measuring.measure({"forward": self.forward, "step": self.train}, repeats, self.device, warm_ups)


def measure(config: Config, repeats: int) -> list[tuple[str, str]]:
    """Time of a forward pass and of a training step, and their peak memory, at trBatch images."""
    step = Step(config)
    on_gpu = step.device.type == "cuda"
    options = {"compiled": config.compile, "recorded": config.cuda_graph, "channels last": config.channels_last,
               f"{config.activation_checkpointing} recomputed": config.activation_checkpointing != "none"}
    used = ", ".join([config.precision, *(name for name, on in options.items() if on)])
    rows = [("device", f"{torch.cuda.get_device_name(step.device) if on_gpu else 'CPU'}, {used}, {config.trBatch} "
             f"image(s) of {config.input_size[0]} x {config.input_size[1]}, {torch.get_num_threads()} thread(s)")]
    for name, cost in step.costs(repeats).items():
        rows += [(f"{name}, ms (median of {repeats})", f"{cost.ms:.1f}"),
                 (f"{name}, images/s", f"{config.trBatch / cost.ms * 1e3:.2f}"),
                 (f"{name}, peak memory GiB (beyond weights)", f"{cost.mib / 2**10:.2f}")]
    return rows


def profiled(config: Config) -> str:
    """Where the time of a training step goes, over three of them: PyTorch's table of operators, by their own time."""
    step = Step(config)
    step.train()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(3):
            step.train()
    return found.key_averages().table(sort_by=f"self_{step.device.type}_time_total", row_limit=20)


def compared(entries: list[str], overrides: list[str], repeats: int, count_only: bool) -> str:
    """A markdown table: size and cost of each experiment beside the original's, time and memory of its step."""
    table: list[dict[str, str]] = []
    originals = yaml.safe_load(Path(__file__).with_name("original_gmacs.yml").read_text(encoding="ascii"))
    first: dict[str, measuring.Cost] = {}
    for entry in entries:
        name, _, own = entry.partition("@")
        path, options = Path(name), [*overrides, *filter(None, own.split(","))]
        config = load_config(path, options)
        cost = dict(count(config))
        official = path.resolve().parent in (CONFIGS, CONFIGS / "backbones") and not options
        original = originals.get(path.stem, "") if official else ""
        row = {"experiment": f"{path.stem} {own}".strip(), "backbone": config.backbone,
               "parameters": cost["parameters, total"], "GMACs": cost["GMACs, total"], "the original": str(original)}
        if not count_only:
            step = Step(config)
            found = step.costs(repeats)
            first = first or found
            for name, spent in found.items():
                row |= ({f"{name}, ms": f"{spent.ms:.1f}"} if step.device.type == "cuda" else
                        {f"{name} / first": f"{spent.cpu_ms / first[name].cpu_ms:.2f}"})
            row |= {f"{name}, GiB": f"{spent.mib / 2**10:.2f}" for name, spent in found.items()}
            del step
            gc.collect()
        table.append(row)
    return measuring.markdown(table)


def random_batch(config: Config, device: torch.device) -> dict[str, Any]:
    """Noise as images, and labels of two values; what is no map says that nothing is there."""
    size = config.output_size or config.input_size
    batch = {"image": torch.randn(config.trBatch, 3, *config.input_size, device=device)}
    for task in config.tasks:
        rules = TASKS.load(task).label
        if rules.is_map:
            batch[task] = torch.randint(0, 2, (config.trBatch, rules.channels, *size), device=device).float()
        else:
            batch[task] = to_device(rules.collate([rules.absent(config.input_size)] * config.trBatch), device)
    return batch


def show(config_exp: str | None, compare: list[str] | None, set: list[str], against: Path | None, count_only: bool,
         count_kernels: bool, profile: bool, repeats: int, overrides: list[str]) -> None:
    """Prints what is asked for: a table of several experiments, a profile, or two columns about one experiment."""
    if (config_exp is None) == (compare is None):
        raise ValueError("give either --config_exp or --compare")
    if against is not None and compare is None:
        raise ValueError("--against needs the experiments of --compare")
    if compare:
        everywhere = [*set, *overrides]
        print(compared(compare, everywhere, repeats, count_only) if against is None else
              measuring.markdown(compared_with(against, [Path(entry) for entry in compare], everywhere, repeats)))
        return
    config = load_config(config_exp, overrides)
    if profile:
        print(profiled(config))
        return
    rows = kernel_rows(config) if count_kernels else count(config) + ([] if count_only else measure(config, repeats))
    width = max(len(name) for name, _ in rows)
    print(f"{config_exp} {' '.join(overrides)}")
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


main = Command(__doc__, show, {
    "--config_exp": dict(metavar="YAML"),
    "--compare": dict(nargs="+", metavar="YAML[@key=value,...]", help="one table of these experiments"),
    "--set": dict(nargs="+", default=[], metavar="key=value", help="overrides for all of --compare"),
    "--against": dict(type=Path, metavar="DIR", help="steps of --compare there and here, in turns, on a CPU"),
    "--count_only": dict(action="store_true", help="parameters and GMACs only; nothing is run"),
    "--count_kernels": dict(action="store_true", help="kernels of a forward pass in training mode; nothing is run"),
    "--profile": dict(action="store_true", help="where the time of a training step goes, by operator"),
    "--repeats": dict(type=int, default=10),
    "overrides": dict(nargs="*", metavar="key=value"),
})

if __name__ == "__main__":
    sys.exit(main())
