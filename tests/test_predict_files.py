"""The files that `predict` writes, read by Pillow, for a network whose answers are known."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.watched_run import MEAN, STD, answers, experiment, voc
from utils.engine.build import model_from_config
from utils.engine.inputs import output_names
from utils.engine.predict import predict

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NYUD = ["task_dictionary.include_normals=true", "task_dictionary.include_edge=true"]
PASCAL = ["train_db_name=PASCALContext", "val_db_name=PASCALContext",
          "task_dictionary={include_semseg: true, include_human_parts: true, include_sal: true}"]
LOG3 = 1.0986122886681098


def stripes(height: int, width: int) -> np.ndarray:
    """Red, green and blue, a third of the width each: (H, W, 3) uint8 RGB."""
    picture = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate((RED, GREEN, BLUE)):
        picture[:, i * width // 3:(i + 1) * width // 3] = colour
    return picture


def by_colour(rgb: Tensor) -> dict[str, Tensor]:
    """Red: class 1, 1.2344 m, +x, 1/4. Green: class 2, 80 m, +y, 3/4. Blue: class 4, -1 m, +z, 1/2."""
    red, green, blue = rgb[:, :1], rgb[:, 1:2], rgb[:, 2:]
    classes = torch.zeros(len(rgb), 40, *rgb.shape[2:])
    classes[:, 1:2], classes[:, 2:3], classes[:, 4:5] = red, green, blue
    chance = LOG3 * (green - red)
    return {"semseg": classes[:, :21], "human_parts": classes[:, :7], "depth": 1.2344 * red + 80 * green - blue,
            "normals": 3 * rgb, "edge": chance, "sal": torch.cat((-chance / 2, chance / 2), 1)}


def by_colour_at_half_size(rgb: Tensor) -> dict[str, Tensor]:
    """As a data set whose labels are of another size than the images would ask for."""
    return {task: F.avg_pool2d(y, 2) for task, y in by_colour(rgb).items()}


def run(tmp_path: Path, pictures: dict[str, np.ndarray], overrides: list[str],
        answer: Callable[[Tensor], dict[str, Tensor]] = by_colour) -> list[Path]:
    """Predicts these pictures into tmp_path/out; the panels."""
    (tmp_path / "in").mkdir()
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / "in" / name)
    config = experiment(tmp_path, tmp_path, *overrides)
    torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
    with answers(answer):
        return predict(config, tmp_path / "any.pt", tmp_path / "in", tmp_path / "out")


def at_stripes(path: Path) -> list:
    """The values of a file in the middle of each stripe."""
    values = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
    height, width = values.shape[:2]
    return [values[height // 2, (2 * i + 1) * width // 6].tolist() for i in range(3)]


SIZES = {"as_trained": (64, 96), "larger": (180, 270), "upright": (120, 60), "panorama": (40, 300), "small": (36, 42)}


@pytest.mark.parametrize("answer", [by_colour, by_colour_at_half_size])
def test_raw_files_and_colours_of_nyud(tmp_path, answer):
    """Every picture at its own size, every value where it belongs."""
    out = tmp_path / "out"
    panels = run(tmp_path, {f"{name}.png": stripes(*size) for name, size in SIZES.items()}, NYUD, answer)
    assert sorted(panels) == sorted(out / "panels" / f"{name}.png" for name in SIZES)
    for name, size in SIZES.items():
        raw = {task: out / "raw" / task / f"{name}.png" for task in ("semseg", "depth", "edge")}
        colour = {task: out / "colour" / task / f"{name}.png" for task in ("semseg", "depth", "normals", "edge")}
        for path in (*raw.values(), *colour.values()):
            assert Image.open(path).size == size[::-1]
        assert all(Image.open(path).mode == "RGB" for path in colour.values())
        assert at_stripes(raw["semseg"]) == [1, 2, 4]
        assert at_stripes(colour["semseg"]) == [voc(2), voc(3), voc(5)]    # no background class: one colour further
        assert at_stripes(raw["depth"]) == [1234, 65535, 0]               # millimetres, cut to 16 bits
        red, green, blue = at_stripes(colour["depth"])
        assert red[0] > red[2] and green[2] > green[0] and blue == [0, 0, 0]       # near, far, none
        assert at_stripes(raw["edge"]) == pytest.approx([65535 / 4, 3 * 65535 / 4, 65535 / 2], abs=1)
        assert at_stripes(colour["edge"]) == [[63] * 3, [191] * 3, [127] * 3]
        vectors = np.load(out / "raw" / "normals" / f"{name}.npy")
        assert vectors.shape == (*size, 3) and vectors.dtype == np.float32
        np.testing.assert_allclose(at_stripes(out / "raw" / "normals" / f"{name}.npy"), np.eye(3), atol=1e-4)
        assert np.abs(np.array(at_stripes(colour["normals"])) - (np.eye(3) * 127.5 + 127.5)).max() <= 1
    formats = json.loads((out / "formats.json").read_text())
    assert list(formats) == ["semseg", "depth", "normals", "edge"]
    assert formats["depth"].startswith("16-bit PNG, millimetres, at most 65.535 m")


def test_raw_files_and_colours_of_pascal(tmp_path):
    out = tmp_path / "out"
    run(tmp_path, {"a.png": stripes(60, 90)}, PASCAL)
    for task in ("semseg", "human_parts"):
        assert at_stripes(out / "raw" / task / "a.png") == [1, 2, 4]
        assert at_stripes(out / "colour" / task / "a.png") == [voc(1), voc(2), voc(4)]
    assert at_stripes(out / "raw" / "sal" / "a.png") == pytest.approx([65535 / 4, 3 * 65535 / 4, 65535 / 2], abs=1)
    assert at_stripes(out / "colour" / "sal" / "a.png") == [[63] * 3, [191] * 3, [127] * 3]


def test_borders_stay_where_they_are(tmp_path):
    """Framing and its inverse: the border between two classes moves by less than one pixel of the frame."""
    run(tmp_path, {"upright.png": stripes(192, 96), "panorama.png": stripes(48, 288)}, [])
    for name, grain in (("upright", 3), ("panorama", 3)):
        found = np.asarray(Image.open(tmp_path / "out" / "raw" / "semseg" / f"{name}.png"))
        wanted = stripes(*found.shape) @ np.array([1, 2, 4]) // 255
        wrong = np.flatnonzero((found != wanted).any(axis=0))
        thirds = np.array([found.shape[1] / 3, 2 * found.shape[1] / 3])
        assert all(np.abs(thirds - column).min() <= grain for column in wrong), wrong


def test_a_trained_network_answers_in_eval_mode(tmp_path):
    """Its batch statistics are the stored ones, its blocks are not dropped, and the moving average goes first."""
    config = experiment(tmp_path, tmp_path, *NYUD, "backbone_kwargs.drop_path_rate=0.5")
    torch.manual_seed(0)
    model = model_from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.3
    other = {key: value + 1 for key, value in model.state_dict().items()}
    average = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": other, "ema": {"n_averaged": torch.tensor(5), **average}}, tmp_path / "any.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predict(config, tmp_path / "any.pt", tmp_path / "a.png", tmp_path / "out")
    with torch.no_grad():
        out = model.eval()(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD)[None]).final
    raw = {task: np.asarray(Image.open(tmp_path / "out" / "raw" / task / "a.png")) for task in ("semseg", "edge")}
    assert (raw["semseg"] != out["semseg"][0].argmax(0).numpy()).mean() < 1e-3
    np.testing.assert_allclose(raw["edge"], out["edge"][0, 0].sigmoid().numpy() * 65535, atol=2)
    normals = np.load(tmp_path / "out" / "raw" / "normals" / "a.npy")
    np.testing.assert_allclose(normals, F.normalize(out["normals"], dim=1)[0].permute(1, 2, 0).numpy(), atol=1e-4)


def test_the_network_sees_the_picture_as_in_training(tmp_path):
    """RGB from 0 to 1 with its aspect ratio kept, in the middle of a frame of the mean colour."""
    seen = []

    def look(rgb: Tensor) -> dict[str, Tensor]:
        seen.append(rgb.clone())
        return by_colour(rgb)

    run(tmp_path, {"a.png": stripes(120, 60)}, [], look)
    [[frame]] = seen                                                           # (3, 64, 96), the picture (64, 32)
    assert frame.shape == (3, 64, 96)
    for outside in (frame[:, :, :32], frame[:, :, 64:]):
        torch.testing.assert_close(outside, MEAN.expand_as(outside))
    inside = frame[:, :, [36, 48, 60]]                                         # one column of each stripe
    torch.testing.assert_close(inside, torch.eye(3)[:, None].expand_as(inside), rtol=0, atol=1e-5)


def test_a_larger_picture_is_averaged_not_sampled(tmp_path):
    seen = []

    def look(rgb: Tensor) -> dict[str, Tensor]:
        seen.append(rgb.clone())
        return by_colour(rgb)

    board = np.indices((320, 480)).sum(0) % 2 * 255                            # five times the size of the network
    run(tmp_path, {"a.png": np.repeat(board[..., None], 3, 2).astype(np.uint8)}, [], look)
    [[frame]] = seen                                                           # (3, 64, 96)
    torch.testing.assert_close(frame, torch.full_like(frame, 0.5), rtol=0, atol=0.03)         # 12 or 13 of 25


def test_the_panel_shows_the_picture_and_the_legend_in_their_colours(tmp_path):
    [panel] = run(tmp_path, {"a.png": stripes(64, 96)}, [])
    sheet = np.asarray(Image.open(panel).convert("RGB"))

    def area(*colour: int) -> int:
        return int((np.abs(sheet.astype(int) - colour).max(axis=-1) <= 2).sum())

    stripe = area(*RED)
    assert stripe > 1000 and area(*GREEN) == pytest.approx(stripe, rel=0.05)
    assert area(*BLUE) == pytest.approx(stripe, rel=0.05)
    for index in (2, 3, 5):                                      # a stripe and a legend's field of every class
        assert area(*voc(index)) == pytest.approx(stripe, rel=0.05) and area(*voc(index)) > stripe
    red_at = np.argwhere((sheet == RED).all(axis=-1)).mean(axis=0)
    blue_at = np.argwhere((sheet == BLUE).all(axis=-1)).mean(axis=0)
    assert red_at[1] < blue_at[1]


def test_photographs_are_turned_upright(tmp_path):
    """A camera held sideways: the stored pixels are turned by the file's EXIF orientation."""
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6                                                           # turn by 90 degrees clockwise
    stored = np.rot90(stripes(90, 150))                                        # counter-clockwise
    Image.fromarray(stored).save(tmp_path / "in" / "a.png", exif=exif)
    config = experiment(tmp_path, tmp_path)
    torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
    with answers(by_colour):
        predict(config, tmp_path / "any.pt", tmp_path / "in" / "a.png", tmp_path / "out")
    found = tmp_path / "out" / "raw" / "semseg" / "a.png"
    assert Image.open(found).size == (150, 90) and at_stripes(found) == [1, 2, 4]


