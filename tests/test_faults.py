"""A short form of the campaigns in scripts/faults: real processes, really hit."""

import random
import subprocess
import sys

import pytest

from scripts.faults import damage, signals
from scripts.faults.kills import in_a_save
from scripts.faults.runs import Stage, differences, in_group, last_step, of_experiment
from utils.engine.manifest import newest_whole

SHORT = {"max_iter": 9, "val_interval": 4, "save_interval": {"steps": 3, "minutes": 0}, "checkpoint_interval": 0}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("stage"), num_val=8)


@pytest.fixture(scope="module")
def quiet(stage):
    done = stage.start(stage.experiment("quiet", **SHORT), ranks=2)
    assert done.wait(120) and set(done.codes.values()) == {0}, done.text()
    return stage.run_dir("quiet")


def test_killed_in_a_save_and_between_two(stage, quiet):
    """Two processes, a moving average, workers: the end is that of a quiet run, bit for bit."""
    command = [*stage.experiment("killed", **SHORT), "--resume"]
    for trap in (in_a_save(14, writing=False), in_a_save(500, writing=True), None):
        run = stage.start(command, ranks=2, trap=trap)
        assert run.wait(120), run.text()
        assert (set(run.codes.values()) == {0}) == (trap is None), run.text()
    assert "resumed at step" in run.text() and differences(stage.run_dir("killed"), quiet) == []


@pytest.mark.parametrize("number, target, phase, workers, ranks", [
    ("SIGTERM", "group", "training", 2, 2), ("SIGUSR1", "process", "evaluating", 0, 1),
    ("SIGINT", "group", "saving", 1, 1)])
def test_a_signal_saves(stage, monkeypatch, number, target, phase, workers, ranks):
    monkeypatch.setattr(signals, "WITHIN_S", 60)      # the campaign's 10 s are for a machine that does nothing else
    *wrong, took = signals.hit(stage, random.Random(0), number, target, phase, workers, ranks)
    assert wrong == [], took


def test_processes_of_an_experiment_are_found_and_no_others(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path / "a.yml")]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while process.pid not in of_experiment(command[-1]):
                assert process.poll() is None
            assert of_experiment(command[-1]) == [process.pid] and in_group(process.pid) == [process.pid]
            assert of_experiment(str(tmp_path / "b.yml")) == []
        finally:
            process.kill()
    assert of_experiment(command[-1]) == []


def test_another_number_of_processes_goes_on_with_the_same_images(stage, quiet):
    """Two processes stop after update 4, one goes on: half the images per pass, twice the passes."""
    run = stage.start([*stage.experiment("fewer", **{**SHORT, "max_iter": 5}), "--resume"], ranks=2)
    assert run.wait(120), run.text()
    run = stage.start([*stage.experiment("fewer", **SHORT), "--resume"])
    assert run.wait(120) and set(run.codes.values()) == {0}, run.text()
    assert "9 updates of 4 images (trBatch 2 x 1 process(es) x 2 accumulation)" in run.text()
    assert last_step(stage.run_dir("fewer")) == 9


def test_damaged_folders(stage, quiet, capsys):
    assert damage.campaign(files=10, seed=1) == 0, capsys.readouterr().out


def test_two_runs_in_one_folder(stage):
    slow = stage.start(stage.experiment("twice", max_iter=100000, val_interval=100000, log_interval=1))
    while last_step(stage.run_dir("twice")) < 2:
        assert not slow.poll(), slow.text()
    for arguments in ([], ["--resume"]):
        second = stage.start([*stage.experiment("twice"), *arguments])
        assert second.wait(60) and set(second.codes.values()) == {1}
        assert f"is in use by process {slow.pids[0]} on" in second.text() and "Traceback" not in second.text()
    slow.kill(15)
    assert slow.wait(60) and newest_whole(stage.run_dir("twice")) is not None
