"""Which inputs are meant, what their results are called, what is there already, and that no input costs another."""

import errno
import json
import logging
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_predict_files import NYUD, by_colour, stripes
from tests.watched_run import answers, experiment
from utils.engine.build import model_from_config
from utils.engine.inputs import Journal, find_inputs, output_names
from utils.engine.predict import predict
from utils.files import declared_size


@pytest.fixture
def network(tmp_path):
    """Predicts whatever is asked for with `by_colour`: (sources, overrides) -> panels, into tmp_path/out."""
    def run(sources, *overrides, overwrite=False):
        config = experiment(tmp_path, tmp_path, *NYUD, *overrides)
        if not (tmp_path / "any.pt").exists():
            torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")
        with answers(by_colour):
            return predict(config, tmp_path / "any.pt", sources, tmp_path / "out", overwrite)

    return run


def picture(path: Path, size=(40, 60), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stripes(*size)).save(path, **options)
    return path


def test_sources_in_every_form(tmp_path, caplog, monkeypatch):
    a, b, c = (picture(tmp_path / "in" / name) for name in ("a.jpg", "b.PNG", "sub/c.png"))
    (tmp_path / "in" / "._a.jpg").write_bytes(b"of a Mac")
    (tmp_path / "in" / "notes.doc").write_text("no picture")
    (tmp_path / "in" / "d.cr2").write_bytes(b"a camera's")
    (tmp_path / "list.txt").write_text("in/sub/c.png\n\nin/a.jpg\n")
    with caplog.at_level(logging.INFO):
        assert find_inputs(tmp_path / "in") == [a, b]
    assert "left out, because no pictures or videos: 1 .cr2, 1 .doc" in caplog.text
    assert find_inputs(str(tmp_path / "in" / "**" / "*.[jp]*g")) == [a, c]
    assert find_inputs(tmp_path / "list.txt") == [c, a]
    assert find_inputs([c, tmp_path / "in", a]) == [c, a, b]
    assert find_inputs("camera:0") == [Path("camera:0")]
    assert find_inputs([a, tmp_path / "gone.jpg"]) == [a, tmp_path / "gone.jpg"]        # told when it is read
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    for source, words in (("nowhere", "no such image"), ("empty", "holds no picture"), ("empty.txt", "list is empty"),
                          ("*.bmp", "no file fits")):
        with pytest.raises(FileNotFoundError, match=words):
            find_inputs(tmp_path / source)


def test_names_are_never_lossy():
    def names(*paths, taken=None):
        return list(output_names([Path(path) for path in paths], taken).values())

    assert names("x/a.b.png", "x/a_b.png") == ["a.b", "a_b"]                    # dots are kept
    assert names("x/a.png", "x/A.jpg") == ["a.png", "A.jpg"]                    # one file on some disks
    assert names("x/1.png", "y/1.png", "z/q/2.png") == ["x/1", "y/1", "z/q/2"]
    assert names("x/Ф.png", "x/ф.bmp") == ["Ф.png", "ф.bmp"]
    assert names("x/e\u0301.png", "x/\u00e9.jpg") == ["e\u0301.png", "\u00e9.jpg"]      # the same letter
    assert names("x/a.png", "x/a.png.png", "x/a.jpg") == ["a.png", "a.png.png", "a.jpg"]
    assert names("photo.jpg") == ["photo"] and names("camera:0")[0].startswith("camera_0_2")
    before = {"a": Path(os.path.abspath("x/a.png"))}
    assert names("x/a.jpg", "x/a.png", taken=before) == ["a.jpg", "a"]           # keeps the name that it had
    assert names("y/a.png", taken=before) == ["a.png"]


