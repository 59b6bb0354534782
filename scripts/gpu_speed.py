"""Steps of gpu_check.py about speed: a recorded update beside the update, every model, host and device."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.benchmark import Step, random_batch
from scripts.gpu_report import Report
from scripts.measuring import measure
from utils.engine.config import Config, load_config
from utils.engine.cost import count
from utils.engine.update import WARM_UPS, Update
from utils.recording import Recorded

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
UPDATES = 7             # compared between two ways to run them: three before recording, four replays
MATRIX = {"cuda": 8192, "cpu": 256}
SECONDS = {"cuda": 1.0, "cpu": 0.02}      # of every timing
NOISES = 3              # runs to tell it
EQUAL = 1e-5            # differences of losses that nobody looks into
LEAST_LOSS = 0.1        # differences of smaller losses are taken relative to this


class Model(NamedTuple):
    """An experiment file, and what makes it tiny on a CPU."""

    file: str
    tiny: tuple[str, ...]


SWIN = ("backbone=swin", "image_size=[64, 64]",
        "backbone_kwargs={embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], window_size: 4}")
VIT = ("backbone=vit", "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2}", "image_size=[64, 64]")
SMALL_BIM = (*SWIN, "model_kwargs={msst_depth: 1, d_state: 2}")
MODELS = {
    "example BIM": Model("example/bim_nyud.yml", SMALL_BIM),
    "BIM": Model("bim_nyud.yml", SMALL_BIM),
    "MTMamba++": Model("mtmamba_plus_nyud.yml", (*SWIN, "model_kwargs={stm_depth: 1}")),
    "InvPT": Model("invpt_nyud.yml", (*VIT, "model_kwargs={embed_dim: 16, PRED_OUT_NUM_CONSTANT: 16}")),
    "MLoRE": Model("mlore_nyud.yml", (
        *VIT, "model_kwargs={final_embed_dim: 8, rank_list: [2, 4], topk: 1, spe_rank: 2}")),
    "BridgeNet": Model("bridgenet_nyud.yml", (
        *SWIN, "model_kwargs={embed_dim: 16, PRED_OUT_NUM_CONSTANT: 16, refine_depth: [1, 1, 1]}")),
}


Cases = Sequence[tuple[str, int, str]]      # model, images, precision
FIRST: Cases = [("BIM", 1, "bf16"), ("BIM", 4, "bf16"), ("example BIM", 4, "bf16"), ("BIM", 1, "fp32"),
                ("BIM", 4, "fp32"), ("example BIM", 4, "fp32")]
OTHERS: Cases = [("example BIM", 4, "fp16"), ("MTMamba++", 1, "bf16"), ("InvPT", 2, "bf16"), ("MLoRE", 2, "bf16"),
                 ("BridgeNet", 3, "bf16")]


def experiment(model: str, device: torch.device, *overrides: str) -> Config:
    """The model at its official size, on a CPU a tiny one."""
    file, tiny = MODELS[model]
    return load_config(CONFIGS / file, ["pretrained=false", "global_batch=0", f"device={device.type}",
                                        *(tiny if device.type == "cpu" else ()), *overrides])


# ---- the card ----

@functools.cache
def matrix_tflops(device: torch.device, precision: str) -> float:
    """What a square matrix product reaches."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    side = MATRIX[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / measure({"": lambda: a @ b}, 10, device, warm_ups=3)[""].ms / 1e9


def card(report: Report, device: torch.device) -> None:
    """Its name, its memory, and what it reaches in products and copies."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(2**28 if on_gpu else 2**16, device=device)
    copied = 2 * 4 * source.numel() / measure({"": source.clone}, 10, device)[""].ms / 1e9
    report.row(what=torch.cuda.get_device_name(device) if on_gpu else "CPU",
               GiB=torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else 0.0,
               torch=torch.__version__, cuda=str(torch.version.cuda),
               **{f"TFLOP/s {name}": matrix_tflops(device, name) for name in ("fp32", "tf32", "bf16")},
               **{"TB/s copied": copied})


# ---- a recorded update ----

class Speed(NamedTuple):
    ms: float           # between two updates in a row
    host_ms: float      # until the host has launched one
    gib: float          # the most that was held at once


def speed(run: Callable[[], object], device: torch.device) -> Speed:
    """Of an update that has run before."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    launches = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        run()
        launches.append(time.perf_counter() - start)
        wait()
        once = time.perf_counter() - start
    repeats = min(200, max(3, math.ceil(SECONDS[device.type] / once)))
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    took = time.perf_counter() - start
    held = torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else 0.0
    return Speed(took / repeats * 1e3, statistics.median(launches) * 1e3, held)


