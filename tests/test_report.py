"""report.html: what is on it, that it stands alone, and that its numbers and pictures are those of the evaluation."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main as command_line
from evaluation.depth import DepthMeter
from evaluation.evaluator import TaskContext
from evaluation.figures import Bars, Confusion, Histogram, PrecisionRecall
from evaluation.normals import NormalsMeter
from evaluation.segmentation import SegmentationMeter
from tests.conftest import TINY
from tests.shared import ROOT
from utils.engine.config import load_config
from utils.engine.panel import coloured_as
from utils.engine.report.figures import figure_html
from utils.engine.report.page import page, pictures, table
from utils.engine.report.plots import COLOURS, figure_svg, lines_svg
from utils.engine.report.review import (
    ImageScores,
    Review,
    _without_padding,
    chosen_images,
    load_image_scores,
    save_image_scores,
    thumbnail,
)
from utils.engine.results import read_results
from utils.engine.train import train
from utils.engine.views import DEPTH_MAP


class Parsed(HTMLParser):
    """Elements with their attributes, the text, and the headings."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.headings, self.words = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings.append((self.open[-1], data))
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(example_root, tmp_path_factory) -> Path:
    """The folder of a tiny run that has written its report."""
    out = tmp_path_factory.mktemp("report")
    config = load_config(str(ROOT / "configs" / "bim_nyud.yml"), [
        *TINY, "report=true", "max_iter=2", "val_interval=1", "single_task_scores={semseg: 0.4, depth: 0.5, "
        "normals: 19, edge: 0.05}", f"db_root={example_root}", f"out_dir={out}"])
    train(config, False)
    return config.run_dir