def test_no_picture_overwrites_another(tmp_path):
    """The whole file name where two pictures differ in their suffix alone."""
    red, blue = (np.full((40, 60, 3), colour, np.uint8) for colour in (RED, BLUE))
    panels = run(tmp_path, {"a.png": red, "a.bmp": blue, "b.c.png": red}, [])
    assert sorted(path.stem for path in panels) == ["a.bmp", "a.png", "b.c"]
    kinds = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "out" / "raw" / "semseg").iterdir()}
    assert {name: int(np.median(ids)) for name, ids in kinds.items()} == {"a.png": 1, "a.bmp": 4, "b.c": 1}


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    run(tmp_path, {"a.png": stripes(40, 60), "b.TIFF": stripes(40, 60)}, [])
    assert sorted(path.name for path in (tmp_path / "out" / "panels").iterdir()) == ["a.png", "b.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.txt", "panels", "colour", "raw",
                                                                  "formats.json", "predictions.jsonl"}
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("kind", ["raw", "colour", "panels"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, kind):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if f"/out/{kind}/" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: No space left"):
        run(tmp_path, {"a.png": stripes(40, 60)}, [])


def test_no_two_images_share_the_name_of_their_outputs():
    paths = [Path(name) for name in ("a.b.png", "a_b.png", "c.jpg", "c.png", "c_jpg.png", "a.b.tif")]
    assert list(output_names(paths).values()) == ["a.b.png", "a_b", "c.jpg", "c.png", "c_jpg", "a.b.tif"]
