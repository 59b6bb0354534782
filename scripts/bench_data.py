"""What a worker of the training loader spends on an image, beside the usual pipeline of this field; memory over epochs.

    python scripts/bench_data.py [--root DIR] [--images 24] [--batches 24] [--repeats 5] [--epochs 10]

Renders images of 425 x 560 pixels in the layout of NYUD-v2 (once, into --root), then takes batches of four, with four
tasks and all training augmentation to 448 x 576, from three pipelines that take turns: `plain_pipeline.py` (NumPy and
OpenCV on float32 arrays, step by step, in PyTorch's loader), our loader from the files, and our loader with its cache
of decoded files. `ms per image` is a worker's processor time, all that it does included; images/s is by the clock,
which means little while other programs share the processor. `decoding` is what Pillow, and what we take to unpack the
PNG files of an image: the least that a pipeline can take without the cache.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from torch.utils.data import DataLoader

from data.base import MultiTaskDataset
from data.cache import DecodedCache
from data.datasets import DATASETS
from data.loader import build_train_loader
from data.transforms import build_transform
from scripts.command_line import Command
from scripts.example_data.write import write_example
from scripts.measuring import markdown, medians
from scripts.plain_pipeline import PlainNYUD, plain_loader
from utils.engine.tasks import label_rules
from utils.files import read_rgb, read_uint8
from utils.png import decoder_in_words

BATCH = 4
SIZE = (425, 560)


def pipelines(root: Path) -> dict[str, Callable[[int], DataLoader]]:
    """The three loaders, by the number of their workers; the cache is filled."""
    spec = DATASETS.load("NYUD")
    labels = label_rules(spec.tasks)
    transform = build_transform(spec.image_size, None, True, labels)
    files = MultiTaskDataset(spec, root, "train", labels, transform)
    cached = MultiTaskDataset(spec, root, "train", labels, transform, DecodedCache(root / "cache", 64e9))
    for name in cached.ids:
        cached.load(name)
    return {"plain": partial(plain_loader, PlainNYUD(root / spec.folder, spec.image_size), BATCH),
            "ours": partial(build_train_loader, files, BATCH),
            "ours, cached": partial(build_train_loader, cached, BATCH)}


def decoding(root: Path, repeats: int) -> tuple[float, float]:
    """Milliseconds of processor time that Pillow takes for the PNG files of an image, and that our readers take."""
    folder, times = root / "NYUDv2", []
    pictures, maps = ([path for kind in kinds for path in (folder / kind).glob("*.png")]
                      for kinds in (("images", "normals"), ("segmentation", "edge")))
    for _ in range(repeats):
        first = time.process_time()
        for path in (*pictures, *maps):
            Image.open(path).load()
        second = time.process_time()
        for path in pictures:
            read_rgb(path, apply_exif=False)
        for path in maps:
            read_uint8(path, 1)
        times.append((second - first, time.process_time() - second))
    return medians(times, 2e3 / len(pictures))


class Rate:
    """A running loader: images per second by the clock, and milliseconds of its workers' processor time per image."""

    def __init__(self, loader: DataLoader):
        before = children()
        self.batches = iter(loader)
        for _ in range(len(loader.dataset) // BATCH):      # an epoch to warm up
            next(self.batches)
        self.workers = children() - before

    def __call__(self, number: int) -> tuple[float, float]:
        list(itertools.islice(self.batches, 4))            # what was made ahead while others ran
        start, used = time.perf_counter(), self._processor_time()
        for _ in itertools.islice(self.batches, number):
            pass
        images, clock = number * BATCH, time.perf_counter() - start
        return images / clock, (self._processor_time() - used) / images * 1e3

    def _processor_time(self) -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.workers]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def children() -> set[str]:
    """Process ids of this process's children (Linux)."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def resident_memory() -> float:
    """MiB of this process and its children; shared pages count for each of them."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (os.getpid(), *children()))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_over_epochs(loader: DataLoader, epochs: int) -> list[float]:
    """MiB after each epoch."""
    batches, found = iter(loader), []
    for _ in range(epochs):
        for _ in range(len(loader.dataset) // BATCH):
            next(batches)
        found.append(resident_memory())
    return found


def rates(loaders: Mapping[str, DataLoader], batches: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of what `Rate` gives; the pipelines take turns, and those that wait sleep (their queues are full)."""
    running = {name: Rate(loader) for name, loader in loaders.items()}
    found = [{name: rate(batches) for name, rate in running.items()} for _ in range(repeats)]
    return {name: medians([turn[name] for turn in found]) for name in loaders}


def bench(root: Path, images: int, batches: int, repeats: int, epochs: int) -> None:
    """Prints the table and the memory."""
    write_example(root, images, 1, SIZE, workers=1, layouts=["NYUDv2"])
    build = pipelines(root)
    one, two = (rates({name: loader(workers) for name, loader in build.items()}, batches, repeats)
                for workers in (1, 2))
    print(markdown([{
        "pipeline": name, "1 worker, ms per image": one[name][1], "of plain": one["plain"][1] / one[name][1],
        "images/s": one[name][0], " of plain": one[name][0] / one["plain"][0],
        "2 workers, ms per image": two[name][1], "images/s ": two[name][0],
        "of 1 worker": two[name][0] / one[name][0]} for name in build]))
    print("decoding: {:.2f} ms per image by Pillow, {:.2f} by ours, which is {}".format(*decoding(root, repeats),
                                                                                     decoder_in_words()))
    for name in ("ours", "ours, cached") if epochs else ():
        after = memory_over_epochs(build[name](1), epochs)
        print(f"{name}: MiB after each epoch", *(f"{value:.0f}" for value in after))


main = Command(__doc__, bench, {
    "--root": dict(type=Path, default=Path("datasets/bench"), help="folder for the rendered images and the cache"),
    "--images": dict(type=int, default=24, help="training images"),
    "--batches": dict(type=int, default=24, help="batches of four per measurement"),
    "--repeats": dict(type=int, default=5),
    "--epochs": dict(type=int, default=10),
})

if __name__ == "__main__":
    sys.exit(main())
