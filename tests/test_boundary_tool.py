"""Boundary score on sets: worker processes, the command-line tool, `infer`, training, and every mistake in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import main as command_line
from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.datasets.nyud import NYUD as NYUDv2
from evaluation.boundary.__main__ import main, score_pairs
from evaluation.boundary.evaluator import BoundaryEvaluator
from evaluation.boundary.files import find_pairs
from evaluation.boundary.pool import WAITING_PER_WORKER, CountingPool, default_workers
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.scores import BoundaryTotals
from evaluation.boundary.settings import BoundarySettings
from evaluation.boundary.source import truth_source
from evaluation.boundary.truth import truth_boundary
from evaluation.evaluator import Split
from tests.conftest import TINY
from tests.shared import ROOT, real_data
from utils.engine.config import load_config
from utils.engine.results import check_reference, delta_m_against, format_table, selection_score
from utils.engine.tasks import TASKS, label_rules
from utils.engine.train import train
from utils.options import ConfigError

NYUD = str(ROOT / "configs" / "bim_nyud.yml")
PROTOCOL = Protocol(0.02)

EDGE = TASKS.load("edge")


def split_of(dataset) -> Split:
    """What an evaluation on this data set covers."""
    return Split(dataset.spec.name, dataset.split, dataset.folder, tuple(dataset.ids),
                 dataset.spec.labels["edge"].boundary)


def save(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folders(tmp_path):
    """pred/ and gt/ with six label maps of two sizes and noisy predictions of their boundaries."""
    rng = np.random.default_rng(0)
    for i in range(6):
        size = (40, 56) if i % 2 else (50, 40)
        label = np.repeat(np.repeat(rng.integers(0, 4, (5, 8)), 10, 0), 7, 1)[:size[0], :size[1]].astype(np.uint8)
        noisy = 0.6 * truth_boundary(label, "regions") + 0.4 * rng.random(label.shape)
        save(tmp_path / "gt" / f"im{i}.png", label)
        save(tmp_path / "pred" / f"im{i}.png", (200 * noisy).astype(np.uint8))
    return tmp_path


def tool(folder, *arguments: str, kind: str = "regions") -> dict:
    """Runs the tool in this process; its JSON."""
    out = folder / "out.json"
    main(["--pred", str(folder / "pred"), "--gt", str(folder / "gt"), "--gt_kind", kind, "--max_dist", "0.02",
          "--workers", "0", "--json", str(out), *arguments])
    return json.loads(out.read_text())


def refused(folder, *arguments: str, kind: str = "regions") -> str:
    with pytest.raises(SystemExit) as stop:
        tool(folder, *arguments, kind=kind)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_the_tool_sums_what_image_counts_gives(folders, capsys):
    result = tool(folders, "--plot", str(folders / "curve.png"))
    totals = BoundaryTotals.empty(101)
    for i in range(6):
        label, prediction = (np.asarray(Image.open(folders / d / f"im{i}.png")) for d in ("gt", "pred"))
        totals.add(image_counts(prediction, [truth_boundary(label, "regions")], PROTOCOL))
    scores = totals.scores(PROTOCOL.thresholds)
    assert (result["ods_f"], result["ois_f"], result["ap"]) == (scores["odsF"], scores["oisF"], scores["ap"])
    assert result["threshold"] == scores["threshold"] and result["images"] == 6
    assert [result[n] for n in ("cntR", "sumR", "cntP", "sumP")] == totals.counts[totals.optimum].tolist()
    assert 0.3 < result["ods_f"] < 1 and len(result["curve"]["f"]) == 101
    assert max(result["curve"]["f"]) == pytest.approx(result["ods_f"], abs=1e-6)
    assert f"| {100 * result['ods_f']:.2f} " in capsys.readouterr().out
    plot = np.asarray(Image.open(folders / "curve.png"))
    assert ((plot[..., 0] > 180) & (plot[..., 1] < 80)).sum() > 200    # the red curve is there


def test_workers_give_the_same_and_wait_in_bounded_numbers(folders, monkeypatch):
    pairs = find_pairs(folders / "pred", folders / "gt")
    alone = score_pairs(pairs, "regions", PROTOCOL, 0, progress=False)
    waiting = []
    collect = CountingPool._collect
    monkeypatch.setattr(CountingPool, "_collect", lambda self: waiting.append(len(self)) or collect(self))
    many = score_pairs(pairs * 4, "regions", PROTOCOL, 2, progress=False)
    assert np.array_equal(many.counts, 4 * alone.counts) and np.array_equal(many.best, 4 * alone.best)
    assert many.images == 24 and max(waiting) <= 2 * WAITING_PER_WORKER + 1
    assert 1 <= default_workers() <= 8 and default_workers(10**6) == 1


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence():
    with CountingPool(BoundaryTotals.empty(101), 1) as pool, \
            pytest.raises(ChildProcessError, match="worker of the boundary score ended unexpectedly"):
        pool.submit(_die)
        pool.finish()


def test_a_damaged_file_is_named_by_workers_too(folders):
    (folders / "pred" / "im3.png").write_bytes((folders / "pred" / "im3.png").read_bytes()[:90])
    assert "im3.png" in refused(folders) and "im3.png" in refused(folders, "--workers", "2")


def children(pid: int) -> list[int]:
    """All descendants of a process; none if it has ended."""
    try:
        found = [int(c) for task in os.listdir(f"/proc/{pid}/task")
                 for c in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found + [grandchild for child in found for grandchild in children(child)]


def ticks(pid: int) -> int:
    """Processor time of a process in clock ticks; -1 once it has ended, also where nobody has collected it yet."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if state in "ZX" else int(numbers[10]) + int(numbers[11])


