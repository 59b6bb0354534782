"""DCNv3 and InternImage: reference numbers, the operator's twin, memory, published files, options, errors."""

import logging
import re
import sys

import pytest
import torch
from torch import nn

from models.backbones import BACKBONES
from models.backbones.internimage import DeformableConv
from models.build import build_backbone
from models.ops.dcnv3 import Kernel, dcnv3
from scripts.check_parity import main as check_parity
from scripts.download_pretrained import download
from tests.shared import assert_same_weights, golden
from utils.engine import pretrained
from utils.engine.pretrained import load_pretrained

TINY = {"embed_dim": 8, "depths": (1, 2, 1, 1), "groups": (1, 2, 2, 4)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything_agrees_with_the_original(dtype, capsys):
    code = check_parity(["--golden", str(golden("dcnv3")), "--dtype", dtype])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    assert "24 passed, 0 failed, 0 not covered" in out
    assert len(re.findall(r"dcnv3: (k\d|module_|layer_|internimage_)", out)) == 24


# ------------------------------------------------------------ the operator


def plain_dcnv3(value, offset, mask, groups, kernel):
    """The definition, one output pixel, group and point at a time."""
    (height, width), channels = kernel.output_size(value.shape[1:3]), value.shape[-1] // groups
    (rows, columns), s = kernel.size, kernel.offset_scale
    offset = offset.unflatten(-1, (groups, rows * columns, 2))
    mask = mask.unflatten(-1, (groups, rows * columns))
    out = []
    for b in range(len(value)):
        for index in range(height * width * groups):
            y, x, g = index // groups // width, index // groups % width, index % groups
            total = value.new_zeros(channels)
            for p in range(rows * columns):
                middle = [d * (k - 1) // 2 for d, k in zip(kernel.dilation, kernel.size, strict=True)]
                dx, dy = offset[b, y, x, g, p]
                px = (x * kernel.stride[1] - kernel.padding[1] + middle[1]
                      + s * (p // rows * kernel.dilation[1] - middle[1] + dx))
                py = (y * kernel.stride[0] - kernel.padding[0] + middle[0]
                      + s * (p % rows * kernel.dilation[0] - middle[0] + dy))
                for i in (py.floor().int().item(), py.floor().int().item() + 1):
                    for j in (px.floor().int().item(), px.floor().int().item() + 1):
                        if 0 <= i < value.shape[1] and 0 <= j < value.shape[2]:
                            weight = (1 - (py - i).abs()) * (1 - (px - j).abs()) * mask[b, y, x, g, p]
                            total = total + weight * value[b, i, j, g * channels:(g + 1) * channels]
            out.append(total)
    return torch.stack(out).view(len(value), height, width, -1)


def arguments(kernel, groups=2, size=(4, 5), channels=4, dtype=torch.float64, batch=1):
    gen = torch.Generator().manual_seed(0)
    points = groups * kernel.num_points
    shapes = ((*size, channels), (*kernel.output_size(size), 2 * points), (*kernel.output_size(size), points))
    return [torch.randn(batch, *shape, generator=gen, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kernel", [
    Kernel(), Kernel(offset_scale=2.0), Kernel((2, 3), (2, 1), (0, 2), (1, 2), 0.5), Kernel((1, 1), padding=(0, 0))])
def test_the_operator_is_its_definition(kernel):
    got_from, want_from = arguments(kernel), arguments(kernel)
    got, want = dcnv3(*got_from, 2, kernel), plain_dcnv3(*want_from, 2, kernel)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    got.backward(cotangent)
    want.backward(cotangent)
    for ours, twin in zip(got_from, want_from, strict=True):
        torch.testing.assert_close(ours.grad, twin.grad, rtol=0, atol=1e-11)


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: dcnv3(*x, 2), arguments(Kernel(), size=(3, 3)))


@pytest.mark.parametrize("limit", [1, 200, 10**9])
def test_portions_change_nothing(limit, monkeypatch):
    kernel = Kernel((3, 5), padding=(1, 2))
    want_from, got_from = arguments(kernel, batch=2), arguments(kernel, batch=2)
    want = dcnv3(*want_from, 2, kernel)
    want.square().sum().backward()
    monkeypatch.setattr(sys.modules["models.ops.dcnv3"], "SAMPLES_AT_ONCE", limit)
    got = dcnv3(*got_from, 2, kernel)
    got.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    for ours, whole in zip(got_from, want_from, strict=True):
        torch.testing.assert_close(ours.grad, whole.grad, rtol=0, atol=1e-12)


def test_no_sampled_map_is_kept():
    inputs, kept = arguments(Kernel(), size=(16, 16), channels=32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        dcnv3(*inputs, 2)
    assert sum(kept) < 1.5 * sum(x.numel() for x in inputs)            # K sampled maps alone would be 9 * 32


def test_without_numbers_nothing_is_sampled(monkeypatch):
    """On the meta device PyTorch's `grid_sample` is Python; `build_model` looks there for layers that nobody reads."""
    monkeypatch.setattr("models.ops.dcnv3._sample", None)
    inputs = [x.detach().to("meta").requires_grad_() for x in arguments(Kernel(), batch=2)]
    out = dcnv3(*inputs, 2)
    out.sum().backward()
    assert out.shape == (2, 4, 5, 4) and all(x.grad.shape == x.shape for x in inputs)


def test_half_precision_computes_places_in_float32():
    inputs = [x.detach().bfloat16() for x in arguments(Kernel(), size=(3, 300), dtype=torch.float32)]
    got, want = dcnv3(*inputs, 2), dcnv3(*(x.float() for x in inputs), 2)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("index, shape, message", [
    (0, (1, 4, 5, 5), r"C a multiple of 2 groups, got \(1, 4, 5, 5\)"),
    (0, (4, 5, 4), "needs values"), (1, (1, 4, 5, 18), r"got masks .*18\) and offsets \(1, 4, 5, 18\)"),
    (2, (1, 3, 5, 18), r"needs masks \(1, 4, 5, 18\) .* got masks \(1, 3, 5, 18\)")])
def test_shapes_are_checked(index, shape, message):
    inputs = arguments(Kernel())
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        dcnv3(*inputs, 2)


# ------------------------------------------------------------ InternImage


def tiny(**options):
    torch.manual_seed(0)
    return build_backbone("internimage", (32, 32), {**TINY, **options})


@pytest.mark.parametrize("name, count", [("internimage_b", 94_909_920), ("intern_l", 218_952_370)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        backbone = build_backbone(name, (448, 576))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count
    convs = [module for module in backbone.modules() if isinstance(module, DeformableConv)]
    assert {conv.kernel.offset_scale for conv in convs} == {2.0 if name == "intern_l" else 1.0}
    assert {conv.output_proj.in_features // conv.groups for conv in convs} == {16}


@pytest.mark.parametrize("options", [
    {}, {"post_norm": False}, {"post_norm": False, "layer_scale": None},
    {"post_norm": False, "layer_scale": None, "res_post_norm": True, "center_feature_scale": True,
     "dw_kernel_size": 5}, {"center_feature_scale": True}])
@pytest.mark.parametrize("size", [(32, 64), (33, 47)])
def test_any_variant_takes_any_size(options, size):
    backbone = tiny(**options)
    maps = backbone(torch.randn(1, 3, *size))
    for feat, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert feat.shape == (1, channels, *(-(-side // stride) for side in size))
    sum((feat * torch.randn_like(feat)).sum() for feat in maps).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_an_untrained_layer_averages_the_regular_grid():
    conv = DeformableConv(4, 2)
    feat = torch.randn(1, 6, 7, 4)
    average = nn.functional.avg_pool2d(conv.input_proj(feat).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv(feat), conv.output_proj(average), rtol=0, atol=1e-5)


def test_drop_path_rises_over_all_levels():
    rates = [module.drop_path1.drop_prob for module in tiny().modules() if hasattr(module, "drop_path1")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_mixed_precision_stays_close():
    backbone, image = tiny(drop_path_rate=0.0), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(image)
    for feat, want in zip(half, backbone(image), strict=True):
        assert (feat.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("options, message", [
    ({"groups": (3, 2, 2, 4)}, r"groups' must be divisors of the levels' channels, \(8, 16, 32, 64\), got \[3"),
    ({"depths": (1, 1)}, r"depths' must be a list of 4 values, got \(1, 1\)"),
    ({"depths": (1, 1, 0, 1)}, "depths' must be numbers of at least 1"), ({"kernel_size": 4}, "must be an odd number"),
    ({"dw_kernel_size": 0}, "dw_kernel_size' must be an odd number"), ({"embed_dim": 7}, "must be an even number"),
    ({"mlp_ratio": 0}, "mlp_ratio' must be a positive number"), ({"offset_scale": -1}, "offset_scale' must be a pos"),
    ({"res_post_norm": True}, "res_post_norm' must be false unless post_norm is false and layer_scale empty"),
    ({"group": 2}, "unknown key 'backbone_kwargs.group'; did you mean 'groups'")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# ------------------------------------------------------------ published files


def published(backbone, prefix=""):
    """A model's weights as the authors' files hold them: their keys, and a classifier's head."""
    state = {}
    for key, value in backbone.state_dict().items():
        key = re.sub(r"(patch_embed\.norm\d|downsample\.norm)\.", r"\1.1.", key)
        key = re.sub(r"(blocks\.\d+\.(?:norm|res_post_norm)\d|levels\.\d+\.norm)\.", r"\1.0.", key)
        key = key.replace("dw_conv.", "dw_conv.0.").replace("dw_norm.", "dw_conv.1.1.")
        state[prefix + key.replace("centre_scale.", "center_feature_scale_proj_")] = value
    return state | {"conv_head.0.weight": torch.zeros(1), "conv_head.1.0.running_mean": torch.zeros(1),
                    "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s},
                                  lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_published_files_load(tmp_path, caplog, wrap, prefix):
    original = tiny(post_norm=False, center_feature_scale=True)
    nn.init.normal_(original.levels[1].blocks[0].dcn.centre_scale.weight)
    torch.save(wrap(published(original, prefix)), tmp_path / "a.pth")
    backbone = tiny(post_norm=False, center_feature_scale=True)
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, tmp_path / "a.pth")
    assert "missing 0 / unexpected 4 (conv_head.*, head.*)" in caplog.text
    assert_same_weights(backbone, original)


def test_files_of_another_model_are_refused(tmp_path):
    state = published(tiny())
    torch.save({k: v for k, v in state.items() if "levels.1.blocks.1.gamma1" not in k}, tmp_path / "lacking.pth")
    torch.save(published(tiny(depths=(1, 2, 2, 1))), tmp_path / "deeper.pth")
    torch.save(published(tiny(embed_dim=16)), tmp_path / "wider.pth")
    for name, message in (("lacking", r"1 missing in the file \(levels.1.blocks.1.gamma1\)"),
                          ("deeper", "unknown to the model"), ("wider", "of another shape")):
        with pytest.raises(ValueError, match=f"{name}.pth does not fit this InternImageBackbone: .*{message}"):
            load_pretrained(tiny(), tmp_path / f"{name}.pth")


def test_true_means_the_authors_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path)
    backbone, original = tiny(), tiny(drop_path_rate=0.0)
    nn.init.normal_(original.levels[0].blocks[0].gamma1)
    backbone.pretrained_file = BACKBONES["internimage_b"].pretrained_file
    with pytest.raises(FileNotFoundError, match="no internimage_b_1k_224.pth in .*huggingface.co/OpenGVLab/InternIm"):
        load_pretrained(backbone, True)
    torch.save({"model": published(original)}, tmp_path / "internimage_b_1k_224.pth")
    load_pretrained(backbone, True)
    assert torch.equal(backbone.levels[0].blocks[0].gamma1, original.levels[0].blocks[0].gamma1)
    with pytest.raises(ValueError, match="fetch internimage_l_22k_192to384.pth from https://huggingface.co"):
        download("intern_l", tmp_path)
