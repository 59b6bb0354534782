"""Images per second of the training loader beside the usual pipeline of this field, and memory over epochs.

    python scripts/bench_data.py [--root DIR] [--images 24] [--batches 24] [--repeats 5] [--epochs 10]

Renders images of 425 x 560 pixels in the layout of NYUD-v2 (once, into --root), then takes batches of four, with four
tasks and all training augmentation to 448 x 576, from three pipelines that take turns: `plain_pipeline.py` (NumPy and
OpenCV on float32 arrays, step by step), our loader from the files, and our loader with its cache of decoded files.
`sample` is processor time of one sample, `worker` that of a worker of the loader (with collation and shared memory);
images/s is by the clock, which means little while other programs share the processor.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.base import MultiTaskDataset
from data.cache import DecodedCache
from data.datasets import DATASETS
from data.loader import build_train_loader, init_worker
from data.transforms import build_transform
from scripts.command_line import Command
from scripts.example_data.write import write_example
from scripts.measuring import markdown, medians
from scripts.plain_pipeline import PlainNYUD
from utils.engine.tasks import label_rules

BATCH = 4
SIZE = (425, 560)


def data_sets(root: Path) -> dict:
    """The three pipelines; the cache is filled."""
    spec = DATASETS.load("NYUD")
    labels = label_rules(spec.tasks)
    transform = build_transform(spec.image_size, None, True, labels)
    cached = MultiTaskDataset(spec, root, "train", labels, transform, DecodedCache(root / "cache", 64e9))
    for name in cached.ids:
        cached.load(name)
    return {"plain": PlainNYUD(root / spec.folder, labels, spec.image_size),
            "ours": MultiTaskDataset(spec, root, "train", labels, transform), "ours, cached": cached}


def processor_time(dataset, images: int, seed: int) -> float:
    """Milliseconds per image in this process, set up like a worker."""
    start = time.process_time()
    for i in range(images):
        dataset[(i % len(dataset), seed + i)]
    return (time.process_time() - start) / images * 1e3


class Rate:
    """A running loader: images per second by the clock, and milliseconds of its workers' processor time per image."""

    def __init__(self, dataset, workers: int):
        before = children()
        self.batches = iter(build_train_loader(dataset, BATCH, workers))
        for _ in range(len(dataset) // BATCH):             # an epoch to warm up
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


def memory_over_epochs(dataset, epochs: int) -> list[float]:
    """MiB after each epoch with one worker."""
    batches = iter(build_train_loader(dataset, BATCH, 1))
    found = []
    for _ in range(epochs):
        for _ in range(len(dataset) // BATCH):
            next(batches)
        found.append(resident_memory())
    return found


def rates(sets: Mapping, workers: int, batches: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of what `Rate` gives; the pipelines take turns, and those that wait sleep (their queues are full)."""
    running = {name: Rate(dataset, workers) for name, dataset in sets.items()}
    found = [{name: rate(batches) for name, rate in running.items()} for _ in range(repeats)]
    return {name: medians([turn[name] for turn in found]) for name in sets}


def bench(root: Path, images: int, batches: int, repeats: int, epochs: int) -> None:
    """Prints the table and the memory."""
    write_example(root, images, 1, SIZE, workers=1, layouts=["NYUDv2"])
    sets = data_sets(root)
    init_worker()
    turns = [{name: processor_time(dataset, images, seed) for name, dataset in sets.items()}
             for seed in range(0, repeats * images, images)]
    alone = {name: statistics.median(turn[name] for turn in turns) for name in sets}
    one, two = (rates(sets, workers, batches, repeats) for workers in (1, 2))
    print(markdown([{
        "pipeline": name, "sample, ms": alone[name], "of plain": alone["plain"] / alone[name],
        "worker, ms per image": one[name][1], "of plain ": one["plain"][1] / one[name][1],
        "images/s, 1 worker": one[name][0], " of plain": one[name][0] / one["plain"][0],
        "2 workers, ms per image": two[name][1], "images/s, 2 workers": two[name][0],
        "of 1 worker": two[name][0] / one[name][0]} for name in sets]))
    for name in ("ours", "ours, cached"):
        after = memory_over_epochs(sets[name], epochs)
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
