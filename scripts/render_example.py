"""Render the example data set: small rooms with exact labels for all six tasks, in both folder layouts.

    python scripts/render_example.py --out example_data --train 160 --val 40 --size 160 224 --workers 2

The folder then holds NYUDv2/ and PASCALContext/ as the loaders expect them. A second call with equal options
does nothing; other options or an interrupted run ask for --overwrite."""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.example_data.write import write_example  # noqa: E402  (needs the path above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for NYUDv2/ and PASCALContext/")
    parser.add_argument("--train", type=int, default=160, help="training images per layout")
    parser.add_argument("--val", type=int, default=40, help="validation images per layout")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 224), metavar=("H", "W"), help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an example data set that is there")
    args = parser.parse_args()
    begin = time.perf_counter()
    try:
        done = write_example(
            args.out, args.train, args.val, tuple(args.size), args.seed, args.workers, args.overwrite
        )
    except (ValueError, FileExistsError) as error:
        sys.exit(f"render_example: {error}")
    if done:
        seconds = time.perf_counter() - begin
        print(f"rendered {args.train} + {args.val} images per layout into {args.out} in {seconds:.0f} s")
    else:
        print(f"{args.out} already holds this data set; nothing to do")


if __name__ == "__main__":
    main()
