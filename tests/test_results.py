"""Tables, result files, the choice of checkpoints, the learning rate, the pictures."""

import math

import numpy as np
import pytest
import torch

from evaluation.evaluator import TaskContext
from utils.engine.optimizers.torch_optimizers import AdamConfig
from utils.engine.panel import batch_panel, prediction_panel
from utils.engine.results import (
    delta_m_against,
    format_table,
    load_results,
    save_results,
    selection_score,
    unscored,
)
from utils.engine.schedules.poly import Poly, PolyConfig
from utils.engine.tasks import TASKS, tasks_named
from utils.engine.views import colour_depth, colour_normals, voc_palette

RESULTS = {"semseg": {"mIoU": 0.5, "valid_pixels": 9}, "depth": {"rmse": 0.6, "valid_pixels": 9}}


def test_table_prints_as_papers_do():
    lines = format_table({"ours": RESULTS}, {"semseg": 0.4, "depth": 0.5}).splitlines()
    header = ["", "semseg mIoU % ^", "depth RMSE m v", "delta_m %"]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == header
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["ours", "50.00", "0.6000", "+2.50"]
    assert "delta_m" not in format_table({"ours": RESULTS})
    assert "depth RMSE px v" in format_table({"ours": RESULTS}, units={"depth": "px", "semseg": "px"})
    assert "semseg mIoU % ^" in format_table({"ours": RESULTS}, units={"depth": "px", "semseg": "px"})


def test_delta_m_takes_signs_from_the_table_and_needs_every_task():
    assert delta_m_against(RESULTS, {"semseg": 0.4, "depth": 0.5}) == pytest.approx((25 - 20) / 2)
    assert delta_m_against(RESULTS, {"semseg": 0.4}) is None
    assert delta_m_against(RESULTS, {}) is None


def test_selection_rewards_a_relative_gain_equally_in_every_task():
    def with_scores(miou: float, rmse: float) -> dict:
        return {"semseg": {"mIoU": miou, "valid_pixels": 1}, "depth": {"rmse": rmse, "valid_pixels": 1}}
    base = selection_score(with_scores(0.5, 0.6))
    assert selection_score(with_scores(0.55, 0.6)) == pytest.approx(selection_score(with_scores(0.5, 0.6 / 1.1)))
    assert selection_score(with_scores(0.5, 0.7)) < base < selection_score(with_scores(0.6, 0.6))
    void = with_scores(0.5, 0.6) | {"normals": {"mean": math.nan, "valid_pixels": 0}}
    assert unscored(void) == ["normals"]
    assert selection_score(void) == base
    assert selection_score({"normals": {"mean": math.nan, "valid_pixels": 0}}) == -math.inf


def test_result_files_read_back(tmp_path):
    path = tmp_path / "sub" / "r.json"
    save_results(path, RESULTS | {"normals": {"mean": math.nan, "valid_pixels": 0}}, step=3)
    back = load_results(path)
    assert back["semseg"] == RESULTS["semseg"] and math.isnan(back["normals"]["mean"])
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"r\.json is not a result file"):
        load_results(path)


def test_learning_rate_is_the_published_one():
    """lr (1 - k / 40000)^0.9 per update; the values of the published runs at base 1e-3."""
    schedule = Poly(PolyConfig(), 1e-3, 40000)
    published = {0: 1.0e-3, 1: 9.999775e-4, 1000: 9.774716e-4, 20000: 5.358867e-4, 39999: 7.2135e-8}
    for step, value in published.items():
        assert schedule(step) == pytest.approx(value, rel=1e-6, abs=1e-12)
    warm = Poly(PolyConfig(warmup_iters=10, min_lr=1e-5), 1e-3, 100)
    assert warm(0) == pytest.approx(1e-4)
    assert warm(99) > 1e-5
    assert AdamConfig().betas == (0.9, 0.999)


def test_palette_is_voc():
    assert voc_palette()[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]


def test_colours_mark_void():
    normals = np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0], [255, 255, 255]]], np.float32)
    assert colour_normals(normals).tolist() == [[[127, 127, 255], [255, 127, 127], [0, 0, 0], [0, 0, 0]]]
    depth = np.array([[1.0, 4.0, 0.0, 255.0]], np.float32)
    near, far, *void = colour_depth(depth)[0].tolist()
    assert near[0] > near[2] and far[2] > far[0] and void == [[0, 0, 0], [0, 0, 0]]
    assert not colour_depth(np.zeros((2, 2), np.float32)).any()


def test_unknown_tasks_are_named():
    assert list(tasks_named(["edge", "semseg"])) == ["semseg", "edge"]
    with pytest.raises(ValueError, match=r"unknown task 'depht'; did you mean 'depth'\? known: semseg, depth"):
        tasks_named(["depht"])


@pytest.mark.parametrize("tasks", [[task for task in TASKS if TASKS.load(task).label.is_map], ["depth"]])
def test_panels_show_every_map(tasks):
    """Predictions of any task make a picture; a panel with one more task is larger."""
    generator = torch.Generator().manual_seed(0)
    channels = {"semseg": 21, "human_parts": 7, "sal": 2, "depth": 1, "normals": 3, "edge": 1}
    contexts = {t: TaskContext(channels[t], class_names=tuple("abcdefghijklmnopqrstu"[:channels[t]])) for t in tasks}
    decoded = {t: TASKS.load(t).decode(torch.randn(1, channels[t], 20, 30, generator=generator), []) for t in tasks}
    rgb = np.zeros((20, 30, 3), np.uint8)
    panel = prediction_panel(rgb, {t: p[0].permute(1, 2, 0).numpy() for t, p in decoded.items()}, contexts)
    assert panel.dtype == np.uint8 and panel.std() > 0
    fewer = prediction_panel(rgb, {}, {})
    assert panel.shape[0] * panel.shape[1] > fewer.shape[0] * fewer.shape[1]
    batch = {"image": torch.zeros(1, 3, 20, 30), **{t: p.float() for t, p in decoded.items()}}
    assert batch_panel(batch, decoded, contexts).shape == (40, 30 * (1 + len(tasks)), 3)
