"""The numbers of a run, against the same run written out in plain PyTorch: losses, rates, updates, moving average."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.model import MultiTaskModel
from tests.watched_run import experiment, names, read_batch, rows, stored, watch
from utils.engine.train import train

Losses = Callable[[object, dict[str, Tensor]], dict[str, Tensor]]
Update = Callable[[int, Tensor, Tensor, float], Tensor]


# ------------------------------------------------------------ the same run by hand


def task_losses(predictions: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four losses of NYUD over a batch, by their definitions."""
    losses = {}
    for task, y in predictions.items():
        label = batch[task]
        if task == "semseg":
            losses[task] = F.cross_entropy(y, label[:, 0].long(), ignore_index=255)
        elif task == "edge":
            log_yes, log_no = torch.log(torch.sigmoid(y)), torch.log(1 - torch.sigmoid(y))
            losses[task] = -(0.9 * label * log_yes + 0.1 * (1 - label) * log_no).mean()
        else:
            y = y if task == "depth" else y / y.norm(dim=1, keepdim=True)
            valid = (label != 255).all(dim=1)                      # (B, H, W)
            losses[task] = (y - label).abs().sum(dim=1)[valid].sum() / valid.sum()
    return losses


def weighted(**weights: float) -> Losses:
    def losses(out, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = task_losses(out.final, batch)
        return {**found, "total": sum(weights[task] * loss for task, loss in found.items())}
    return losses


def logs_of_every_image(out, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`loss_scheme: log` with `loss_scope: image`: figures of single images, averaged."""
    found = []
    for i in range(len(batch["image"])):
        one = task_losses({t: y[i:i + 1] for t, y in out.final.items()}, {t: y[i:i + 1] for t, y in batch.items()})
        found.append({**one, "total": sum(loss.log() for loss in one.values())})
    return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}


def sgd(weight_decay: float, momentum: float = 0.0, nesterov: bool = False) -> Update:
    velocity: dict[int, Tensor] = {}

    def update(i: int, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
        grad = grad + weight_decay * weight
        velocity[i] = momentum * velocity[i] + grad if i in velocity else grad
        return weight - lr * (grad + momentum * velocity[i] if nesterov else velocity[i])
    return update


def adam(betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool) -> Update:
    moments: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(i: int, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
        if decoupled:
            weight = weight * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * weight
        n, mean, square = moments.get(i, (0, torch.zeros_like(grad), torch.zeros_like(grad)))
        n, mean, square = n + 1, betas[0] * mean + (1 - betas[0]) * grad, betas[1] * square + (1 - betas[1]) * grad**2
        moments[i] = n, mean, square
        return weight - lr * (mean / (1 - betas[0]**n)) / ((square / (1 - betas[1]**n)).sqrt() + eps)
    return update


def by_hand(model: nn.Module, root: Path, updates: Sequence[Sequence[Sequence[str]]], rates: Sequence[float],
            losses: Losses, update: Update, decay: float = 0.0, max_norm: float = math.inf, norm_type: float = 2.0,
            precision: torch.dtype | None = None, scale: float = 1.0) -> tuple[list[dict], dict[str, Tensor]]:
    """Trains `model` in place on these passes of these updates; the losses and gradient norms, and the average.

    `scale` multiplies the loss and divides the gradient: it changes what small float16 numbers are rounded to.
    """
    model.train()
    history, average = [], {}
    for passes, lr in zip(updates, rates, strict=True):
        model.zero_grad()
        found = []
        for images in passes:
            batch = read_batch(root, images)
            with torch.autocast("cpu", precision, enabled=precision is not None):
                out = model(batch["image"], batch)
            found.append(losses(out, batch))
            (scale * found[-1]["total"] / len(passes)).backward()
        weights = list(model.parameters())
        for weight in weights:
            weight.grad /= scale
        norm = torch.stack([p.grad.abs().pow(norm_type).sum() for p in weights]).sum() ** (1 / norm_type)
        with torch.no_grad():
            for i, weight in enumerate(weights):
                weight.copy_(update(i, weight, weight.grad * min(1.0, max_norm / norm.item()), lr))
            now = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
            average = ({key: decay * average[key] + (1 - decay) * value for key, value in now.items()} if average
                       else {key: value.clone() for key, value in now.items()})      # the first update is copied
        history.append({f"loss/{name}": sum(one[name].item() for one in found) / len(found) for name in found[0]}
                       | {"grad_norm": norm.item(), "lr": lr})
    return history, average


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every floating-point entry of `expected`, up to rounding."""
    expected = {key: value for key, value in expected.items() if value.is_floating_point()}
    found = {key.removeprefix("module."): value for key, value in state.items()}
    torch.testing.assert_close({key: found[key] for key in expected}, expected, rtol=tolerance, atol=tolerance)


def grouped(passes: list[list[str]], accumulate: int) -> list[list[list[str]]]:
    return [passes[i:i + accumulate] for i in range(0, len(passes), accumulate)]


# lr = min_lr + (base - min_lr) (1 - k / max_iter)^0.9, and (k + 1) / warmup_iters of it in the first updates.
SGD_RATES = [0.003333333333, 0.005574979543, 0.006683012807, 0.004945449615, 0.003114314098]
CASES = {
    # plain steps, so that a factor of the gradient shows; every other key away from its default
    "sgd": (["optimizer=sgd", "optimizer_kwargs={lr: 1e-2, momentum: 0, weight_decay: 0.1}", "ema_decay=0.75",
             "scheduler_kwargs={power: 0.9, min_lr: 1e-3, warmup_iters: 3}", "global_batch=4", "max_iter=5",
             "loss_kwargs.loss_weights={semseg: 2, depth: 0.5}"],
            dict(rates=SGD_RATES, losses=weighted(semseg=2, depth=0.5), update=sgd(0.1), decay=0.75), 2),
    "clipped": (["optimizer=sgd", "optimizer_kwargs={lr: 1e-1, momentum: 0.5, weight_decay: 0, nesterov: true}",
                 "grad_clip_param={max_norm: 0.25, norm_type: 3}", "task_dictionary.include_normals=true",
                 "task_dictionary.include_edge=true", "max_iter=20", "epochs=1", "trBatch=4"],
                dict(rates=[0.1, 0.095488538162, 0.090953257608], update=sgd(0.0, 0.5, True), max_norm=0.25,
                     norm_type=3, losses=weighted(semseg=1, depth=1, normals=1, edge=1)), 1),
    "adamw": (["optimizer=adamw", "optimizer_kwargs={lr: 1e-3, betas: [0.8, 0.95], eps: 1e-4, weight_decay: 0.5}",
               "loss_kwargs={loss_scheme: log, loss_scope: image}", "scheduler_kwargs.power=2", "ema_decay=0.5"],
              dict(rates=[1e-3, 5.625e-4, 2.5e-4, 6.25e-5], losses=logs_of_every_image, decay=0.5,
                   update=adam((0.8, 0.95), 1e-4, 0.5, decoupled=True)), 1),
    "adam": (["optimizer=adam", "optimizer_kwargs={lr: 1e-3, weight_decay: 0.1, eps: 1e-4}",
              "scheduler_kwargs.power=1", "global_batch=4"],
             dict(rates=[1e-3, 7.5e-4, 5e-4, 2.5e-4], losses=weighted(semseg=1, depth=1),
                  update=adam((0.9, 0.999), 1e-4, 0.1, decoupled=False)), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_what_its_file_says(example_root, tmp_path, case):
    """Weights, buffers, moving average, losses, gradient norms and rates of every update, to rounding."""
    overrides, settings, accumulate = CASES[case]
    config = experiment(example_root, tmp_path, *overrides)
    with watch(example_root) as seen:
        train(config, resume=False)
    updates = grouped(seen.passes, accumulate)
    history, average = by_hand(seen.start, example_root, updates, **settings)
    logged = rows(config, "train")
    assert [row["step"] for row in logged] == list(range(1, len(settings["rates"]) + 1))
    for row, expected in zip(logged, history, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row["lr"] == pytest.approx(expected["lr"], rel=1e-7)
    if "max_norm" in settings:
        assert all(row["grad_norm"] > settings["max_norm"] for row in logged)    # what is logged is not clipped
    last = stored(config.run_dir / "last.pt")
    assert_same(last["model"], seen.start.state_dict(), 2e-5)
    if "decay" in settings:
        assert_same(last["ema"], average, 2e-5)
    else:
        assert last["ema"] is None


def test_pixels_without_a_label_do_not_count(example_root, tmp_path):
    """Depth 0 and segmentation 0 are "not measured" and "unlabelled", in losses and in scores."""
    root = tmp_path / "data"
    shutil.copytree(example_root / "NYUDv2", root / "NYUDv2")
    for path in (root / "NYUDv2" / "depth").iterdir():
        depth = np.load(path)
        depth[:, :40] = 0
        np.save(path, depth)
    for path in (root / "NYUDv2" / "segmentation").iterdir():
        label = np.array(Image.open(path))
        label[:24] = 0
        Image.fromarray(label).save(path)
    config = experiment(root, tmp_path / "out", "max_iter=2", "optimizer=sgd", "val_interval=2",
                        "optimizer_kwargs={lr: 1e-2, momentum: 0, weight_decay: 0}", "scheduler_kwargs.power=1")
    with watch(root) as seen:
        results = train(config, resume=False)
    history, _ = by_hand(seen.start, root, grouped(seen.passes, 1), [1e-2, 5e-3], weighted(semseg=1, depth=1), sgd(0.0))
    for row, expected in zip(rows(config, "train"), history, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert_same(stored(config.run_dir / "last.pt")["model"], seen.start.state_dict(), 2e-5)
    truth = read_batch(root, names(root, "val"))
    for task in ("semseg", "depth"):
        assert results[task]["valid_pixels"] == int((truth[task] != 255).sum()) < 5 * 64 * 96


PLAIN = ["optimizer=sgd", "optimizer_kwargs={lr: 1, momentum: 0, weight_decay: 0}", "max_iter=1",
         "loss_kwargs.loss_weights={semseg: 1e-3, depth: 1e-3}"]


@pytest.mark.parametrize("precision, dtype, scale", [("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 65536.0)])
def test_half_precision_is_in_the_network_alone(example_root, tmp_path, precision, dtype, scale):
    """One update; in float16 the gradient is measured and clipped after the loss scale has been taken out again."""
    config = experiment(example_root, tmp_path, *PLAIN, f"precision={precision}", "grad_clip_param.max_norm=1e-4")
    with watch(example_root) as seen:
        train(config, resume=False)
    history, _ = by_hand(seen.start, example_root, [seen.passes], [1.0], weighted(semseg=1e-3, depth=1e-3), sgd(0.0),
                         max_norm=1e-4, precision=dtype, scale=scale)
    [row] = rows(config, "train")
    assert {key: row[key] for key in history[0]} == pytest.approx(history[0], rel=1e-5)
    assert row["grad_norm"] > 1e-4
    assert_same(stored(config.run_dir / "last.pt")["model"], seen.start.state_dict(), 1e-7)


def test_updates_that_overflow_in_float16_are_left_out_until_the_scale_fits(example_root, tmp_path):
    """The loss scale is halved by each, and the run goes on: the updates behind them move the weights."""
    config = experiment(example_root, tmp_path, *PLAIN, "precision=fp16", "max_iter=24", "val_interval=24",
                        "optimizer_kwargs.lr=1e-7", "loss_kwargs.loss_weights={semseg: 1e5, depth: 1e5}")
    with watch(example_root) as seen:
        train(config, resume=False)
    last = stored(config.run_dir / "last.pt")
    halved = math.log2(65536 / last["scaler"]["scale"])
    assert last["step"] == 24 and halved == int(halved) and 2 < halved < 24
    assert any(not torch.equal(last["model"][key], value) for key, value in seen.start.named_parameters())


def test_a_run_whose_updates_all_overflow_in_float16_ends_with_a_sentence(example_root, tmp_path):
    """Each is left out and the loss scale is halved; where none is left, nothing has been trained."""
    config = experiment(example_root, tmp_path, *PLAIN, "precision=fp16", "max_iter=2",
                        "loss_kwargs.loss_weights={semseg: 1e5, depth: 1e5}")
    with pytest.raises(FloatingPointError, match="not one of 2 updates was made"):
        train(config, resume=False)


@pytest.mark.parametrize("factor, overrides", [(1.0, []), (0.5, ["loss_kwargs.intermediate_weight=0.5"]),
                                               (0.0, ["intermediate_supervision=false"])])
def test_preliminary_predictions_and_extra_terms_count(example_root, tmp_path, factor, overrides):
    """Their losses are in the total with the file's factor, or not at all; extra terms as they are."""
    def add_terms(module: nn.Module, arguments: tuple, out):
        if not isinstance(module, MultiTaskModel):
            return None
        return out._replace(intermediate={"depth": 0.5 * out.final["depth"]},
                            extra={"push": 0.25 * out.final["semseg"].square().mean()})

    def losses(out, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = weighted(semseg=2, depth=3)(out, batch)
        inter = task_losses(out.intermediate, batch)["depth"]
        return {**found, "push": out.extra["push"], **({"inter/depth": inter} if factor else {}),
                "total": found["total"] + factor * 3 * inter + out.extra["push"]}

    config = experiment(example_root, tmp_path, "intermediate_supervision=true", *overrides, "max_iter=2",
                        "optimizer=sgd", "optimizer_kwargs={lr: 1e-2, momentum: 0, weight_decay: 0}",
                        "loss_kwargs.loss_weights={semseg: 2, depth: 3}", "scheduler_kwargs.power=1")
    handle = torch.nn.modules.module.register_module_forward_hook(add_terms)
    try:
        with watch(example_root) as seen:
            train(config, resume=False)
        history, _ = by_hand(seen.start, example_root, grouped(seen.passes, 1), [1e-2, 5e-3], losses, sgd(0.0))
    finally:
        handle.remove()
    for row, expected in zip(rows(config, "train"), history, strict=True):
        assert {key: row[key] for key in row if key.startswith("loss/")} == pytest.approx(
            {key: expected[key] for key in expected if key.startswith("loss/")}, rel=1e-5)
    assert_same(stored(config.run_dir / "last.pt")["model"], seen.start.state_dict(), 1e-5)


def test_a_log_line_holds_the_means_since_the_last_one(example_root, tmp_path):
    """Losses: means over the updates and passes in between. Rate and gradient norm: those of the last update."""
    fine = experiment(example_root, tmp_path / "a", "max_iter=5", "val_interval=2", "global_batch=4")
    coarse = experiment(example_root, tmp_path / "b", "max_iter=5", "val_interval=2", "global_batch=4",
                        "log_interval=2")
    train(fine, resume=False)
    train(coarse, resume=False)
    single, means = rows(fine, "train"), rows(coarse, "train")
    assert [row["step"] for row in means] == [2, 4, 5]
    for row, part in zip(means, (single[:2], single[2:4], single[4:]), strict=True):
        for name in ("loss/semseg", "loss/depth", "loss/total"):
            assert row[name] == pytest.approx(sum(one[name] for one in part) / len(part), rel=1e-6)
        assert (row["lr"], row["grad_norm"]) == (part[-1]["lr"], part[-1]["grad_norm"])
    assert [row["step"] for row in rows(coarse, "eval")] == [2, 4, 5]


# ------------------------------------------------------------ what is read, and in which order


def test_the_seed_decides_on_weights_and_order(example_root, tmp_path):
    """Every epoch visits every image once (what does not fill an update is left over), each in an order of its own."""
    seen = {}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        with watch(example_root) as seen[folder]:
            train(experiment(example_root, tmp_path / folder, f"seed={seed}", "max_iter=5", "val_interval=5",
                             "global_batch=4"), resume=False)
    a, b, c = (seen[folder] for folder in "abc")
    assert a.passes == b.passes and len(a.passes) == 10
    for run in (a, c):
        read = [name for images in run.passes for name in images]
        assert sorted(read[:12]) == sorted(names(example_root, "train")) and len(set(read[12:])) == 8
        assert read[:12] != sorted(read[:12]) and read[:8] != read[12:]
    with watch(example_root) as uneven:
        train(experiment(example_root, tmp_path / "d", "trBatch=5", "max_iter=3"), resume=False)
    assert [len(images) for images in uneven.passes] == [5, 5, 5]
    assert len({name for images in uneven.passes[:2] for name in images}) == 10
    assert a.passes[:6] != c.passes[:6] and a.passes[6:] != c.passes[6:]
    for key, value in a.start.named_parameters():
        assert torch.equal(value, b.start.get_parameter(key))
    assert any(not torch.equal(value, c.start.get_parameter(key)) for key, value in a.start.named_parameters())


def test_augmentation_is_drawn_anew_for_every_image_of_every_epoch(example_root, tmp_path):
    """Colours are changed with odds that leave hardly an image alone; workers draw the same as none."""
    runs = []
    for folder, workers in (("a", 0), ("b", 1)):
        with watch(example_root) as seen:
            train(experiment(example_root, tmp_path / folder, "augmentation={photometric: true, flip_prob: 0.5}",
                             f"nworkers={workers}", "max_iter=2", "trBatch=12", "val_interval=2"), resume=False)
        runs.append(seen.inputs)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    first, second = runs[0]
    assert len({x.numpy().tobytes() for x in torch.cat((first, second))}) == 24


def test_evaluations_read_the_test_split_once_in_order_and_as_it_is(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=3", "val_interval=2", "eval_at_start=true", "ema_decay=0.5",
                        "augmentation={scale_range: [0.5, 2.0], flip_prob: 0.5, photometric: true}")
    with watch(example_root) as seen:
        train(config, resume=False)
    a, b, c, d, e = names(example_root, "val")
    assert seen.evaluated == 3 * [[a, b], [c, d], [e]]             # recognised, so not augmented
    assert [row["step"] for row in rows(config, "eval")] == [0, 2, 3]