def test_a_training_ends_with_a_page_that_stands_alone(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    found = Parsed(text)
    assert [words for level, words in found.headings if level == "h2"] == [
        "Scores", "What may be compared with this", "Task semseg", "Task depth", "Task normals", "Task edge",
        "Learning curves", "Model", "Environment", "Configuration"]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in found.all("a"):
        assert link["href"].startswith("#") and link["href"][1:] in ids
    sources = [image["src"] for image in found.all("img")]
    assert all(source.startswith("data:image/") for source in sources) and len(sources) > 20
    assert all(image["alt"] for image in found.all("img"))
    assert not found.all("script") and not found.all("link") and "@import" not in text and "url(" not in text
    assert len(text) < 15e6


def test_the_page_shows_the_scores_of_the_run(run):
    results, about = read_results(run / "results" / "step_2.json")
    words = Parsed((run / "report.html").read_text(encoding="utf-8")).words
    for cell in (f"{100 * results['semseg']['mIoU']:.2f}", f"{results['depth']['rmse']:.4f}", "delta_m %",
                 "last update", "5, NYUD test", "bim", "parameters, total", "GMACs, total", "64 x 96"):
        assert cell in words, cell
    assert about["units"] == {"depth": "m"}
    captions = " ".join(words)
    assert f"Mean {100 * results['semseg']['mIoU']:.1f} %" in captions and "semseg mIoU in the evaluations" in captions


def test_images_are_scored_one_by_one_and_shown_small(run):
    found = load_image_scores(run / "images.json")
    results, _ = read_results(run / "results" / "step_2.json")
    assert len(found.names) == 5 and found.names == sorted(found.names)
    assert set(found.values) == {"semseg", "depth", "normals", "edge"}
    assert found.scores["semseg"].key == "mIoU_present" and found.scores["depth"].key == "rmse"
    squared = np.mean(found.values["depth"] ** 2)          # images of one size without void pixels
    assert np.sqrt(squared) == pytest.approx(results["depth"]["rmse"], rel=0.02)
    for kind in ("input", "semseg", "semseg_label", "edge", "edge_label"):
        picture = Image.open(thumbnail(run, kind, found.names[0]))
        assert picture.format == "JPEG" and max(picture.size) == 240
    shown = Parsed((run / "report.html").read_text(encoding="utf-8")).all("img")
    best = found.names[int(np.argmin(found.values["depth"]))]
    first = next(image for image in shown if image["alt"].startswith(f"prediction, {best}: RMSE"))
    data = base64.b64decode(first["src"].partition("base64,")[2])
    assert data == thumbnail(run, "depth", best).read_bytes()


def keys_of(page: Path) -> list[tuple[str, list[str], list[str], bool]]:
    """Of every list of colours on a page: its name, the colours, their words, and whether it is folded."""
    text = page.read_text(encoding="utf-8")
    return [(name, re.findall('fill="#(.*?)"', body), re.findall("</svg>(.*?)</li>", body), bool(folded))
            for folded, name, body in re.findall('(</summary>\n)?<ul class="key" aria-label="(.*?)">(.*?)</ul>', text)]


def test_every_task_has_a_key_to_its_colours(run):
    """Words beside each colour, folded where there are many; the colours are those of the pictures."""
    keys = load_image_scores(run / "images.json").keys
    assert list(keys) == ["semseg", "depth", "normals", "edge"]
    assert keys_of(run / "report.html") == [
        (f"{task}: colours", ["{:02x}{:02x}{:02x}".format(*colour) for colour, _ in key], [text for _, text in key],
         task == "semseg") for task, key in keys.items()]
    colours, names = zip(*keys["semseg"], strict=True)
    assert len(colours) == len(set(names)) == 41 and names[:2] == ("wall", "floor")
    label = np.asarray(Image.open(thumbnail(run, "semseg_label", load_image_scores(run / "images.json").names[0])))
    nearest = np.abs(label.reshape(-1, 1, 3).astype(int) - np.array(colours)).max(axis=2).min(axis=1)
    assert np.median(nearest) <= 8                          # as JPEG keeps it


def test_infer_writes_the_page_beside_its_results(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["main.py", "--run_mode", "infer", "--trained_model", str(run / "last.pt"),
                                     "--output", str(tmp_path / "out"), "boundary_kwargs.workers=0"])
    command_line.main()
    words = Parsed((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).words
    assert "edge: boundaries at all thresholds" in " ".join(words) and "Losses of the training" in words
    again = load_image_scores(tmp_path / "out" / "images.json")
    at_the_end = load_image_scores(run / "images.json")
    assert again.names == at_the_end.names
    assert all(np.array_equal(again.values[task], at_the_end.values[task]) for task in again.values)


def test_without_a_report_nothing_of_it_is_written(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["main.py", "--run_mode", "infer", "--trained_model", str(run / "last.pt"),
                                     "--output", str(tmp_path), "boundary_infer=off", "report=false"])
    command_line.main()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "edge"}


def test_a_request_to_leave_ends_the_page_and_nothing_else(example_root, monkeypatch, tmp_path, capsys):
    config = load_config(str(ROOT / "configs" / "bim_nyud.yml"), [
        *TINY, "report=true", "max_iter=1", "val_interval=1", f"db_root={example_root}", f"out_dir={tmp_path}"])

    def asked(*_) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr("utils.engine.report.write.table_rows", asked)
    began = time.monotonic()
    results = train(config, False)
    assert time.monotonic() - began < 60 and set(results) == {"semseg", "depth", "normals", "edge"}
    assert ("no report (SIGINT); it can be had any time: python main.py --run_mode infer --trained_model "
            f"{config.run_dir / 'last.pt'}") in capsys.readouterr().out
    assert not (config.run_dir / "report.html").exists() and not list(config.run_dir.glob(".*.tmp"))
    assert torch.load(config.run_dir / "last.pt", weights_only=False)["step"] == 1


def test_pictures_of_a_large_set_take_no_more_room_than_of_a_small_one(monkeypatch, tmp_path):
    """Those that the page shows stay, and as many others, of every run the same."""
    names = [f"im{i:02}" for i in range(40)]
    values = np.random.default_rng(0).permutation(40).astype(float)
    contexts = {"depth": TaskContext(1, unit="m")}

    def pictured(folder: Path, of_images: np.ndarray) -> set[str]:
        review = Review(contexts, folder)
        review.rows = [(name, {"depth": value}) for name, value in zip(names, of_images, strict=True)]
        for name in names:
            for kind in ("input", "depth", "depth_label"):
                thumbnail(folder, kind, name).parent.mkdir(parents=True, exist_ok=True)
                thumbnail(folder, kind, name).touch()
        found, _ = review.finish()
        assert found.names == names
        left = [{path.stem for path in (folder / "thumbnails" / kind).iterdir()} for kind in os.listdir(
            folder / "thumbnails")]
        assert len(left) == 3 and left[0] == left[1] == left[2]
        return left[0]

    assert pictured(tmp_path / "all", values) == set(names)
    monkeypatch.setattr("utils.engine.report.review.KEPT", 10)
    shown = {names[i] for _, part in chosen_images(values, False, 3) for i in part}
    some, others = pictured(tmp_path / "a", values), pictured(tmp_path / "b", values[::-1])
    assert shown < some and 10 <= len(some) <= 19 and len(some & others) >= 10


def test_a_prediction_has_the_colours_of_its_label():
    label, context = np.array([[[1.0], [5.0], [0.0]]], np.float32), TaskContext(1, unit="m")
    assert coloured_as(label, "depth", context).shown == DEPTH_MAP.shown_range(label, context)
    assert coloured_as(0 * label, "depth", context) == context              # no value is valid
    assert coloured_as(label, "edge", context) == context == coloured_as(label, "semseg", context)


def test_choice_of_images():
    values = np.array([3.0, np.nan, 1.0, 5.0, 2.0, 4.0, 0.0])
    assert dict(chosen_images(values, True, 1)) == {"best": [3], "median": [0], "worst": [6]}
    assert dict(chosen_images(values, False, 2)) == {"best": [6, 2], "median": [4, 0], "worst": [3, 5]}
    assert dict(chosen_images(np.array([1.0, 2.0]), True, 3)) == {"best": [1], "median": [0]}
    assert dict(chosen_images(np.array([np.nan]), True, 3)) == {}
    for number in range(1, 12):                            # never one twice
        chosen = [i for _, part in chosen_images(np.arange(number), True, 3) for i in part]
        assert len(chosen) == len(set(chosen)) == min(number, 9)


def test_padding_is_cut_from_pictures_of_any_scale():
    frame = np.zeros((10, 20, 3), np.uint8)
    frame[3:7, 5:15] = 9
    assert (_without_padding(frame, (10, 20), (4, 10)) == 9).all()
    half = frame[::2, ::2]
    assert _without_padding(half, (10, 20), (4, 10)).shape == (2, 5, 3)


def test_scores_of_images_read_back(tmp_path):
    score = SegmentationMeter.of_image
    save_image_scores(tmp_path / "images.json", ImageScores({"semseg": score}, ["a/b", "c"],
                                                            {"semseg": np.array([0.5, np.nan])},
                                                            {"semseg": [((1, 2, 3), "caf\u00e9")]}))
    back = load_image_scores(tmp_path / "images.json")
    assert back.scores == {"semseg": score} and back.names == ["a/b", "c"]
    assert back.keys == {"semseg": [((1, 2, 3), "caf\u00e9")]}
    assert back.values["semseg"].tolist()[0] == 0.5 and np.isnan(back.values["semseg"][1])
    older = json.loads((tmp_path / "images.json").read_text())
    del older["keys"]
    (tmp_path / "images.json").write_text(json.dumps(older))
    assert load_image_scores(tmp_path / "images.json").keys == {}
    (tmp_path / "images.json").write_text("{}")
    with pytest.raises(ValueError, match=r"images\.json holds no scores of images"):
        load_image_scores(tmp_path / "images.json")


def test_what_is_written_is_text_and_never_markup(tmp_path):
    Image.new("RGB", (8, 4), (200, 0, 0)).save(tmp_path / "a.jpg")
    evil = '<b>"x" & y'
    text = page(evil, evil, [("One & two", table(evil, [["", "depth RMSE m v", "edge odsF % ^"], [evil, "1", "2"]])
                                + pictures(evil, [("image", tmp_path / "a.jpg"), ("label", tmp_path / "b.jpg")]))])
    found = Parsed(text)
    assert not found.all("b") and evil in found.words and ", lower is better" in found.words
    (image,) = found.all("img")
    assert Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2]))).size == (8, 4)
    assert "no picture" in found.words


