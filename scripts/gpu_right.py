"""Steps of gpu_check.py about correctness: kernels, precisions, the whole path, NCCL; and the scan beside mamba-ssm."""

import functools
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.ops import SCAN_BACKENDS
from models.ops.routes import four_routes
from models.ops.scan_choice import ScanNeeds
from models.ops.selective_scan import scan_routes
from scripts.example_data.write import write_example
from scripts.gpu_report import Report
from scripts.gpu_speed import SMALL_BIM, UPDATES, built, difference, experiment, random_batch
from utils.engine.config import load_config
from utils.engine.predict import infer, predict
from utils.engine.train import train
from utils.engine.update import WARM_UPS_DDP, build_update
from utils.recording import recording_stream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAP = {"cuda": (35, 53), "cpu": (5, 7)}     # height and width
CHANNELS, STATE, ROUTES = 70, 16, 4
EXAMPLE = Path(__file__).resolve().parents[1] / "configs" / "example" / "bim_nyud.yml"
Results = dict[str, Tensor]
PRECISIONS = ("fp32", "bf16", "fp16")
AGREE = 0.03                                # of the losses of bf16 with those of float32

# ---- kernels ----


def kernels(report: Report, device: torch.device) -> None:
    """Every backend of the scan that runs here against float64: y and all gradients, and twice the same."""
    torch.use_deterministic_algorithms(True, warn_only=True)        # nothing is tuned, which would take minutes
    try:
        for name in SCAN_BACKENDS:
            if name in ("auto", "reference", "torch"):
                continue
            if refusal := SCAN_BACKENDS.load(name).refusal(ScanNeeds(device.type, torch.float32, STATE, False)):
                report.row(what=name, refused=refusal)
                continue
            for dtype in DTYPES:
                for groups in (1, 2):
                    with report.attempt(f"{name}, {dtype}, {groups} group(s)"):
                        inputs, grad_y, exact = _scan_case(groups, DTYPES[dtype], device)
                        found, again = (_scan_results(name, inputs, grad_y, device) for _ in range(2))
                        _kernel_row(report, found, again, exact, what=name, dtype=dtype, groups=groups)
    finally:
        torch.use_deterministic_algorithms(False)


def _kernel_row(report: Report, found: Results, again: Results, exact: Results, **about: str | int) -> None:
    errors = {k: ((found[k].double() - exact[k]).abs().max() / exact[k].abs().max()).item() for k in exact}
    limits = {k: _limit(k, found["y"].dtype, found["y"][..., 0, 0].numel()) for k in exact}
    worst = max(errors, key=lambda k: errors[k] / limits[k])
    bad = {}
    if not all(errors[k] <= limits[k] for k in exact):
        bad = {"wrong": f"the error of {worst} is above its limit"}
    elif about["what"] != "mamba_ssm" and not all(torch.equal(found[k], again[k]) for k in exact):
        bad = {"wrong": "two runs differ"}
    report.row(**about, worst=worst, error=errors[worst], limit=limits[worst], **bad)


@functools.cache
def _scan_case(groups: int, dtype: torch.dtype, device: torch.device) -> tuple[Results, Tensor, Results]:
    """Arguments of `scan_routes` for two images, tokens in the dtype and parameters in float32 as under autocast; a
    gradient of y; y and all gradients in float64."""
    generator, tokens = torch.Generator().manual_seed(0), (2, math.prod(MAP[device.type]))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"u": draw(*tokens, groups, CHANNELS), "delta": draw(*tokens, ROUTES, CHANNELS) - 1,
              "B": draw(*tokens, ROUTES, STATE), "C": draw(*tokens, ROUTES, STATE)}
    inputs = {k: x.to(dtype) for k, x in inputs.items()}
    inputs |= {"A": -torch.exp(draw(ROUTES, CHANNELS, STATE)).float(), "D": draw(ROUTES, CHANNELS).float(),
               "delta_bias": draw(ROUTES, CHANNELS).float()}
    inputs = {k: x.to(device) for k, x in inputs.items()}
    grad_y = draw(*inputs["u"].shape).to(device, dtype)
    exact = _scan_results("torch", {k: x.double() for k, x in inputs.items()}, grad_y.double(), device)
    return inputs, grad_y, exact


