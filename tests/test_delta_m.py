"""The multi-task gain of runs: formula and signs, which files are read, what is refused."""

import subprocess
import sys

import pytest
import yaml

from scripts.delta_m import main
from tests.shared import ROOT
from utils.engine.results import save_results

MULTI = {"semseg": {"mIoU": 0.55, "valid_pixels": 9}, "depth": {"rmse": 0.54, "valid_pixels": 9},
         "normals": {"mean": 20.0, "valid_pixels": 9}}
SINGLE = {"semseg": {"mIoU": 0.5, "valid_pixels": 9}, "depth": {"rmse": 0.6, "valid_pixels": 9},
          "normals": {"mean": 16.0, "valid_pixels": 9}}


def make_run(folder, results, backbone="swin_tiny", files=("results/step_9.json",)):
    """A run's folder with these scores in each of the files."""
    for file in files:
        save_results(folder / file, results)
    (folder / "config.yaml").write_text(yaml.safe_dump({"backbone": backbone, "val_db_name": "NYUD"}))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """The multi-task run and one run per task."""
    singles = [make_run(tmp_path / f"one_{task}", {task: scores}) for task, scores in SINGLE.items()]
    return make_run(tmp_path / "multi", MULTI), singles


def gain(capsys, *arguments) -> tuple[int, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_gain_by_hand(runs, capsys):
    multi, singles = runs
    code, out = gain(capsys, multi, "--single", *singles)
    assert code == 0 and "delta_m -1.67 % = mean of semseg +10.00 %, depth +10.00 %, normals -25.00 %" in out
    assert out.count("read ") == 4 and "| single-task | 50.00" in out and "| multi-task  | 55.00" in out


def test_order_and_kind_of_the_singles_do_not_matter(runs, capsys, tmp_path):
    multi, (semseg, depth, _) = runs
    file = tmp_path / "one_semseg" / "results" / "step_9.json"
    assert "delta_m -1.67 %" in gain(capsys, multi, "--single", "normals=16", depth, file)[1]


def test_one_task(capsys, tmp_path):
    run = make_run(tmp_path / "a", {"depth": MULTI["depth"]})
    assert "delta_m +10.00 %" in gain(capsys, run, "--single", "depth=0.6")[1]


def test_the_last_evaluation_or_infer_of_all(runs, capsys, tmp_path):
    multi, singles = runs
    save_results(tmp_path / "multi" / "results" / "step_10.json", SINGLE)
    assert "delta_m +0.00 %" in gain(capsys, multi, "--single", *singles)[1]        # 10 is after 9
    save_results(tmp_path / "multi" / "infer" / "results.json", MULTI)
    assert "delta_m +0.00 %" in gain(capsys, multi, "--single", *singles)[1]        # the others have no infer
    for task, scores in SINGLE.items():
        save_results(tmp_path / f"one_{task}" / "infer" / "results.json", {task: scores})
    code, out = gain(capsys, multi, "--single", *singles)
    assert "delta_m -1.67 %" in out and out.count("infer/results.json") == 4


def test_boundary_score_where_both_have_it(capsys, tmp_path):
    both = {"edge": {"loss": 0.04, "odsF": 0.8, "valid_pixels": 1}}
    loss_only = {"edge": {"loss": 0.05, "valid_pixels": 1}}
    run, single = make_run(tmp_path / "a", both), make_run(tmp_path / "b", loss_only)
    assert "delta_m +20.00 %" in gain(capsys, run, "--single", single)[1]           # lower loss is better
    assert "delta_m +14.29 %" in gain(capsys, run, "--single", "edge/odsF=0.7")[1]
    code, out = gain(capsys, single, "--single", "edge/odsF=0.7")
    assert code == 1 and "no score is on both sides" in out and "edge/loss" in out


@pytest.mark.parametrize("change, message", [
    (lambda s: s[:1], "no single-task run for depth, normals; --single gives semseg"),
    (lambda s: [*s, "sal=0.8"], "sal=0.8 is of task sal, which the run lacks; its tasks: semseg, depth, normals"),
    (lambda s: [*s, "depth=0.8"], "gives task depth twice: depth=0.8 and "),
    (lambda s: [*s[:2], "depht=0.8"], "unknown task(s) depht; known: semseg, depth"),
    (lambda s: [*s[:2], "normals=low"], "'low' is not a number"),
    (lambda s: [*s[:2], "normals=0"], "the single-task figure of normals is 0"),
    (lambda s: [s[0].replace("one_semseg", "multi")], "has the tasks semseg, depth, normals; a single"),
    (lambda s: ["nowhere"], "nowhere"),
])
def test_mistakes_are_one_sentence(runs, capsys, change, message):
    multi, singles = runs
    code, out = gain(capsys, multi, "--single", *change(singles))
    assert code == 1 and out.startswith("error: ") and message in out and out.count("\n") == 1


def test_another_backbone_is_refused(runs, capsys, tmp_path):
    multi, singles = runs
    other = make_run(tmp_path / "other", {"semseg": SINGLE["semseg"]}, backbone="swin_large")
    code, out = gain(capsys, multi, "--single", other, *singles[1:])
    assert code == 1 and "other has backbone swin_large but" in out and "give the result files instead" in out
    file = tmp_path / "other" / "results" / "step_9.json"
    assert gain(capsys, multi, "--single", file, *singles[1:])[0] == 0


def test_no_evaluation_and_no_valid_pixel(runs, capsys, tmp_path):
    multi, singles = runs
    (tmp_path / "empty").mkdir()
    assert "holds no results/step_N.json" in gain(capsys, multi, "--single", tmp_path / "empty")[1]
    void = make_run(tmp_path / "void", {"semseg": {"mIoU": float("nan"), "valid_pixels": 0}})
    code, out = gain(capsys, multi, "--single", void, *singles[1:])
    assert code == 1 and "has no mIoU for semseg: no pixel of its test images was valid" in out


def test_help_says_how():
    command = [sys.executable, str(ROOT / "scripts" / "delta_m.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--single" in text and "fcn_nyud_swin_tiny_" in text and "TASK=SCORE" in text
