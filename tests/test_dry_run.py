"""The rehearsal of a run: what it says, that nothing stays, and what it finds."""

import json
import shutil
import time

import pytest

import main
from tests.processes import on_ranks, run_main
from tests.test_train import NYUD
from utils.engine.config import load_config
from utils.engine.dry_run import Needs, dry_run
from utils.engine.manifest import LAST
from utils.engine.train import train
from utils.machine import in_words


def test_needs_by_hand():
    needs = Needs(update=0.5, images=8, evaluation=10.0, saving=1.0, checkpoint=100, memory=None, updates=1000,
                  evaluations=4, checkpoints=5, free=0)
    assert (needs.total, needs.disk) == (540.0, 600)
    assert [in_words(size) for size in (None, 3 * 2**30, 2**20 * 52)] == ["?", "3.0G", "0.05G"]


def test_a_rehearsal_says_what_the_run_will_need_and_leaves_nothing(monkeypatch, tiny, tmp_path, capsys):
    arguments = [*tiny, "max_iter=6", "checkpoint_interval=2", "val_interval=4", "ema_decay=0.9"]
    monkeypatch.setattr("sys.argv", ["main.py", "--config_exp", NYUD, "--dry_run", *arguments])
    before = {path for path in tmp_path.rglob("*")}
    main.main()
    assert {path for path in tmp_path.rglob("*")} == before
    said = capsys.readouterr().out
    for words in ("dry run of bim_nyud: everything works", "for 2 images", "for 6 updates and 2 evaluations",
                  "for 6 checkpoints and one being written"):
        assert words in said
    config = load_config(NYUD, arguments)
    needs = dry_run(config)
    train(config, resume=False)
    size = (config.run_dir / LAST).stat().st_size
    assert abs(needs.checkpoint - size) < 0.02 * size       # the run's holds metrics, too
    assert needs.update > 0 and needs.evaluation > 0 and needs.free > size and needs.memory > 2**20


def test_a_rehearsal_of_a_run_that_is_there_touches_nothing(tiny):
    config = load_config(NYUD, [*tiny, "max_iter=1"])
    train(config, resume=False)

    def files() -> dict:        # but the log, which is this process's until a run takes it
        found = [path for path in config.run_dir.parent.rglob("*") if path.is_file() and path.name != "log.txt"]
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    dry_run(config)
    assert files() == before


def test_a_rehearsal_on_two_processes(tiny, tmp_path):
    said = run_main(["--config_exp", NYUD, "--dry_run", *tiny], processes=2)
    assert said.count("everything works") == 1 and "for 4 images" in said
    assert not (tmp_path / "runs").exists()


def late_rehearsal(rank: int, tiny: list[str]) -> None:
    """One process is slower than the one that removes the folder."""
    if rank == 1:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda folder: time.sleep(0.5) or usage(folder)
    dry_run(load_config(NYUD, tiny))


def test_the_folder_of_a_rehearsal_stays_until_no_process_needs_it(tiny, tmp_path):
    on_ranks(late_rehearsal, 2, tiny)
    assert not (tmp_path / "runs").exists()


def test_a_rehearsal_finds_what_would_break_the_run(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match="the first updates already have losses or gradients that are not fin"):
        dry_run(load_config(NYUD, [*tiny, "loss_kwargs.loss_weights={semseg: 1e38, depth: 1e38, normals: 1, edge: 1}"]))
    with pytest.raises(FileNotFoundError, match="data folder not found"):
        dry_run(load_config(NYUD, [*tiny, "db_root=/nowhere"]))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_ends_before_its_checkpoint_is_refused(tiny):
    config = load_config(NYUD, [*tiny, "max_iter=2", "val_interval=2"])
    train(config, resume=False)
    with pytest.raises(ValueError, match=r"last\.pt holds step 2, but the run ends after 1 updates"):
        train(load_config(NYUD, [*tiny, "max_iter=1"]), resume=True)
    train(config, resume=True)
    mistyped = load_config(NYUD, [*tiny, "max_iter=1", "version_name=bim_nyuda"])
    train(mistyped, resume=True)
    assert "nothing to resume in" in (log := (mistyped.run_dir / "log.txt").read_text()) and "holds bim_nyud)" in log
    assert "all updates have been made, nothing is left to train" in (config.run_dir / "log.txt").read_text()
    assert json.loads((config.run_dir / "results" / "step_2.json").read_text())["step"] == 2
