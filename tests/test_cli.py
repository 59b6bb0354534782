"""The command line: infer and predict end to end, and every mistake as one sentence with exit code 1."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch

import main
from tests.shared import ROOT, real_data
from utils.engine.config import load_config
from utils.engine.inputs import find_inputs
from utils.engine.train import train

NYUD = str(ROOT / "configs" / "bim_nyud.yml")
PASCAL = str(ROOT / "configs" / "bim_pascal.yml")


def run(monkeypatch, *arguments: str) -> None:
    """`python main.py ...` in this process."""
    monkeypatch.setattr("sys.argv", ["main.py", *map(str, arguments)])
    main.main()


def refused(monkeypatch, *arguments: str) -> str:
    """The sentence that `python main.py ...` ends with; fails if it does not end with one."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message and len(message) < 800, message
    return message


@pytest.fixture(scope="module")
def trained(example_root, tmp_path_factory):
    """A tiny PASCAL run: its folder."""
    from tests.conftest import TINY
    runs = tmp_path_factory.mktemp("runs")
    config = load_config(PASCAL, [*TINY, "max_iter=1", f"db_root={example_root}", f"out_dir={runs}"])
    train(config, resume=False)
    return config.run_dir


def test_infer_writes_scores_and_boundary_maps(monkeypatch, trained, tmp_path, example_root):
    run(monkeypatch, "--run_mode", "infer", "--trained_model", trained / "best.pt", "--output", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["scores"]) == {"semseg", "human_parts", "sal", "normals", "edge"}
    maps = sorted((tmp_path / "edge").glob("*.png"))
    ids = (example_root / "PASCALContext" / "ImageSets" / "Context" / "val.txt").read_text().split()
    assert [p.stem for p in maps] == sorted(ids)
    assert cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED).shape == (64, 96)


