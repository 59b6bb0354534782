"""scripts/fair_table.py: suites, their cells, records and pages; trainings of a few steps on the example data."""

import json
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

import main as program
from models.decoders import DECODERS
from scripts import fair_table
from scripts.fair import cell as cell_module
from scripts.fair.page import write_page
from scripts.fair.records import RecordError, read_record, read_records, require_comparable, write_record
from scripts.fair.strip import draw_strip
from scripts.fair.suite import checked_cells, load_suite
from tests.conftest import TINY
from tests.shared import ROOT
from utils import exits
from utils.engine.cost import counted
from utils.engine.yaml_files import apply_overrides
from utils.options import ConfigError

SUITES = sorted(path for path in (ROOT / "configs" / "suites").glob("*.yml") if not path.name.startswith("_"))


@pytest.fixture
def suite(example_root, tmp_path):
    """Writes a suite of two decoders on two tasks, with some keys changed; returns its file."""
    def write(**changed):
        common: dict = {}
        apply_overrides(common, {}, [item for item in TINY if not item.startswith(("backbone", "model", "optimizer"))])
        common |= {"train_db_name": "NYUD", "db_root": str(example_root), "max_iter": 2, "val_interval": 2,
                   "log_interval": 1, "eval_at_start": True, "val_from_train": 0.25, "boundary_infer": "off",
                   "task_dictionary": {"include_semseg": True, "include_depth": True}}
        swin = {"backbone_kwargs": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
                                    "window_size": 4}}
        values = {"title": "Tiny", "about": "Nothing.", "common": common, "backbones": {"swin": swin},
                  "decoders": {"fcn": {}, "multi_scale": {"model_kwargs": {"channels": 8}}}, "single_task": "fcn",
                  "seeds": [0], "search": {"lr": [1e-3, 1e-2], "max_iter": 1, "seed": 7}}
        path = tmp_path / "tiny.yml"
        path.write_text(yaml.safe_dump({**values, **changed}))
        return path
    return write


@pytest.fixture
def in_process(monkeypatch):
    """main.py without a process of its own; counts the calls."""
    calls = []

    def run(arguments, place, log):
        calls.append(arguments)
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        log.write_text("told\n")
        try:
            program.main()
        except SystemExit as end:
            if end.code:
                raise cell_module.CellError(f"exit status {end.code}") from end

    monkeypatch.setattr(cell_module, "run_main", run)
    return calls


def test_a_suite_is_run_recorded_and_written_up(suite, in_process, tmp_path, capsys):
    where = ["--work", str(tmp_path / "runs"), "--results", str(tmp_path / "records"), "--jobs", "1"]
    assert fair_table.main([str(suite()), *where]) == 0
    records = read_records(tmp_path / "records")
    assert list(records) == ["fcn-swin-seed0", "fcn-swin-single-depth-seed0", "fcn-swin-single-semseg-seed0",
                             "multi_scale-swin-seed0"]
    # Four rows: two trials, a training and a score each.
    assert len(in_process) == 4 * (2 + 2)
    record = records["multi_scale-swin-seed0"]
    assert [trial["lr"] for trial in record["search"]] == [1e-3, 1e-2]
    best = max(record["search"], key=lambda trial: trial["score"])["lr"]
    assert record["experiment"]["optimizer_kwargs"]["lr"] == best
    assert record["selection"] == "last update" and [point["step"] for point in record["curve"]] == [0, 2]
    assert "out_dir" not in record["experiment"] and str(tmp_path) not in json.dumps(record)
    assert record["data"]["train"]["images"] == 9 and record["data"]["test"]["images"] == 5
    assert record["cost"]["parameters"] > 1000 and record["cost"]["gmacs"] > 0 and record["cost"]["images_per_s"] > 0
    page = (tmp_path / "records" / "README.md").read_text()
    assert "| multi_scale-swin | 1 |" in page and "delta_m % ^" in page and "| fcn-swin-single-depth | 1 |" in page
    before = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    # Nothing is run twice, and the page comes from the records alone.
    assert fair_table.main([str(suite()), *where]) == 0 and len(in_process) == 16
    assert fair_table.main([str(suite()), *where, "--page"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before
    # A row per decoder of what they say of a picture; only then has the page one.
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    assert fair_table.main([str(suite()), *where, "--strip", str(tmp_path / "red.png")]) == 0
    with Image.open(tmp_path / "records" / "strip.jpg") as strip:
        assert strip.size == (3 * 154, 2 * (18 + 100 + 4)) and strip.getpixel((70, 60))[0] > 240
    assert "strip.jpg" not in page and fair_table.main([str(suite()), *where, "--page"]) == 0
    assert "](strip.jpg)" in (tmp_path / "records" / "README.md").read_text()
    # One cell from its record alone: equal to the last digit.
    capsys.readouterr()
    again = tmp_path / "records" / "multi_scale-swin-seed0.json"
    assert fair_table.main([str(suite()), *where, "--again", str(again)]) == 0
    assert "0 score(s) differ from the record's" in capsys.readouterr().out
    record["scores"]["depth"]["rmse"] += 1e-9
    write_record(again, record)
    assert fair_table.main([str(suite()), *where, "--again", str(again)]) == 1
    assert "depth/rmse:" in capsys.readouterr().out


def test_a_cell_that_fails_is_told_and_the_others_run(suite, in_process, tmp_path, capsys):
    file = suite(search={}, single_task="", decoders={"fcn": {}, "mlore": {}})       # MLoRE wants maps of one stride
    where = ["--work", str(tmp_path / "runs"), "--results", str(tmp_path / "records"), "--jobs", "1"]
    assert fair_table.main([str(file), *where]) == 1
    told = capsys.readouterr()
    assert "mlore-swin-seed0: FAILED: exit status" in told.out and "1 of 2 cell(s) failed" in told.err
    assert list(read_records(tmp_path / "records")) == ["fcn-swin-seed0"]


def test_a_training_that_is_asked_to_leave_ends_the_suite(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cell_module.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], exits.CONTINUE))
    file = suite(search={}, single_task="")
    assert fair_table.main([str(file), "--work", str(tmp_path), "--results", str(tmp_path / "records")]) == 75
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "records").exists()


