"""The order of samples and the seeds of their augmentation, as literal values: a changed order is a changed run."""

import itertools
import pickle

import cv2
import numpy as np
import pytest
import torch

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.labels import MapLabel
from data.loader import EvalSampler, TrainBatchSampler, build_eval_loader, build_train_loader, collate, sample_seed
from data.transforms import build_transform
from utils.engine.tasks import TASKS, label_rules

# What NumPy's PCG64 gives for the seeds (0, 0), (0, 1) and (1, 0), and its SeedSequence for four samples.
ORDER = [[2, 4, 3, 6, 5, 0, 1], [1, 3, 6, 0, 4, 2, 5]]
OTHER = [5, 0, 1, 4, 2, 6, 3]
SEEDS = [15793235383387715774, 7434755675892716031, 5836529245451711556, 8649202198168436674]


def indices(number: int, **options) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in itertools.islice(TrainBatchSampler(7, **options), number)]


def test_the_order_of_the_first_epochs():
    """Seven samples in batches of two: three batches an epoch, the seventh sample is dropped."""
    assert indices(6, batch_size=2) == [ORDER[0][:2], ORDER[0][2:4], ORDER[0][4:6],
                                        ORDER[1][:2], ORDER[1][2:4], ORDER[1][4:6]]
    assert indices(3, batch_size=2, seed=1) == [OTHER[:2], OTHER[2:4], OTHER[4:6]]


def test_ranks_take_turns_within_a_pass():
    ranks = [indices(2, batch_size=1, rank=rank, world_size=3) for rank in range(3)]
    assert ranks == [[[ORDER[0][rank]], [ORDER[0][3 + rank]]] for rank in range(3)]
    two = [indices(1, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert two == [[ORDER[0][0:4:2]], [ORDER[0][1:4:2]]]


def test_passes_of_an_update_follow_each_other():
    """Three passes of two samples are one update, the only one of an epoch of seven."""
    assert indices(4, batch_size=2, accumulate=3) == [ORDER[0][:2], ORDER[0][2:4], ORDER[0][4:6], ORDER[1][:2]]
    assert indices(1, batch_size=2, accumulate=3, start_update=1) == [ORDER[1][:2]]
    assert indices(1, batch_size=2, start_update=4) == [ORDER[1][2:4]]


def test_seeds_of_samples():
    assert [sample_seed(0, 0, 0), sample_seed(1, 0, 0), sample_seed(0, 1, 0), sample_seed(0, 0, 1)] == SEEDS
    first = next(iter(TrainBatchSampler(7, 2, seed=3, start_update=3)))
    assert [seed for _, seed in first] == [sample_seed(3, 1, index) for index, _ in first]


@pytest.mark.parametrize("options", [
    {"batch_size": 0}, {"batch_size": 1, "accumulate": 0}, {"batch_size": 1, "rank": 1}, {"batch_size": 1, "rank": -1},
    {"batch_size": 1, "rank": 2, "world_size": 2}, {"batch_size": 1, "start_update": -1}])
def test_impossible_samplers_are_refused(options):
    with pytest.raises(ValueError, match=rf"invalid sampler: batch_size={options['batch_size']} \(>= 1\)"):
        TrainBatchSampler(7, **options)


def test_an_update_may_take_the_whole_set_but_no_more():
    assert len(indices(1, batch_size=7)[0]) == 7
    with pytest.raises(ValueError, match=r"7 training images do not fill one update of 8 \(2 per process x 2 process"):
        TrainBatchSampler(7, 2, 0, 2, accumulate=2)


def test_evaluation_takes_every_nth():
    assert [list(EvalSampler(5, rank, 2)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
    assert list(EvalSampler(3)) == [0, 1, 2] and len(EvalSampler(5, 1, 2)) == 2


class Squares(torch.utils.data.Dataset):
    """A sample is its index squared and its seed."""

    labels, present, draws = {}, np.ones((7, 0), bool), None

    def __len__(self) -> int:
        return 7

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, -1)
        return {"image": torch.full((1, 2, 2), float(index**2)), "meta": {"index": index, "seed": seed}}


def test_loaders_hand_out_what_the_samplers_say():
    train = list(itertools.islice(build_train_loader(Squares(), 2), 4))
    assert [[meta["index"] for meta in batch["meta"]] for batch in train] == indices(4, batch_size=2)
    assert train[0]["image"].shape == (2, 1, 2, 2) and train[0]["image"][0, 0, 0, 0] == ORDER[0][0]**2
    assert train[0]["meta"][1]["seed"] == sample_seed(0, 0, ORDER[0][1])
    later = next(iter(build_train_loader(Squares(), 1, 0, 1, 2, 5, 2, 1)))["meta"]
    assert later[0]["index"] == next(iter(TrainBatchSampler(7, 1, 1, 2, 5, 2, 1)))[0][0]
    shares = [[meta["index"] for batch in build_eval_loader(Squares(), 3, rank=rank, world_size=2)
               for meta in batch["meta"]] for rank in range(2)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    assert [len(batch["meta"]) for batch in build_eval_loader(Squares(), 3)] == [3, 3, 1]


def test_collating_stacks_maps_and_lists_meta():
    samples = [{"image": torch.full((1, 2), i), "a": torch.full((1,), i), "meta": {"n": i}} for i in (0, 1)]
    batch = collate(samples, {"a": MapLabel()})
    assert batch["image"].tolist() == [[[0, 0]], [[1, 1]]] and batch["meta"] == [{"n": 0}, {"n": 1}]
    assert batch["a"].tolist() == [[0], [1]]


def test_workers_stay_and_compute_on_one_thread():
    loaders = [build(Squares(), 2, workers) for build in (build_train_loader, build_eval_loader) for workers in (0, 1)]
    assert [loader.persistent_workers for loader in loaders] == [False, True] * 2
    assert [loader.num_workers for loader in loaders] == [0, 1] * 2
    before = cv2.getNumThreads(), torch.get_num_threads()
    try:
        cv2.setNumThreads(4)
        torch.set_num_threads(2)
        loaders[1].worker_init_fn.then(0)
        assert (cv2.getNumThreads(), torch.get_num_threads()) == (1, 1)
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


# Other processes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_a_task_can_be_sent_to_another_process(task):
    row = TASKS.load(task)
    again = pickle.loads(pickle.dumps(row))
    assert (again.label, again.loss, again.decode, again.view) == (row.label, row.loss, row.decode, row.view)


def test_workers_give_the_same_batches_however_they_are_started(example_root):
    spec = DATASETS.load("NYUD")
    labels = label_rules(spec.tasks)
    dataset = MultiTaskDataset(spec, example_root, "train", labels, build_transform((32, 48), None, True, labels))
    here = list(itertools.islice(build_train_loader(dataset, 3, seed=4), 2))
    for method in ("fork", "forkserver", "spawn"):
        loader = build_train_loader(dataset, 3, num_workers=1, seed=4)
        loader.multiprocessing_context = method
        for a, b in zip(here, itertools.islice(loader, 2), strict=True):
            assert a["meta"] == b["meta"] and all(torch.equal(a[key], b[key]) for key in ("image", *labels)), method