def test_predict_any_picture(monkeypatch, trained, tmp_path):
    """Colour, grey, RGBA, 16-bit; upright, panorama, tiny, larger than the frame: all at their own size."""
    rng = np.random.default_rng(0)
    source = tmp_path / "in"
    source.mkdir()
    pictures = {"colour.jpg": (90, 120, 3), "grey.png": (200, 50), "alpha.png": (40, 300, 4), "deep.png": (64, 64),
                "small.png": (33, 33, 3)}
    for name, shape in pictures.items():
        kind = np.uint16 if name.startswith("deep") else np.uint8
        cv2.imwrite(str(source / name), rng.integers(0, np.iinfo(kind).max, shape).astype(kind))
    out = tmp_path / "out"
    run(monkeypatch, "--run_mode", "predict", "--trained_model", trained / "best.pt", "--input", source,
        "--output", out)
    formats = json.loads((out / "formats.json").read_text())
    assert set(formats) == {"semseg", "human_parts", "sal", "normals", "edge"}
    for name, shape in pictures.items():
        stem = name.split(".")[0]
        assert (out / "panels" / f"{stem}.png").is_file()
        for task in formats:
            assert cv2.imread(str(out / "colour" / task / f"{stem}.png")).shape == (*shape[:2], 3)
        semseg = cv2.imread(str(out / "raw" / "semseg" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert semseg.dtype == np.uint8 and semseg.shape == shape[:2] and semseg.max() < 21
        edge = cv2.imread(str(out / "raw" / "edge" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert edge.dtype == np.uint16 and edge.shape == shape[:2]
        normals = np.load(out / "raw" / "normals" / f"{stem}.npy")
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)


def test_predict_the_real_capture(monkeypatch, trained, tmp_path):
    run(monkeypatch, "--run_mode", "predict", "--trained_model", trained / "best.pt",
        "--input", real_data() / "sample_rgb.png", "--output", tmp_path)
    assert (tmp_path / "panels" / "sample_rgb.png").is_file()


def test_predict_names_the_pictures_it_could_not_read(monkeypatch, trained, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    cv2.imwrite(str(source / "good.png"), np.zeros((64, 64, 3), np.uint8))
    (source / "broken.jpg").write_bytes(b"not a picture")
    cv2.imwrite(str(source / "small.png"), np.zeros((20, 64, 3), np.uint8))
    message = refused(monkeypatch, "--run_mode", "predict", "--trained_model", trained / "best.pt",
                      "--input", source, "--output", tmp_path / "out")
    assert "2 of 3 input(s) could not be predicted: broken.jpg, small.png; all others are done" in message
    assert message.endswith("Next: the lines above say what is wrong with each; the same line again does those alone")
    assert "good.png is a file; name a folder" in refused(
        monkeypatch, "--run_mode", "predict", "--trained_model", trained / "best.pt", "--input", source / "good.png",
        "--output", source / "good.png")
    assert (tmp_path / "out" / "panels" / "good.png").is_file()
    assert find_inputs(source / "good.png") == [source / "good.png"]
    assert "no such image, video, folder or list" in refused(monkeypatch, "--run_mode", "predict", "--trained_model",
                                                trained / "best.pt", "--input", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refused(monkeypatch, "--run_mode", "predict", "--trained_model", trained / "best.pt",
                                       "--input", tmp_path / "empty")


@pytest.mark.parametrize(("override", "words"), [
    ("max_itr=3", "did you mean 'max_iter'"),
    ("db_root=/nowhere", "data folder not found: /nowhere"),
    ("model=bmi", "did you mean 'bim'"),
    ("model=MLoRA", "did you mean 'mlore'"),
    ("backbone=swin_larg", "did you mean 'swin_large'"),
    ("model_kwargs.msst_dept=1", "did you mean 'msst_depth'"),
    ("image_size=[70,96]", "must be multiples of 32"),
    ("pretrained=nowhere.pth", "nowhere.pth"),
])
def test_training_mistakes(monkeypatch, tiny, tmp_path, override, words):
    assert words in refused(monkeypatch, "--config_exp", NYUD, *tiny, override)
    assert not (tmp_path / "runs").exists()                        # nothing was written


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(monkeypatch, tiny):
    assert "finds no CUDA device" in refused(monkeypatch, "--config_exp", NYUD, *tiny, "device=cuda")


def test_damaged_data(monkeypatch, tiny, example_root, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(example_root, broken)
    label = next((broken / "NYUDv2" / "segmentation").glob("*.png"))
    cv2.imwrite(str(label), np.full((64, 96), 77, np.uint8))
    arguments = ["--config_exp", NYUD, *tiny, f"db_root={broken}", "version_name=damaged"]
    message = refused(monkeypatch, *arguments, "trBatch=12", "valBatch=5")
    assert label.name in message and "77" in message
    label.unlink()
    assert label.name in refused(monkeypatch, *arguments, "version_name=missing")


def test_checkpoint_mistakes(monkeypatch, trained, tmp_path, example_root):
    best = trained / "best.pt"
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(best.read_bytes()[:5000])
    assert "truncated.pt" in refused(monkeypatch, "--run_mode", "infer", "--trained_model", truncated)
    assert "nowhere.pt" in refused(monkeypatch, "--run_mode", "infer", "--trained_model", tmp_path / "nowhere.pt")
    message = refused(monkeypatch, "--run_mode", "infer", "--trained_model", best, "--config_exp", NYUD,
                      f"db_root={example_root}", "backbone=swin_tiny")
    assert "best.pt" in message
    before = best.read_bytes()
    assert "human_parts" in refused(monkeypatch, "--run_mode", "infer", "--trained_model", best, "train_db_name=NYUD",
                                    "val_db_name=NYUD")
    assert best.read_bytes() == before


def test_a_split_without_valid_pixels_is_an_error_after_the_table(monkeypatch, trained, tmp_path, example_root):
    void = tmp_path / "data"
    shutil.copytree(example_root, void)
    for path in (void / "PASCALContext" / "semseg" / "VOC12").glob("*.png"):
        cv2.imwrite(str(path), np.full((64, 96), 255, np.uint8))
    message = refused(monkeypatch, "--run_mode", "infer", "--trained_model", trained / "best.pt", f"db_root={void}",
                      "--output", tmp_path / "out")
    assert "no valid pixel for semseg" in message
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["sal"]["maxF"] is not None


@pytest.mark.parametrize(("line", "words"), [
    ("train --config_exp F --trained_model C", "the default); init_from=C starts a training from its weights"),
    ("train --config_exp F --input P", "does not read --input; it is for --run_mode predict"),
    ("infer --trained_model C --resume", "does not read --resume; it is for --run_mode train"),
    ("infer --trained_model C optimizer_kwargs.lr=1", "does not read optimizer_kwargs.lr"),
    ("predict --trained_model C --input P max_iter=3", "does not read max_iter")])
def test_arguments_that_would_change_nothing_are_refused(monkeypatch, capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--run_mode", *line.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_usage_errors(monkeypatch, capsys):
    for arguments in (["--run_mode", "predict"], ["--run_mode", "train"], ["--run_mode", "infer"]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments)
        assert stop.value.code == 2