def _scan_results(backend: str, inputs: Results, grad_y: Tensor, device: torch.device) -> Results:
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    y = scan_routes(**leaves, routes=four_routes(*MAP[device.type]), delta_softplus=True, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def _limit(name: str, dtype: torch.dtype, tokens: int) -> float:
    """Of an error over the largest value: one rounding to the result's dtype, and float32's roundings of a sum, which
    grow as the root of the number of its terms."""
    terms = {"y": STATE, "u": STATE, "delta": STATE, "B": CHANNELS, "C": CHANNELS}
    rounding = torch.finfo(dtype).eps / 2 if name in terms and dtype != torch.float32 else 0
    return rounding + 2**-24 * (10 + 2 * math.sqrt(terms.get(name, tokens)))


# ---- precisions ----

@contextmanager
def example_data(device: torch.device) -> Iterator[tuple[Path, list[str]]]:
    """A folder that goes away again, and overrides of the example experiment that read and write there."""
    on_gpu = device.type == "cuda"
    images, held_out, size = (64, 8, (128, 160)) if on_gpu else (4, 2, (64, 64))
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        folder = Path(name)
        workers = min(16, os.cpu_count() or 1) if on_gpu else 1
        write_example(folder / "data", images, held_out, size, workers=workers, progress=False)
        yield folder, [f"db_root={folder / 'data'}", f"out_dir={folder}", f"device={device.type}", "progress=false",
                       "tensorboard=false", "report=false", "eval_at_start=false", "boundary_eval=off",
                       "boundary_infer=off", f"nworkers={8 if on_gpu else 0}",
                       *(() if on_gpu else (*SMALL_BIM, "trBatch=2", "scheduler_kwargs.warmup_iters=0"))]


def agree(report: Report, device: torch.device) -> None:
    """300 updates of the example in each precision: the losses of the last 20, and the speed of the whole loop."""
    updates, log = (300, 20) if device.type == "cuda" else (2, 1)
    runs = {"fp32, recorded": ("fp32", "on"), "bf16, recorded": ("bf16", "on"), "bf16": ("bf16", "off"),
            "fp32": ("fp32", "off")}
    first: dict[str, float] = {}
    with example_data(device) as (folder, overrides):
        for name, (precision, graph) in runs.items():
            with report.attempt(name):
                config = load_config(EXAMPLE, [*overrides, f"max_iter={updates}", f"val_interval={updates}",
                                               f"log_interval={log}", f"precision={precision}", f"cuda_graph={graph}",
                                               f"version_name={name.replace(', ', '_')}"])
                train(config, resume=False)
                lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
                rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
                losses = {key: value for key, value in rows[-1].items() if key.startswith("loss/")}
                first = first or losses
                apart = {key: abs(value / first[key] - 1) for key, value in losses.items()}
                rates = [row["images_per_s"] / config.trBatch for row in rows[len(rows) // 2:]]
                bad = {} if apart["loss/total"] <= AGREE or device.type == "cpu" else {"wrong": "apart from float32"}
                report.row(what=name, **{"updates": updates, "updates/s": sum(rates) / len(rates), **losses,
                                         "total apart": apart["loss/total"], "most apart": max(apart.values())}, **bad)


# ---- the whole path ----

def path(report: Report, device: torch.device) -> None:
    """Train, resume, infer and predict the example in every precision, recorded and not."""
    half = 6 if device.type == "cuda" else 1                # three of them as they are, then replays
    with example_data(device) as (folder, overrides):
        for precision in PRECISIONS:
            for graph in ("off", "on"):
                with report.attempt(f"{precision}, cuda_graph={graph}"):
                    name = f"{precision}_{graph}"
                    options = [*overrides, f"precision={precision}", f"cuda_graph={graph}", f"version_name={name}",
                               f"val_interval={half}", "log_interval=1", "valBatch=2",
                               "scheduler_kwargs.warmup_iters=0"]
                    train(load_config(EXAMPLE, [*options, f"max_iter={half}"]), resume=False)
                    config = load_config(EXAMPLE, [*options, f"max_iter={2 * half}"])
                    trained = train(config, resume=True)
                    scores = infer(config, config.run_dir / "last.pt", config.run_dir / "infer")
                    images = sorted((folder / "data" / "NYUDv2" / "images").iterdir())[:5]
                    pictures = folder / f"pictures_{name}"
                    pictures.mkdir()
                    for image in images:
                        shutil.copy(image, pictures)
                    panels = predict(config, config.run_dir / "last.pt", pictures, config.run_dir / "predict")
                    apart = max(abs(scores[task][key] - value) / max(abs(value), 1e-3)
                                for task, of_task in trained.items() for key, value in of_task.items()
                                if math.isfinite(value) and key in scores[task])
                    bad = {} if apart < 1e-3 else {"wrong": "infer gives other scores than the training's evaluation"}
                    report.row(what="train, resume, infer, predict", precision=precision, cuda_graph=graph,
                               panels=len(panels), **{"scores apart": apart}, **bad)


def one_process_group(report: Report, device: torch.device) -> None:
    """Updates under DistributedDataParallel in a group of one process (NCCL, on a CPU gloo) against updates alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1,
                            device_id=device if on_gpu else None)
    try:
        for graph in ("off", "on"):
            with report.attempt(f"cuda_graph={graph}"):
                losses = []
                for wrap in (False, True):
                    losses.append(_losses(experiment("example BIM", device, f"cuda_graph={graph}"), wrap))
                apart = difference(losses[1], losses[0])
                bad = {} if apart <= 1e-3 else {"wrong": "DDP gives other losses"}
                report.row(what=dist.get_backend(), cuda_graph=graph, updates=len(losses[0]), difference=apart, **bad)
    finally:
        dist.destroy_process_group()


def _losses(config, wrap: bool) -> Tensor:
    with built(config) as step:
        if wrap:
            with torch.cuda.stream(recording_stream(step.device) if step.device.type == "cuda" else None):
                step.wrapped = DistributedDataParallel(step.model)
            update, step.update = build_update(step)
            update.set_lr(config.optimizer_kwargs.lr)
        torch.manual_seed(1)
        batches = [random_batch(config, step.device) for _ in range(WARM_UPS_DDP + UPDATES)]
        return torch.stack([step.update([batch]).losses[0] for batch in batches]).cpu()


# ---- the scan ----

def scan_beside_mamba(report: Report, device: torch.device) -> None:
    """scripts/bench_scan.py --device cuda."""
    if device.type == "cpu":
        report.row(what="not run on a CPU")
        return
    from scripts import bench_scan_cuda  # needs Triton
    bench_scan_cuda.machine()
    for part in bench_scan_cuda.PARTS.values():
        for row in part(10):
            report.row(**row)
