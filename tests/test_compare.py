"""Runs beside each other: the table's units, the differences image by image, and the page."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.depth import DepthMeter
from evaluation.segmentation import SegmentationMeter
from scripts.compare import main
from tests.test_report import Parsed, keys_of
from utils.engine.report.comparison import Compared, mean_and_interval, of_images
from utils.engine.report.review import INPUT, ImageScores, save_image_scores, thumbnail
from utils.engine.results import save_results

NAMES = [f"im{i:02}" for i in range(20)]


def make_run(folder, rmse, miou, names=NAMES, unit="m", images=True) -> str:
    """An inferred run with these scores of its images; every picture has a grey of its own."""
    folder = folder / "infer"
    save_results(folder / "results.json", {"depth": {"rmse": float(np.mean(rmse))}, "semseg": {
        "mIoU": float(np.nanmean(miou))}}, selection="last update", units={"depth": unit})
    if images:
        save_image_scores(folder / "images.json", ImageScores(
            {"semseg": SegmentationMeter.of_image, "depth": DepthMeter.of_image}, list(names),
            {"semseg": np.asarray(miou, float), "depth": np.asarray(rmse, float)},
            {"semseg": [((0, 128, 0), "cat")], "depth": [((122, 4, 3), "near & far")]}))
    for i, name in enumerate(names):
        for kind in (INPUT, "depth", "depth_label", "semseg", "semseg_label"):
            path = thumbnail(folder, kind, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * i).save(path)
    return str(folder / "results.json")


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """The second is 0.1 m better on all images but im03; both have the same classes, im05 has none."""
    rmse = np.linspace(0.4, 0.8, 20)
    better = rmse - 0.1
    better[3] = rmse[3] + 0.3
    miou = np.where(np.arange(20) == 5, np.nan, 0.5)
    return [make_run(tmp_path / "a", rmse, miou), make_run(tmp_path / "b", better[::-1], miou[::-1], NAMES[::-1])]


def test_the_page_pairs_the_same_images(runs, tmp_path, capsys):
    assert main([f"first={runs[0]}", f"second={runs[1]}", "--page", str(tmp_path / "new" / "page.html")]) == 0
    assert "| first | 1 |" in capsys.readouterr().out
    document = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    found, text = Parsed(document), " ".join(Parsed(document).words)
    line, = re.findall(r'<th scope="row">depth</th>(.*)</tr>', document)
    number, score, *values, _, better = re.findall(r"<td>(.*?)</td>", line)
    assert (number, score, values, better) == ("20", "RMSE m", ["0.6000", "0.5200", "-0.0800"], "95 %")
    assert "second is better on 95 % of 20 images" in text and "second is better on 0 % of 19 images" in text
    assert "depth: better by most in first" in text and "im03, RMSE m: first 0.4632, second 0.7632" in text
    assert "semseg: better by most in" not in text         # nowhere a difference
    assert len([i for i in found.all("img") if i["alt"].startswith("image, ")]) == 4
    assert keys_of(tmp_path / "new" / "page.html") == [("depth: colours", ["7a0403"], ["near &amp; far"], False)]
    assert r"\begin{tabular}" in text and "depth/rmse mean" in text


def test_of_large_sets_images_with_pictures_are_shown(runs, tmp_path):
    """im03 is where the first is better by most, and has no picture any more."""
    thumbnail(tmp_path / "a" / "infer", INPUT, "im03").unlink()
    main([*runs, "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "of the 19 images with pictures" in page and "no picture" not in page


def test_the_mean_over_seeds_and_common_images(tmp_path):
    files = [make_run(tmp_path / "a", [1, 2, 3], [0.1, 0.2, 0.3], NAMES[:3]),
             make_run(tmp_path / "b", [5, 4, 9], [0.3, 0.4, 0.5], [NAMES[1], NAMES[0], NAMES[7]])]
    images = Compared("row", [Path(file) for file in files], "last update").images
    assert images.names == NAMES[:2] and images.values["depth"].tolist() == [2.5, 3.5]
    assert of_images(images, "depth", [NAMES[1]]).tolist() == [3.5]


def test_the_interval_is_that_of_a_mean():
    rng = np.random.default_rng(5)
    difference = 0.3 + rng.standard_normal(400)
    mean, low, high = mean_and_interval(difference)
    assert mean == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(mean - half, abs=0.02) and high == pytest.approx(mean + half, abs=0.02)
    assert mean_and_interval(np.full(9, -2.0)) == pytest.approx((-2, -2, -2))
    assert mean_and_interval(difference) == (mean, low, high)          # the same draws every time


def test_an_interval_without_zero_is_said_to_be_one(runs, tmp_path):
    main([f"first={runs[0]}", f"second={runs[1]}", "--page", str(tmp_path / "page.html")])
    cell = re.search(r"<td>(-0\.\d+ to -0\.\d+)(.*?)</td>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert cell and cell[2] == ", without 0"
    few = [make_run(tmp_path / name, values, [0.5, 0.5], NAMES[:2]) for name, values in (("c", [1, 2]), ("d", [2, 3]))]
    main([f"first={few[0]}", f"second={few[1]}", "--page", str(tmp_path / "few.html")])
    assert "too few images" in (tmp_path / "few.html").read_text(encoding="utf-8")


def test_runs_without_scores_of_images_still_have_a_table(runs, tmp_path):
    bare = make_run(tmp_path / "c", [1, 2], [0.1, 0.2], NAMES[:2], images=False)
    assert main([f"first={runs[0]}", f"bare={bare}", "--page", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "no scores of single images (images.json)" in text and "bare: evaluate again with report=true" in text
    assert main([f"one={runs[0]}", "--page", str(tmp_path / "one.html")]) == 0
    assert main([f"<b>={runs[0]}", f"&amp;={runs[1]}", "--page", str(tmp_path / "names.html")]) == 0
    found = Parsed((tmp_path / "names.html").read_text(encoding="utf-8"))      # names are text
    assert not found.all("b") and ("h4", "depth: better by most in <b>") in found.headings


def test_units_head_the_columns_and_do_not_mix(runs, tmp_path, capsys):
    pixels = make_run(tmp_path / "c", [1, 2], [0.1, 0.2], NAMES[:2], unit="px")
    assert main([f"x={pixels}"]) == 0 and "depth RMSE px v" in capsys.readouterr().out
    assert main([f"x={pixels}", "--format", "latex"]) == 0 and r"depth RMSE px $\downarrow$" in capsys.readouterr().out
    assert main([f"x={pixels}", f"y={runs[0]}"]) == 1
    assert "depth is measured in px in one result and in m in another" in capsys.readouterr().err
