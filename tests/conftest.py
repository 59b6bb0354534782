"""Fixtures shared by the tests: a rendered data set, a model small enough to train in a test, and launchers."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import free_port
from tests.shared import ROOT

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # a shell's background job; what the tests start must hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):                           # which nohup ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our Triton kernels then run on the CPU, slowly

# A BIM of 10^4 parameters on 64 x 96 pixels.
TINY = [
    "backbone=swin", "backbone_kwargs={embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], window_size: 4}",
    "model_kwargs={msst_depth: 1, d_state: 2}", "pretrained=false", "image_size=[64, 96]", "global_batch=0",
    "trBatch=2", "valBatch=2", "nworkers=0", "max_iter=6", "val_interval=3", "log_interval=1", "device=cpu",
    "optimizer_kwargs.lr=1e-3", "tensorboard=false", "progress=false", "report=false",
]


@pytest.fixture(autouse=True)
def signals_and_logging_as_before():
    """A test that leaves signals blocked, or logging off, breaks those behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert logging.root.manager.disable == logging.NOTSET


@pytest.fixture(scope="session")
def example_root(tmp_path_factory) -> Path:
    """A data folder with 12 training and 5 test images of 64 x 96 pixels in both layouts."""
    from scripts.example_data.write import write_example
    root = tmp_path_factory.mktemp("example")
    write_example(root, num_train=12, num_val=5, size=(64, 96), seed=0, workers=1, progress=False)
    return root


@pytest.fixture(scope="session", autouse=True)
def what_the_data_check_remembers(tmp_path_factory) -> None:
    """Lies with the other files of the tests."""
    os.environ["DATA_CHECK_CACHE"] = str(tmp_path_factory.mktemp("known"))


@pytest.fixture
def tiny(example_root, tmp_path) -> list[str]:
    """`key=value` arguments of a tiny run on the example data, writing into this test's folder."""
    return [*TINY, f"db_root={example_root}", f"out_dir={tmp_path / 'runs'}"]


def launch(command: list[str], processes: int = 1, launcher: str = "torchrun") -> subprocess.CompletedProcess:
    """Runs `main.py` with these arguments on so many processes and returns what it printed; does not raise."""
    starter = {"torchrun": ["-m", "torch.distributed.run"], "launch": ["-m", "torch.distributed.launch"]}[launcher]
    alone = processes == 1 and launcher == "torchrun"
    many = [] if alone else [*starter, f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return subprocess.run([sys.executable, *many, str(ROOT / "main.py"), *command], cwd=ROOT, capture_output=True,
                          text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
