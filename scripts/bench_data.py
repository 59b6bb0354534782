"""What a worker of the training loader spends on an image, beside the usual pipeline of this field; memory over epochs.

    python scripts/bench_data.py [--root DIR] [--images 24] [--batches 24] [--repeats 5] [--epochs 10]

Renders images of 425 x 560 pixels in the layout of NYUD-v2 (once, into --root), then takes batches of four, with four
tasks and all training augmentation to 448 x 576, from pipelines that take turns: `plain_pipeline.py` (NumPy and OpenCV
on float32 arrays, step by step, in PyTorch's loader), our loader from the files, with its cache of decoded files, and
with colours left to the device. `ms per image` is a worker's processor time, all that it does included; images/s is by
the clock, which means little while other programs share the processor. `two alone` is what two processes get done
against one that make the same batches, share nothing and hand nothing over: no loader can do better, and it is below 2
where the machine's cores share caches, memory or themselves. `decoding` is what Pillow, and what we take to unpack the
PNG files of an image: the least that a pipeline can take without the cache.
"""

import itertools
import multiprocessing
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
WARM_UP = 8             # batches of a worker at the beginning of a turn; they take longer, of two workers most of all
SIZE = (425, 560)


def pipelines(root: Path) -> dict[str, Callable[[int], DataLoader]]:
    """The loaders, by the number of their workers; the cache is filled."""
    spec, cache = DATASETS.load("NYUD"), DecodedCache(root / "cache", 64e9)
    labels = label_rules(spec.tasks)

    def ours(cache: DecodedCache | None, on_device: bool) -> MultiTaskDataset:
        transform = build_transform(spec.image_size, None, True, labels, photometric_on_device=on_device)
        return MultiTaskDataset(spec, root, "train", labels, transform, cache)

    cached = ours(cache, False)
    for name in cached.ids:
        cached.load(name)
    return {"plain": partial(plain_loader, PlainNYUD(root / spec.folder, spec.image_size), BATCH),
            "ours": partial(build_train_loader, ours(None, False), BATCH),
            "ours, cached": partial(build_train_loader, cached, BATCH),
            "ours, cached, colours on the device": partial(build_train_loader, ours(cache, True), BATCH)}


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
        number *= len(self.workers)
        list(itertools.islice(self.batches, WARM_UP * len(self.workers)))      # what was made ahead while others ran
        start, used = time.perf_counter(), self._processor_time()
        for _ in itertools.islice(self.batches, number):
            pass
        images, clock = number * BATCH, time.perf_counter() - start
        return images / clock, (self._processor_time() - used) / images * 1e3

    def _processor_time(self) -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.workers]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


class Alone:
    """Processes that make the batches of a loader, not started yet, and keep them: images per second of all."""

    def __init__(self, loader: DataLoader, processes: int, batches: int):
        self.begin, self.end = (multiprocessing.Barrier(processes + 1) for _ in range(2))
        self.images = processes * batches * BATCH
        for _ in range(processes):
            multiprocessing.Process(target=self._work, args=(loader, batches), daemon=True).start()
        self()                                             # to warm up

    def __call__(self) -> float:
        self.begin.wait()
        self.begin.wait()                                  # they are warm
        start = time.perf_counter()
        self.end.wait()
        return self.images / (time.perf_counter() - start)

    def _work(self, loader: DataLoader, batches: int) -> None:
        loader.worker_init_fn(0)
        samples = iter(loader.batch_sampler)
        while True:
            self.begin.wait()
            for number, batch in enumerate(itertools.islice(samples, WARM_UP + batches)):
                if number == WARM_UP:
                    self.begin.wait()
                loader.collate_fn([loader.dataset[key] for key in batch])
            self.end.wait()


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


def measured(build: Mapping[str, Callable[[int], DataLoader]], batches: int,
             repeats: int) -> dict[str, tuple[float, ...]]:
    """Medians of images/s and ms per image with one worker, with two, and images/s of one and of two processes alone.

    All take turns; those that wait sleep.
    """
    alone = {name: [Alone(loader(1), number, batches) for number in (1, 2)] for name, loader in build.items()}
    running = {name: [Rate(loader(number)) for number in (1, 2)] for name, loader in build.items()}   # has threads
    turns = [{name: (*running[name][0](batches), *running[name][1](batches), *(make() for make in alone[name]))
              for name in build} for _ in range(repeats)]
    return {name: medians([turn[name] for turn in turns]) for name in build}


def bench(root: Path, images: int, batches: int, repeats: int, epochs: int) -> None:
    """Prints the table and the memory."""
    write_example(root, images, 1, SIZE, workers=1, layouts=["NYUDv2"])
    build = pipelines(root)
    rows = measured(build, batches, repeats)
    plain = rows["plain"]
    print(markdown([{
        "pipeline": name, "1 worker, ms per image": ms, "of plain": plain[1] / ms, "images/s": speed,
        " of plain": speed / plain[0], "2 workers, ms per image": ms_of_two, "images/s ": of_two,
        "of 1 worker": of_two / speed, "two alone, of one": two / one}
        for name, (speed, ms, of_two, ms_of_two, one, two) in rows.items()]))
    print("decoding: {:.2f} ms per image by Pillow, {:.2f} by ours, which is {}".format(*decoding(root, repeats),
                                                                                     decoder_in_words()))
    for name in ("ours", "ours, cached") if epochs else ():
        after = memory_over_epochs(build[name](1), epochs)
        print(f"{name}: MiB after each epoch", *(f"{value:.0f}" for value in after))


main = Command(__doc__, bench, {
    "--root": dict(type=Path, default=Path("datasets/bench"), help="folder for the rendered images and the cache"),
    "--images": dict(type=int, default=24, help="training images"),
    "--batches": dict(type=int, default=24, help="batches of four per measurement and worker"),
    "--repeats": dict(type=int, default=5),
    "--epochs": dict(type=int, default=10),
})

if __name__ == "__main__":
    sys.exit(main())
