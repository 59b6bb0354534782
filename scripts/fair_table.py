"""The fair table: every decoder on one backbone, under one training loop, with several seeds, from one command.

    python scripts/fair_table.py configs/suites/rooms.yml                     # what is not there yet, then the page
    python scripts/fair_table.py configs/suites/rooms.yml --only 'bim-*' --jobs 2
    python scripts/fair_table.py configs/suites/people.yml --devices cuda:0 cuda:1 --jobs 4   # four at a time on each
    python scripts/fair_table.py configs/suites/rooms.yml --list
    python scripts/fair_table.py configs/suites/rooms.yml --page              # from the records alone
    python scripts/fair_table.py configs/suites/rooms.yml --again RECORD.json # one cell again, against its record
    python scripts/fair_table.py configs/suites/rooms.yml --strip photo.jpg   # what all decoders say of a picture
    python scripts/fair_table.py configs/suites/smoke.yml --check             # all cells again, against the records

Each cell (decoder x backbone x seed, and networks of one task each) is a normal run of main.py in a folder of its own
below --work; a finished one is kept, an interrupted one goes on, a failed one is told and skipped. docs/results/SUITE/
receives a sealed record per cell and the page. Records that differ in data, schedule, image size, weights or rule of
selection are refused. docs/fair_table.md says what a suite file holds.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.fair.cell import CellError, CellLeft, Place, outcome_of, run_cell, run_trial
from scripts.fair.page import results_folder, write_page
from scripts.fair.records import (
    RecordError,
    experiment_file,
    read_record,
    read_records,
    record_of,
    same_scores,
    write_record,
)
from scripts.fair.strip import STRIP, draw_strip
from scripts.fair.suite import Cell, LoadedSuite, checked_cells, load_suite
from utils import exits
from utils.engine.config import Config, load_config
from utils.engine.results import selection_score


def fair_table(suite: Path, only: Sequence[str], share: str, devices: Sequence[str], jobs: int, work: Path,
               results: Path | None, list: bool, page: bool, again: Path | None, strip: Path | None,
               check: bool) -> int:
    """Does what is asked; 1 where a cell failed or differs, `exits.CONTINUE` where the suite was asked to leave."""
    loaded = load_suite(suite)
    results, work = results or results_folder(loaded), work / loaded.name
    if again is not None:
        return repeat(again, loaded, _places(devices, 1, work)[0])
    if page:
        print(f"wrote {write_page(loaded, _records(results), results)}")
        return 0
    cells = checked_cells(loaded, work, only, _share(share))
    if list:
        for cell, _ in cells:
            print(f"{'recorded' if (results / f'{cell.name}.json').is_file() else 'missing':9}{cell.name}")
        return 0
    places = _places(devices, jobs, work)
    if strip is not None:
        print(f"wrote {results / STRIP}: {draw_strip(cells, strip, places[0].device, results / STRIP)} row(s)")
        return 0
    try:
        if check:
            with tempfile.TemporaryDirectory() as fresh:
                return compare(cells, [replace(place, folder=Path(fresh)) for place in places], results)
        missing = [(cell, config) for cell, config in cells if not (results / f"{cell.name}.json").is_file()]
        failed = run_all(missing, places, results)
    except (CellLeft, KeyboardInterrupt):
        print("stopped; what was trained is kept, and the same command goes on", file=sys.stderr)
        return exits.CONTINUE
    if _share(share)[1] == 1:
        print(f"wrote {write_page(loaded, _records(results), results)}")
    return 1 if failed else 0


def run_all(cells: Sequence[tuple[Cell, Config]], places: Sequence[Place], results: Path) -> dict[str, str]:
    """Runs these cells, as many at a time as there are places; name -> reason of those that failed.

    First the trials of the learning rates, once for each row, none where a record of the row has them; then the
    cells, in their order. A training that was asked to leave, and Ctrl-C, end the suite: no further cell begins.
    """
    recorded = {(record["row"], trial["lr"]): trial for record in read_records(results).values()
                for trial in record["search"]}
    failed: dict[str, str] = {}
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    def somewhere(work: Callable[[Place], Any]) -> Any:
        place = free.get()
        try:
            return work(place)
        finally:
            free.put(place)

    def run(cell: Cell, trials: Sequence[Future], place: Place) -> str:
        try:
            config, outcome = run_cell(cell, [trial.result() for trial in trials], place)
            write_record(results / f"{cell.name}.json", record_of(cell, config, outcome, place))
            return f"score {selection_score(outcome['scores']):.4f}"
        except (CellError, ValueError, OSError) as error:
            failed[cell.name] = str(error)
            return f"FAILED: {error}"

    with ThreadPoolExecutor(len(places)) as pool:
        # Trials were handed in before the cells that wait for them: they are over, or run in another thread.
        rows = {cell.row: cell for cell, _ in reversed(cells)}
        trials = {row: [pool.submit(recorded.get, (row, rate)) if (row, rate) in recorded else
                        pool.submit(somewhere, partial(run_trial, rows[row], rate))
                        for rate in rows[row].suite.suite.search.lr] for row in dict.fromkeys(c.row for c, _ in cells)}
        futures = {pool.submit(somewhere, partial(run, cell, trials[cell.row])): cell.name for cell, _ in cells}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                print(f"[{number}/{len(cells)}] {futures[future]}: {future.result()}", flush=True)
        except (CellLeft, KeyboardInterrupt):
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        print(f"{len(failed)} of {len(cells)} cell(s) failed; the same command tries them again", file=sys.stderr)
    return failed


def repeat(path: Path, loaded: LoadedSuite, place: Place) -> int:
    """Trains and scores a recorded cell once more, in a folder that is removed, and prints which scores differ.

    With as many threads as the record says: their number decides the order of sums on a CPU. Where the data lie the
    suite says, if its `db_root` does.
    """
    common = loaded.suite.common
    data = {"db_root": common["db_root"]} if "db_root" in common else {}
    record = read_record(path)
    place = replace(place, threads=record["threads"])
    with tempfile.TemporaryDirectory() as fresh:
        file = Path(fresh) / f"{path.stem}.yml"
        experiment_file(record, file, out_dir=fresh, version_name=path.stem, resume="never", **data)
        scores = outcome_of(file, load_config(file), replace(place, folder=Path(fresh)))["scores"]
    differences = same_scores(record, scores)
    print(*differences, sep="\n")
    print(f"{path.stem}: {len(differences)} score(s) differ from the record's, of {sum(map(len, scores.values()))}")
    return 1 if differences else 0


def compare(cells: Sequence[tuple[Cell, Config]], places: Sequence[Place], results: Path) -> int:
    """Trains cells again: each must beat its own untrained scores and stay within the suite's band of its record."""
    fresh, wrong = places[0].folder / "records", 0
    failed = run_all(cells, places, fresh)
    for cell, _ in cells:
        if cell.name in failed:
            continue
        record, now = read_record(results / f"{cell.name}.json"), read_record(fresh / f"{cell.name}.json")
        first, last = (selection_score(point["scores"]) for point in (now["curve"][0], now["curve"][-1]))
        reasons = [f"learned nothing: {first:.4f} before, {last:.4f} after"] if not last > first else []
        if (gap := abs(selection_score(now["scores"]) - selection_score(record["scores"]))) > cell.suite.suite.band:
            reasons.append(f"is {gap:.3f} away from its record (band {cell.suite.suite.band:g})")
        wrong += bool(reasons)
        print(f"{cell.name}: {'; '.join(reasons) or f'ok, {first:.3f} -> {last:.3f}, {gap:.3f} from its record'}")
    return 1 if wrong or failed else 0


