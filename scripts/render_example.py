"""Render the example data set: small rooms and streets with exact labels for all six tasks, in three folder layouts.

    python scripts/render_example.py --out example_data --train 160 --val 40 --size 128 160 --workers 2

The folder then holds NYUDv2/, PASCALContext/ and cityscapes/ as the loaders expect them (--layouts chooses). A second
call with equal options does nothing; other options or an interrupted run ask for --overwrite.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.example_data.layouts import LAYOUTS
from scripts.example_data.write import write_example


def render(out: Path, train: int, val: int, size: Sequence[int], seed: int, workers: int, overwrite: bool,
           layouts: Sequence[str]) -> None:
    """Renders, and says how long it took."""
    begin = time.perf_counter()
    if write_example(out, train, val, tuple(size), seed, workers, overwrite, layouts=layouts):
        seconds = time.perf_counter() - begin
        print(f"rendered {train} + {val} images per layout into {out} in {seconds:.0f} s")
    else:
        print(f"{out} already holds this data set; nothing to do")


main = Command(__doc__, render, {
    "--out": dict(type=Path, required=True, help="folder for NYUDv2/, PASCALContext/ and cityscapes/"),
    "--train": dict(type=int, default=160, help="training images per layout"),
    "--val": dict(type=int, default=40, help="validation images per layout"),
    "--size": dict(type=int, nargs=2, default=(128, 160), metavar=("H", "W"), help="pixels"),
    "--seed": dict(type=int, default=0, help="other seeds give other scenes"),
    "--workers": dict(type=int, default=min(8, os.cpu_count() or 1), help="processes"),
    "--layouts": dict(nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="which folders"),
    "--overwrite": dict(action="store_true", help="replace an example data set that is there"),
})

if __name__ == "__main__":
    sys.exit(main())
