"""Updates whose numbers are not finite: what is written down, what happens then, and how often it may."""

import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from losses.multi_task import MultiTaskLoss
from tests.test_train import NYUD, QUIET, rows
from utils.engine.config import load_config
from utils.engine.guard import SCALED_IN_A_ROW, Guard, by_module
from utils.engine.train import train
from utils.engine.update import Outcome
from utils.engine.watchdog import ENOUGH, Watchdog

NAMES = ["semseg", "depth"]
BATCHES = [{"meta": [{"name": "c"}, {"name": "d"}], "image": torch.ones(2, 2)}]


class Layers(nn.Sequential):
    """A layer, a norm that keeps statistics, and one that squares what it is given."""

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2, elementwise_affine=False))

    def forward(self, image, labels=None):
        return super().forward(image) * torch.rand(1)          # something is drawn, too


class FakeRun:
    """A run of a model with two parts that goes nowhere."""

    def __init__(self, folder, scaled=False, **settings):
        self.config = SimpleNamespace(run_dir=folder, precision="fp32", grad_clip_param=SimpleNamespace(norm_type=2.0),
                                      **{"on_nonfinite": "stop", "nonfinite_limit": 2, **settings})
        self.model, self.device = Layers(), torch.device("cpu")
        self.criterion = nn.Module()
        self.scaler = SimpleNamespace(is_enabled=lambda: scaled, get_scale=lambda: 1.0)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": torch.tensor(0.5)}])
        self.step = 6


def guard_of(run, back=None):
    update = SimpleNamespace(loss_names=NAMES, grad_names=[name for name, _ in run.model.named_parameters()])
    return Guard(run, update, lambda: back)


def outcome(losses=((0.5, 1.0),), norms=(3.0, 4.0, 0.0, 0.0)):
    losses, norms = torch.tensor(losses), torch.tensor(norms)
    norm = torch.linalg.vector_norm(norms)
    return Outcome(losses, norm, norms, losses.isfinite().all() & norm.isfinite())


@pytest.mark.parametrize(("losses", "norms", "words"), [
    (((math.nan, 1.0),), (1.0,) * 4, r"^step 7: loss 'semseg' is nan; the run stops \(on_nonfinite=skip or rollback"),
    (((0.0, 1.0), (0.0, -math.inf)), (1.0,) * 4, "step 7: loss 'depth' is -inf;"),
    (((0.0, 1.0),), (1.0, math.inf, 1.0, 1.0), "step 7: gradient norm is inf;"),
    (((0.0, math.inf),), (math.nan,) * 4, "step 7: loss 'depth' is inf, gradient norm is nan;")])
def test_bad_numbers_stop_the_run_at_once_and_are_written_down(tmp_path, losses, norms, words):
    guard = guard_of(FakeRun(tmp_path))
    guard.check(outcome(), [])
    with pytest.raises(FloatingPointError, match=words) as stop:
        guard.check(outcome(losses, norms), BATCHES)
    report = tmp_path / "nonfinite" / "step_7.json"
    assert str(report) in str(stop.value) and "\n" not in str(stop.value)
    said = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert said["step"] == 7 and said["processes"][0]["files"] == ["c", "d"] and said["lr"] == [0.5]
    told = [float(value) for row in said["processes"][0]["losses"] for value in row.values()]
    assert told == pytest.approx([value for row in losses for value in row], nan_ok=True)
    bad = [name for name, norm in zip(guard.update.grad_names, norms, strict=True) if not math.isfinite(norm)]
    assert said["bad_gradients"] == bad and said["bad_weights"] == []
    assert said["first_bad_layer"] is None and set(said["largest_values_of_layers"]) == {"0", "1", "2"}
    guard.flush()                                          # what was answered is not answered again


def test_the_layer_where_numbers_overflow_is_named_and_nothing_else_changes(tmp_path):
    run = FakeRun(tmp_path)
    with torch.no_grad():
        run.model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))   # squares and their mean are inf
        run.model[1].weight.fill_(1e20)
    state, drawn = {key: value.clone() for key, value in run.model.state_dict().items()}, torch.get_rng_state()
    batch = {"meta": [{"name": "c"}], "image": torch.tensor([[1.0, 1.0], [-1.0, 0.0]])}
    with pytest.raises(FloatingPointError, match="is nan, the first layer to put out such a number is 2; "):
        guard_of(run).check(outcome(((math.nan, 1.0),)), [batch])
    said = json.loads((tmp_path / "nonfinite" / "step_7.json").read_text())
    assert said["first_bad_layer"] == "2" and list(said["largest_values_of_layers"]) == ["1", "0"]
    assert said["largest_values_of_layers"]["1"] == pytest.approx(1e20, rel=0.1)
    assert torch.equal(torch.get_rng_state(), drawn) and not run.model[0]._forward_hooks
    assert all(torch.equal(value, state[key]) for key, value in run.model.state_dict().items())


def test_gradients_are_told_by_module():
    norms = {"encoder.layers.0.weight": 3.0, "encoder.layers.1.bias": 4.0, "head.weight": 2.0, "scale": math.nan}
    found = by_module(norms, 2.0)
    assert math.isnan(found.pop("scale")) and found == {"encoder.layers": 5.0, "head": 2.0}
    assert by_module({"a.b.c": 3.0, "a.b.d": 4.0}, math.inf) == {"a.b": 4.0}


