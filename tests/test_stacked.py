"""Layers of several tasks as one: the same as a layer per task, in values, gradients, initial weights and files."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.blocks.stacked import (
    JoinLinear,
    TaskDepthwise,
    TaskDropPath,
    TaskLayerNorm,
    TaskLinear,
    by_task,
    split_by_task,
)
from models.decoders.coarse_to_fine import PatchExpandHead
from scripts.kernel_count import SCAN, count_kernels
from tests.conftest import TINY
from tests.shared import ROOT
from utils.engine.build import model_from_config
from utils.engine.config import load_config

TASKS = ("a", "b", "c")
MLORE = ("backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2, patch_size: 8}",
         "model_kwargs={final_embed_dim: 12, rank_list: [1, 2, 3], topk: 2, spe_rank: 2}")


def randomised(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def alone(layer, state, task):
    """One task's plain layer."""
    layer.load_state_dict({key.removeprefix(f"{task}."): x for key, x in state.items() if key.startswith(f"{task}.")})
    return layer


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(tasks, bias):
    together = randomised(by_task(TaskLinear(len(tasks), 5, 7, bias), tasks).double())
    feat = torch.randn(len(tasks), 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    state = together.state_dict()
    expected = torch.stack([alone(nn.Linear(5, 7, bias).double(), state, task)(x)
                            for task, x in zip(tasks, feat, strict=True)])
    torch.testing.assert_close(together(feat), expected, rtol=0, atol=1e-13)
    grads = [torch.autograd.grad(out.sin().sum(), feat)[0] for out in (together(feat), expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)
    common = feat[0].expand_as(feat)  # one map for all tasks, without copies
    torch.testing.assert_close(together(common), together.of_common(feat[0]).movedim(-2, 0), rtol=0, atol=1e-13)


def test_linear_layers_on_a_map_joined_with_a_common_one():
    together = randomised(by_task(JoinLinear(3, 9, 7), TASKS).double())
    own, common = torch.randn(3, 2, 4, 5, 6).double(), torch.randn(2, 4, 5, 3).double()
    state, out = together.state_dict(), together(own, common)
    for index, task in enumerate(TASKS):
        expected = alone(nn.Linear(9, 7).double(), state, task)(torch.cat((own[index], common), dim=-1))
        torch.testing.assert_close(out[index], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tasks_last", [False, True])
def test_norms(tasks_last):
    together = randomised(by_task(TaskLayerNorm(3, 6, tasks_last), TASKS))
    feat, axis = torch.randn(3, 2, 4, 5, 6), 3 if tasks_last else 0
    out, state = together(feat.movedim(0, axis).contiguous()).movedim(axis, 0), together.state_dict()
    for index, task in enumerate(TASKS):
        torch.testing.assert_close(out[index], alone(nn.LayerNorm(6), state, task)(feat[index]))


def test_depthwise_convolutions():
    together = randomised(by_task(TaskDepthwise(3, 4), TASKS))
    feat = torch.randn(3, 2, 5, 6, 4)
    out, state = together(feat.permute(1, 2, 3, 0, 4)), together.state_dict()
    for index, task in enumerate(TASKS):
        plain = alone(nn.Conv2d(4, 4, 3, padding=1, groups=4), state, task)
        expected = plain(feat[index].movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(out[..., index, :], expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()


def test_a_branch_is_dropped_for_one_image_of_one_task_and_its_mean_is_kept():
    torch.manual_seed(0)
    drop, feat, branch = TaskDropPath(0.25).train(), torch.randn(4, 500, 2, 3), torch.ones(4, 500, 2, 3)
    added = drop(feat, branch) - feat
    kept = (added[..., 0, 0] > 0.5)
    torch.testing.assert_close(added, (kept / 0.75)[..., None, None].expand_as(added))
    for one, other in pairwise(kept):
        assert 0.7 < one.float().mean() < 0.8 and not torch.equal(one, other)
    assert torch.equal(drop.eval()(feat, branch), feat + branch)


def test_every_task_starts_like_a_layer_of_its_own():
    torch.manual_seed(0)
    for together, plain in ((TaskLinear(50, 16, 32), nn.Linear(16, 32)),
                            (TaskDepthwise(50, 32), nn.Conv2d(32, 32, 3, padding=1, groups=32))):
        for found, own in zip(together.parameters(), plain.parameters(), strict=True):
            limit = (16 if isinstance(plain, nn.Linear) else 9) ** -0.5
            assert 0.95 * limit < found.abs().max() <= limit and own.abs().max() <= limit
            assert found.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
            assert found.numel() == 50 * own.numel()


def test_layers_run_in_mixed_precision():
    """The norm in float32, products and what only they take in bfloat16; maps of both kinds meet in the residual."""
    layers = nn.ModuleList([TaskLayerNorm(3, 8), TaskLinear(3, 8, 8), TaskDropPath(0.5), JoinLinear(3, 16, 8)]).train()
    last, feat = TaskLayerNorm(3, 8, tasks_last=True), torch.randn(3, 2, 4, 4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = layers[0](feat.bfloat16())
        product = layers[1](normed)
        summed = layers[2](feat, product)
        joined = layers[3](summed, feat[0])
        inside = layers[1].of_normed(layers[0], joined)
        gated = last.gated(inside.permute(1, 2, 3, 0, 4).contiguous(), product)
        for_product = layers[0].for_product(feat.bfloat16())
    assert torch.equal(for_product, normed.bfloat16())
    assert [x.dtype for x in (normed, summed)] == [torch.float32] * 2
    assert [x.dtype for x in (product, joined, inside, gated)] == [torch.bfloat16] * 4
    gated.sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == torch.float32 for x in (feat, *layers.parameters()))


def definition(norm, feat, weight, bias):
    """Norms of maps (T, R, C) and linear layers behind them, read plainly."""
    return norm(feat) @ weight.mT + bias


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_norm_inside_its_linear_layer(tasks):
    """Values and all gradients; what is normed is not kept."""
    norm, linear = randomised(TaskLayerNorm(tasks, 5).double()), randomised(TaskLinear(tasks, 5, 7).double())
    feat, kept = torch.randn(tasks, 2, 3, 5, dtype=torch.float64, requires_grad=True), []
    leaves = [feat, *norm.parameters(), *linear.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        fast = linear.of_normed(norm, feat)
    weight, bias = linear.per_task
    plain = definition(norm, feat.flatten(1, 2), weight, bias).unflatten(1, (2, 3))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    for found, expected in zip(torch.autograd.grad(fast.sin().sum(), leaves),
                               torch.autograd.grad(plain.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert kept.count(torch.Size((tasks, 6, 5))) == 1


def test_a_gated_norm():
    norm = randomised(TaskLayerNorm(3, 6, tasks_last=True).double())
    feat, gate = torch.randn(2, 4, 5, 3, 6, dtype=torch.float64), torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    leaves = [feat.requires_grad_(), gate.requires_grad_(), *norm.parameters()]
    fast, plain = norm.gated(feat, gate), norm(feat).permute(3, 0, 1, 2, 4) * torch.nn.functional.silu(gate)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    for found, expected in zip(torch.autograd.grad(fast.sin().sum(), leaves),
                               torch.autograd.grad(plain.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_heads_equal_their_definition():
    head = randomised(PatchExpandHead(6, 5).double())
    feat = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves, fast, plain = [feat, *head.parameters()], head(feat), head.plain(feat)
    assert fast.shape == (2, 5, 12, 16)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    for found, expected in zip(torch.autograd.grad(fast.sin().sum(), leaves),
                               torch.autograd.grad(plain.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------ state dicts


def nested():
    block = nn.Sequential(TaskLinear(3, 4, 4), TaskLayerNorm(3, 4), nn.BatchNorm2d(12))
    return nn.ModuleDict({"stage": by_task(randomised(block), TASKS), "common": nn.Linear(2, 2)})


def test_files_have_keys_for_every_task_and_load_again():
    model, other = nested(), nested()
    state = model.state_dict()
    assert set(state) >= {"stage.a.0.weight", "stage.c.1.bias", "stage.b.2.running_var", "common.weight"}
    assert not any(key.startswith("stage.0") for key in state)
    assert state["stage.b.0.weight"].shape == (4, 4) and state["stage.a.2.num_batches_tracked"].dim() == 0
    other.load_state_dict(state)
    copied = copy.deepcopy(nested())
    copied.load_state_dict(state)
    for found in (other, copied):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    assert torch.equal(other["stage"][0].weight[4:8], state["stage.b.0.weight"])


def test_keys_survive_synchronised_batch_norms():
    """Which replace the norms, as `DistributedDataParallel` on CUDA needs it."""
    model = model_from_config(load_config("configs/mlore_nyud.yml", [*TINY, "backbone=vit", *MLORE]))
    keys = list(model.state_dict())
    assert list(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == keys
    assert "decoder.first.0.mixture_norm.semseg.running_var" in keys


def test_an_incomplete_file_is_refused():
    state = nested().state_dict()
    del state["stage.b.0.weight"]
    with pytest.raises(RuntimeError, match="(?s)Missing key.*stage.0.weight.*Unexpected key.*stage.a.0.weight"):
        nested().load_state_dict(state)


def test_gradients_by_the_keys_of_the_file():
    model = nested()
    tensors = split_by_task(model, dict(model.named_parameters()))
    assert tensors.keys() == {key for key, value in model.state_dict().items() if key.split(".")[-1] in
                              ("weight", "bias")}
    assert torch.equal(tensors["stage.c.0.weight"], model["stage"][0].weight[8:])


@pytest.mark.parametrize("name", ["bim", "mtmamba", "mtmamba_plus"])
def test_one_task_alone(name):
    """A stack of one; every parameter learns."""
    others = ("depth", "normals", "edge")
    config = load_config(f"configs/{name}_nyud.yml", [*TINY, "model_kwargs={d_state: 2}", *(
        f"task_dictionary.include_{task}=false" for task in others)])
    model = model_from_config(config)
    out = model(torch.randn(1, 3, 64, 96)).final
    assert list(out) == ["semseg"]
    out["semseg"].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------ what it saves


@pytest.mark.parametrize(("name", "most", "scans"), [
    ("bim_nyud", 330, 24), ("mtmamba_nyud", 260, 12), ("mtmamba_plus_nyud", 250, 9), ("mlore_nyud", 520, 0)])
def test_kernels_of_a_forward_pass(name, most, scans):
    """Of decoder and heads, at full size; a module per task would dispatch three times as many."""
    kernels = count_kernels(load_config(ROOT / "configs" / f"{name}.yml"))
    assert kernels["decoder"].total() + kernels["heads"].total() <= most
    assert kernels["decoder"][SCAN] == scans