def wait_until(condition, what: str) -> None:
    """Waits as long as a busy machine may need; a failure says what did not happen."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def start_interruptible(command: list[str]) -> subprocess.Popen:
    """Starts a process that Ctrl-C ends. A shell's background job ignores SIGINT, and so would its children."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        signal.signal(signal.SIGINT, ours)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how, code", [(signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_ctrl_c_or_kill_leaves_no_workers(folders, how, code):
    (folders / "slow" / "pred").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for kind, limit in (("pred", 256), ("gt", 9)):                     # one pair under so many names that it lasts
        save(folders / "slow" / kind / "0.png", rng.integers(0, limit, (300, 300), np.uint8))
        for i in range(1, 3000):
            os.link(folders / "slow" / kind / "0.png", folders / "slow" / kind / f"{i}.png")
    process = start_interruptible(
        [sys.executable, "-m", "evaluation.boundary", "--pred", str(folders / "slow" / "pred"), "--gt",
         str(folders / "slow" / "gt"), "--gt_kind", "regions", "--max_dist", "0.02", "--workers", "2"])
    started: list[int] = []

    def counting() -> bool:
        assert process.poll() is None, process.stderr.read()
        started[:] = children(process.pid)                             # tracker, server, two workers
        return len(started) >= 4 and sum(ticks(pid) >= 5 for pid in started if not children(pid)) >= 2

    try:
        wait_until(counting, "two workers never got to work")
        process.send_signal(how)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code
    assert how == signal.SIGKILL or errors.strip().endswith("interrupted")
    assert "Traceback" not in errors
    wait_until(lambda: all(ticks(pid) < 0 for pid in started), "a worker outlived its parent")


def test_mismatches_name_the_file(folders):
    pred, gt = folders / "pred", folders / "gt"
    (gt / "im5.png").rename(folders / "im5.png")
    assert "im5.png has no ground truth" in refused(folders)
    (folders / "im5.png").rename(gt / "im5.png")
    (pred / "im2.png").rename(folders / "im2.png")
    assert "first im2.png; to score a part, list it with --images" in refused(folders)
    (folders / "list.txt").write_text("im0\nim1\n")
    assert tool(folders, "--images", str(folders / "list.txt"))["images"] == 2
    (folders / "list.txt").write_text("im0\nim2\n")
    assert "no prediction for the image im2" in refused(folders, "--images", str(folders / "list.txt"))
    save(pred / "im2.png", np.zeros((40, 50), np.uint8))
    assert "im2.png has (H, W) = (40, 50), its ground truth" in refused(folders)
    save(pred / "im2.png", np.zeros((50, 40, 3), np.uint8))
    assert "im2.png: expected 1 channel(s) of 8 bits, found 3" in refused(folders)
    save(pred / "im2.png", np.zeros((50, 40), np.uint8))
    assert "is it a label map" in refused(folders, kind="boundary")
    np.save(gt / "im4.npy", np.zeros((50, 40), int))
    assert "two ground truths for the image im4" in refused(folders)


