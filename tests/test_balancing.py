"""Loss balancing: every scheme against its formula in NumPy and, where it has it, against torchjd; runs that train."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from losses.balancing import BALANCING, build_balancing
from losses.balancing.gradients import GradientBalancing
from tests.processes import run_main
from tests.shared import ROOT
from tests.test_train import QUIET, rows
from utils.engine.config import load_config
from utils.engine.train import train

TASKS = ("semseg", "depth", "edge")
WEIGHTS = {"semseg": 1.0, "depth": 2.0, "edge": 5.0}
torchjd = pytest.importorskip("torchjd.scalarization", reason="torchjd is not installed")
aggregation = pytest.importorskip("torchjd.aggregation")
ON_GRADIENTS = [name for name in BALANCING if issubclass(BALANCING.load(name), GradientBalancing)]


def scheme(name, weights=None, **options):
    return build_balancing(name, TASKS, weights or dict.fromkeys(TASKS, 1.0), options)


def values(seed=0, low=0.2, high=3.0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, len(TASKS)))


def named(losses):
    return dict(zip(TASKS, losses, strict=True))


ALL = dict.fromkeys(TASKS, 1.0)


def directed(balancing, gradients, losses=None):
    return balancing.direct(torch.as_tensor(gradients, dtype=torch.float32),
                            torch.ones(len(TASKS)) if losses is None else losses.float()).double().numpy()


@pytest.fixture
def gradients():
    """Three gradients of which two oppose each other."""
    rows = np.random.default_rng(3).normal(size=(3, 7))
    rows[1] = -0.7 * rows[0] + 0.2 * rows[1]
    return rows * np.array([[1.0], [5.0], [0.3]])


# ------------------------------------------------------------ from losses


def test_geometric_mean():
    losses, weights = values(), np.array(list(WEIGHTS.values()))
    want = np.prod(losses.numpy() ** (weights / weights.sum()))
    assert scheme("gls", WEIGHTS).combine(named(losses), ALL).item() == pytest.approx(want, rel=1e-7)
    equal = torchjd.GeometricMean()(losses).item()
    assert scheme("geometric_mean").combine(named(losses), ALL).item() == pytest.approx(equal, rel=1e-7)


def test_uncertainty():
    balancing, losses = scheme("uncertainty", WEIGHTS).double(), values()
    with torch.no_grad():
        balancing.log_variance.copy_(torch.tensor([0.5, -1.0, 2.0]))
    logs = np.array([0.5, -1.0, 2.0])
    want = 0.5 * np.sum(np.array(list(WEIGHTS.values())) * (np.exp(-logs) * losses.numpy() + logs))
    assert balancing.combine(named(losses), ALL).item() == pytest.approx(want, rel=1e-12)
    theirs, ours = torchjd.UW(3).double(), scheme("uncertainty").double()
    for kind in (theirs, ours):
        value = kind(losses) if kind is theirs else kind.combine(named(losses), ALL)
        value.backward()
    assert torch.allclose(theirs.log_var.grad, ours.log_variance.grad)


def test_dynamic_weight_average():
    """Two intervals of two passes; the third has weights by the ratio of their means."""
    balancing, rounds = scheme("dwa", WEIGHTS, interval=2, temperature=1.5), [values(seed) for seed in range(5)]
    for losses in rounds[:4]:
        assert balancing.ratios.tolist() == [1, 1, 1]
        balancing.follow(losses.float())
    first, second = (sum(rounds[i:i + 2]).numpy() / 2 for i in (0, 2))
    shares = np.exp(second / first / 1.5)
    want = np.sum(np.array(list(WEIGHTS.values())) * 3 * shares / shares.sum() * rounds[4].numpy())
    assert balancing.combine(named(rounds[4]), ALL).item() == pytest.approx(want, rel=1e-6)


def test_famo():
    """Two passes by hand: the logits move by Adam's first step, lr times the sign of the gradient."""
    balancing, before, after = scheme("famo", lr=0.1, weight_decay=0.0), values(1), values(2)
    theirs = torchjd.FAMO(3, lr=0.1, weight_decay=0.0).double()
    assert balancing.combine(named(before), ALL).item() == pytest.approx(theirs(before).item(), rel=1e-6)
    balancing.follow(before.float())
    assert balancing.logits.tolist() == [0, 0, 0]
    balancing.follow(after.float())
    theirs.update(after)
    change = np.log(before.numpy()) - np.log(after.numpy())
    slope = (change - change.mean()) / 3
    assert balancing.logits.numpy() == pytest.approx(-0.1 * np.sign(slope), rel=1e-5)
    assert balancing.logits.double().numpy() == pytest.approx(theirs._w.detach().numpy(), rel=1e-4)
    for seed in (3, 4):
        last, now = values(seed - 1), values(seed)
        theirs(last)
        theirs.update(now)
        balancing.follow(now.float())
    assert balancing.logits.double().numpy() == pytest.approx(theirs._w.detach().numpy(), rel=1e-3)


