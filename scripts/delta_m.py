"""Multi-task gain of a run over single-task networks: delta_m, in percent, positive where the run is better.

    python scripts/delta_m.py runs/demt_nyud --single runs/fcn_nyud_swin_tiny_{semseg,depth,normals,edge}
    python scripts/delta_m.py runs/x/infer/results.json --single semseg=0.51 depth=0.59 normals=19.1 edge/odsF=0.77

delta_m is the mean over the tasks of (multi - single) / single, with the sign turned where lower is better (the task
table says where). A run is its folder or one of its result files. Of folders the scores of `--run_mode infer` are
taken if every folder has them, else those of the last evaluation while training. In place of a single-task run
TASK=SCORE gives its score as result files hold it: a fraction, metres, degrees.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from utils.engine.results import (
    Results,
    common_units,
    delta_m_against,
    format_table,
    load_results,
    read_results,
    reference_keys,
)
from utils.engine.selection import UNKNOWN
from utils.engine.tasks import TASKS

INFER = Path("infer", "results.json")       # where `--run_mode infer` writes beside a checkpoint
COMPARABLE = ("backbone", "val_db_name")    # what runs must share for their gain to mean anything


def report(run: str, single: Sequence[str]) -> None:
    """Prints the files that were read, the scores in Markdown, delta_m, and each task's share of it."""
    runs = [run, *(item for item in single if "=" not in item or Path(item).exists())]
    paths = [Path(item) for item in runs]
    check_comparable(paths)
    files = dict(zip(runs, result_files(paths), strict=True))
    multi = load_results(files[run])
    rows = [(item, load_results(files[item]) if item in files else given_score(item)) for item in single]
    check_tasks(multi, rows)
    alone = {task: scores for _, results in rows for task, scores in results.items()}
    reference = {name: alone[task][score.key] for name, (task, score) in reference_keys().items()
                 if score.key in alone.get(task, {})}
    if (gain := delta_m_against(multi, reference)) is None:
        raise ValueError(f"no score is on both sides for every task: {run} has {_scores(multi)}, the single-task side "
                         f"{_scores(alone)}; evaluate both with the same boundary setting")
    parts = [f"{task} {delta_m_against({task: scores}, reference):+.2f} %" for task, scores in multi.items()]
    print(*(f"read {file} ({selection_of(file)})" for file in files.values()), sep="\n")
    units = common_units(read_results(file)[1] for file in files.values())
    print("", format_table({"single-task": alone, "multi-task": multi}, reference, units), sep="\n")
    print(f"\ndelta_m {gain:+.2f} % = mean of {', '.join(parts)}")


def selection_of(file: Path) -> str:
    """How the weights behind a result file were chosen."""
    return read_results(file)[1].get("selection", UNKNOWN)


def given_score(item: str) -> Results:
    """TASK=SCORE as the results of a run that has this score alone."""
    name, _, text = item.rpartition("=")
    if name not in (known := reference_keys()):
        raise ValueError(f"--single names unknown task(s) {name}; known: {', '.join(known)}")
    try:
        return {known[name][0]: {known[name][1].key: float(text)}}
    except ValueError:
        raise ValueError(f"--single {item}: '{text}' is not a number") from None


def result_files(paths: Sequence[Path]) -> list[Path]:
    """The result file of every run: itself, or of one kind for all folders."""
    folders = [path for path in paths if path.is_dir()]
    inferred = all((folder / INFER).is_file() for folder in folders)
    return [path if path not in folders else path / INFER if inferred else _last_evaluation(path) for path in paths]


def _last_evaluation(folder: Path) -> Path:
    steps = [(int(path.stem.removeprefix("step_")), path) for path in (folder / "results").glob("step_*.json")]
    if not steps:
        raise FileNotFoundError(f"{folder} holds no results/step_N.json: no evaluation of this run is finished")
    return max(steps)[1]


def check_comparable(paths: Iterable[Path]) -> None:
    """Refuses folders of runs with other backbones or data; result files say nothing about theirs."""
    first: dict[str, tuple[str, Path]] = {}
    for path in paths:
        config = path / "config.yaml"
        values = yaml.safe_load(config.read_text(encoding="ascii")) if config.is_file() else {}
        for key in values.keys() & set(COMPARABLE):
            value, other = first.setdefault(key, (values[key], path))
            if values[key] != value:
                raise ValueError(f"{path} has {key} {values[key]} but {other} {value}: the gain compares networks of "
                                 f"one {key}; give the result files instead of the folders to do it all the same")


def check_tasks(multi: Results, rows: Sequence[tuple[str, Results]]) -> None:
    """Refuses what leaves a task of the run without exactly one usable score on the single-task side."""
    seen: dict[str, str] = {}
    for name, results in rows:
        if len(results) != 1:
            raise ValueError(f"--single {name} has the tasks {', '.join(results)}; a single-task run has one")
        task, = results
        if task not in multi:
            raise ValueError(f"--single {name} is of task {task}, which the run lacks; its tasks: {', '.join(multi)}")
        if task in seen:
            raise ValueError(f"--single gives task {task} twice: {name} and {seen[task]}")
        seen[task] = name
    if lacking := [task for task in multi if task not in seen]:
        raise ValueError(f"no single-task run for {', '.join(lacking)}; --single gives {', '.join(seen)}")
    for run, results in [("the multi-task run", multi), *rows]:
        for task, scores in results.items():
            key = TASKS.load(task).main_score(scores).key
            if not math.isfinite(scores[key]):
                raise ValueError(f"{run} has no {key} for {task}: no pixel of its test images was valid")


def _scores(results: Results) -> str:
    return ", ".join(f"{task}/{TASKS.load(task).main_score(scores).key}" for task, scores in results.items())


main = Command(__doc__, report, {
    "run": dict(metavar="RUN", help="folder or result file of the multi-task run"),
    "--single": dict(nargs="+", required=True, metavar="RUN|TASK=SCORE",
                     help="one per task of RUN: folder or result file of a single-task run, or its score"),
})

if __name__ == "__main__":
    sys.exit(main())
