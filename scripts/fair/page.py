"""The page of a suite, from its records alone: table, plots, and what may be concluded from them.

The same records give the same page, byte for byte.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.evaluator import Score
from scripts.compare import mean_and_spread
from scripts.fair.plots import Point, draw_cost, draw_curves
from scripts.fair.records import ROOT, Record, require_comparable
from scripts.fair.strip import STRIP
from scripts.fair.suite import LoadedSuite
from utils.durable import write_text
from utils.engine.results import (
    Results,
    column_title,
    columns_of,
    common_units,
    delta_m_against,
    selection_score,
)
from utils.engine.tasks import TASKS

PAGE, COST, CURVES = "README.md", "cost.svg", "curves.svg"


@dataclass(frozen=True)
class Row:
    """A line of the table: the records that differ in their seed alone."""

    name: str
    records: tuple[Record, ...]

    @property
    def task(self) -> str:
        return self.records[0]["task"]

    def values(self, task: str, score: Score) -> list[float]:
        """A score of every seed, as papers scale it."""
        found = (record["scores"].get(task, {}).get(score.key) for record in self.records)
        return [value * score.scale for value in found if value is not None]

    def cost(self, key: str, machine: str | None = None) -> float | None:
        """The median of the seeds; machine: of those that ran on it. None where there is none."""
        found = [record["cost"][key] for record in self.records
                 if machine in (None, record["machine"]) and record["cost"][key] is not None]
        return statistics.median(found) if found else None


def rows_of(records: Mapping[str, Record]) -> list[Row]:
    """The rows in the order of their names."""
    grouped: dict[str, list[Record]] = {}
    for record in records.values():
        grouped.setdefault(record["row"], []).append(record)
    return [Row(name, tuple(sorted(of, key=lambda r: r["seed"]))) for name, of in sorted(grouped.items())]


def write_page(loaded: LoadedSuite, records: Mapping[str, Record], folder: Path) -> Path:
    """Writes README.md and its plots into `folder`. RecordError for records that must not be ranked together."""
    suite, command = loaded.suite, f"python scripts/fair_table.py configs/suites/{loaded.path.name}"
    if suite.ranked:
        require_comparable(records)
    rows = rows_of(records)
    several = [row for row in rows if not row.task]
    single = {row.records[0]["backbone"]: {} for row in rows}
    for row in rows:
        if row.task:
            single[row.records[0]["backbone"]][row.task] = _means(row)
    gains = {row.name: _gains(row, single[row.records[0]["backbone"]]) for row in several}
    # On one backbone the plots name the decoders alone.
    short = {row.name: row.name if len(single) > 1 else row.records[0]["decoder"] for row in several}
    several.sort(key=lambda row: -_rank(row, gains[row.name]))
    parts = [f"# {suite.title}", suite.about.strip(), _conditions(records, rows),
             "## Scores", _legend(gains), _table(several, gains)]
    if any(single.values()):
        parts += ["Networks of one task each, with which delta_m compares:",
                  _table([row for row in rows if row.task], {})]
    if several:
        draw_cost([_point(row, short[row.name], gains[row.name]) for row in several], folder / COST)
        parts += ["## Cost and accuracy", f"![Accuracy against multiply-adds]({COST})", _costs(several)]
    if curves := {short[row.name]: curve for row in several if (curve := _curve(row))}:
        draw_curves(curves, folder / CURVES)
        parts += ["## Learning curves", f"![Selection score by update]({CURVES})",
                  "Mean over the seeds on the images held out of the training split; the selection score is the mean\n"
                  "of the logarithms of the tasks' main scores, negated where lower is better."]
    if (folder / STRIP).is_file():
        parts += ["## One picture", f"![What every decoder says of a picture]({STRIP})",
                  "A picture that none of them was trained on or scored with; of every row the first seed whose "
                  "weights were at hand."]
    parts += ["## How the learning rates were found", _search(rows)] if suite.search.lr else []
    repeated = next((name for name, record in records.items() if "CUDA" not in record["machine"]), next(iter(records)))
    parts += ["## To check it", f"One cell, from its record; it says which digits differ:\n\n```bash\n{command} "
              f"--again docs/results/{loaded.name}/{repeated}.json\n```\n\nThis page, from the records: "
              f"`{command} --page`. Cells that are not there yet: `{command}`."]
    write_text(folder / PAGE, "\n\n".join(filter(None, parts)) + "\n")
    return folder / PAGE


def _means(row: Row) -> dict[str, float]:
    """Of a single-task network over its seeds, as result files scale it."""
    score = TASKS.load(row.task).main_score(row.records[0]["scores"][row.task])
    return {score.key: statistics.fmean(row.values(row.task, score)) / score.scale}


def _gains(row: Row, single: Mapping[str, Mapping[str, float]]) -> list[float]:
    """delta_m of every seed against the means of the single-task networks; none where a task has none."""
    reference = {f"{task}/{key}": value for task, scores in single.items() for key, value in scores.items()}
    gains = [delta_m_against(_results(record), reference) for record in row.records]
    return [gain for gain in gains if gain is not None]


def _results(record: Record) -> Results:
    """The scores as the program computes with them: null is not a number."""
    return {task: {key: float("nan") if value is None else value for key, value in scores.items()}
            for task, scores in record["scores"].items()}


def _rank(row: Row, gains: Sequence[float]) -> float:
    """What the table is sorted by."""
    if gains:
        return statistics.fmean(gains)
    return statistics.fmean(selection_score(_results(record)) for record in row.records)


def _point(row: Row, name: str, gains: Sequence[float]) -> Point:
    values = list(gains) or [selection_score(_results(record)) for record in row.records]
    return Point(name, row.cost("gmacs") or 0.0, statistics.fmean(values),
                 statistics.stdev(values) if len(values) > 1 else 0.0, "delta_m %" if gains else "selection score")


def _curve(row: Row) -> list[tuple[int, float]]:
    """(update, mean selection score over the seeds) of the evaluations that all seeds have."""
    by_step: dict[int, list[float]] = {}
    for record in row.records:
        for point in record["curve"]:
            by_step.setdefault(point["step"], []).append(selection_score(_results(point)))
    return sorted((step, statistics.fmean(v)) for step, v in by_step.items() if len(v) == len(row.records))


# Text ----------------------------------------------------------------------------------------------------------------


def _conditions(records: Mapping[str, Record], rows: Sequence[Row]) -> str:
    experiment = next(iter(records.values()))["experiment"]
    seeds = sorted({record["seed"] for record in records.values()})

    def seen(key: str) -> list[str]:
        return sorted({str(record[key]) for record in records.values()})

    data = sorted({(r["data"]["train"]["images"], r["data"]["test"]["images"]) for r in records.values()})
    size = " x ".join(map(str, experiment["image_size"] or ()))
    lines = [
        f"{len(records)} networks, {len(rows)} rows, seeds {', '.join(map(str, seeds))}",
        f"{experiment['max_iter']} updates of {experiment['global_batch'] or experiment['trBatch']} images"
        f"{f' of {size} pixels' if size else ''}, {experiment['precision']}, {experiment['optimizer']}, schedule "
        f"{experiment['scheduler']}",
        "trained on " + "; ".join(f"{train} images, scored on {test}" for train, test in data),
        f"weights: {', '.join(seen('selection'))}; the test split was scored once per network, and chose nothing",
        *_machines(records),
        _determinism(experiment, records),
        f"dates: {', '.join(seen('date'))}; commits: {', '.join(c[:9] + c[40:] for c in seen('commit'))}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _machines(records: Mapping[str, Record]) -> list[str]:
    """A line per machine; on all but the one that had the most cells, the rows and the seeds of each."""
    cells: dict[str, list[Record]] = {}
    for record in records.values():
        cells.setdefault(record["machine"], []).append(record)
    most, *others = sorted(cells, key=lambda machine: -len(cells[machine]))

    def line(machine: str, which: str) -> str:
        at_a_time = sorted({record["sharing"] for record in cells[machine]})
        return f"machine: {machine}; cells at a time on it: {', '.join(map(str, at_a_time))}{which}"

    def seeds(machine: str) -> str:
        rows: dict[str, list[str]] = {}
        for record in cells[machine]:
            rows.setdefault(record["row"], []).append(str(record["seed"]))
        return ", ".join(f"{row} ({' '.join(of)})" for row, of in rows.items())

    if not others:
        return [line(most, "")]
    return [line(most, f"; {len(cells[most])} networks"),
            *(line(machine, f"; rows and seeds: {seeds(machine)}") for machine in others)]


def _determinism(experiment: Mapping[str, Any], records: Mapping[str, Record]) -> str:
    """What a repetition on the same machine may differ by."""
    rows = {}
    for record in records.values():
        for name in record["not_deterministic"]:
            rows.setdefault(name, set()).add(record["row"])
    cards = ["CUDA" in record["machine"] for record in records.values()]
    on_cpu = "" if all(cards) else "arithmetic of a CPU, whose digits depend on the number of threads alone"
    if not any(cards):
        return on_cpu
    on_cpu = f"; {on_cpu}" if on_cpu else ""
    if not experiment["deterministic"]:
        return f"arithmetic as fast as it comes, whose last digits may differ from run to run on a GPU{on_cpu}"
    return "deterministic arithmetic" + "".join(
        f", but for {name} ({', '.join(sorted(of))})" for name, of in sorted(rows.items())) + on_cpu


def _legend(gains: Mapping[str, Sequence[float]]) -> str:
    gain = " Sorted by delta_m, the mean gain over networks of one task each." if any(gains.values()) else ""
    return f"Mean +- standard deviation over the seeds (n of them); ^ higher is better, v lower is better.{gain}"


def _table(rows: Sequence[Row], gains: Mapping[str, Sequence[float]]) -> str:
    records = [record for row in rows for record in row.records]
    columns, units = columns_of(record["scores"] for record in records), common_units(records)
    lines = [["", "n", *(column_title(*column, units) for column in columns),
              *(["delta_m % ^"] if any(gains.values()) else [])]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [mean_and_spread(row.values(task, score), score.decimals) for task, score in columns]
        gain = [mean_and_spread(gains[row.name], 2, sign="+")] if any(gains.values()) else []
        lines.append([row.name, str(len(row.records)), *cells, *gain])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(rows: Sequence[Row]) -> str:
    """Memory and speed are of one machine, the one that had the most cells: those of two do not compare.

    Images/s say nothing of a network where several cells ran on a device at a time: then they are left out.
    """
    records = [record for row in rows for record in row.records]
    machine = statistics.mode(record["machine"] for record in records)
    alone = all(record["sharing"] == 1 for record in records)
    on = "" if all(record["machine"] == machine for record in records) else f" ({machine})"
    titles = ["parameters, millions", "GMACs per image", f"memory, GiB{on}",
              *([f"training images/s{on}"] if alone else [])]
    lines = [f"| | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    for row in rows:
        rate, memory = row.cost("images_per_s", machine), row.cost("memory_gib", machine)
        cells = [f"{(row.cost('parameters') or 0) / 1e6:.2f}", f"{row.cost('gmacs') or 0:.2f}",
                 "-" if memory is None else f"{memory:.1f}", "-" if rate is None else f"{rate:.3g}"]
        lines.append(f"| {row.name} | {' | '.join(cells[:len(titles)])} |")
    return "\n".join(lines)


def _search(rows: Sequence[Row]) -> str:
    rates = sorted({trial["lr"] for row in rows for record in row.records for trial in record["search"]})
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} | taken |", "| --- " * (len(rates) + 2) + "|"]
    for row in rows:
        scores = {trial["lr"]: trial["score"] for trial in row.records[0]["search"]}
        cells = ["-" if scores.get(rate) is None else f"{scores[rate]:.3f}" for rate in rates]
        taken = row.records[0]["experiment"]["optimizer_kwargs"]["lr"]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {taken:g} |")
    return ("Selection score (higher is better) of short trainings with another seed, on the images held out of the "
            "training split:\n\n" + "\n".join(lines))


def results_folder(loaded: LoadedSuite) -> Path:
    """Where the committed records of a suite lie."""
    return ROOT / "docs" / "results" / loaded.name