def test_empty_and_missing_folders(folders):
    (folders / "pred").rename(folders / "edge")
    assert "no such folder" in refused(folders)
    (folders / "pred").mkdir()
    (folders / "edge").rename(folders / "pred" / "edge")
    assert f"holds no PNG file; did you mean {folders / 'pred' / 'edge'}?" in refused(folders)


def test_ground_truth_formats_agree(folders):
    """A .mat label map, a 16-bit picture and an array give what the 8-bit picture gives."""
    want = tool(folders)
    for i, suffix in enumerate((".mat", ".npy", "16")):
        path = folders / "gt" / f"im{i}.png"
        label = np.asarray(Image.open(path))
        path.unlink()
        if suffix == ".mat":
            savemat(path.with_suffix(suffix), {"LabelMap": label.astype(np.uint16)})
        elif suffix == ".npy":
            np.save(path.with_suffix(suffix), label.astype(np.int64))
        else:
            save(path, label.astype(np.uint16) * 300)
    assert tool(folders) == want


def test_a_folder_per_image_holds_several_annotations(folders):
    label = np.asarray(Image.open(folders / "gt" / "im0.png"))
    (folders / "gt" / "im0.png").unlink()
    for annotator, copy in enumerate((label, np.roll(label, 3, 1))):
        save(folders / "gt" / "im0" / f"{annotator}.png", copy)
    pair = find_pairs(folders / "pred", folders / "gt")[0]
    truths = [truth_boundary(copy, "regions") for copy in (label, np.roll(label, 3, 1))]
    prediction = np.asarray(Image.open(folders / "pred" / "im0.png"))
    assert np.array_equal(pair.counts("regions", PROTOCOL), image_counts(prediction, truths, PROTOCOL))
    assert tool(folders)["images"] == 6


def test_annotators_of_bsds_are_read_from_one_mat_file(folders):
    """`groundTruth` is a row of cells; each annotator's `Boundaries` are used as drawn."""
    rng = np.random.default_rng(2)
    for i in range(6):
        path = folders / "gt" / f"im{i}.png"
        label = np.asarray(Image.open(path))
        path.unlink()
        drawn = [truth_boundary(np.roll(label, k, 1), "regions") for k in range(1 + i % 3)]
        cells = np.empty((1, len(drawn)), object)
        for k, boundaries in enumerate(drawn):
            cells[0, k] = {"Segmentation": rng.integers(1, 9, label.shape).astype(np.uint16),
                           "Boundaries": boundaries.astype(np.uint8)}
        savemat(path.with_suffix(".mat"), {"groundTruth": cells})
        prediction = np.asarray(Image.open(folders / "pred" / f"im{i}.png"))
        pair = find_pairs(folders / "pred", folders / "gt", [f"im{i}"])[0]
        assert np.array_equal(pair.counts("bsds", PROTOCOL), image_counts(prediction, drawn, PROTOCOL))
    assert tool(folders, kind="bsds")["images"] == 6
    assert "im0.mat has no variable 'LabelMap'" in refused(folders)
    savemat(folders / "gt" / "im0.mat", {"groundTruth": np.ones((3, 3))})
    assert "im0.mat: 'groundTruth' holds no 'Boundaries'" in refused(folders, kind="bsds")