def _records(folder: Path) -> dict[str, dict]:
    records = read_records(folder)
    if not records:
        raise RecordError(f"{folder} has no records yet: nothing to write a page from")
    return records


def _places(devices: Sequence[str], jobs: int, work: Path) -> list[Place]:
    """`jobs` on each device, which share the machine's threads."""
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    for device in devices:
        if device not in ("cpu", *known):
            raise ValueError(f"--devices {device}: this machine has {', '.join(known)}")
    chosen = list(devices or known) * jobs
    threads = max(1, torch.get_num_threads() // len(chosen))
    return [Place(work, device, threads, jobs) for device in chosen]


def _share(text: str) -> tuple[int, int]:
    which, _, of = text.partition("/")
    if not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise ValueError(f"--share {text}: give I/N, the I-th (from 0) of N parts of the rows, such as 0/4")
    return int(which), int(of)


main = Command(__doc__, fair_table, {
    "suite": dict(type=Path, metavar="SUITE.yml"),
    "--only": dict(nargs="+", default=(), metavar="PATTERN", help="cells of these names"),
    "--share": dict(default="0/1", metavar="I/N", help="the I-th of N parts of the rows, for arrays of jobs"),
    "--devices": dict(nargs="+", default=(), metavar="DEVICE", help="cuda:0 cuda:1 ...; default: all, else the CPU"),
    "--jobs": dict(type=int, default=1, metavar="N", help="cells at a time on each device"),
    "--work": dict(type=Path, default=Path("runs/suites"), metavar="DIR", help="where the runs lie"),
    "--results": dict(type=Path, metavar="DIR", help="where the records lie; default: docs/results/SUITE"),
    "--list": dict(action="store_true", help="the cells, and which of them are recorded"),
    "--page": dict(action="store_true", help="write the page from the records, run nothing"),
    "--again": dict(type=Path, metavar="RECORD", help="repeat one recorded cell and compare"),
    "--strip": dict(type=Path, metavar="PICTURE", help="what every decoder says of a picture, from the runs in --work"),
    "--check": dict(action="store_true", help="train all cells again and compare with their records"),
})

if __name__ == "__main__":
    sys.exit(main())
