"""Measures what `predict` costs beside its network: time for a folder of photographs, memory for large ones and videos.

    python scripts/bench_predict.py folder --config_exp configs/example/lite0_nyud.yml --images 200
    python scripts/bench_predict.py memory --megapixels 24
    python scripts/bench_predict.py video  --frames 300

Weights are random, for they cost the same. `folder` takes turns: a block of photographs through the network alone
(`Predictor.forward` on frames that are ready), then the same block through everything (reading JPEG files, network,
decoding, writing panels, colours and raw files), so that other programs on the machine disturb both alike; wall and
processor time of both. `memory` and `video` print the most that their process ever held, of which `before` was there
before the first picture (PyTorch's libraries and the network). `video` does so for a third of the frames first.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # as main.py does

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from utils.engine.build import model_from_config
from utils.engine.config import load_config
from utils.engine.inputs import Journal
from utils.engine.predict import predict_pictures
from utils.engine.predictor import Predictor
from utils.engine.video import predict_video
from utils.machine import peak_memory

BLOCK = 4
CPU = torch.device("cpu")


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Coarse noise, which compresses about like a photograph: (H, W, 3) uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def predictor_of(config_exp: str, folder: Path, overrides: list[str]) -> Predictor:
    """The experiment's network with random weights."""
    config = load_config(config_exp, ["progress=false", "pretrained=false", *overrides])
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    torch.save({"model": model_from_config(config).state_dict()}, folder / "random.pt")
    return Predictor(config, folder / "random.pt", device)


def folder_time(predictor: Predictor, folder: Path, images: int, size: tuple[int, int]) -> str:
    """Wall times of the network alone and of everything, in turns of a block of photographs."""
    paths = [folder / f"{i:04d}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), photograph(*size, seed=i))
    journal, network, everything = Journal(folder, "bench"), np.zeros(2), np.zeros(2)
    predictor.forward([predictor.read(paths[0])])                                   # kernels are compiled
    for start in range(0, images, BLOCK):
        block = paths[start:start + BLOCK]
        framed = [predictor.read(path) for path in block]
        began = clocks()
        for i in range(0, len(framed), predictor.batch):
            predictor.forward(framed[i:i + predictor.batch])
        _synchronise(predictor)
        between = clocks()
        predict_pictures(predictor, block, {path: path.stem for path in block}, folder / "out", journal)
        network, everything = network + between - began, everything + clocks() - between
    return (f"{images} photographs of {size[1]} x {size[0]} on {predictor.device}: " + "; ".join(
        f"{name} time: network alone {alone:.1f} s, all {whole:.1f} s, ratio {whole / alone:.3f}"
        for name, alone, whole in zip(("wall", "processor"), network, everything, strict=True)))


def clocks() -> np.ndarray:
    """Wall and processor time, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def mebibytes() -> str:
    """The most that this process ever held."""
    return f"{peak_memory(CPU) / 2**20:,.0f} MiB"


def _synchronise(predictor: Predictor) -> None:
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()


def large_picture(predictor: Predictor, folder: Path, megapixels: float) -> str:
    """Peak memory of one photograph of the shape 3 : 2."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    path, before = folder / "large.jpg", mebibytes()
    code = ("import sys; sys.path.insert(0, '.'); import cv2; from scripts.bench_predict import photograph; "
            f"cv2.imwrite({str(path)!r}, photograph({height}, {height * 3 // 2}, 0))")
    subprocess.run([sys.executable, "-c", code], check=True)                        # its memory is not ours
    began = time.process_time()
    predict_pictures(predictor, [path], {path: "large"}, folder / "out", Journal(folder, "bench"))
    return (f"{megapixels:g} megapixels, tasks {', '.join(predictor.tasks)}: peak {mebibytes()} (before "
            f"{before}), {time.process_time() - began:.1f} s of processor time")


def video_memory(predictor: Predictor, folder: Path, frames: int) -> str:
    """Peak memory of 480p videos, the shorter one first."""
    found = []
    for number in (frames // 3, frames):
        source = folder / f"{number}.mp4"
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"mp4v"), 30, (854, 480))
        for i in range(number):
            writer.write(np.roll(photograph(480, 854, 0), 3 * i, 1))
        writer.release()
        before, began = mebibytes(), time.perf_counter()
        predict_video(predictor, str(source), folder / f"out_{number}.mp4")
        found.append(f"{number} frames: peak {mebibytes()} (before {before}), "
                     f"{number / (time.perf_counter() - began):.2f} frames/s")
    return "; ".join(found)


def bench(what: str, config_exp: str, images: int, size: list[int], megapixels: float, frames: int, threads: int,
          overrides: list[str]) -> None:
    """Prints one line."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        predictor = predictor_of(config_exp, folder, overrides)
        if what == "folder":
            print(folder_time(predictor, folder, images, tuple(size)))
        elif what == "memory":
            print(large_picture(predictor, folder, megapixels))
        else:
            print(video_memory(predictor, folder, frames))


main = Command(__doc__, bench, {
    "what": dict(choices=("folder", "memory", "video")),
    "--config_exp": dict(default="configs/example/lite0_nyud.yml", metavar="YAML"),
    "--images": dict(type=int, default=200), "--size": dict(type=int, nargs=2, default=[321, 481]),
    "--megapixels": dict(type=float, default=24), "--frames": dict(type=int, default=300),
    "--threads": dict(type=int, default=2), "overrides": dict(nargs="*", metavar="key=value"),
})

if __name__ == "__main__":
    sys.exit(main())
