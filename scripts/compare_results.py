"""One table out of several result files.

    python scripts/compare_results.py untrained=runs/x/results/step_0.json trained=runs/x/infer/results.json
    python scripts/compare_results.py RUN.json --single semseg=0.51 depth=0.59 normals=19.1 edge=0.06

`--single` gives the primary scores of single-task networks (as stored in the JSON files: fractions, metres,
degrees) and adds delta_m, the mean relative gain in percent with the sign taken from the task table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tasks import reference_keys
from evaluation.results import format_table, load_results


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="[NAME=]JSON")
    parser.add_argument("--single", nargs="+", default=[], metavar="TASK=SCORE")
    args = parser.parse_args()
    try:
        rows = {}
        for item in args.results:
            name, _, path = item.rpartition("=")
            rows[name or Path(path).stem] = load_results(Path(path))
        single = {task: float(value) for task, value in (item.split("=", 1) for item in args.single)}
        if unknown := single.keys() - reference_keys().keys():
            raise ValueError(f"--single names unknown task(s) {sorted(unknown)}; known: {', '.join(reference_keys())}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_table(rows, single))


if __name__ == "__main__":
    main()
