"""One update: nothing in it waits for the device, bad numbers change no weight, and a recording of it is the same."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses.balancing import BALANCING
from models.blocks.deformable_conv import NOT_RECORDED, ModulatedDeformableConv
from models.decoders import DECODERS
from scripts.benchmark import Step, random_batch
from tests.conftest import TINY
from tests.test_pairs import INTERN, SMALL, SWIN, VIT
from tests.test_train import NYUD, PASCAL, QUIET, rows
from utils.engine import evaluate as evaluation
from utils.engine import train as training
from utils.engine import update as updates
from utils.engine.averages import MovingAverage
from utils.engine.config import load_config
from utils.engine.tasks import TASKS
from utils.engine.train import train
from utils.engine.update import Update, recorded, unrecordable
from utils.recording import Recorded, reason_against

CPU = torch.device("cpu")


class Rerun:
    """Stands for CUDA: recording runs nothing, and a replay runs the function on what then lies in its inputs."""

    replays = 0

    def warm_up(self, run):
        return run()

    def record(self, run):
        def replay():
            self.replays += 1
            return run()
        return replay


class Unrecordable(Rerun):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def a_step(*overrides, file=NYUD):
    return Step(load_config(file, [*TINY, *overrides]))


# ---- no value is read on the host ----

class HostReads(TorchDispatchMode):
    """Refuses what makes the host wait for a value, or a shape depend on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        indices = [x for x in (args[1] if name in ("index", "index_put_", "index_put") else ()) if x is not None]
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2"), func
        assert not any(x.dtype == torch.bool for x in indices), f"{func} by a mask"
        return func(*args, **kwargs or {})


BACKBONES = {"vit": f"backbone_kwargs={VIT}", "swin": f"backbone_kwargs={SWIN}",
             "internimage": f"backbone_kwargs={INTERN}"}
CASES = [(name, "vit" if name in ("invpt", "mlore", "taskdiffusion") else "swin", file)
         for name in DECODERS for file in (NYUD, PASCAL)] + [("bridgenet", "internimage", NYUD)]


@pytest.mark.parametrize(("decoder", "backbone", "file"), CASES)
def test_an_update_reads_no_value(decoder, backbone, file):
    kinds = "{" + ", ".join(f"{key}: {list(value) if isinstance(value, tuple) else value}"
                            for key, value in SMALL.get(decoder, {}).items()) + "}"
    options = BACKBONES[backbone].replace("(", "[").replace(")", "]").replace("'", "")
    step = a_step(f"model={decoder}", f"backbone={backbone}", options, f"model_kwargs={kinds}", "ema_decay=0.9",
                  "intermediate_supervision=true", "image_size=[64, 64]", file=file)
    step.ema = MovingAverage(step.model, 0.9)
    step.train()                                                # what is made once, is made here
    with HostReads():
        losses, norm, *_ = step.train()
    assert losses.isfinite().all() and norm > 0


@pytest.mark.parametrize("overrides", [
    ["optimizer=sgd"], ["optimizer=adam", "precision=fp16"], ["precision=bf16", "grad_clip_param.max_norm=0.1"],
    ["loss_kwargs={loss_scheme: log, loss_scope: image}", "optimizer_kwargs.lr=1e-4"],
    *([f"loss_kwargs={{loss_scheme: {name}}}"] for name in BALANCING if not BALANCING.load(name).reads_values)])
def test_no_option_of_an_update_reads_a_value(overrides):
    step = a_step(*overrides)
    step.train()
    with HostReads():
        step.train()


# ---- what an update does ----

@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_bad_number_changes_no_weight(optimizer):
    """Not even in the first update, and the next one goes on as if it had not been."""
    found = []
    for bad in (False, True):
        step = a_step(f"optimizer={optimizer}", *QUIET)
        before = [p.detach().clone() for p in step.model.parameters()]
        if bad:
            image = step.batch["image"].clone()
            step.model.eval()                                   # keeps running statistics out of it
            step.batch["image"][0, 0, 0, 0] = torch.nan
            losses, norm, *_ = step.update([step.batch])
            assert not (losses.isfinite().all() and norm.isfinite())
            assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
            step.batch["image"] = image
        step.train()
        found.append([p.detach() for p in step.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, found[0], strict=True))


