"""`models.load_model`: what a program gets from a checkpoint, and that the command line says the same."""

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models import load_model
from models.blocks.resize import resize, resized_rows
from tests.test_predict_files import NYUD, by_colour, stripes
from tests.watched_run import answers, experiment
from utils.engine import prediction
from utils.engine.build import model_from_config
from utils.engine.predict import predict
from utils.engine.prediction import Rows
from utils.engine.stored_model import find_checkpoint, own_config
from utils.engine.tasks import TASKS


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of a network that has not been trained, with its configuration inside."""
    config = experiment(tmp_path, tmp_path, *NYUD, "backbone_kwargs.drop_path_rate=0.0")
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    content = {"model": model_from_config(config).state_dict(), "config": config.to_dict()}
    torch.save(content, tmp_path / "run" / "best.pt")
    return tmp_path / "run"


def test_typed_results(run_dir, tmp_path):
    model = load_model(run_dir)
    assert model.tasks == ("semseg", "depth", "normals", "edge") and "best.pt" in repr(model)
    with answers(by_colour):
        out = model.predict(stripes(60, 90))
    assert list(out) == list(model.tasks) and out.image.shape == (60, 90, 3) and "90 x 60" in repr(out)
    at = [(30, 15), (30, 45), (30, 75)]                                       # the middle of each stripe
    semseg, depth, normals, edge = out.values()
    assert [int(semseg.array[place]) for place in at] == [1, 2, 4] and semseg.array.dtype == np.uint8
    assert semseg.class_names[1] == "floor" and len(semseg.class_names) == 40
    assert [float(depth.array[place]) for place in at] == pytest.approx([1.2344, 80, 0], abs=1e-4)
    assert [result.unit for result in out.values()] == ["class", "m", "unit vector", "probability"]
    assert normals.array.shape == (60, 90, 3) and edge.array.shape == (60, 90)
    np.testing.assert_allclose([normals.array[place] for place in at], np.eye(3), atol=1e-5)
    assert edge.array[at[0]] == pytest.approx(0.25, abs=1e-5)
    assert semseg.colour().shape == (60, 90, 3) and semseg.colour().dtype == np.uint8
    assert [text for _, text in depth.legend()] and semseg._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="this network predicts semseg, depth, normals, edge"):
        out["sal"]
    assert depth.save(tmp_path / "d.npy") == tmp_path / "d.npy"
    assert np.array_equal(np.load(tmp_path / "d.npy"), depth.array)
    for path in (depth.save(tmp_path / "my.depth"), depth.save(tmp_path / "my.depth.png")):
        assert path == tmp_path / "my.depth.png" and np.asarray(Image.open(path))[at[0]] == 1234
    assert depth.format.startswith("16-bit PNG, millimetres")
    assert out.save(tmp_path / "all", "x.y") == tmp_path / "all" / "panels" / "x.y.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "all" / "panels" / "x.y.png")), out.panel())


def test_every_form_of_picture_and_the_command_line_say_the_same(run_dir, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    model = load_model(run_dir / "best.pt", batch=3)
    forms = [path, str(path), pixels, Image.open(path)]
    one = model.predict(path)
    for other in (*model.predict(forms), *model.stream(iter(forms))):
        for task in model.tasks:
            np.testing.assert_allclose(other[task].array, one[task].array, atol=1e-5)
    predict(model.config, run_dir / "best.pt", path, tmp_path / "out")
    one.save(tmp_path / "api", "a")
    files = sorted(p.relative_to(tmp_path / "out") for kind in ("raw", "colour", "panels")
                   for p in (tmp_path / "out" / kind).rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "api" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


def test_bad_pictures_are_named(run_dir, tmp_path):
    model = load_model(run_dir)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for bad, words in ((tmp_path / "broken.png", "broken.png"), (tmp_path / "gone.png", "file not found"),
                       (np.zeros((40, 40, 3)), r"not an array \(40, 40, 3\) float64"), (3, "not a int"),
                       (np.zeros((40, 40, 4), np.uint8), r"\(40, 40, 4\)"), (np.zeros((8, 40), np.uint8), "8 x 40"),
                       (Image.new("I;16", (40, 40)), "mode I;16")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            model.predict([stripes(40, 60), bad])
    left_out = []
    found = list(model.stream([stripes(40, 60), tmp_path / "gone.png", stripes(50, 60)],
                              on_error=lambda picture, error: left_out.append((picture, error))))
    assert [out.image.shape[0] for out in found] == [40, 50]
    assert [picture for picture, _ in left_out] == [tmp_path / "gone.png"]


def test_threads_may_share_a_model(run_dir):
    """And two models of one process keep their settings."""
    models = [load_model(run_dir), load_model(run_dir, overrides=["precision=bf16", "scan_backend=torch"])]
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 96, 3), np.uint8) for i in range(4)]
    alone = [[model.predict(p)["depth"].array for p in pictures] for model in models]
    found = {}

    def work(m: int, i: int) -> None:
        found[m, i] = models[m].predict(pictures[i])["depth"].array

    threads = [threading.Thread(target=work, args=(m, i)) for i in range(4) for m in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (m, i), array in found.items():
        np.testing.assert_array_equal(array, alone[m][i])
    assert len(found) == 8 and not np.array_equal(alone[0][0], alone[1][0])


def test_strips_are_the_whole(monkeypatch):
    """Upsampled, the same and downsampled; classes, one channel, vectors."""
    torch.manual_seed(0)
    for size in ((37, 53), (12, 16), (7, 9)):
        for task, channels in (("semseg", 40), ("depth", 1), ("normals", 3), ("sal", 2)):
            logits, decode = torch.randn(1, channels, 12, 16), TASKS.load(task).decode
            wanted = decode(resize(logits, size), [{}])[0].permute(1, 2, 0).numpy()
            for strip in (1, 40 * 53 * 5, 2**20):
                monkeypatch.setattr(prediction, "STRIP", strip)
                rows = Rows(logits, size, decode)
                found = rows[:]
                assert found.shape == rows.shape == wanted.shape
                assert found.dtype == (np.uint8 if task == "semseg" else np.float32)
                np.testing.assert_allclose(found, wanted, atol=1e-5)
                for part in (slice(3, 6), slice(6, 900), slice(-1, None)):
                    assert np.array_equal(rows[part], found[part])
    feat = torch.randn(2, 3, 5, 6)
    assert torch.equal(resized_rows(feat, (5, 6), 1, 4), feat[..., 1:4, :])
    torch.testing.assert_close(resized_rows(feat, (9, 4), 2, 7),
                               F.interpolate(feat, (9, 4), mode="bilinear")[..., 2:7, :])


def test_which_checkpoint_is_meant(run_dir, tmp_path, monkeypatch):
    best = run_dir / "best.pt"
    assert find_checkpoint(best) == find_checkpoint(run_dir) == best
    best.rename(run_dir / "last.pt")
    assert find_checkpoint(str(run_dir)).name == "last.pt"
    (run_dir / "last.pt").rename(run_dir / "mine.pth")
    assert find_checkpoint(run_dir).name == "mine.pth"
    (run_dir / "other.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds mine.pth, other.pth; a run has best.pt or last.pt"):
        find_checkpoint(run_dir)
    (run_dir / "other.pth").unlink()
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: asked.append(name) or str(run_dir))
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("somebody/bim-nyud") == run_dir / "mine.pth" and asked == ["somebody/bim-nyud"]
    for path in ("nowhere.pt", "run/nowhere.pt", "no/where/best.pt", "run/nowhere"):
        assert find_checkpoint(path) == Path(path)              # no names of the hub; reading says what is there
    assert asked == ["somebody/bim-nyud"]


def test_weights_alone_need_a_configuration(run_dir, tmp_path):
    weights = tmp_path / "weights" / "w.pt"
    weights.parent.mkdir()
    torch.save({"model": torch.load(run_dir / "best.pt", weights_only=True)["model"]}, weights)
    with pytest.raises(ValueError, match="does not hold its configuration"):
        load_model(weights)
    assert load_model(weights, config=tmp_path / "watched.yml", overrides=NYUD).tasks[0] == "semseg"
    import yaml
    (weights.parent / "config.yaml").write_text(yaml.safe_dump(own_config(run_dir / "best.pt").to_dict()))
    assert load_model(weights.parent).tasks == ("semseg", "depth", "normals", "edge")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_checkpoint_of_a_gpu_runs_here(run_dir, caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    content = torch.load(run_dir / "best.pt", weights_only=True)
    content["config"] |= {"device": "cuda", "scan_backend": "cuda"}
    torch.save(content, run_dir / "best.pt")
    with caplog.at_level(logging.INFO):
        config = own_config(run_dir / "best.pt")
    assert (config.device, config.scan_backend) == ("auto", "auto")
    assert "device: the checkpoint's cuda is not to be had here; auto takes its place" in caplog.text
    assert "scan_backend: the checkpoint's cuda cannot run here (" in caplog.text
    asked = own_config(run_dir / "best.pt", ["scan_backend=cuda", "device=cuda"])          # what is asked for stays
    assert (asked.device, asked.scan_backend) == ("cuda", "cuda")
    with pytest.raises(ValueError, match="finds no CUDA device"):
        load_model(run_dir, device="cuda")
    assert load_model(run_dir).predict(stripes(64, 96))["depth"].array.shape == (64, 96)
