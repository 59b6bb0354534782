"""DCNv3 and InternImage as published: the operator, its module, single blocks, whole backbones.

A table of cases beside arrays "<case>.<quantity>". The operator's settings are told by "group_channels", the others
by "kind". Backbones were computed in float64 and stored in float32: in float64 an error counts from half a unit
of the stored value's last place on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from models.backbones.internimage import DeformableConv, InternImageBlock, to_own_layout
from models.build import build_backbone
from models.ops.dcnv3 import Kernel, dcnv3
from scripts.parity.base import Bound, Check, Folder, Measure, Options, below, stored_error, stored_share

OUTPUT, GRADIENT = Bound(stored_error, 1e-9, 2e-5), Bound(stored_share, 1e-9, 5e-5)


def checks(folder: Folder) -> Iterator[Check]:
    for table, case, settings in folder.entries(lambda entry: True):
        run = (_operator if "group_channels" in settings else
               _on_module if str(settings.get("kind")) in KINDS else None)
        arrays = next((p for p, keys in folder.arrays.items() if f"{case}.input" in keys), None)
        if run is not None and arrays is not None:
            yield Check(case, frozenset({table, arrays}), partial(_run, run, case, settings, arrays))


def _run(run: Callable, case: str, settings: dict, path: Path, options: Options) -> Iterator[Measure]:
    yield from run(settings, below(load_file(path), f"{case}."), options)


def _leaf(value: Tensor, options: Options) -> Tensor:
    return value.to(options.device, options.dtype).detach().clone().requires_grad_()


def _operator(c: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    kernel = Kernel(*(tuple(c[name]) for name in ("kernel", "stride", "pad", "dilation")), c["offset_scale"])
    leaves = {name: _leaf(data[name], options) for name in ("input", "offset", "mask")}
    out = dcnv3(*leaves.values(), c["group"], kernel)
    yield OUTPUT.measure("output", out, data["output"], options)
    out.backward(data["grad_output"].to(out))
    for name, leaf in leaves.items():
        if f"grad_{name}" in data:  # none for offsets at whole-numbered places
            yield GRADIENT.measure(f"grad_{name}", leaf.grad, data[f"grad_{name}"], options)


def _on_module(c: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    """A module, a block or a backbone: what it gives, gradients of the input and of every parameter."""
    module = KINDS[c["kind"]](c)
    prefix = "dcn." if isinstance(module, DeformableConv) else ""  # its name in a block

    def ours(key: str) -> str:
        return to_own_layout(f"{prefix}{key}").removeprefix(prefix)

    module.load_state_dict({ours(key): value for key, value in below(data, "state.").items()})
    module.to(options.device, options.dtype)
    image = _leaf(data["input"], options)
    out = module(image)
    if isinstance(out, Tensor):
        yield OUTPUT.measure("output", out, data["output"], options)
        out.backward(data["grad_output"].to(out))
    else:                           # maps: the gradients are those of sum_i mean(map_i * R_i)
        for index, feat in enumerate(out):
            yield OUTPUT.measure(f"feat{index}", feat, data[f"feat{index}"], options)
        sum((feat * data[f"R{index}"].to(feat)).mean() for index, feat in enumerate(out)).backward()
    yield GRADIENT.measure("grad_input", image.grad, data["grad_input"], options)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for key, want in below(data, "grad.").items():
        yield GRADIENT.measure(f"grad.{key}", gradients[ours(key)], want, options)


OF_BACKBONE = ("depths", "groups", "offset_scale", "post_norm", "layer_scale", "mlp_ratio", "drop_path_rate")
KINDS: dict[str, Callable[[dict], nn.Module]] = {
    "DCNv3 module": lambda c: DeformableConv(
        c["channels"], c["group"], c["kernel_size"], c["pad"], c["dilation"], c["offset_scale"], c["dw_kernel_size"],
        c["center_feature_scale"]),
    "InternImage layer": lambda c: InternImageBlock(
        c["channels"], c["groups"], c["mlp_ratio"], c["post_norm"], c["layer_scale"], c["res_post_norm"], 0.0,
        offset_scale=c["offset_scale"], dw_kernel_size=c.get("dw_kernel_size"),
        centre_scale=c.get("center_feature_scale", False)),
    "InternImage backbone": lambda c: build_backbone(
        "internimage", tuple(c["input_shape"][-2:]),
        {"embed_dim": c["channels"], **{name: c[name] for name in OF_BACKBONE}}),
}
