"""One table out of several result files.

    python scripts/compare_results.py untrained=runs/x/results/step_0.json trained=runs/x/infer/results.json

The gain over single-task networks is `scripts/delta_m.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from utils.engine.results import format_table, read_results
from utils.engine.selection import UNKNOWN


def compare(results: Sequence[str]) -> None:
    """Prints the table in Markdown, and for each row how its weights were chosen."""
    named = [item.rpartition("=") for item in results]
    rows = {name or Path(path).stem: read_results(Path(path)) for name, _, path in named}
    print(format_table({name: scores for name, (scores, _) in rows.items()}), "", sep="\n")
    print(*(f"{name}: {about.get('selection', UNKNOWN)}" for name, (_, about) in rows.items()), sep="\n")


main = Command(__doc__, compare, {"results": dict(nargs="+", metavar="[NAME=]JSON")})

if __name__ == "__main__":
    sys.exit(main())
