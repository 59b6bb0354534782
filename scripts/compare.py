"""Several runs beside each other: a table with mean and spread over seeds, and a page that looks at every image.

    python scripts/compare.py runs/bim_nyud_seed{0,1,2} runs/mtmamba_nyud_seed{0,1,2} --page compare.html
    python scripts/compare.py --format latex ours=runs/a/infer/results.json theirs=runs/b/infer/results.json

A run is its folder or one of its result files, with a NAME= if wanted. Folders whose experiments are equal but for the
seed, the name and the machine are one row: mean +- standard deviation (over n - 1), and how many they are; so are runs
of one NAME. Of folders the scores of `--run_mode infer` are taken if every folder has them, else those of the last
evaluation while training. Each row says how its weights were chosen; a row of several such protocols is refused.

The page sets every row beside the first one: a point per image, whether the mean difference is more than the choice of
images explains, and the images where they differ most. The gain over single-task networks is `scripts/delta_m.py`.
"""

import csv
import io
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.evaluator import Score
from scripts.command_line import Command
from scripts.delta_m import result_files
from utils.engine.report.comparison import Compared, comparison_page
from utils.engine.results import Results, column_title, columns_of, common_units, read_results
from utils.engine.selection import UNKNOWN

# What equal experiments may differ in.
NOT_THE_EXPERIMENT = ("seed", "version_name", "out_dir", "db_root", "device", "nworkers", "progress", "tensorboard",
                      "report")
Column = tuple[str, Score, str]           # task, score, title


@dataclass(frozen=True)
class Row:
    """The runs of one experiment: their name, result files and scores, and how their weights were chosen."""

    name: str
    files: list[Path]
    runs: list[Results]
    selection: str

    def values(self, column: Column) -> list[float]:
        """A score of every run, as papers scale it."""
        task, score, _ = column
        return [run[task][score.key] * score.scale for run in self.runs if score.key in run.get(task, {})]


def compare(runs: Sequence[str], format: str, page: Path | None) -> None:
    """Prints the table, and writes the page where one is wanted."""
    named = [(name, Path(path)) for name, _, path in (run.rpartition("=") for run in runs)]
    files = result_files([path for _, path in named])
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for (name, path), file in zip(named, files, strict=True):
        groups.setdefault(f"name {name}" if name else _experiment(path), []).append((path, file))
    rows = [_row(key, members) for key, members in groups.items()]
    units = common_units(read_results(file)[1] for file in files)
    columns = [(task, score, column_title(task, score, units))
               for task, score in columns_of(results for row in rows for results in row.runs)]
    print(FORMATS[format](rows, columns))
    if page is not None:
        compared = [Compared(row.name, row.files, row.selection) for row in rows]
        tables = {name: write(rows, columns) for name, write in FORMATS.items()}
        page.parent.mkdir(parents=True, exist_ok=True)
        shown = [row[:-1] for row in cells(rows, columns)]              # without the weights, which stand below
        page.write_text(comparison_page(compared, shown, tables, units), encoding="utf-8")


def _experiment(path: Path) -> str:
    """What is equal for runs of one experiment: the configuration without the seed; of a file, the file."""
    if not (config := path / "config.yaml").is_file():
        return str(path)
    values: Mapping = yaml.safe_load(config.read_text(encoding="ascii"))
    return json.dumps({k: v for k, v in values.items() if k not in NOT_THE_EXPERIMENT}, sort_keys=True, default=str)


def _row(key: str, members: Sequence[tuple[Path, Path]]) -> Row:
    content = [read_results(file) for _, file in members]
    chosen = {about.get("selection", UNKNOWN): file for (_, about), (_, file) in zip(content, members, strict=True)}
    if len(chosen) > 1:
        raise ValueError("runs of one row must have chosen their weights alike: "
                         + "; ".join(f"{file}: {words}" for words, file in chosen.items()))
    name = key.removeprefix("name ") if key.startswith("name ") else _common_name([str(path) for path, _ in members])
    return Row(name, [file for _, file in members], [scores for scores, _ in content], next(iter(chosen)))


def _common_name(paths: Sequence[str]) -> str:
    """What the names of the runs begin with: runs/bim_seed0, runs/bim_seed1 -> bim."""
    names = [Path(path).stem for path in paths]
    if len(names) == 1:
        return names[0]
    return os.path.commonprefix(names).removesuffix("seed").rstrip("_-.") or names[0]


def mean_and_spread(values: Sequence[float], decimals: int, between: str = " +- ", sign: str = "") -> str:
    """Mean and standard deviation (over n - 1) of runs, "-" of none. sign: "+" shows it."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.{decimals}f}"
    return mean if len(values) == 1 else f"{mean}{between}{statistics.stdev(values):.{decimals}f}"


def cells(rows: Sequence[Row], columns: Sequence[Column], between: str = " +- ") -> list[list[str]]:
    """Of the table, its titles first."""
    return [["", "n", *(title for _, _, title in columns), "weights"],
            *([row.name, str(len(row.runs)), *(mean_and_spread(row.values(c), c[1].decimals, between) for c in columns),
               row.selection] for row in rows)]


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """For a README."""
    titles, *lines = cells(rows, columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))


def latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A tabular (booktabs) for a paper."""
    def text(words: str) -> str:
        return words.replace("%", r"\%").replace("_", r"\_")

    arrows = {"^": r"$\uparrow$", "v": r"$\downarrow$"}
    heads = [f"{text(words)} {arrows[arrow]}" for words, _, arrow in (title.rpartition(" ") for *_, title in columns)]
    lines = [rf"\begin{{tabular}}{{l{'c' * (len(columns) + 1)}l}}", r"\toprule",
             " & ".join(["", "n", *heads, "weights"]) + r" \\", r"\midrule"]
    for name, *values, chosen in cells(rows, columns, r" $\pm$ ")[1:]:
        lines.append(" & ".join([text(name), *values, text(chosen)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def comma_separated(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """For a spreadsheet: mean and spread apart, in full precision; no spread for a single run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [f"{task}/{score.key} {part}" for task, score, _ in columns for part in ("mean", "spread")]
    writer.writerow(["name", "n", *titles, "weights"])
    for row in rows:
        cells: list[object] = []
        for column in columns:
            values = row.values(column)
            cells += [statistics.fmean(values) if values else "", statistics.stdev(values) if len(values) > 1 else ""]
        writer.writerow([row.name, len(row.runs), *cells, row.selection])
    return out.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}

main = Command(__doc__, compare, {
    "runs": dict(nargs="+", metavar="[NAME=]RUN", help="folder or result file of a run"),
    "--format": dict(choices=tuple(FORMATS), default="markdown", help="of the table"),
    "--page": dict(type=Path, metavar="FILE", help="write everything into this HTML file"),
})

if __name__ == "__main__":
    sys.exit(main())