def test_hed_on_bsds_as_an_independent_evaluator_counts_it():
    """Four photographs of the test split with four to nine annotators each; its matcher loses a match now and then."""
    folder = real_data() / "photos" / "BSDS500_test"
    stored = json.loads((folder / "hed_counts.json").read_text())
    protocol, ours, theirs = Protocol(0.0075, "plain"), BoundaryTotals.empty(99), BoundaryTotals.empty(99)
    for name in sorted(stored)[:4]:
        bits = np.asarray(Image.open(folder / "gt" / f"{name}.png")).astype(int)
        truths = [truth_boundary(bits >> k & 1, "bsds") for k in range(16) if (bits >> k & 1).any()]
        counts = image_counts(np.asarray(Image.open(folder / "hed" / f"{name}.png")), truths, protocol)
        assert np.array_equal(counts[:, [1, 3]], np.array(stored[name])[:, [1, 3]])
        assert (counts[:, 0] >= np.array(stored[name])[:, 0]).all()
        ours.add(counts)
        theirs.add(np.array(stored[name]))
    assert (ours.counts[:, 0] <= 1.001 * theirs.counts[:, 0]).all()
    np.testing.assert_allclose(ours.counts[:, 2], theirs.counts[:, 2], rtol=1.5e-3, atol=1)


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """An untrained NYUD network, and a data folder with 50 rendered test images."""
    from scripts.example_data.write import write_example
    root = tmp_path_factory.mktemp("fifty")
    write_example(root / "data", num_train=2, num_val=50, size=(48, 64), seed=1, workers=2, progress=False)
    config = load_config(NYUD, [*TINY, "max_iter=1", "val_interval=1", "boundary_eval=fast",
                                f"db_root={root / 'data'}", f"out_dir={root / 'runs'}"])
    return root / "data", config.run_dir, train(config, resume=False)


def infer(monkeypatch, run_dir, output, *overrides: str) -> dict:
    monkeypatch.setattr("sys.argv", ["main.py", "--run_mode", "infer", "--trained_model", str(run_dir / "last.pt"),
                                     "--output", str(output), *overrides])
    command_line.main()
    return json.loads((output / "results.json").read_text())["scores"]["edge"]


@pytest.mark.parametrize("rule, kind", [("seism", "nyud"), ("thin", "boundary")])
def test_infer_equals_the_tool_on_its_files(fifty, rule, kind, monkeypatch, tmp_path, capsys):
    data, run_dir, _ = fifty
    scores = infer(monkeypatch, run_dir, tmp_path / "out", "boundary_kwargs.workers=2",
                   f"boundary_kwargs.nyud_gt={rule}")
    nyud = data / "NYUDv2"
    edges = tmp_path / "out" / "edge"
    main(["--pred", str(edges), "--gt", str(nyud / "edge"), "--gt_kind", kind, "--max_dist", "0.011",
          "--images", str(nyud / "gt_sets" / "val.txt"), "--workers", "0", "--json", str(tmp_path / "tool.json")])
    files = json.loads((tmp_path / "tool.json").read_text())
    assert files["images"] == scores["images"] == 50
    assert [scores[k] for k in ("odsF", "oisF", "ap", "threshold")] == [
        files[k] for k in ("ods_f", "ois_f", "ap", "threshold")]
    assert scores["odsF"] > 0 and "loss" in scores
    assert f"{100 * scores['odsF']:.2f} at threshold {scores['threshold']:g} over 50 images" in capsys.readouterr().out


def test_infer_without_the_boundary_score(fifty, monkeypatch, tmp_path):
    assert "odsF" not in infer(monkeypatch, fifty[1], tmp_path / "out", "boundary_infer=off")


def test_training_can_score_boundaries(fifty):
    _, run_dir, results = fifty
    assert 0 < results["edge"]["odsF"] < 1 and results["edge"]["images"] == 50
    assert "edge odsF %" in (run_dir / "log.txt").read_text()
    stored = json.loads((run_dir / "results" / "step_1.json").read_text())["scores"]["edge"]
    assert stored["odsF"] == results["edge"]["odsF"]