def test_cells_share_a_device_and_a_row_is_searched_once(suite, monkeypatch, tmp_path):
    at_work, most, trials, given = set(), [], [], {}

    def busy(name):
        at_work.add(name)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.remove(name)

    def trial(cell, rate, place):
        busy((cell.row, rate))
        trials.append((cell.row, rate))
        return {"lr": rate, "score": -rate}

    def run(cell, found, place):
        busy(cell.name)
        given[cell.name] = [t["lr"] for t in found], place
        return None, {"scores": {"depth": {"rmse": 1.0}}}

    monkeypatch.setattr(fair_table, "run_trial", trial)
    monkeypatch.setattr(fair_table, "run_cell", run)
    monkeypatch.setattr(fair_table, "record_of", lambda *_: {})
    monkeypatch.setattr(fair_table, "write_record", lambda *_: None)
    # Two trials of a row are in a record that is there.
    kept = {"row": "fcn-swin", "search": [{"lr": 1e-3, "score": 1.0}, {"lr": 1e-2, "score": 2.0}]}
    monkeypatch.setattr(fair_table, "read_records", lambda _: {"fcn-swin-seed5": kept})
    cells = checked_cells(load_suite(suite(seeds=[0, 1])), tmp_path)
    assert fair_table.run_all(cells, fair_table._places(["cpu"], 3, tmp_path), tmp_path) == {}
    assert len(trials) == len(set(trials)) == 6
    assert {row for row, _ in trials} == {cell.row for cell, _ in cells} - {"fcn-swin"}
    assert set(given) == {cell.name for cell, _ in cells} and max(most) == 3
    assert all(rates == [1e-3, 1e-2] and place.sharing == 3 for rates, place in given.values())


def test_the_page_says_what_a_repetition_may_differ_by(suite, tmp_path):
    records = records_of(2)
    loaded = load_suite(suite(search={}))
    page = write_page(loaded, records, tmp_path).read_text()
    assert "\n- deterministic arithmetic\n" in page and "| training images/s |" in page
    records["r1"]["not_deterministic"] = ["grid_sampler_2d_backward_cuda"]
    records["r1"]["sharing"] = 12
    page = write_page(loaded, records, tmp_path).read_text()
    assert "deterministic arithmetic, but for grid_sampler_2d_backward_cuda (fcn-swin)\n" in page
    assert "cells at a time on it: 1, 12" in page and "images/s" not in page
    for record in records.values():
        record["experiment"]["deterministic"] = False
    assert "whose last digits may differ from run to run" in write_page(loaded, records, tmp_path).read_text()
    for record in records.values():
        record["machine"] = "a processor, 1 of 2 thread(s)"
    assert "depend on the number of threads alone" in write_page(loaded, records, tmp_path).read_text()


