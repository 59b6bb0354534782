"""Every file of a split is read once before it is trained on, so that none of them can end a run hours later.

An image is sound if its readers accept all of its files, its labels show what it shows, and none of them looks like
something else (`LabelRules.doubts`). What was found sound is noted with sizes and modification times of the files and
not read again while these stay the same (`SoundFiles`).
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from data.base import MultiTaskDataset
from data.spec import read_image
from utils.files import exif_orientation

VERSION = 1          # raise it where a file that was sound may no longer be
INLINE = 200         # so many images are read in this process: to start others takes longer
SHOWN = 5
Look = Callable[[MultiTaskDataset, str, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Examined:
    """What was found about one image.

    problems: why it cannot be trained on. notes: what is strange but does no harm. digest: of the image file's bytes.
    seen: what the caller's own look at the maps gave.
    """

    name: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""
    seen: Any = None


def examine(dataset: MultiTaskDataset, name: str, look: Look | None = None) -> Examined:
    """Reads all files of one image."""
    problems, notes, maps = [], [], {}
    for key in dataset.maps_of(name):
        try:
            maps[key] = dataset.read(key, name)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        except Exception as error:                     # whatever a reader does with a file that it was not written for
            files = ", ".join(map(str, dataset.paths(key, name)))
            problems.append(f"{files}: cannot be read ({type(error).__name__}: {error})")
    if "image" in maps:
        problems += _misfits(dataset, name, maps)
    for key, rules in dataset.labels.items():
        if key not in maps:
            continue
        file = dataset.paths(key, name)[0]
        if doubt := rules.doubts(maps[key]):
            problems.append(f"{file}: {doubt}")
        elif dataset.spec.labels[key].informs is None and rules.is_void(maps[key]):
            notes.append(f"{file}: void everywhere, it supervises nothing")
    digest = _digest(dataset.paths("image", name)[0]) if "image" in maps else ""
    return Examined(name, tuple(problems), tuple(notes), digest, look(dataset, name, maps) if look else None)


def _misfits(dataset: MultiTaskDataset, name: str, maps: Mapping[str, Any]) -> Iterator[str]:
    """Labels of another geometry than the image's, as far as it can be told."""
    size, file = maps["image"].shape[:2], dataset.paths("image", name)[0]
    sizes = {key: dataset.labels[key].size_of(value) for key, value in maps.items() if key != "image"}
    for key, found in sizes.items():
        try:
            dataset.check_geometry(key, name, size, found)
        except ValueError as error:
            yield str(error)
    turn = exif_orientation(file) if dataset.spec.image.read is read_image else 1
    stored = turn >= 5 and size[0] != size[1] and size in sizes.values()      # the labels lie as the pixels are stored
    if turn != 1 and not stored:
        yield (f"{file} carries the EXIF orientation {turn}: whether its labels belong to the stored or to the turned "
               "pixels cannot be told; store the pixels upright, without the tag, and look at the labels")


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


# In parallel ---------------------------------------------------------------------------------------------------------


def survey(dataset: MultiTaskDataset, names: Sequence[str], workers: int = 1,
           look: Look | None = None) -> Iterator[Examined]:
    """`examine` for each of these images, in their order, in worker processes where there are many."""
    if workers <= 1 or len(names) <= INLINE:
        yield from (examine(dataset, name, look) for name in names)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")    # see CountingPool
    with ProcessPoolExecutor(workers, context, _start_worker, (dataset, look)) as pool:
        yield from pool.map(_examine_here, names, chunksize=16)


_job: list = []      # of a worker process: the arguments of `examine` that stay the same


def _start_worker(dataset: MultiTaskDataset, look: Look | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is for the calling process, which stops its workers
    cv2.setNumThreads(0)
    _job[:] = dataset, look


def _examine_here(name: str) -> Examined:
    dataset, look = _job
    return examine(dataset, name, look)


# What is known already -----------------------------------------------------------------------------------------------


class SoundFiles:
    """Images of a data set that were found sound: their digests, beside size and time of each of their files.

    Kept as JSON in $DATA_CHECK_CACHE, by default in the user's cache folder, one file for each data folder, set of
    labels and way to read them.
    """

    def __init__(self, dataset: MultiTaskDataset):
        self.dataset = dataset
        own = [key for key in dataset.labels if key in dataset.spec.labels]
        sources = [dataset.spec.image, *(dataset.spec.labels[key] for key in own)]
        try:
            told = pickle.dumps((VERSION, str(dataset.folder.resolve()), sources, list(dataset.labels.items())))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"a reader or a label rule of {dataset.spec.name} cannot be sent to other processes "
                             f"({error}); make it a function of a module, or functools.partial of one") from error
        usual = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/mtdp/data_check"
        folder = Path(os.environ.get("DATA_CHECK_CACHE") or usual).expanduser()
        self.file = folder / f"{hashlib.sha256(told).hexdigest()[:32]}.json"
        self.entries: dict[str, list] = {}
        try:
            self.entries = json.loads(self.file.read_bytes())
        except (OSError, ValueError):                  # none yet, or half of one
            self.entries = {}

    def _stamps(self, name: str) -> list:
        found = [path.stat() for key in self.dataset.maps_of(name) for path in self.dataset.paths(key, name)]
        return [[file.st_size, file.st_mtime_ns] for file in found]

    def find(self, name: str) -> Examined | None:
        """What was found about a sound image whose files have not changed since."""
        try:
            digest, notes, stamps = self.entries[name]
            return Examined(name, (), tuple(notes), digest) if stamps == self._stamps(name) else None
        except (KeyError, OSError, TypeError, ValueError):
            return None

    def add(self, found: Iterable[Examined]) -> None:
        """Notes the sound ones among these; where nothing can be written, they are read again next time."""
        self.entries |= {e.name: [e.digest, e.notes, self._stamps(e.name)] for e in found if not e.problems}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self.entries), encoding="ascii")
            os.replace(temporary, self.file)
        except OSError:
            return


def repeated(splits: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """(images of one split that are in an earlier one, too; images that stand twice in one split), in words.

    splits: name of the split -> digest of each image by id.
    """
    leaks, twins, seen = [], [], {}
    for split, digests in splits.items():
        here: dict[str, str] = {}
        for name, digest in ((name, digest) for name, digest in digests.items() if digest):
            if digest in seen:
                other, twin = seen[digest]
                leaks.append(f"{name} of {split} is {twin} of {other}")
            elif digest in here:
                twins.append(f"{name} of {split} is {here[digest]}, too")
            here.setdefault(digest, name)
        seen |= {digest: (split, name) for digest, name in here.items() if digest not in seen}
    return leaks, twins


def summary(problems: Sequence[str]) -> str:
    """The first problems in one sentence."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
