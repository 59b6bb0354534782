"""Machines of all kinds: other ways to start processes, little shared memory, no TensorBoard, nobody who reads."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import workers
from data.loader import build_eval_loader, build_train_loader
from data.workers import WorkerLost
from tests.conftest import launch
from tests.shared import ROOT
from tests.test_train import NYUD, rows
from utils import machine
from utils.engine.config import load_config
from utils.engine.train import train
from utils.exits import ending_of, sentence_of
from utils.logging import RunWriter


def test_a_run_is_the_same_however_its_workers_are_started(tiny):
    logged = {}
    for start in ("fork", "spawn"):
        config = load_config(NYUD, [*tiny, "max_iter=2", "val_interval=2", "nworkers=1", f"worker_start={start}",
                                    f"version_name={start}"])
        train(config, resume=False)
        logged[start] = [row["loss/total"] for row in rows(config.run_dir, "train")]
    assert logged["spawn"] == logged["fork"]


class Stalling(torch.utils.data.Dataset):
    """A data set on a file system that does not answer."""

    labels: dict = {}
    present, draws = np.ones((4, 0), bool), None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(60)


def test_workers_that_do_not_answer_are_not_waited_for_for_ever():
    for build in (build_train_loader, build_eval_loader):
        with pytest.raises(TimeoutError, match=r"no batch for 1(\.0)? s \(loader_timeout\): does the file system"):
            next(iter(build(Stalling(), 1, 1, timeout=1)))
    build_train_loader(Stalling(), 1, 0, timeout=1, start="spawn")          # without workers neither means anything


@pytest.mark.parametrize(("said", "free", "error", "words"), [
    ("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_1>: "
     "No space left on device (28)", 2**20, OSError, r"shared memory is short \(1 MiB free .*--shm-size=8g"),
    ("unable to allocate shared memory(shm) for file </torch_2>", 0, OSError, "shared memory is short"),
    ("unable to open shared memory object </torch_3> in read-write mode: Read-only file system (30)", 2**40, OSError,
     r"shared memory \(.*\) cannot be used \(.*Read-only file system \(30\)\); mount it anew, or use nworkers=0"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", 2**20, WorkerLost, "shared memory is short"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", 2**40, WorkerLost, "most often for want of memory"),
    ("anything else", 0, RuntimeError, "^anything else$")])
def test_what_ends_a_worker_is_told_with_what_helps(monkeypatch, tmp_path, said, free, error, words):
    def broken():
        raise RuntimeError(said)
        yield

    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    with pytest.raises(error, match=words):
        next(workers._watched(broken(), SimpleNamespace(timeout=0)))


def test_a_worker_that_stops_while_it_hands_a_batch_over_is_not_waited_for_for_ever(monkeypatch):
    """PyTorch's time-out does not cover this wait: the workers are ended, so that it breaks off."""
    ended = threading.Event()

    def stuck():
        yield "batch"
        assert ended.wait(20)
        raise ConnectionResetError("a worker has gone")

    monkeypatch.setattr(workers, "GRACE_S", 0.1)
    monkeypatch.setattr(workers, "end_children", ended.set)
    batches = workers._watched(stuck(), SimpleNamespace(timeout=0.5))
    assert next(batches) == "batch"
    time.sleep(1.5)                                         # between two batches nobody waits
    assert not ended.is_set()
    with pytest.raises(TimeoutError, match=r"no batch for 0\.5 s \(loader_timeout\)"):
        next(batches)


def test_a_run_goes_on_where_nobody_reads_its_output(tiny, tmp_path):
    """As `python main.py ... | head -1`: the reader leaves, the run does not."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), "--config_exp", NYUD, *tiny, "max_iter=2"],
                               cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    log = (tmp_path / "runs" / "bim_nyud" / "log.txt").read_text()
    assert "step 2/2" in log and "evaluation at step 2" in log and "Traceback" not in errors


def test_a_run_without_tensorboard_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = RunWriter(tmp_path, tensorboard=True)
    writer.scalars("train", 1, {"loss": 1.0})
    writer.close()
    assert caplog.text.count("no tb/: TensorBoard is not installed") == 1 and not (tmp_path / "tb").exists()
    assert '"loss": 1.0' in (tmp_path / "metrics.jsonl").read_text()


def test_memory_is_not_known_everywhere(monkeypatch):
    assert machine.peak_memory(torch.device("cpu")) > 2**24
    monkeypatch.setattr(machine, "resource", None)           # as on Windows
    assert machine.in_words(machine.peak_memory(torch.device("cpu"))) == "?"


def test_want_of_memory_is_a_sentence_and_a_fault_of_the_program_is_none():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        assert sentence_of(error).startswith("not enough memory: ") and "\n" not in sentence_of(error)
    assert sentence_of(RuntimeError("a shape does not fit")) is None and ending_of(KeyError("x")) is None
    assert ending_of(ValueError("one\ntwo")).startswith("error: one two. Next: ")
    ending = ending_of(OSError(errno.EROFS, "Read-only disk", "/runs/x"))
    assert ending.startswith("error: /runs/x: Read-only disk. Next: ")


def test_what_all_processes_find_is_said_once(tiny):
    done = launch(["--config_exp", NYUD, *tiny, "db_root=/nowhere"], processes=2)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
