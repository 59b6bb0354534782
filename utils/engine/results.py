"""What is done with scores once they are there: the table, the JSON file, delta_m, the choice of checkpoints."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evaluation.delta_m import delta_m
from evaluation.evaluator import Score
from utils.engine.tasks import TASKS
from utils.options import ConfigError, nearest

Results = dict[str, dict[str, float]]       # task -> score -> value
VALID_PIXELS = "valid_pixels"               # a count, which every task has


def selection_score(results: Results) -> float:
    """One number to choose checkpoints by: the mean log of the primary scores, negated where lower is better.

    It is scale-free (a relative gain of 1 % counts the same in every task) and needs no reference scores. Tasks
    without a valid pixel are left out.
    """
    logs, empty = [], unscored(results)
    for task, scores in results.items():
        score = TASKS.load(task).main_score(scores)
        value = scores[score.key]
        if task not in empty:
            logs.append((1 if score.higher_is_better else -1) * math.log(max(value, 1e-6)))
    return sum(logs) / len(logs) if logs else float("-inf")


def reference_keys(apart: Iterable[str] = ()) -> dict[str, tuple[str, Score]]:
    """Names of single-task scores -> (task, score): `edge` is the score that is always there, `edge/odsF` any other.

    apart: tasks that are named apart (`semseg@street`) among them.
    """
    rows = {name: TASKS.load(name).scores for name in TASKS.in_order({*TASKS, *apart})}
    named = {f"{name}/{score.key}": (name, score) for name, scores in rows.items() for score in scores}
    return {name: (name, scores[0]) for name, scores in rows.items()} | named


def check_reference(reference: Mapping[str, float]) -> None:
    """ConfigError for a name in `single_task_scores` that is no task and no score of one."""
    known = reference_keys(filter(TASKS.is_name, (key.partition("/")[0] for key in reference)))
    for key in reference:
        if key not in known:
            raise ConfigError(f"single_task_scores: unknown score '{key}'; {nearest(key, known)}")


def delta_m_against(results: Results, reference: Mapping[str, float]) -> float | None:
    """Multi-task gain in percent over the reference scores of the same tasks; None where a task has no reference.

    See `reference_keys` for the names; of two references of a task the later key has precedence (edge/odsF over edge).
    """
    compared = {task: (key, score) for key, (task, score) in reference_keys(results).items()
                if key in reference and score.key in results.get(task, {})}
    if not results or compared.keys() != results.keys():
        return None
    return delta_m({task: results[task][score.key] for task, (_, score) in compared.items()},
                   {task: reference[key] for task, (key, _) in compared.items()},
                   {task: score.higher_is_better for task, (_, score) in compared.items()})


def column_title(task: str, score: Score, units: Mapping[str, str] | None = None) -> str:
    """A column's name, with ^ or v for its direction."""
    arrow = "^" if score.higher_is_better else "v"
    return " ".join(filter(None, (task, score.label, unit_of(task, score, units or {}), arrow)))


def unit_of(task: str, score: Score, units: Mapping[str, str]) -> str:
    """What a score is measured in. units: by task, that of the labels where it is not the task's metre (disparities in
    "px")."""
    return units.get(task) or score.unit if score.unit == "m" else score.unit


def columns_of(rows: Iterable[Results]) -> list[tuple[str, Score]]:
    """The scores that tables print, where any of the rows has them, in the order of the tasks."""
    rows = list(rows)
    return [(task, score) for task in TASKS.in_order({task for results in rows for task in results})
            for score in TASKS.load(task).scores if any(score.key in results.get(task, {}) for results in rows)]


def table_rows(rows: Mapping[str, Results], reference: Mapping[str, float] | None = None,
               units: Mapping[str, str] | None = None) -> list[list[str]]:
    """Cells of a table, its titles first: one row per named result, the scores as papers print them, and delta_m."""
    columns = columns_of(rows.values())
    titles = [column_title(task, score, units) for task, score in columns]
    lines = [["", *titles, *(["delta_m %"] if reference else [])]]
    for name, results in rows.items():
        cells = [s.format(results[t][s.key]) if s.key in results.get(t, {}) else "-" for t, s in columns]
        gain = delta_m_against(results, reference or {})
        lines.append([name, *cells, *(["-" if gain is None else f"{gain:+.2f}"] if reference else [])])
    return lines


def format_table(rows: Mapping[str, Results], reference: Mapping[str, float] | None = None,
                 units: Mapping[str, str] | None = None) -> str:
    """`table_rows` in Markdown."""
    header, *lines = table_rows(rows, reference, units)
    lines = [header, ["---"] * len(header), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def common_units(abouts: Iterable[Mapping]) -> dict[str, str]:
    """Units of labels by task, as result files say them; one table cannot hold a task in two of them."""
    units: dict[str, str] = {}
    for about in abouts:
        for task, unit in about.get("units", {}).items():
            if units.setdefault(task, unit) != unit:
                raise ValueError(f"{task} is measured in {units[task]} in one result and in {unit} in another: they do "
                                 "not belong in one table")
    return units


def save_results(path: Path, results: Results, **about: object) -> None:
    """Writes {"scores": results, **about} as JSON; NaN becomes null."""
    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite({**about, "scores": results}), indent=1) + "\n", encoding="ascii")


def load_results(path: Path) -> Results:
    """The scores of a file that `save_results` wrote; null becomes NaN."""
    return read_results(path)[0]


def read_results(path: Path) -> tuple[Results, dict]:
    """The scores of a file that `save_results` wrote, null as NaN, and what else it holds about them."""
    try:
        about = json.loads(path.read_text(encoding="ascii"))
        scores = about.pop("scores")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result file written by this program ({type(error).__name__})") from error
    scores = {task: {k: math.nan if v is None else v for k, v in values.items()} for task, values in scores.items()}
    return scores, about


def unscored(results: Results) -> Sequence[str]:
    """Tasks whose scores mean nothing because no pixel was valid."""
    return [task for task, scores in results.items() if scores.get(VALID_PIXELS) == 0]
