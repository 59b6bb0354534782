"""The parity runner passes on the reference numbers, notices damage, and skips nothing silently."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from scripts.check_parity import main
from tests.shared import golden


def copy(tmp_path, *names: str):
    """A folder with copies of these files of the metrics references."""
    for name in names:
        shutil.copy(golden("metrics") / name, tmp_path / name)
    return tmp_path


def run(folder, capsys, *arguments: str) -> tuple[int, str]:
    code = main(["--golden", str(folder), *arguments])
    return code, capsys.readouterr().out


def rewrite(path, **changes) -> None:
    """Replace arrays of an .npz file."""
    with np.load(path) as content:
        arrays = dict(content.items())
    np.savez(path, **{**arrays, **changes})


@pytest.mark.parametrize("family", ["metrics", "selective_scan"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything_agrees(family, dtype, capsys):
    code, out = run(golden(family), capsys, "--dtype", dtype)
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    passed, failed = map(int, re.search(r"(\d+) passed, (\d+) failed", out).groups())
    assert failed == 0 and passed == sum(bool(re.search(r"\d  pass\b", line)) for line in out.splitlines())


@pytest.mark.parametrize("family, metric, key", [
    ("invpt", "semseg_nyud", "mIoU"), ("mlore", "sal", "maxF"), ("atrc", "normals", "value"),
    ("mtmamba", "depth_nyud", "log_rmse"), ("mtl", "delta_m", "value"),
    ("demt", "depth_nyud_as_run", "value")])
def test_a_wrong_score_fails(family, metric, key, tmp_path, capsys):
    inputs = [path.name for path in golden("metrics").glob("metric_*.npz")]
    folder = copy(tmp_path, "scores.json", *inputs)
    scores = json.loads((folder / "scores.json").read_text())
    scores[family][metric][key] *= 1 + 1e-4
    (folder / "scores.json").write_text(json.dumps(scores))
    code, out = run(folder, capsys, "--only", f"{family}/")
    assert code == 1 and " 1 failed" in out and re.search(rf"{family}/{metric} .*FAIL +{key}", out)


def test_one_pixel_off_fails(tmp_path, capsys):
    folder = copy(tmp_path, "scores.json", "metric_semseg_pascal.npz")
    scores = json.loads((folder / "scores.json").read_text())
    scores["invpt"]["semseg_pascal"]["_state"]["tp"][3] += 1
    (folder / "scores.json").write_text(json.dumps(scores))
    code, out = run(folder, capsys, "--only", "invpt/semseg_pascal")
    assert code == 1 and re.search(r"FAIL +tp", out)


def test_a_wrong_loss_or_gradient_fails(tmp_path, capsys):
    folder = copy(tmp_path, "losses.json", "losses.npz")
    entries = json.loads((folder / "losses.json").read_text())
    next(e for e in entries if e["name"] == "bbce_edge_w0.88")["value_f64"] *= 1 + 1e-6
    (folder / "losses.json").write_text(json.dumps(entries))
    with np.load(folder / "losses.npz") as content:
        grad = content["grad/l1_normals"]
    grad[0, 0, 0, 0] += 1e-6
    rewrite(folder / "losses.npz", **{"grad/l1_normals": grad})
    code, out = run(folder, capsys)
    assert code == 1 and " 2 failed" in out
    assert re.search(r"bbce_edge_w0.88 .*FAIL +value", out) and re.search(r"l1_normals .*FAIL +grad", out)


def test_renamed_files_and_cases_are_found(tmp_path, capsys):
    entries = [{**entry, "name": f"other_{entry['name']}"} for entry in json.loads(
        (golden("metrics") / "losses.json").read_text()) if "params" in entry]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with np.load(golden("metrics") / "losses.npz") as content:
        arrays = {key.replace("grad/", "grad/other_"): value for key, value in content.items()}
    np.savez(tmp_path / "b.npz", **arrays)
    code, out = run(tmp_path, capsys)
    assert code == 0 and "other_ce_semseg40" in out


def test_a_wrong_scan_fails(tmp_path, capsys):
    source = golden("selective_scan")
    shutil.copy(source / "cases.json", tmp_path)
    data = load_file(source / "scan_L7_g2_D.safetensors")
    data["grad.A"][0, 0] += 1e-6
    save_file(data, tmp_path / "scan_L7_g2_D.safetensors")
    code, out = run(tmp_path, capsys)
    assert code == 1 and re.search(r"scan_L7_g2_D .*FAIL +grad.A", out)
    assert run(tmp_path, capsys, "--scan_backend", "nonsense")[0] == 1


def test_a_wrong_label_after_a_transform_fails(tmp_path, capsys):
    folder = copy(tmp_path, "transforms.json", "transforms.npz")
    with np.load(folder / "transforms.npz") as content:
        label = content["train_mtmamba_1/semseg"]
    label[0, 5, 5] = (label[0, 5, 5] + 1) % 40
    rewrite(folder / "transforms.npz", **{"train_mtmamba_1/semseg": label})
    code, out = run(folder, capsys, "--only", "train_mtmamba")
    assert code == 1 and " 1 failed" in out and re.search(r"train_mtmamba_1 .*FAIL +semseg", out)


def test_unknown_references_are_listed_not_passed(tmp_path, capsys):
    (tmp_path / "strange.json").write_text('{"answer": 42}')
    code, out = run(tmp_path, capsys)
    assert code == 1 and "0 passed, 0 failed, 1 not covered" in out and "nothing was compared" in out


def test_a_missing_folder_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--golden", str(tmp_path / "absent")])
    assert stop.value.code == 2 and "absent: no such folder" in capsys.readouterr().err
