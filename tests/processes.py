"""Several processes of a run, forked from one that has loaded PyTorch: a start of its own costs four seconds each."""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import main

LOADED = ["utils.engine.train", "utils.engine.predict", "pytest"]       # by the process that the others are forked from
PATIENCE_S = 300


def on_ranks(function: Callable[..., Any], processes: int, *arguments: Any) -> list[str]:
    """Runs function(rank, *arguments) on so many processes, in the environment that a launcher gives them.

    Returns what each of them printed. AssertionError where one does not end well.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    common = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, str(rank)) for rank in range(processes)]
        running = [context.Process(target=_run, args=(function, rank, arguments, common, said[rank]))
                   for rank in range(processes)]
        for process in running:
            process.start()
        for process in running:
            process.join(PATIENCE_S)
            process.kill()
        texts = [path.read_text() for path in said]
        assert [process.exitcode for process in running] == [0] * processes, "\n".join(texts)
        return texts


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_main(command: Sequence[str], processes: int = 1) -> str:
    """`main.py` with these arguments on so many processes; returns what all of them printed."""
    return "".join(on_ranks(_main, processes, list(command)))


def _run(function: Callable[..., Any], rank: int, arguments: tuple, environment: dict[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    function(rank, *arguments)


def _main(rank: int, command: list[str]) -> None:
    sys.argv = ["main.py", *command]
    main.main()
