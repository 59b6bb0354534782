"""What a run writes about itself: log lines, metrics.jsonl, and durations in words."""

import json
import logging
import math
import re

import numpy as np
import pytest

from utils.logging import RunWriter, duration, setup_logging


@pytest.fixture(autouse=True)
def root_logger():
    """Puts back the handlers of the process, whatever a test has set up."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield root
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "0s"), (38.9, "38s"), (59, "59s"), (60, "1m00"), (725, "12m05"), (3599, "59m59"), (3600, "1h00"),
    (27_659, "7h40"), (90_061, "25h01")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_rank_0_logs_to_the_terminal_and_to_a_file_that_grows(tmp_path, capsys, root_logger):
    for text in ("one", "two"):
        setup_logging(True, tmp_path)
        logging.getLogger("utils.engine").info(text)
        logging.getLogger("utils.engine").debug("never")
        logging.getLogger("PIL").info("never")
    written = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"\d\d:\d\d:\d\d one\n\d\d:\d\d:\d\d two\n", written)
    assert capsys.readouterr().out == written and len(root_logger.handlers) == 2
    setup_logging(True)
    logging.getLogger("PIL").warning("on the terminal only")
    assert capsys.readouterr().out.endswith(" on the terminal only\n") and (tmp_path / "log.txt").read_text() == written


def test_other_ranks_are_silent(tmp_path, capsys, root_logger):
    setup_logging(False, tmp_path)
    logging.getLogger("utils.engine").error("unheard")
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == [] and len(root_logger.handlers) == 1


def test_scalars_are_json_lines_that_are_appended(tmp_path):
    for step in (1, 2):
        writer = RunWriter(tmp_path, tensorboard=False)
        writer.scalars("train", step, {"loss": 0.5, "grad_norm": math.nan, "other": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()      # written before the writer is closed
        writer.image("x", step, np.zeros((2, 2, 3), np.uint8))
        writer.close()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "step": step, "loss": 0.5, "grad_norm": None, "other": None} for step in (1, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_writer_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = RunWriter(None, tensorboard=True)
    writer.scalars("train", 1, {"loss": 1.0})
    writer.image("x", 1, np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_the_same_scalars_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    writer = RunWriter(tmp_path, tensorboard=True)
    writer.scalars("eval", 3, {"depth/rmse": 0.25})
    writer.image("panel", 3, np.zeros((4, 6, 3), np.uint8))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/depth/rmse")] == [(3, 0.25)]
    [picture] = events.Images("panel")
    assert (picture.step, picture.height, picture.width) == (3, 4, 6)