class Halving(torch.optim.Optimizer):
    """An optimizer of one's own: p <- p / 2. It cannot be told on the device to skip."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)


def test_an_optimizer_that_cannot_skip_is_not_called():
    step = a_step()
    step.optimizer = Halving(step.model.parameters())
    update, weight = Update(step), next(step.model.parameters())
    before = weight.detach().clone()
    update([{**step.batch, "depth": step.batch["depth"] * torch.inf}])
    assert torch.equal(weight, before)
    update([step.batch])
    assert torch.equal(weight, before / 2)


def test_the_moving_average_copies_indices():
    """An average of equal integers, in float32, may be the next smaller one."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("index", torch.arange(600))
    average, weights = MovingAverage(model, 0.9999), []
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        weights.append(average.module.weight[0, 0].item())
        assert torch.equal(average.module.index, model.index) and average.n_averaged == len(weights)
    assert weights == pytest.approx([1.0, 1.0001, 1.0001 + 0.0001 * 2.9999], rel=1e-6)
    restored = MovingAverage(torch.nn.Linear(2, 2), 0.9999)
    restored.module.register_buffer("index", torch.zeros(600, dtype=torch.long))
    restored.load_state_dict(average.state_dict())
    restored.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(restored.module.weight, average.module.weight)


# ---- recording ----

@pytest.mark.parametrize("overrides", [
    ["model_kwargs.drop_path_rate=0.5"], ["precision=fp16"], ["optimizer=sgd", "grad_clip_param.max_norm=0.5"],
    ["loss_kwargs.loss_scheme=log"]])