def test_off_is_a_word_in_yaml():
    assert load_config(NYUD, ["boundary_eval=off"]).boundary_eval == "off"
    assert load_config(NYUD).boundary_eval == "off" and load_config(NYUD).boundary_infer == "exact"
    for wrong, message in (("boundary_eval=true", "must be one of off, fast, exact"),
                           ("boundary_kwargs.max_dist=7.7", "boundary_kwargs.max_dist' must be a share"),
                           ("boundary_kwargs.workers=-1", "boundary_kwargs.workers' must be at least 0"),
                           ("single_task_scores.egde/odsF=1", "unknown task.*did you mean 'edge'")):
        with pytest.raises(ConfigError, match=message):
            load_config(NYUD, [wrong])
    with pytest.raises(ConfigError, match="unknown score 'edge/odsf'; did you mean 'edge/odsF'"):
        check_reference({"semseg": 0.5, "edge/odsf": 1})


def test_the_boundary_score_stands_for_the_task_where_it_was_run():
    loss_only = {"edge": {"loss": 0.05, "valid_pixels": 9}}
    both = {"edge": {"loss": 0.05, "odsF": 0.75, "valid_pixels": 9}}
    assert EDGE.main_score(loss_only["edge"]).key == "loss" and EDGE.main_score(both["edge"]).key == "odsF"
    assert selection_score(both) > selection_score({"edge": {**both["edge"], "odsF": 0.7}})
    reference = {"edge": 0.04, "edge/odsF": 0.7}
    assert delta_m_against(loss_only, reference) == pytest.approx(-25)
    assert delta_m_against(both, reference) == pytest.approx(100 / 14)
    assert delta_m_against(both, {"edge": 0.04}) == pytest.approx(-25)
    assert delta_m_against(loss_only, {"edge/odsF": 0.7}) is None
    lines = format_table({"a": both, "b": loss_only}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["edge boundary loss v", "edge odsF % ^"]
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == ["0.0500", "75.00"]
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["0.0500", "-"]


def test_pascal_images_can_be_those_of_the_published_list(example_root):
    dataset = split_of(MultiTaskDataset(DATASETS.load("PASCALContext"), example_root, "val", label_rules(["edge"])))
    path = example_root / "PASCALContext" / "ImageSets" / "Context" / "test_new.txt"
    assert "which is not at" in truth_source(dataset, "auto").covered
    with pytest.raises(FileNotFoundError, match=r"test_new\.txt .*SEISM.*boundary_kwargs.images=all"):
        truth_source(dataset, "test_new")
    try:
        path.write_text("\n".join(dataset.ids[:2]))
        for images in ("auto", "test_new"):
            assert truth_source(dataset, images).names == set(dataset.ids[:2])
        assert truth_source(dataset, "all").names is None
        path.write_text("2007_000001")
        with pytest.raises(ValueError, match="lists 2007_000001, which is not in the split 'val'"):
            truth_source(dataset, "auto")
    finally:
        path.unlink()


def test_fast_scores_every_eighth_image():
    def split(number: int) -> Split:
        return Split("NYUD", "val", Path(), tuple(map(str, range(number))), NYUDv2.labels["edge"].boundary)
    for number, stride in ((654, 8), (40, 1), (100, 3)):
        assert truth_source(split(number), "auto", fast=True).names == {str(i) for i in range(0, number, stride)}
    assert "a sample of 82 from all of val" in truth_source(split(654), "auto", fast=True).covered


def test_only_listed_images_are_counted_and_nan_is_refused(example_root):
    import dataclasses

    import torch
    dataset = MultiTaskDataset(DATASETS.load("PASCALContext"), example_root, "val", label_rules(["edge"]))
    source = dataclasses.replace(truth_source(split_of(dataset), "all"), names=frozenset(dataset.ids[1:3]))
    meta = [{"name": name, "size": (64, 96)} for name in dataset.ids]
    prediction = torch.rand(len(meta), 1, 64, 96)
    evaluator = BoundaryEvaluator(source, BoundarySettings(workers=0))
    evaluator.update(prediction, None, meta)
    evaluator.reduce()
    assert evaluator.compute()["images"] == 2
    prediction[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match=f"{meta[1]['name']} is not a number"):
        evaluator.update(prediction, None, meta)
    with pytest.raises(ValueError, match=r"\.mat: the prediction has \(H, W\) = \(32, 32\)"):
        evaluator.update(prediction[1:2, :, :32, :32].nan_to_num(), None, [{**meta[1], "size": (32, 32)}])
