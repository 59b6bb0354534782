"""Batches: which samples, in which order, on which rank, with which augmentation.

The order is a pure function of (seed, step). It depends neither on the number of processes, as long as the
global batch is the same, nor on the workers, nor on where a run was interrupted. No state has to be saved
but the step.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.base import MultiTaskDataset
from data.labels import LabelRules, stack
from data.mixture import MixedDataset
from data.workers import Loader


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (index, sample seed) for one rank, from update `start_update` on.

    An update takes `batch_size * world_size * accumulate` images, in `accumulate` passes. Epoch e visits
    the samples in a permutation seeded by (seed, e); every update takes the next images of it, and in each
    pass rank r the entries r::world_size. So the images of an update do not depend on how they are shared
    out. What is left at the end of an epoch is dropped. A sample's seed depends on (seed, epoch, index)
    only. present: which image has which label, (samples, tasks) bool; scope: what one loss belongs to (`shares`).
    draws: the samples fall into groups of these sizes, of each of which an epoch takes that many, some more than once;
    None: every sample once.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 accumulate: int = 1, start_update: int = 0, present: np.ndarray | None = None, scope: str = "image",
                 draws: Sequence[tuple[int, int]] | None = None):
        self.per_pass = batch_size * world_size
        self.global_batch = self.per_pass * accumulate
        if min(batch_size, accumulate) < 1 or not 0 <= rank < world_size or start_update < 0:
            raise ValueError(f"invalid sampler: batch_size={batch_size} (>= 1), accumulate={accumulate} "
                             f"(>= 1), rank={rank} (0..world_size-1), world_size={world_size}, "
                             f"start_update={start_update} (>= 0)")
        self.epoch_size = num_samples if draws is None else sum(number for _, number in draws)
        if self.epoch_size < self.global_batch:
            raise ValueError(f"{self.epoch_size} training images do not fill one update of {self.global_batch} "
                             f"({batch_size} per process x {world_size} process(es) x {accumulate} "
                             "accumulation); reduce trBatch or global_batch")
        self.num_samples, self.rank, self.world_size = num_samples, rank, world_size
        self.seed, self.start_update = seed, start_update
        self.present, self.scope = np.ones((num_samples, 0), bool) if present is None else present, scope
        self.updates_per_epoch = self.epoch_size // self.global_batch
        self.draws = draws

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, update in self._updates():
            for batch in update[:, self.rank::self.world_size]:
                yield [(int(i) % self.num_samples, sample_seed(self.seed, epoch, int(i))) for i in batch]

    def _updates(self) -> Iterator[tuple[int, np.ndarray]]:
        """Epoch, and the images of an update, (passes, images of all ranks); the n-th repetition of one is n * samples
        higher."""
        epoch, first = divmod(self.start_update, self.updates_per_epoch)
        while True:
            order = self._order(np.random.default_rng((self.seed, epoch)))
            end = self.updates_per_epoch * self.global_batch
            for start in range(first * self.global_batch, end, self.global_batch):
                yield epoch, order[start:start + self.global_batch].reshape(-1, self.per_pass)
            epoch, first = epoch + 1, 0

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """The images of an epoch."""
        if self.draws is None:
            return rng.permutation(self.num_samples)
        taken, start = [], 0
        for size, number in self.draws:
            rounds = [start + rng.permutation(size) + self.num_samples * i for i in range(-(-number // size))]
            taken.append(np.concatenate(rounds)[:number])
            start += size
        return rng.permutation(np.concatenate(taken))

    def shares(self) -> Iterator[np.ndarray]:
        """For each batch how much the loss of each image and task counts, (images, tasks) float32.

        A loss is that of an image (scope "image") or of a batch of one process ("process"). One without a label counts
        0; the others more, so that their mean over all processes and passes is the mean over those that have a label.
        Every process knows the images of all, so nothing has to be exchanged. 1 where every image has every label.
        """
        for _, update in self._updates():
            images = self.per_pass // self.world_size
            labelled = self.present[update % self.num_samples]         # (passes, images of all ranks, tasks)
            labelled = labelled.reshape(len(update), images, self.world_size, labelled.shape[-1])
            if self.scope == "process":                                # (passes, images, ranks, tasks)
                labelled = np.broadcast_to(labelled.any(axis=1, keepdims=True), labelled.shape)
            mean = labelled.mean(axis=(0, 1, 2))
            share = np.divide(labelled, mean, out=np.zeros(labelled.shape), where=labelled)
            yield from share[:, :, self.rank].astype(np.float32)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """64-bit seed of one sample's augmentation in one epoch."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