def test_a_recorded_update_is_the_update(overrides):
    """Bit for bit, with new data and a new learning rate in every update of two batches, drop paths included."""
    results = []
    for record in (False, True):
        step, recorder = a_step(*overrides), Rerun()
        step.accumulate, step.ema = 2, MovingAverage(step.model, 0.9)
        update = Update(step)
        run = recorded(update, recorder)                        # the plain one has its learning rate there, too
        step.model.train()
        torch.manual_seed(1)
        data = [random_batch(step.config, CPU) for _ in range(10)]
        torch.manual_seed(2)
        for i in range(5):
            update.set_lr(1e-3 / (i + 1))
            outcome = (run if record else update)(data[2 * i:2 * i + 2])
            results.append([*outcome, torch.cat([p.detach().flatten() for p in step.ema.module.parameters()])])
        assert recorder.replays == (2 if record else 0)
        assert step.optimizer.param_groups[0]["lr"] == 1e-3 / 5
    for plain, other in zip(results[:5], results[5:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def recording_on_cpu(monkeypatch, recorder):
    monkeypatch.setattr(updates, "unrecordable", lambda run: None)
    monkeypatch.setattr(updates, "CudaRecorder", lambda device: recorder)


def test_a_run_with_recorded_updates_is_the_run(tiny, monkeypatch):
    """The same losses and checkpoints, which do not tell how they were made. The rate is one that float32 holds."""
    found, losses, recorder = [], [], Rerun()
    recording_on_cpu(monkeypatch, recorder)
    monkeypatch.setattr(training.SCHEDULES.load("poly"), "__call__", lambda self, step: 2.0 ** -(10 + step))
    for record in (False, True):
        config = load_config(NYUD, [*tiny, "ema_decay=0.5", f"cuda_graph={record}", f"version_name=record_{record}"])
        train(config, resume=False)
        found.append(torch.load(config.run_dir / "last.pt", weights_only=True))
        losses.append([row["loss/total"] for row in rows(config.run_dir, "train")])
    assert recorder.replays == 3
    plain, other = found
    for part in ("model", "ema"):
        assert all(torch.equal(plain[part][key], other[part][key]) for key in plain[part])
    assert plain["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert losses[0] == losses[1]


def test_inputs_of_each_kind_have_their_own_places():
    recorder = Rerun()
    double = Recorded(lambda given: {"y": 2 * given["x"]}, recorder, "doubling", warm_ups=2)
    for round_ in range(4):
        for size in (1, 3):
            x = torch.full((size,), float(round_ + size))
            y = double({"x": x, "name": "a"})["y"]
            assert torch.equal(y, 2 * x)
            kept = y.clone()
            double({"x": x + 1, "name": "a"})
            assert torch.equal(y, kept)                         # results are not overwritten
    assert recorder.replays == 12 and len(double.kinds) == 2
    for size in range(10, 30):
        assert double({"x": torch.ones(size), "name": "a"})["y"].sum() == 2 * size
    assert len(double.kinds) == 8
    double.forget()
    assert not double.kinds


def test_what_cannot_be_recorded_goes_on_and_says_so_once(tiny, monkeypatch):
    recording_on_cpu(monkeypatch, Unrecordable())
    config = load_config(NYUD, [*tiny, "cuda_graph=on", "precision=fp16"])
    assert train(config, resume=False)
    told = [line[9:] for line in (config.run_dir / "log.txt").read_text().splitlines() if "an update" in line]
    assert told == ["cuda_graph: an update cannot be recorded and runs as without it "
                    "(operation not permitted when stream is capturing)"]
    monkeypatch.setattr(updates.distributed, "world_size", lambda: 2)
    step = a_step()
    with pytest.raises(ValueError, match="the processes cannot agree to go on; set cuda_graph=false"):
        recorded(Update(step), Unrecordable()).recover(RuntimeError("x"))


def test_reasons_not_to_record(monkeypatch):
    step = a_step("activation_checkpointing=all", "find_unused_parameters=true")
    assert unrecordable(step) == "it needs CUDA, this run is on cpu"
    step.device = torch.device("cuda")
    assert "activation_checkpointing all stores random states" in unrecordable(step)
    step.config = load_config(NYUD, TINY)
    assert unrecordable(step) is None
    monkeypatch.setattr(type(step.criterion.balancing), "reads_values", True)
    assert "loss_scheme log reads losses or gradients" in unrecordable(step)
    monkeypatch.undo()
    step.optimizer = Halving(step.model.parameters())
    assert "optimizer adamw reads on the host whether to step" in unrecordable(step)
    step = a_step()
    step.device, row = torch.device("cuda"), TASKS.load("det3d")
    monkeypatch.setattr(updates, "tasks_named", lambda names: {"semseg": row})
    assert "labels of semseg have another size in every batch" in unrecordable(step)
    monkeypatch.undo()
    step = a_step("find_unused_parameters=true")
    step.device = torch.device("cuda")
    monkeypatch.setattr(updates.distributed, "world_size", lambda: 2)
    assert "find_unused_parameters reads on the host" in unrecordable(step)


def test_a_network_with_kernels_on_another_stream_is_not_recorded(caplog, monkeypatch):
    """A graph would lack torchvision's deformable convolutions and give wrong numbers without a word."""
    step = a_step("model=demt", "model_kwargs={dim: 8}")
    step.device = torch.device("cuda")
    assert unrecordable(step) == NOT_RECORDED and reason_against(nn.Conv2d(1, 1, 1)) is None
    assert reason_against(nn.Sequential(ModulatedDeformableConv(1, 1))) == NOT_RECORDED
    monkeypatch.setattr(evaluation, "CudaRecorder", None)
    evaluation._tell_unrecorded.cache_clear()
    evaluation.forward_pass(step.model, replace(step.config, cuda_graph=True), step.device)
    assert f"forward passes run as without it: {NOT_RECORDED}" in caplog.text


def test_on_a_cpu_it_is_said_that_nothing_is_recorded(caplog):
    with caplog.at_level(logging.WARNING):
        evaluation._tell_unrecorded.cache_clear()
        step = a_step("cuda_graph=on")
        evaluation.forward_pass(step.model, step.config, CPU)
    assert isinstance(step.update, Update)
    assert "cuda_graph: updates run as without it: it needs CUDA, this run is on cpu" in caplog.text
    assert "cuda_graph: forward passes run as without it: it needs CUDA" in caplog.text