def test_memory_and_speed_are_of_one_machine(suite, tmp_path):
    records = records_of(3)
    records["r1"].update(machine="a processor, 1 of 2 thread(s)", sharing=2)
    records["r1"]["cost"].update(memory_gib=9.0)
    page = write_page(load_suite(suite(search={})), records, tmp_path).read_text()
    assert "- machine: m, CUDA 1; cells at a time on it: 1; 2 networks\n" in page
    assert "- machine: a processor, 1 of 2 thread(s); cells at a time on it: 2; rows and seeds: fcn-swin (1)\n" in page
    assert "deterministic arithmetic; arithmetic of a CPU, whose digits depend" in page
    assert "| memory, GiB (m, CUDA 1) |" in page and "9.0" not in page
    assert "/r1.json\n```" in page                       # a cell that repeats to the last digit


def test_check_compares_with_the_records(suite, in_process, tmp_path, capsys):
    file = suite(search={}, single_task="", decoders={"fcn": {}}, ranked=False)
    where = ["--work", str(tmp_path / "runs"), "--results", str(tmp_path / "records"), "--jobs", "1"]
    assert fair_table.main([str(file), *where]) == 0
    path = tmp_path / "records" / "fcn-swin-seed0.json"
    assert fair_table.main([str(file), *where, "--check"]) == 0
    assert "fcn-swin-seed0: ok, " in (line := capsys.readouterr().out.splitlines()[-1]) and ", 0.000 from" in line
    record = read_record(path)
    record["scores"]["depth"]["rmse"] *= 3
    write_record(path, record)
    assert fair_table.main([str(file), *where, "--check"]) == 1
    assert "away from its record (band 0.1)" in capsys.readouterr().out


def records_of(number=2):
    """Records that agree, as far as they must."""
    experiment = {"model": "fcn", "backbone": "swin", "backbone_kwargs": {}, "neck": "none", "neck_kwargs": {},
                  "task_dictionary": {"edge_w": 0.95}, "optimizer_kwargs": {"lr": 1e-3}, "max_iter": 10, "trBatch": 2,
                  "loss_kwargs": {"loss_weights": {}}, "train_db_name": {"folder": "here", "images": "x"},
                  "val_db_name": "NYUD", "image_size": [64, 96], "global_batch": 0, "precision": "fp32",
                  "optimizer": "adamw", "scheduler": "poly", "deterministic": True}
    return {f"r{seed}": json.loads(json.dumps({
        "format": 1, "row": "fcn-swin", "decoder": "fcn", "backbone": "swin", "seed": seed, "task": "", "commit": "c",
        "date": "2000-01-01", "machine": "m, CUDA 1", "threads": 1, "sharing": 1,
        "data": {"train": {"sha256": "a", "images": 1}, "test": {"sha256": "b", "images": 1}},
        "backbone_weights": "random", "experiment": experiment, "selection": "last update", "search": [],
        "not_deterministic": [], "units": {}, "scores": {"depth": {"rmse": 0.5 + seed / 10}}, "curve": [], "losses": [],
        "cost": {"images_per_s": 1.0, "memory_gib": None, "parameters": 5, "gmacs": 0.1}})) for seed in range(number)}


@pytest.mark.parametrize("change, words", [
    (lambda r: r["experiment"].update(max_iter=20), "max_iter is 20 in the first and 10 in the second"),
    (lambda r: r["experiment"].update(image_size=[32, 32]), "image_size is"),
    (lambda r: r["data"]["test"].update(sha256="other"), r"data is .*\(tasks depth\)"),
    (lambda r: r.update(backbone_weights="other"), r"weights of the backbone is .*\(backbone swin\)"),
    (lambda r: r.update(selection="best on the test split"), "selection rule is"),
    (lambda r: r["experiment"]["optimizer_kwargs"].update(weight_decay=1), "optimizer_kwargs is"),
    (lambda r: r["experiment"]["train_db_name"].update(images="y"), "train_db_name is"),
])
def test_records_that_must_not_be_ranked_together(change, words):
    records = records_of()
    change(records["r1"])
    with pytest.raises(RecordError, match=f"r1 and r0 cannot stand in one table: {words}"):
        require_comparable(records)


