"""One table out of several result files.

    python scripts/compare_results.py untrained=runs/x/results/step_0.json trained=runs/x/infer/results.json

The gain over single-task networks is `scripts/delta_m.py`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.engine.results import format_table, load_results


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="[NAME=]JSON")
    args = parser.parse_args()
    try:
        rows = {}
        for item in args.results:
            name, _, path = item.rpartition("=")
            rows[name or Path(path).stem] = load_results(Path(path))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_table(rows))


if __name__ == "__main__":
    main()