class EvalSampler(Sampler[int]):
    """Indices rank::world_size; shards may differ by one, so no sample is scored twice or lost."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def collate(samples: list[dict], labels: Mapping[str, LabelRules]) -> dict:
    """Images as (B, 3, H, W), labels as their rules say (maps: (B, C, H, W)); "meta" stays a list of dicts.

    "colours", where there are any, (B, 7): see `data.photometric.ColoursToCome`.
    """
    images = [sample["image"] for sample in samples]
    if len(sizes := {tuple(image.shape[-2:]) for image in images}) > 1:       # windows slide over images of any size
        raise ValueError(f"images of one batch have different sizes (height x width: "
                         f"{', '.join(f'{h} x {w}' for h, w in sorted(sizes))}); score them one by one: valBatch=1")
    drawn = [torch.from_numpy(sample["colours"]) for sample in samples if "colours" in sample]
    return ({"image": stack(images),
             "meta": [sample["meta"] for sample in samples]} | ({"colours": stack(drawn)} if drawn else {})
            | {key: rules.collate([sample[key] for sample in samples]) for key, rules in labels.items()})


def init_worker(worker_id: int = 0) -> None:
    """Workers are the parallelism: OpenCV and torch threads inside each would only compete."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # glibc may reuse the megabytes that each sample frees: to hand them back and ask again costs two fifths of the
    # time. Other C libraries have no `mallopt` and keep their own habits.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 32 * 2**20)                                # M_MMAP_THRESHOLD: the largest value glibc accepts
        mallopt(-1, 256 * 2**20)                               # M_TRIM_THRESHOLD: more than a sample ever frees


class TrainLoader(Loader):
    """Batches of a `TrainBatchSampler`, each with "shares": task -> how much the loss of each image counts, (B,)."""

    def __iter__(self) -> Iterator[dict]:
        return self._with_shares(super().__iter__())       # here, not later: it draws from the random generators

    def _with_shares(self, batches: Iterator[dict]) -> Iterator[dict]:
        for batch, share in zip(batches, self.batch_sampler.shares(), strict=False):               # both endless
            values = torch.from_numpy(share.T.copy())                                             # (tasks, B)
            values = values.pin_memory() if self.pin_memory else values
            yield batch | {"shares": dict(zip(self.dataset.labels, values, strict=True))}


def _loader(dataset: MultiTaskDataset | MixedDataset, num_workers: int, timeout: float, start: str | None,
            kind: type[Loader] = Loader, **kwargs) -> Loader:
    processes = dict(timeout=timeout, multiprocessing_context=start) if num_workers else {}
    return kind(dataset, num_workers=num_workers, collate_fn=partial(collate, labels=dataset.labels),
                worker_init_fn=init_worker, pin_memory=torch.cuda.is_available(), **processes, **kwargs)


def build_train_loader(dataset: MultiTaskDataset | MixedDataset, batch_size: int, num_workers: int = 0, rank: int = 0,
                       world_size: int = 1, seed: int = 0, accumulate: int = 1,
                       start_update: int = 0, scope: str = "image", timeout: float = 0,
                       start: str | None = None) -> TrainLoader:
    """Endless loader; `batch_size` is per process and pass; restart with the number of updates made.

    scope: what one loss belongs to, an image or the batch of a process. timeout: seconds that workers may take for a
    batch, 0 for ever. start: "fork", "forkserver" or "spawn"; None: as Python does on this system. The batches are the
    same.
    """
    sampler = TrainBatchSampler(len(dataset), batch_size, rank, world_size, seed, accumulate, start_update,
                                dataset.present, scope, dataset.draws)
    return _loader(dataset, num_workers, timeout, start, TrainLoader, batch_sampler=sampler)


def build_eval_loader(dataset: MultiTaskDataset | MixedDataset, batch_size: int, num_workers: int = 0, rank: int = 0,
                      world_size: int = 1, timeout: float = 0, start: str | None = None) -> DataLoader:
    """One pass over this rank's share of the data set, last batch possibly smaller.

    It leaves the random state of the process alone: a run that is evaluated goes on as one that is not.
    """
    sampler = EvalSampler(len(dataset), rank, world_size)
    return _loader(dataset, num_workers, timeout, start, batch_size=batch_size, sampler=sampler,
                   generator=torch.Generator())