def test_records_may_differ_in_the_decoder_the_rate_and_the_place():
    records = records_of()
    records["r1"]["experiment"].update(model="bim", model_kwargs={"x": 1}, seed=1, nworkers=9)
    records["r1"]["experiment"]["optimizer_kwargs"]["lr"] = 5
    records["r1"]["experiment"]["train_db_name"]["folder"] = "there"
    require_comparable(records)


def test_mean_spread_and_single_runs_by_hand(suite, tmp_path):
    loaded = load_suite(suite(search={}))
    write_page(loaded, records_of(3), tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| fcn-swin | 3 | 0.6000 +- 0.1000 |" in page        # of 0.5, 0.6 and 0.7
    single = records_of(4)["r3"] | {"task": "depth", "row": "fcn-swin-single-depth"}      # 0.8
    write_page(loaded, {**records_of(2), "s": single}, tmp_path)
    gains = [100 * (0.8 - score) / 0.8 for score in (0.5, 0.6)]
    spread = abs(gains[0] - gains[1]) / 2**0.5
    assert f"| {sum(gains) / 2:+.2f} +- {spread:.2f} |" in (tmp_path / "README.md").read_text()


def test_a_record_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, records_of(1)["r0"])
    assert read_record(path)["seed"] == 0
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(RecordError, match="a.json is not what was written: its seal does not fit its content"):
        read_record(path)
    path.write_text("{}")
    with pytest.raises(RecordError, match="is no record of a cell"):
        read_record(path)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_is_whole(path, tmp_path):
    """Each cell's experiment is read and checked; the photographs need not be there."""
    cells = checked_cells(load_suite(path), tmp_path)
    decoders = {cell.decoder for cell, _ in cells}
    assert set(DECODERS) - decoders <= {"taskprompter", *(["taskdiffusion"] if path.stem == "six_tasks" else [])}
    names = [cell.name for cell, _ in cells]
    assert len(set(names)) == len(names) and not set("/:@ ") & set("".join(names))


def test_every_decoder_of_the_nightly_suite_can_be_built_and_counted(tmp_path):
    for cell, config in checked_cells(load_suite(ROOT / "configs" / "suites" / "smoke.yml"), tmp_path):
        assert counted(config).total > 0.1, cell.name


def test_shares_of_a_suite_are_whole_rows(suite, tmp_path):
    loaded = load_suite(suite(seeds=[0, 1]))
    shares = [{(cell.row, cell.seed) for cell, _ in checked_cells(loaded, tmp_path, share=(i, 3))} for i in range(3)]
    assert {cell for share in shares for cell in share} == {(cell.row, cell.seed) for cell, _ in
                                                            checked_cells(loaded, tmp_path)}
    assert sum(map(len, shares)) == 8 and [len({row for row, _ in share}) for share in shares] == [2, 1, 1]
    [(only, _)] = checked_cells(loaded, tmp_path, only=["multi*seed1"])
    assert only.name == "multi_scale-swin-seed1"
    with pytest.raises(ConfigError, match="--only bim: no cell of .*tiny.yml is called so; the first of 8 is fcn"):
        checked_cells(loaded, tmp_path, only=["bim"])


def test_a_strip_needs_weights(suite, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "black.png")
    with pytest.raises(FileNotFoundError, match=r"no cell of the suite has weights, such as .*fcn-swin-seed0/last\.pt"):
        draw_strip(checked_cells(load_suite(suite()), tmp_path), tmp_path / "black.png", "cpu", tmp_path / "strip.jpg")


@pytest.mark.parametrize("changed, words", [
    ({"seedz": [1]}, "unknown key 'seedz'; did you mean 'seeds'?"),
    ({"single_task": "bim"}, "'single_task' must be one of the decoders"),
    ({"seeds": [0, 7]}, "without search.seed"),
    ({"decoders": {"fcm": {}}, "single_task": ""}, "the cell fcm-swin-seed0: .*did you mean 'fcn'"),
    ({"decoders": {"fcn": {"model_kwargs": {"widht": 3}}}}, "the cell fcn-swin-seed0: .*unknown key 'model_kwargs.wid"),
])
def test_a_mistake_is_told_before_anything_is_run(suite, changed, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        checked_cells(load_suite(suite(**changed)), tmp_path)
