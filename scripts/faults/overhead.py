"""What keeping a run costs: of a checkpoint, and of asking all processes after every update.

    python scripts/faults/overhead.py --mebibytes 512

A checkpoint stops the training while the state is copied to the host; then a thread writes it. Printed are both, the
processor time of the thread, and what they are of a minute; and of two processes the processor time that an agreement
adds to an update.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts.command_line import Command
from utils.engine.leaving import GOING_ON, Agreement
from utils.engine.saving import Saver

UPDATES = 1000


def of_a_checkpoint(mebibytes: int, folder: Path) -> None:
    """Three checkpoints of this size, the fastest counts."""
    part = torch.randn(2**18)                                           # 1 MiB
    state = {"step": 0, "model": {str(i): part + i for i in range(mebibytes)}}
    times = []
    for step in range(3):
        saver = Saver(folder, lambda: None)
        state["step"] = step
        wall, used = time.perf_counter(), time.process_time()
        saver.save(state)
        stopped = time.perf_counter() - wall
        saver.wait()
        times.append((stopped, time.perf_counter() - wall, time.process_time() - used))
    stopped, wall, used = (min(column) for column in zip(*times, strict=True))
    print(f"{mebibytes} MiB: the training stops for {stopped:.3f} s ({stopped / 60:.2%} of a minute), written after "
          f"{wall:.2f} s, {used:.2f} s of processor time ({used / 60:.2%} of a core)")


def _rank(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    agreement = Agreement(lambda: GOING_ON)
    used = []
    for ask in (True, False):
        dist.barrier()
        start = time.process_time()
        for _ in range(UPDATES):
            if ask:
                agreement.announce()
            time.sleep(0.005)                                           # the update
            if ask:
                agreement.result()
        used.append((time.process_time() - start) / UPDATES)
    if rank == 0:
        print(f"agreements of 2 processes, updates of 5 ms: {1e6 * (used[0] - used[1]):.0f} us of processor time each")
    dist.destroy_process_group()


def measure(mebibytes: int) -> None:
    """Prints both."""
    with tempfile.TemporaryDirectory() as name:
        of_a_checkpoint(mebibytes, Path(name))
    mp.spawn(_rank, (29741,), nprocs=2)


main = Command(__doc__, measure, {"--mebibytes": dict(type=int, default=512, help="size of the checkpoint")})

if __name__ == "__main__":
    sys.exit(main())
