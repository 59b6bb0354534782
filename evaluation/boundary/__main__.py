"""Boundary score of a folder of predictions: ODS-F, OIS-F and AP as the multi-task papers report them.

    python -m evaluation.boundary --pred runs/x/infer/edge --gt NYUDv2/edge --gt_kind nyud --max_dist 0.011
    python -m evaluation.boundary --pred DIR --gt PASCALContext/pascal-context/trainval --gt_kind regions \\
        --max_dist 0.0075 --images test_new.txt --json scores.json --plot curve.png
    python -m evaluation.boundary --pred DIR --gt BSDS500/data/groundTruth/test --gt_kind bsds --max_dist 0.0075

Predictions are 8-bit grey PNG files, <name>.png, at the images' original sizes. Ground truths are <name>.png, .npy or
.mat (LabelMap), or a folder <name>/ of such files, one per annotator. Kinds: `boundary` pictures are thinned and used;
`regions` are label maps whose boundaries are taken; `nyud` are edge pictures read as if they were label maps, as the
published scores on NYUD-v2 do; `bsds` are boundaries used as they are, in a .mat file those of all its annotators.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from evaluation.boundary.files import Pair, find_pairs
from evaluation.boundary.plot import save_plot
from evaluation.boundary.pool import CountingPool, default_workers
from evaluation.boundary.protocol import Protocol
from evaluation.boundary.scores import COUNT_NAMES, BoundaryTotals, precision_recall_f
from evaluation.boundary.truth import TRUTH_KINDS


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.boundary", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pred", type=Path, required=True, metavar="DIR", help="predictions")
    add("--gt", type=Path, required=True, metavar="DIR", help="ground truth")
    add("--gt_kind", choices=TRUTH_KINDS, required=True, help="what the ground truth files hold")
    add("--max_dist", type=float, required=True, metavar="SHARE",
        help="largest distance of a match, as a share of the diagonal: NYUD-v2 0.011, PASCAL and BSDS 0.0075")
    add("--images", type=Path, metavar="FILE", help="score only these images: a text file, one name per line")
    add("--protocol", choices=("nms", "plain"), default="nms",
        help="plain: no non-maximum suppression, 99 thresholds (MTI-Net)")
    add("--workers", type=int, metavar="N", help="processes; 0: none besides this one (default: the cores, at most 8)")
    add("--json", type=Path, metavar="OUT", help="write the scores and the curve")
    add("--plot", type=Path, metavar="OUT", help="write the precision-recall curve as PNG")
    return parser.parse_args(arguments)


def score_pairs(pairs: list[Pair], kind: str, protocol: Protocol, workers: int,
                progress: bool = True) -> BoundaryTotals:
    """The sums over all images; `workers` processes count."""
    totals = BoundaryTotals.empty(len(protocol.thresholds))
    with CountingPool(totals, workers) as pool, tqdm(total=len(pairs), desc="boundary score", unit="image", leave=False,
                                                     disable=None if progress else True) as bar:
        for pair in pairs:
            bar.update(pool.submit(pair.counts, kind, protocol))
        pool.finish(bar)
    return totals


def summary(totals: BoundaryTotals, protocol: Protocol) -> dict[str, float]:
    """The scores as fractions, the threshold of ODS-F, and the four counts at it."""
    scores = totals.scores(protocol.thresholds)
    return {"ods_f": scores["odsF"], "ois_f": scores["oisF"], "ap": scores["ap"], "threshold": scores["threshold"],
            "images": totals.images, **dict(zip(COUNT_NAMES, totals.counts[totals.optimum].tolist(), strict=True))}


def table(result: dict[str, float]) -> str:
    """Markdown."""
    cells = {"images": f"{result['images']}", "odsF % ^": f"{100 * result['ods_f']:.2f}",
             "oisF % ^": f"{100 * result['ois_f']:.2f}", "AP % ^": f"{100 * result['ap']:.2f}",
             "threshold": f"{result['threshold']:g}", **{name: f"{result[name]}" for name in COUNT_NAMES}}
    widths = [max(len(name), len(cell)) for name, cell in cells.items()]
    rows = (cells.keys(), ["---"] * len(cells), cells.values())
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows)


def run(args: argparse.Namespace) -> None:
    """Scores the pairs of files, prints the table, and writes what else was asked for."""
    protocol = Protocol(args.max_dist, args.protocol)
    names = None if args.images is None else args.images.read_text(encoding="utf-8").split()
    pairs = find_pairs(args.pred, args.gt, names)
    totals = score_pairs(pairs, args.gt_kind, protocol, default_workers() if args.workers is None else args.workers)
    result = summary(totals, protocol)
    print(table(result))
    if args.json is not None:
        precision, recall, f = (x.round(6).tolist() for x in precision_recall_f(totals.counts))
        about = {"gt_kind": args.gt_kind, "max_dist": args.max_dist, "protocol": args.protocol}
        curve = {"threshold": protocol.thresholds.tolist(), "precision": precision, "recall": recall, "f": f}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**result, **about, "curve": curve}, indent=1) + "\n", encoding="ascii")
    if args.plot is not None:
        save_plot(args.plot, totals, f"ODS-F {result['ods_f']:.3f} at {result['threshold']:g}, OIS-F "
                                     f"{result['ois_f']:.3f}, AP {result['ap']:.3f}, {result['images']} images")


def main(arguments: list[str] | None = None) -> None:
    """Runs, and turns a user's mistake into one sentence and exit code 1."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