@pytest.mark.parametrize("name", ["geometric_mean", "uncertainty", "dwa", "famo"])
def test_a_task_without_a_label_has_no_part(name):
    losses, shares = values().requires_grad_(), {"semseg": 1.0, "depth": 0.0, "edge": 2.0}
    balancing = scheme(name)
    balancing.combine(named(losses), shares).backward()
    assert losses.grad[1] == 0 and (losses.grad[[0, 2]] > 0).all()
    if name in ("dwa", "famo"):
        for seed in range(300):
            balancing.follow(values(seed).float() * torch.tensor([1, 0, 1]))
        assert all(value.isfinite().all() for value in balancing.state_dict().values())
        unmoved = balancing.ratios[1] == 1 if name == "dwa" else balancing.before[1] == 0
        assert unmoved


def test_famo_s_gradient_is_a_convex_combination():
    losses = values().requires_grad_()
    balancing = scheme("famo")
    balancing.logits.copy_(torch.tensor([0.3, -0.2, 1.0]))
    balancing.combine(named(losses), ALL).backward()
    assert losses.grad.sum().item() == pytest.approx(1, rel=1e-6) and (losses.grad > 0).all()


# ------------------------------------------------------------ from gradients


def test_gradnorm(gradients):
    """Two passes against algorithm 1 with its gradient relative to the mean norm."""
    balancing, shares, first = scheme("gradnorm", alpha=0.7, lr=0.1), np.ones(3), values(0).numpy()
    norms = np.linalg.norm(gradients, axis=1)
    for seed in (0, 1, 2):
        losses = values(seed)
        assert directed(balancing, gradients, losses) == pytest.approx(shares @ gradients, rel=1e-5)
        ratio = losses.numpy() / first
        weighted = shares * norms
        slope = np.sign(weighted - weighted.mean() * (ratio / ratio.mean()) ** 0.7) * norms / weighted.mean()
        shares = np.maximum(shares - 0.1 * slope, 1e-6)
        shares *= 3 / shares.sum()
        assert balancing.shares.numpy() == pytest.approx(shares, rel=1e-5)


def test_db_mtl(gradients):
    balancing, losses = scheme("db_mtl", WEIGHTS, beta=0.9, sigma=0.5), values()
    want = sum(WEIGHTS[task] * math.log(loss) for task, loss in named(losses.tolist()).items())
    assert balancing.combine(named(losses), ALL).item() == pytest.approx(want, rel=1e-6)
    balancing.prepare([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))])
    average = np.zeros_like(gradients)
    for step in (1, 2, 3):
        kept = 0.9 / step ** 0.5
        average = kept * average + (1 - kept) * step * gradients
        norms = np.linalg.norm(average, axis=1, keepdims=True)
        want = (norms.max() * average / norms).sum(axis=0)
        assert directed(balancing, step * gradients) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert "averages" not in dict(scheme("db_mtl", beta=0.0).named_buffers())


def pcgrad(rows, seed):
    """Algorithm 1, with the library's order of the tasks."""
    torch.manual_seed(seed)
    out = np.zeros(rows.shape[1])
    for i, row in enumerate(rows):
        changed = row.copy()
        for j in torch.randperm(len(rows)).tolist():
            if j != i and changed @ rows[j] < 0:
                changed -= changed @ rows[j] / (rows[j] @ rows[j]) * rows[j]
        out += changed
    return out


def test_pcgrad(gradients):
    balancing = scheme("pcgrad")
    for step in range(3):
        assert directed(balancing, gradients) == pytest.approx(pcgrad(gradients, step), rel=1e-4, abs=1e-5)
    before = torch.get_rng_state()
    directed(balancing, gradients)
    assert torch.equal(before, torch.get_rng_state())


def test_cagrad(gradients):
    """The dual of its problem, minimised by hand on a fine grid of convex weights."""
    mean, ball = gradients.mean(axis=0), 0.4 * np.linalg.norm(gradients.mean(axis=0))
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 201) for b in np.linspace(0, 1 - a, 201)])
    rows = grid @ gradients
    best = rows[np.argmin(rows @ mean + ball * np.linalg.norm(rows, axis=1))]
    want = mean + ball * best / np.linalg.norm(best)
    got = directed(scheme("cagrad", c=0.4), gradients)
    assert got == pytest.approx(want, rel=0.05, abs=0.05 * np.abs(want).max())


def test_nash_mtl(gradients):
    """Its condition, G G^T w = 1 / w up to a common factor."""
    rows = np.random.default_rng(5).normal(size=(3, 7))
    balancing = scheme("nash_mtl")
    got = directed(balancing, rows)
    weights = np.linalg.lstsq(rows.T, got, rcond=None)[0]
    products = weights * (rows @ rows.T @ weights)
    assert (weights > 0).all() and products == pytest.approx(np.full(3, products.mean()), rel=0.05)


