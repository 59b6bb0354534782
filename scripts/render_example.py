"""Render the example data set: small rooms with exact labels for all six tasks, in both folder layouts.

    python scripts/render_example.py --out example_data --train 160 --val 40 --size 160 224 --workers 2

The folder then holds NYUDv2/ and PASCALContext/ as the loaders expect them. A second call with equal options does
nothing; other options or an interrupted run ask for --overwrite.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.example_data.write import write_example


def render(args) -> None:
    """Renders, and says how long it took."""
    begin = time.perf_counter()
    if write_example(args.out, args.train, args.val, tuple(args.size), args.seed, args.workers, args.overwrite):
        seconds = time.perf_counter() - begin
        print(f"rendered {args.train} + {args.val} images per layout into {args.out} in {seconds:.0f} s")
    else:
        print(f"{args.out} already holds this data set; nothing to do")


def main(arguments: list[str] | None = None) -> int:
    command = Command(__doc__)
    add = command.add_argument
    add("--out", type=Path, required=True, help="folder for NYUDv2/ and PASCALContext/")
    add("--train", type=int, default=160, help="training images per layout")
    add("--val", type=int, default=40, help="validation images per layout")
    add("--size", type=int, nargs=2, default=(160, 224), metavar=("H", "W"), help="pixels")
    add("--seed", type=int, default=0, help="other seeds give other scenes")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    add("--overwrite", action="store_true", help="replace an example data set that is there")
    return command.run(render, arguments)


if __name__ == "__main__":
    sys.exit(main())