# Figures -------------------------------------------------------------------------------------------------------------

def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def test_figures_of_the_evaluators():
    meter = SegmentationMeter(3, class_names=("sky", "sea", "sand"))
    meter.update(row(0, 0, 1, 2, 1), row(0, 0, 0, 2, 255))
    bars, confusion = meter.figures()
    assert bars.names == ("sky", "sea", "sand") and bars.values == pytest.approx([200 / 3, 0, 100])
    assert confusion.counts.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]
    meter = DepthMeter()
    meter.update(row(2, 1.1, 500, 7), row(2, 1, 1, 255))   # errors of 0, 10 and 49900 %, and a void pixel
    (histogram,) = meter.figures()
    assert histogram.edges[[0, -1]] == pytest.approx([0.1, 1000]) and histogram.counts.sum() == 3
    assert histogram.counts[[0, -1]].tolist() == [1, 1]
    at = np.flatnonzero(histogram.counts)[1]
    assert histogram.edges[at] <= 10.0001 and histogram.edges[at + 1] >= 9.9999
    meter = NormalsMeter()
    angles = np.radians([0.5, 45.5, 170])
    pred = torch.tensor(np.stack([np.cos(angles), np.sin(angles), 0 * angles])).float().view(1, 3, 1, 3)
    meter.update(pred, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand_as(pred))
    (histogram,) = meter.figures()
    assert np.flatnonzero(histogram.counts).tolist() == [0, 45, 90] and len(histogram.edges) == 92