def test_what_is_there_is_left_and_what_has_changed_is_made_anew(tmp_path, network, caplog):
    paths = [picture(tmp_path / "in" / f"{name}.png") for name in "abc"]
    assert len(network(paths[:2])) == 2
    journal = tmp_path / "out" / "predictions.jsonl"
    with journal.open("a") as file:
        file.write('{"name": "c", "sou')                        # a process that died
    depth = tmp_path / "out" / "raw" / "depth"
    (depth / "a.png").unlink()
    with caplog.at_level(logging.INFO):
        assert [panel.stem for panel in network(paths)] == ["a", "b", "c"]
    assert "2 of 3 are there already; --overwrite makes them anew" in caplog.text
    assert sorted(path.name for path in depth.iterdir()) == ["b.png", "c.png"]
    whole = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["name"] for line in whole] == ["a", "b", "c"]
    network(paths, overwrite=True)
    assert (depth / "a.png").is_file()
    for change in ("other picture", "other settings", "other checkpoint"):
        (depth / "a.png").unlink()
        if change == "other picture":
            picture(paths[0], (48, 60))
        if change == "other checkpoint":
            os.utime(tmp_path / "any.pt", (1, 1))
        network(paths, *(["precision=bf16"] if change == "other settings" else ["nworkers=3"]))
        assert (depth / "a.png").is_file(), change


def test_a_journal_tells_inputs_apart(tmp_path):
    path = picture(tmp_path / "a.png")
    journal = Journal(tmp_path, "x")
    assert not journal.has(path, "a")
    journal.add(path, "a")
    assert Journal(tmp_path, "x").has(path, "a") and not Journal(tmp_path, "y").has(path, "a")
    assert not Journal(tmp_path, "x").has(path, "b") and Journal(tmp_path, "x").names() == {"a": path}


