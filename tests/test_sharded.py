"""Models of which every process holds a part (`parallel: fsdp`): two gloo processes make what DDP makes of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from losses.balancing import BALANCING
from scripts.faults.runs import Stage, checkpoint, metrics
from tests.processes import on_ranks
from tests.test_train import NYUD
from utils import distributed
from utils.engine import spread
from utils.engine.config import load_config
from utils.options import ConfigError
from utils.sharded import is_sharded, local, norms_of, parted_like, shard, whole

KEYS = {"max_iter": 4, "val_interval": 2, "save_interval": {"steps": 0, "minutes": 0}, "checkpoint_interval": 0,
        "log_interval": 1, "nworkers": 0, "scheduler": "step", "scheduler_kwargs": {"milestones": [1], "gamma": 1.0},
        "grad_clip_param": {"max_norm": 1.0}}
ORDERS = (1.0, 2.0, float("inf"))


class Plain(nn.Module):
    """Three rows and one row for two processes: one of them holds no part of `tail`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        self.tail = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.blocks(x))


def plain() -> tuple[Plain, torch.Tensor]:
    """The same on every process, with gradients."""
    torch.manual_seed(0)
    model = Plain()
    model(torch.ones(2, 4)).square().sum().backward()
    return model, torch.stack([torch.stack([p.grad.norm(order) for p in model.parameters()]) for order in ORDERS])


def _process(rank: int, folder: Path) -> None:
    with distributed.process_group(torch.device("cpu")):
        model, norms = plain()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        shard(model, model.blocks, torch.device("cpu"))
        model(torch.ones(2, 4)).square().sum().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        gathered = whole({"model": model.state_dict(), "more": [1, (2.0, None)]}, keep=rank == 0)
        parted = parted_like(before["tail.weight"], model.tail.weight)
        seen = {"here": sum(local(parameter).numel() for parameter in model.parameters()), "is": is_sharded(model),
                "norms": torch.stack([norms_of(grads, order) for order in ORDERS]).tolist(),
                "more": gathered["more"], "elsewhere": [n for n, value in gathered["model"].items() if value is None],
                "same": rank > 0 or all(torch.equal(gathered["model"][name], value) for name, value in before.items()),
                "parted": torch.equal(local(parted), local(model.tail.weight)) and parted.shape == (1, 2)}
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def test_a_process_holds_its_part_and_all_of_it_is_brought_together(tmp_path):
    on_ranks(_process, 2, tmp_path)
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model, norms = plain()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(one["here"] for one in two) == total and max(one["here"] for one in two) < total
    for one in two:
        assert one["is"] and one["same"] and one["parted"] and one["more"] == [1, [2.0, None]]
        torch.testing.assert_close(torch.tensor(one["norms"]), norms)
    assert two[0]["elsewhere"] == [] and two[1]["elsewhere"] == list(model.state_dict())


# Runs ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("sharded"), num_val=3)        # one process evaluates an image more


def train(stage: Stage, name: str, parallel: str, resume: bool = False, **keys) -> Path:
    run = stage.start([*stage.experiment(name, **KEYS | keys, parallel=parallel), *(["--resume"] if resume else [])], 2)
    try:
        assert run.wait(120) and set(run.codes.values()) == {0}, run.text()
    finally:
        run.kill()
    assert ("every process holds 1/2 of the model: in 4 blocks" in run.text()) == (parallel == "fsdp")
    return stage.run_dir(name)


@pytest.fixture(scope="module")
def as_ddp(stage):
    return train(stage, "ddp", "ddp", report=False)


@pytest.mark.parametrize(("first", "then"), [("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")])
def test_either_goes_on_from_the_checkpoint_of_the_other(stage, as_ddp, first, then):
    """Weights, moving average, optimizer, scores and losses are those of DDP, up to the order of sums."""
    train(stage, f"{first}_{then}", first, max_iter=2, report=first == then)
    run_dir = train(stage, f"{first}_{then}", then, resume=True, report=False)
    one, other = checkpoint(run_dir), checkpoint(as_ddp)
    for part in ("model", "ema", "rng"):
        torch.testing.assert_close(one[part], other[part], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=1e-4, atol=1e-6)
    for row, wanted in zip(metrics(run_dir), metrics(as_ddp), strict=True):
        assert row.pop("kind") == wanted["kind"]
        assert row == pytest.approx({key: value for key, value in wanted.items() if key != "kind"}, rel=1e-4)


@pytest.mark.parametrize("key", ["compile", "cuda_graph", "channels_last", "find_unused_parameters"])
def test_what_needs_whole_parameters_is_refused(key):
    with pytest.raises(ConfigError, match=f"'{key}' does not go with parallel fsdp, .*; set {key}=false, or parallel="):
        load_config(NYUD, ["parallel=fsdp", f"{key}=true"])


@pytest.mark.parametrize(("keys", "images", "words"), [
    (["loss_kwargs.loss_scheme=gradnorm"], 9, "loss_scheme gradnorm compares whole gradients of single tasks"),
    (["optimizer=sgd"], 9, "optimizer sgd does not work on the parts .* set parallel=ddp, or one of adam, adamw$"),
    (["optimizer=torch:RAdam"], 9, "optimizer torch:RAdam does not work on the parts"),
    ([], 3, "every process evaluates an image, but there are 3 for 4 processes")])
def test_what_only_the_run_can_tell_is_refused_too(monkeypatch, keys, images, words):
    config = load_config(NYUD, ["parallel=fsdp", *keys])
    scheme = BALANCING.load(config.loss_kwargs.loss_scheme)
    spread.check_spread(config, scheme, images)                         # one process holds all of it
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(ValueError, match=words):
        spread.check_spread(config, scheme, images)
    spread.check_spread(load_config(NYUD, ["parallel=fsdp"]), SimpleNamespace(needs_gradients=False), 4)