def test_skipping_is_bounded_and_no_bad_statistic_stays(tmp_path):
    run = FakeRun(tmp_path, on_nonfinite="skip")
    guard, bad = guard_of(run), outcome(((math.nan, 1.0),))
    for _ in range(2):
        guard.check(bad, [])
        guard.check(outcome(), [])
    with pytest.raises(FloatingPointError, match="one more than the 2 that nonfinite_limit allows"):
        guard.check(bad, [])
    run.model[1].running_mean[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"but 1\.running_mean holds the bad numbers: use on_nonfinite=roll"):
        guard_of(run).check(bad, [])


def test_going_back_needs_a_checkpoint(tmp_path, caplog):
    bad = outcome(norms=(math.inf, 1.0, 1.0, 1.0))
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to yet"):
        guard_of(FakeRun(tmp_path, on_nonfinite="rollback")).check(bad, [])
    guard = guard_of(FakeRun(tmp_path, on_nonfinite="rollback"), back="step 3")
    guard.check(bad, [])
    assert "weights and optimizer are those of step 3 again" in caplog.text and guard.bad == 1


def test_a_loss_scale_may_skip_but_not_for_ever(tmp_path):
    guard, overflow = guard_of(FakeRun(tmp_path, scaled=True)), outcome(norms=(math.inf, 1.0, 1.0, 1.0))
    for _ in range(3):                                     # in a row counts
        for _ in range(SCALED_IN_A_ROW - 1):
            guard.check(overflow, [])
        guard.check(outcome(), [])
    guard.finish()
    with pytest.raises(FloatingPointError, match="the last 25 updates were not finite at any loss scale, nothing is"):
        for _ in range(SCALED_IN_A_ROW):
            guard.check(overflow, [])
    guard = guard_of(FakeRun(tmp_path, scaled=True))
    guard.check(overflow, [])
    with pytest.raises(FloatingPointError, match="not one of 1 updates was made"):
        guard.finish()
    with pytest.raises(FloatingPointError, match="loss 'semseg' is nan"):      # no scale mends a loss
        guard.check(outcome(((math.nan, 1.0),)), [])


# ---- in a run ----

@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of depth not a number in these passes of a run, counted from 1."""
    def poison(*passes):
        original, calls = MultiTaskLoss.forward, []

        def forward(self, *args):
            calls.append(1)
            out = original(self, *args)
            bad = float("nan") if len(calls) in passes else 1.0
            return {**out, "depth": out["depth"] * bad, "total": out["total"] * bad}
        monkeypatch.setattr(MultiTaskLoss, "forward", forward)
    return poison


def run_of(tiny, name, *overrides):
    return load_config(NYUD, [*tiny, *QUIET, "max_iter=5", "val_interval=2", "ema_decay=0.5", f"version_name={name}",
                              *overrides])


def weights(config, name="last.pt"):
    return torch.load(config.run_dir / name, weights_only=True)


def test_a_skipped_update_is_one_that_was_not_made(tiny, poisoned):
    poisoned(3)
    config = run_of(tiny, "skip", "on_nonfinite=skip")
    train(config, resume=False)
    log = (config.run_dir / "log.txt").read_text()
    assert "step 3: loss 'depth' is nan" in log and "the update was skipped (1 of at most 10)" in log
    logged = rows(config.run_dir, "train")
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5] and logged[2]["loss/depth"] is None
    assert all(value.isfinite().all() for value in weights(config)["model"].values())
    steps = {entry["step"].item() for entry in weights(config)["optimizer"]["state"].values()}
    assert steps == {4.0}                                  # of five updates


def test_rollback_takes_the_last_checkpoint_and_goes_on(tiny, poisoned):
    """Step 4 is bad: the weights and the optimizer after it are those of step 2."""
    poisoned(4)
    config = run_of(tiny, "back", "on_nonfinite=rollback", "checkpoint_interval=2", "max_iter=4", "val_interval=10")
    train(config, resume=False)
    assert "weights and optimizer are those of" in (config.run_dir / "log.txt").read_text()
    kept, last = weights(config, "step_2.pt"), weights(config)
    assert last["step"] == 4
    assert all(torch.equal(kept["model"][key], last["model"][key]) for key in kept["model"])
    assert all(torch.equal(kept["optimizer"]["state"][i]["exp_avg"], last["optimizer"]["state"][i]["exp_avg"])
               for i in kept["optimizer"]["state"])


# ---- an update that takes too long ----

def test_the_watchdog_writes_where_every_thread_stands(tmp_path, caplog):
    with Watchdog(tmp_path / "stacks", factor=3, least_seconds=0.2) as watchdog:
        for _ in range(ENOUGH + 1):
            watchdog.beat()
            time.sleep(0.01)
        with watchdog.resting():
            time.sleep(0.5)
        assert not (tmp_path / "stacks").exists()          # an evaluation is no update
        watchdog.beat()
        hanging_here = threading.Event()
        hanging_here.wait(0.6)
    text = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "an update takes" in text and "test_the_watchdog_writes_where_every_thread_stands" in text
    assert text.count("an update takes") == 1 and "more than 3 times the median" in caplog.text


def test_the_watchdog_can_be_off(tmp_path):
    with Watchdog(tmp_path / "stacks", factor=0) as watchdog:
        watchdog.beat()
    assert not watchdog._thread.ident