@contextmanager
def built(config: Config) -> Iterator[Step]:
    """A step with the same weights and batch whenever it is built, with the memory counted from here."""
    gc.collect()                        # a step and its update know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = Step(config)
    step.model.train()
    try:
        yield step
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def trajectory(config: Config, timed: bool = True) -> tuple[Tensor, Speed | None, bool]:
    """Losses (updates, names) of some updates with new noise in each, their speed, and whether they were recorded."""
    with built(config) as step:
        if isinstance(step.update, Update):
            step.update.lr = torch.tensor(config.optimizer_kwargs.lr, device=step.device)    # as where it is recorded
        torch.manual_seed(1)
        batches = [random_batch(config, step.device) for _ in range(UPDATES)]
        torch.manual_seed(2)                                                            # of drop paths
        losses = torch.stack([step.update([batch]).losses[0] for batch in batches]).cpu()
        recorded = isinstance(step.update, Recorded) and not step.update.refused
        return losses, speed(step.train, step.device) if timed else None, recorded


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / expected.abs().clamp_min(LEAST_LOSS)).max().item()


def recorded_updates(report: Report, device: torch.device, cases: Cases) -> None:
    """The same updates one by one and replayed. Noise, looked for where they differ: the most that other runs one by
    one are apart from the first."""
    for model, images, precision in cases:
        with report.attempt(f"{model}, {images} image(s), {precision}"):
            configs = {graph: experiment(model, device, f"trBatch={images}", f"precision={precision}",
                                         f"cuda_graph={graph}") for graph in ("off", "on")}
            expected, plain, _ = trajectory(configs["off"])
            found, replayed, was_recorded = trajectory(configs["on"])
            apart = [difference(found[part], expected[part]) for part in (slice(WARM_UPS), slice(WARM_UPS, None))]
            noise = [difference(trajectory(configs["off"], timed=False)[0], expected)
                     for _ in range(NOISES if max(apart) > EQUAL else 0)]
            bad = {}
            if device.type == "cuda" and not was_recorded:
                bad = {"wrong": "it was not recorded (see the log)"}
            elif not max(apart) <= max([EQUAL, *noise]):
                bad = {"wrong": "a recorded update gives other losses"}
            report.row(what=model, images=images, precision=precision, **{
                "ms": plain.ms, "ms recorded": replayed.ms, "updates/s recorded": 1e3 / replayed.ms,
                "host ms": plain.host_ms, "host ms recorded": replayed.host_ms, "GiB": plain.gib,
                "GiB recorded": replayed.gib, "apart, warm-ups": apart[0], "apart, replays": apart[1],
                "noise": max(noise, default=0.0)}, **bad)


# ---- every model ----

@functools.cache
def gmacs(model: str, device: torch.device) -> float:
    """Of one image's forward pass."""
    return float(dict(count(experiment(model, device)))["GMACs, total"])


def speed_row(report: Report, device: torch.device, model: str, options: str) -> None:
    """Speed of a model's update, and its share of what a matrix product in bfloat16 reaches; a backward pass counts
    as two forward passes."""
    config = experiment(model, device, *options.split())
    with built(config) as step:
        for _ in range(UPDATES):
            step.update([step.batch])
        took = speed(step.train, device)
    tflops = 6 * gmacs(model, device) * config.trBatch / took.ms
    report.row(what=model, options=options, images=config.trBatch, ms=took.ms, **{
        "images/s": config.trBatch / took.ms * 1e3, "host ms": took.host_ms, "GiB": took.gib, "TFLOP/s": tflops,
        "share": tflops / matrix_tflops(device, "bf16")})


OPTIONS = ("precision=bf16 cuda_graph=on", "precision=bf16", "precision=tf32 cuda_graph=on", "precision=tf32",
           "precision=fp32 cuda_graph=on", "precision=fp32")


def every_model(report: Report, device: torch.device) -> None:
    for options in OPTIONS:
        for model in MODELS:
            with report.attempt(f"{model} {options}"):
                speed_row(report, device, model, options)


def compiled(report: Report, device: torch.device) -> None:
    """A CPU compiles for minutes: there the step only says so."""
    if device.type == "cpu":
        report.row(what="not run on a CPU")
        return
    for model in MODELS:
        for options in ("precision=bf16 compile=true", "precision=bf16 compile=true cuda_graph=on"):
            with report.attempt(f"{model} {options}"):
                speed_row(report, device, model, options)


# ---- host and device ----

def host_and_device(report: Report, device: torch.device) -> None:
    """Of BIM's update: kernels, their time, the host's time; then the kernels that take most."""
    for graph in ("on", "off"):
        with report.attempt(f"cuda_graph={graph}"), built(experiment("BIM", device, "precision=bf16",
                                                                     f"cuda_graph={graph}")) as step:
            for _ in range(UPDATES):
                step.update([step.batch])
            took = speed(step.train, device)
            kernels = _kernels(step)
            report.row(what=f"BIM, bf16, cuda_graph={graph}", ms=took.ms, **{
                "host ms": took.host_ms, "kernels": sum(n for _, n, _ in kernels),
                "kernels' ms": sum(ms for _, _, ms in kernels)})
            for name, times, ms in kernels[:25]:
                report.row(what=name[:110], kernels=times, **{"kernels' ms": ms})


def _kernels(step: Step) -> list[tuple[str, int, float]]:
    """Name, number and milliseconds in one update, the longest first; on a CPU operators stand for kernels."""
    on_gpu = step.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        step.train()
        if on_gpu:
            torch.cuda.synchronize()
    times = [(e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3)
             for e in found.key_averages()]
    return sorted((row for row in times if row[2]), key=lambda row: -row[2])