FIGURES = {
    "bars": (Bars("IoU", ("a", "b"), np.array([20.0, 60.0])), "Mean 40.0 %; best b (60.0 %), worst a (20.0 %)."),
    "confusion": (Confusion("classes", ("a", "b"), np.array([[3, 1], [0, 4]])),
                  "Most often a was taken for b (25.0 % of its pixels)."),
    "no confusion": (Confusion("classes", ("a", "b"), np.diag([3, 1])), "No pixel was taken for another class."),
    "histogram": (Histogram("angle", "deg", np.arange(4.0), np.array([5, 4, 1])),
                  "Half of the pixels lie below 1 deg, nine of ten below 2 deg"),
    "nothing": (Histogram("angle", "deg", np.arange(4.0), np.array([0, 0, 0])), "No pixel was valid."),
    "curve": (PrecisionRecall("edge", np.array([0.5, 0.8]), np.array([0.9, 0.6]), np.array([0.1, 0.5]), 1),
              "Best F 68.57 % at threshold 0.5, precision 80.0 %, recall 60.0 %"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_told(name):
    figure, words = FIGURES[name]
    found = Parsed(figure_html("task", figure))
    (image,) = found.all("img")
    assert words in image["alt"] and f"task: {figure.title}. {words}"[:40] in " ".join(found.words)
    svg = base64.b64decode(image["src"].partition("base64,")[2]).decode()
    assert svg == figure_svg(figure) and svg.count("<path") + svg.count("<image") > 3
    assert not any(stand_in in svg for stand_in in COLOURS) and "prefers-color-scheme: dark" in svg


def test_learning_curves_have_a_line_and_a_name_each():
    svg = lines_svg({"seg": ([1, 2], [3.0, 2.0]), "dep": ([1, 2], [1.0, 0.5])}, "update", "loss", logarithmic=True)
    assert all(f">{word}</text>" in svg for word in ("seg", "dep", "update", "loss"))


# In a browser ---------------------------------------------------------------------------------------------------------

def browser_is_there() -> bool:
    node, chromium = shutil.which("node"), os.environ.get("CHROMIUM", "/usr/bin/chromium")
    return bool(node and Path(chromium).exists()) and subprocess.run(
        [node, "-e", "require('puppeteer-core'); require('axe-core')"], capture_output=True).returncode == 0


@pytest.mark.skipif(not browser_is_there(), reason="needs node, Chromium, and puppeteer-core and axe-core on NODE_PATH")
def test_a_browser_finds_nothing_wrong(run):
    done = subprocess.run(["node", str(ROOT / "scripts" / "check_page.js"), str(run / "report.html")],
                          capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["wrong"] == 0, done.stdout
    assert not found["console"] and not found["requests"] and not found["wide"] and found["tab_stops"] > 10
    assert found["unprinted"] == 0 and found["keys"] == 4
