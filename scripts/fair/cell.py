"""One cell of a suite: its learning rate is searched, it is trained and scored by `main.py`, and what came out noted.

Everything is resumable: a finished trial or training is not repeated, an interrupted one goes on.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.fair.suite import Cell
from utils import exits
from utils.engine.config import Config
from utils.engine.results import Results, load_results, read_results, selection_score

MAIN = Path(__file__).resolve().parents[2] / "main.py"
MEMORY = re.compile(r"  mem ([\d.]+)G  eta ")       # of a log line
UNORDERED = re.compile(r"(\S+) does not have a deterministic implementation")         # of a warning of PyTorch
Trial = dict[str, Any]


class CellError(Exception):
    """A program of the cell ended with an error; the message has its last words and the log with the rest."""


class CellLeft(Exception):
    """The training was asked to leave and has saved: the suite ends here, and goes on with the next call."""


@dataclass(frozen=True)
class Place:
    """Where cells run. device: `cpu`, or `cuda:N`, of which a cell sees that one.

    threads: of a process on a CPU. sharing: how many cells run on the device at a time.
    """

    folder: Path
    device: str = "cpu"
    threads: int = 1
    sharing: int = 1

    def environment(self) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": str(self.threads)}
        if self.device.startswith("cuda:"):
            own["CUDA_VISIBLE_DEVICES"] = self.device.removeprefix("cuda:")
        return {**os.environ, **own}


def best_rate(cell: Cell, trials: Sequence[Trial]) -> float:
    """The learning rate of the trial with the highest score."""
    best = max(trials, key=lambda trial: -math.inf if trial["score"] is None else trial["score"])
    if best["score"] is None:
        raise CellError(f"{cell.row}: no learning rate of the search trains it: {list(trials)}")
    return best["lr"]


def run_trial(cell: Cell, rate: float, place: Place) -> Trial:
    """A learning rate, and the selection score that a short training with it has on the images held out.

    The score is null where the training fails or ends in numbers that are not finite, as too high a rate makes it.
    """
    search = cell.suite.suite.search
    folder = place.folder / "search" / f"{cell.row.replace(':', '_').replace('@', '_at_')}-lr{rate:g}"
    done = folder / "score.json"
    if not done.is_file():
        steps = {"max_iter": search.max_iter, "val_interval": search.max_iter, "eval_at_start": False}
        config = cell.config(folder, seed=search.seed, optimizer_kwargs={"lr": rate}, boundary_eval="off", **steps)
        try:
            train(cell.file(folder), config, place)
            score = selection_score(load_results(_evaluations(config)[-1]))
        except CellError as error:
            score, reason = None, str(error)
            (folder / "failed.txt").write_text(reason, encoding="utf-8")
        finite = score is not None and math.isfinite(score)
        done.write_text(json.dumps(score if finite else None), encoding="ascii")
    return {"lr": rate, "score": json.loads(done.read_text(encoding="ascii"))}


def train(experiment: Path, config: Config, place: Place) -> None:
    """Trains the experiment of this file to its end; nothing where that has been done."""
    if not (config.run_dir / "results" / f"step_{config.max_iter}.json").is_file():
        run_main(["--config_exp", str(experiment), "resume=auto", "progress=false"], place,
                 experiment.with_suffix(".train.log"))


def run_main(arguments: list[str], place: Place, log: Path) -> None:
    """CellError with the last line of main.py where it fails, CellLeft where it was asked to leave."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, str(MAIN), *arguments], stdin=subprocess.DEVNULL, stdout=file,
                              stderr=subprocess.STDOUT, env=place.environment(), check=False)
    if done.returncode == exits.CONTINUE:
        raise CellLeft
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise CellError(f"exit status {done.returncode}: {' '.join(last) or 'no output'} ({log})")


def run_cell(cell: Cell, trials: Sequence[Trial], place: Place) -> tuple[Config, dict[str, Any]]:
    """Trains and scores the cell; its experiment, and what a record says of its outcome.

    trials: of its row; the best one's rate is taken, the experiment's own where there are none.
    """
    keys = {"optimizer_kwargs": {"lr": best_rate(cell, trials)}} if trials else {}
    config = cell.config(place.folder, **keys)
    return config, {**outcome_of(cell.file(place.folder), config, place), "search": list(trials)}


def outcome_of(experiment: Path, config: Config, place: Place) -> dict[str, Any]:
    """The training and its one look at the test split."""
    train(experiment, config, place)
    scored = config.run_dir / "infer" / "results.json"
    if not scored.is_file():
        run_main(["--run_mode", "infer", "--trained_model", str(config.run_dir / "last.pt"), "progress=false"], place,
                 experiment.with_suffix(".infer.log"))
    scores, about = read_results(scored)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text(encoding="ascii").splitlines()]
    rates = [row["images_per_s"] for row in rows if row["kind"] == "train"]
    log = (config.run_dir / "log.txt").read_text(encoding="utf-8", errors="replace")
    told = experiment.with_suffix(".train.log").read_text(encoding="utf-8", errors="replace")
    return {
        "experiment": portable(config), "scores": scores, "selection": about["selection"],
        "units": about["units"],
        "curve": [{"step": int(file.stem.removeprefix("step_")), "scores": _in_sum(load_results(file))}
                  for file in _evaluations(config)],
        "losses": [{key: value for key, value in row.items() if key == "step" or key.startswith("loss/")}
                   for row in rows if row["kind"] == "train"],
        "not_deterministic": sorted(set(UNORDERED.findall(told))),
        "cost": {"images_per_s": statistics.median(rates) if rates else None,
                 "memory_gib": max(map(float, MEMORY.findall(log)), default=None)},
    }


def portable(config: Config) -> dict[str, Any]:
    """The experiment without the places of this machine: where the run lies, and an absolute path of the data."""
    values = config.to_dict()
    del values["out_dir"]
    if Path(values["db_root"]).is_absolute():
        del values["db_root"]
    return values


def _in_sum(results: Results) -> Results:
    """Without the scores of single classes, `IoU/3`."""
    return {task: {key: value for key, value in scores.items() if "/" not in key} for task, scores in results.items()}


def _evaluations(config: Config) -> list[Path]:
    """Result files of a training, in their order."""
    return sorted((config.run_dir / "results").glob("step_*.json"), key=lambda f: int(f.stem.removeprefix("step_")))