def test_mgda_is_the_smallest_convex_combination():
    rows = np.array([[2.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    weights = np.array([1 / 4, 1, 1]) / (1 / 4 + 2)           # 1 / norm^2, normalised: orthogonal gradients
    assert directed(scheme("mgda"), rows) == pytest.approx(weights @ rows, rel=2e-2)


def test_imtl_g_has_equal_projections(gradients):
    got = directed(scheme("imtl_g"), gradients)
    along = gradients @ got / np.linalg.norm(gradients, axis=1)
    assert along == pytest.approx(np.full(3, along.mean()), rel=1e-3)


@pytest.mark.parametrize("name, kind", [("aligned_mtl", aggregation.AlignedMTL), ("upgrad", aggregation.UPGrad)])
def test_the_library_gives_the_same(name, kind, gradients):
    want = kind()(torch.from_numpy(gradients)).numpy()
    scale = np.linalg.norm(want)
    assert directed(scheme(name), gradients) / scale == pytest.approx(want / scale, abs=2e-3)


# ------------------------------------------------------------ the contract


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.heads = nn.Linear(4, 5), nn.Linear(5, 3)


def step(balancing, net, data, extra=0.0):
    losses = named(net.heads(torch.tanh(net.encoder(data))).square().mean(dim=0))
    losses |= {"inter/depth": losses["depth"] * 0.1, "balance": extra * net.encoder.weight.square().sum()}
    losses["total"] = sum(losses.values())
    net.zero_grad()
    balancing.backward(losses, lambda loss: loss, list(net.encoder.parameters()), list(net.heads.parameters()))
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_plain_directions_give_the_gradient_of_the_weighted_sum():
    """The sum of the tasks' gradients, terms of the decoder and preliminary predictions included."""
    class Plain(GradientBalancing):
        def direct(self, gradients, losses):
            return gradients.sum(dim=0)

    torch.manual_seed(0)
    net, data = Net(), torch.randn(6, 4)
    plain = Plain(TASKS, WEIGHTS, None)
    plain.intermediate_weight = 0.5
    got = step(plain, net, data, extra=0.3)
    losses = net.heads(torch.tanh(net.encoder(data))).square().mean(dim=0)
    total = sum(WEIGHTS[task] * loss for task, loss in named(losses).items()) + 0.5 * 2.0 * 0.1 * losses[1]
    net.zero_grad()
    (total + 0.3 * net.encoder.weight.square().sum()).backward()
    for ours, parameter in zip(got, net.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_only_the_backbone_is_balanced(name):
    torch.manual_seed(0)
    net, data = Net(), torch.randn(6, 4)
    balancing, log = scheme(name), name == "db_mtl"
    balancing.prepare(list(net.encoder.parameters()))
    got = step(balancing, net, data)
    losses = net.heads(torch.tanh(net.encoder(data))).square().mean(dim=0)
    want = losses + torch.tensor([0, 0.1, 0]) * losses
    total = (losses.log() + torch.tensor([0, 1, 0]) * (0.1 * losses).log()).sum() if log else want.sum()
    net.zero_grad()
    total.backward()
    for ours, parameter in zip(got[2:], net.heads.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(grad.isfinite().all() for grad in got)


@pytest.mark.parametrize("name", BALANCING)
def test_what_is_remembered_is_saved(name):
    torch.manual_seed(0)
    net, batches = Net(), torch.randn(4, 6, 4)
    first = scheme(name)
    first.prepare(list(net.encoder.parameters()))
    for data in batches[:3]:
        step(first, net, data)
    second = scheme(name)
    second.prepare(list(net.encoder.parameters()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for ours, again in zip(step(first, net, batches[3]), step(second, net, batches[3]), strict=True):
        assert torch.equal(ours, again)


# ------------------------------------------------------------ runs

@pytest.mark.parametrize("name", sorted(set(BALANCING) - {"weighted_sum", "log"}))
def test_every_scheme_trains(tiny, name):
    config = load_config(ROOT / "configs" / "bim_nyud.yml", [*tiny, "max_iter=3", f"loss_kwargs.loss_scheme={name}"])
    assert set(train(config, resume=False)) >= set(config.tasks)


@pytest.mark.parametrize("name", ["pcgrad", "famo"])
def test_two_processes_equal_one(tiny, tmp_path, name):
    """The same losses and the same state at the same global batch."""
    path, states, losses = str(ROOT / "configs" / "bim_nyud.yml"), [], []
    for processes in (1, 2):
        run_main(["--config_exp", path, "--run_mode", "train", *tiny, *QUIET, "max_iter=3",
                  f"loss_kwargs.loss_scheme={name}", f"trBatch={4 // processes}", f"version_name=of{processes}"],
                 processes)
        folder = tmp_path / "runs" / f"of{processes}"
        states.append(torch.load(folder / "last.pt", weights_only=True)["criterion"])
        losses.append([row["loss/total"] for row in rows(folder, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert states[0], "it remembers something"
    for key, value in states[0].items():
        assert torch.allclose(value.double(), states[1][key].double(), rtol=1e-3, atol=1e-5), key