def header_of(width: int, height: int) -> bytes:
    """A PNG that declares this size and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
            + struct.pack(">I", 1000) + b"IDAT")


def test_no_input_costs_another(tmp_path, network, caplog):
    """Declared sizes, animations, damage of many kinds, names that no console shows."""
    folder = tmp_path / "in"
    good = picture(folder / "good.png")
    bad = {"huge.png": header_of(60_000, 60_000), "large.png": header_of(14_000, 13_000), "empty.jpg": b"",
           "text.jpg": b"no picture", "phone.HEIC": b"\0\0\0\x18ftypheic",
           "half.png": good.read_bytes()[:90], "tiff.tif": b"II*\x00\xff\xff\xff\x7f" * 9}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    frames = [Image.fromarray(stripes(40, 60)), Image.fromarray(stripes(40, 60)[::-1, ::-1])]
    for ending in ("gif", "png", "webp", "tif"):
        frames[0].save(folder / f"moving.{ending}", save_all=True, append_images=frames[1:])
    gone = tmp_path / "gone.png"
    odd = picture(folder / "фото \udcff.png")                   # a byte that is no UTF-8
    with pytest.raises(ValueError, match=r"12 of 14 input\(s\) could not be predicted: .*; all others are done"):
        network([folder, gone])
    assert sorted(os.listdir(tmp_path / "out" / "panels")) == sorted(["good.png", odd.name])
    assert "huge.png declares more than 179 megapixels" in caplog.text
    assert "large.png declares more than 179" in caplog.text
    assert "moving.webp holds 2 pictures (an animation, or pages)" in caplog.text
    assert "phone.HEIC: Pillow does not know this format of phones; save it as JPEG or PNG" in caplog.text
    assert "Traceback" not in caplog.text


def test_kinds_of_pictures_the_training_never_saw(tmp_path, network):
    """The same stripes in every kind; those of a single channel are grey."""
    folder, colour = tmp_path / "in", Image.fromarray(stripes(48, 96))
    folder.mkdir()
    colour.convert("CMYK").save(folder / "cmyk.tif")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.gif")
    colour.save(folder / "still.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 3                                            # upside down
    colour.rotate(180).save(folder / "turned.png", exif=exif)
    Image.fromarray(stripes(48, 96)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    colour.convert("L").save(folder / "grey.bmp")
    colour.convert("LA").save(folder / "grey_alpha.png")
    panels = network(folder)
    assert len(panels) == 8
    for name in ("cmyk", "alpha", "palette", "still", "turned"):
        classes = np.asarray(Image.open(tmp_path / "out" / "raw" / "semseg" / f"{name}.png"))
        assert classes[24, [16, 48, 80]].tolist() == [1, 2, 4], name


def test_sizes_are_read_without_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(header_of(300, 200))
    assert declared_size(tmp_path / "a.png") == (200, 300)
    with pytest.raises(FileNotFoundError, match="file not found"):
        declared_size(tmp_path / "b.png")
    picture(tmp_path / "c.jpg")
    assert declared_size(tmp_path / "c.jpg") == (40, 60)


def test_large_maps_are_coloured_and_written_piece_by_piece(monkeypatch, tmp_path):
    from evaluation.evaluator import TaskContext
    from utils.engine import views
    rng = np.random.default_rng(0)
    depth, vectors = rng.uniform(0, 9, (50, 30)).astype(np.float32), rng.normal(size=(50, 30, 3)).astype(np.float32)
    functions = [lambda: views.colour_depth(depth), lambda: views.colour_normals(vectors),
                 lambda: views.colour_probability(depth / 9),
                 lambda: views.DEPTH_MAP.write(tmp_path / "x", depth[..., None], TaskContext(1)).read_bytes()]
    whole = [function() for function in functions]
    monkeypatch.setattr(views, "PIECE", 61)
    for function, wanted in zip(functions, whole, strict=True):
        assert np.array_equal(function(), wanted)           # the file, too: bytes are compared as they are


def test_of_a_large_picture_no_vectors_are_held_whole(network, tmp_path, monkeypatch):
    """And its files are those of a picture that is not large."""
    from utils.engine import prediction, views
    picture(tmp_path / "a.png", (50, 70))
    files = lambda: {path: path.read_bytes() for path in (tmp_path / "out").rglob("a.*")}  # noqa: E731
    asked, decoded = [], prediction.Rows.__getitem__

    def noted(rows: prediction.Rows, part: slice) -> np.ndarray:
        found = decoded(rows, part)
        asked.append(found.shape)
        return found

    monkeypatch.setattr(prediction.Rows, "__getitem__", noted)
    monkeypatch.setattr(views, "PIECE", 70 * 9)
    network(tmp_path / "a.png")
    wanted = files()
    assert len(wanted) == 9 and (50, 70, 3) in asked
    assert np.load(tmp_path / "out" / "raw" / "normals" / "a.npy").shape == (50, 70, 3)
    asked.clear()
    monkeypatch.setattr(prediction, "LARGE", 1)
    network(tmp_path / "a.png", overwrite=True)
    assert files() == wanted and max(rows for rows, _, channels in asked if channels == 3) == 10


def test_a_full_disk_leaves_no_part_of_a_file_and_says_what_to_do(tmp_path, monkeypatch):
    from evaluation.evaluator import TaskContext
    from utils.engine.views import VECTORS
    from utils.exits import ending_of
    vectors = np.ones((4, 5, 3), np.float32)

    class Full(np.ndarray):
        def __getitem__(self, rows):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*a\.npy: No space left on device$") as error:
        VECTORS.write(tmp_path / "a", vectors.view(Full), TaskContext(3))
    assert not list(tmp_path.iterdir())
    assert ending_of(error.value).endswith("Next: free some space and start the same line again")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(OSError, match="Read-only file system$") as error:
        VECTORS.write(tmp_path / "b", vectors, TaskContext(3))
    assert ending_of(error.value).endswith("Next: get the right to that path, or name another one")


@pytest.mark.skipif(sys.platform != "linux", reason="the environment decides on the encoding there")
def test_an_ascii_console_ends_no_run(tmp_path):
    import subprocess

    from tests.shared import ROOT
    code = ("import logging; from utils.logging import setup_logging; setup_logging(True); "
            "logging.info('\\u0444 \\udcff'); logging.info('goes on')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0 and "\\u0444" in done.stdout and "goes on" in done.stdout and not done.stderr
