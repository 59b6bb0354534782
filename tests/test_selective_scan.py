"""Selective scan: every backend against the reference numbers and against the plain recurrence."""

import json

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from models.ops import scan_mamba, scan_torch
from models.ops.scan_op import scan_flops
from models.ops.selective_scan import count_scan_flops, selective_scan
from models.ops.ss2d import S6Weights, ss2d_core
from tests.scan_backends import BACKENDS, FAST, chunk_tokens, device_of, random_inputs, relative_error, tolerance
from tests.shared import SHARED, golden

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def cases(pattern):
    return sorted(path.stem for path in (SHARED / "golden" / "selective_scan").glob(pattern)) or ["absent"]


def values_and_grads(inputs, backend, cotangent=None, state_cotangent=None, **kwargs):
    """[y, last_state, gradients in the order of `inputs`]; only the cotangents given take part."""
    device = device_of(backend)
    leaves = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in inputs.items()}
    if backend == "mamba_ssm":
        leaves = {name: leaf.float() for name, leaf in leaves.items()}
    # mamba_ssm refuses gradients through the last state: it is then computed without any
    with torch.set_grad_enabled(backend != "mamba_ssm"):
        y, last_state = selective_scan(**leaves, return_last_state=True, backend=backend, **kwargs)
    if backend == "mamba_ssm":
        y = selective_scan(**leaves, backend=backend, **kwargs)
    loss = 0 if cotangent is None else (y * cotangent.to(device)).sum()
    if state_cotangent is not None:
        if backend == "mamba_ssm":
            pytest.skip("mamba_ssm gives no gradient through last_state")
        loss = loss + (last_state * state_cotangent).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.values(), grads, strict=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs]
    return [y.detach(), last_state.detach(), *zeros]


# ---- values and gradients ----

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("scan_*.safetensors"))
def test_golden_values_and_all_gradients(case, backend):
    folder = golden("selective_scan")
    flags = {entry["name"]: entry for entry in json.loads((folder / "cases.json").read_text())}[case]
    data = load_file(folder / f"{case}.safetensors")
    inputs = {name: data[f"in.{name}"] for name in NAMES if f"in.{name}" in data}
    y, last_state, *grads = values_and_grads(inputs, backend, data["cot.y"],
                                             delta_softplus=flags["delta_softplus"])
    assert relative_error(y, data["out.y"]) <= tolerance(backend, 1e-10)
    assert relative_error(last_state, data["out.last_state"]) <= tolerance(backend, 1e-10)
    for name, grad in zip(inputs, grads, strict=True):
        assert relative_error(grad, data[f"grad.{name}"]) <= tolerance(backend, 1e-10), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("ss2d_*.safetensors"))
def test_golden_four_route_blocks(case, backend, monkeypatch):
    """ss2d_core inside the three published blocks: values and the gradients of inputs and parameters."""
    data = load_file(golden("selective_scan") / f"{case}.safetensors")
    monkeypatch.setenv("SCAN_BACKEND", backend)
    device, limit = device_of(backend), tolerance(backend, 1e-10)
    dtype = torch.float32 if backend == "mamba_ssm" else torch.float64
    leaves = {key: data[key].to(device, dtype).requires_grad_() for key in data if key.startswith(("param.", "in."))}
    p = {key.removeprefix("param."): leaf for key, leaf in leaves.items()}
    width, height_width = p["out_norm.weight"].numel(), p["in.x"].shape[1:3]

    gated = "out_proj.weight" in p
    inner = p["in.x"] @ p["in_proj.weight"].T
    inner, gate = inner.split(width, dim=-1) if gated else (inner, None)
    inner = F.conv2d(rearrange(inner, "b h w d -> b d h w"), p["conv2d.weight"], p["conv2d.bias"], padding=1,
                     groups=width)
    inner = F.silu(rearrange(inner, "b d h w -> b h w d"))
    source = p["in.x_cross"] @ p["in_proj_cross.weight"].T if "in.x_cross" in p else None
    weights = S6Weights(p["x_proj_weight"], p["dt_projs_weight"], p["dt_projs_bias"],
                        p["A_logs"].unflatten(0, (4, width)), p["Ds"].unflatten(0, (4, width)))
    merged = ss2d_core(inner, weights, source)
    assert merged.shape[1:3] == height_width
    assert relative_error(merged, data["mid.merged_before_norm"]) <= limit
    y = F.layer_norm(merged, (width,), p["out_norm.weight"], p["out_norm.bias"])
    if gated:
        y = (y * F.silu(gate)) @ p["out_proj.weight"].T
    assert relative_error(y, data["out.y"]) <= limit
    grads = torch.autograd.grad((y * data["cot.y"].to(y)).sum(), list(leaves.values()))
    for key, grad in zip(leaves, grads, strict=True):
        assert relative_error(grad, data[f"grad.{key.removeprefix('in.')}"]) <= limit, key


def assert_equals_reference(inputs, backend, *cotangents, limit=1e-11):
    plain, fast = (values_and_grads(inputs, name, *cotangents, delta_softplus=True) for name in ("reference", backend))
    for name, a, b in zip(("y", "last_state", *inputs), fast, plain, strict=True):
        assert relative_error(a, b) <= tolerance(backend, limit), name


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 64, 65, 129])
@pytest.mark.parametrize("backend", FAST)
def test_equals_reference_at_any_length(length, backend):
    inputs = random_inputs(length=length)
    assert_equals_reference(inputs, backend, torch.randn_like(inputs["u"]))
    assert_equals_reference(inputs, backend, torch.randn_like(inputs["u"]), torch.randn(2, 6, 4).double())


@pytest.mark.parametrize("length", [1, 3, 32, 65])
def test_recurrence_by_doubling_equals_reference(length, monkeypatch):
    """The in-chunk recurrence of the torch backend on GPUs."""
    for name in ("_recurrence", "_reverse_recurrence"):
        function = getattr(scan_torch, name + "_by_doubling")
        monkeypatch.setattr(scan_torch, name, lambda decay, states, end, function=function:
                            function(decay.chunk[:end], states.chunk[:end]))
    inputs = random_inputs(length=length)
    assert_equals_reference(inputs, "torch", torch.randn_like(inputs["u"]), torch.randn(2, 6, 4).double())


@pytest.mark.parametrize("channels, state, groups", [(1, 1, 1), (5, 1, 5), (15, 3, 3), (17, 16, 1), (130, 5, 2)])
@pytest.mark.parametrize("backend", FAST)
def test_widths_that_do_not_fill_vectors(channels, state, groups, backend):
    inputs = random_inputs(channels=channels, state=state, groups=groups, length=35)
    assert_equals_reference(inputs, backend, torch.randn_like(inputs["u"]))


@pytest.mark.parametrize("backend", FAST)
def test_gradient_through_last_state_alone(backend):
    inputs = random_inputs(length=40)
    assert_equals_reference(inputs, backend, None, torch.randn(2, 6, 4).double())


@pytest.mark.parametrize("backend", FAST)
def test_absent_arguments(backend):
    inputs = random_inputs(length=40)
    for name in ("D", "z", "delta_bias"):
        del inputs[name]
        assert_equals_reference(inputs, backend, torch.randn_like(inputs["u"]))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_softplus_is_the_identity_above_20_in_both_directions(backend):
    """The sigmoid would be off by 1e-9 there, which a comparison with the largest gradient cannot see."""
    inputs = random_inputs(batch=1, channels=1, length=5, state=1, groups=1)
    inputs["delta"] = torch.tensor([[[19.9, 20.1, 20.5, 21.0, 25.0]]], dtype=torch.float64)
    inputs["A"] = torch.full((1, 1), -0.01, dtype=torch.float64)
    inputs["delta_bias"] = torch.zeros(1, dtype=torch.float64)
    cotangent = torch.ones_like(inputs["u"])
    plain, fast = (values_and_grads(inputs, b, cotangent, delta_softplus=True) for b in ("reference", backend))
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("maps", ["constant_B", "constant_C", "one_group"])
@pytest.mark.parametrize("backend", FAST)
def test_other_shapes_of_B_and_C(maps, backend):
    inputs = random_inputs(length=37, groups=1 if maps == "one_group" else 2)
    if maps == "one_group":
        inputs["B"] = inputs["B"][:, 0]  # (B, N, L)
    else:
        inputs[maps[-1]] = torch.randn(6, 4, dtype=torch.float64)
    assert_equals_reference(inputs, backend, torch.randn_like(inputs["u"]))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradcheck(backend):
    device_of(backend)
    inputs = random_inputs(batch=1, channels=2, length=chunk_tokens(backend) + 2, state=2, groups=1)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(
        lambda *args: selective_scan(*args, delta_softplus=True, return_last_state=True, backend=backend), leaves)


@pytest.mark.parametrize("backend", FAST)
def test_sequence_of_all_tasks_longer_than_65536(backend):
    """A two-byte index or a lossy decay would show here; A near zero keeps the whole past alive."""
    length, device = 70_001, device_of(backend)
    inputs = random_inputs(batch=1, channels=1, length=length, state=1, groups=1)
    inputs["A"] = torch.full((1, 1), -1e-4, dtype=torch.float64)
    inputs["D"] = inputs["z"] = inputs["delta_bias"] = None
    step = F.softplus(inputs["delta"])[0, 0]
    decay, push = torch.exp(-1e-4 * step).tolist(), (step * inputs["u"][0, 0] * inputs["B"][0, 0, 0]).tolist()
    state, states = 0.0, []
    for a, b in zip(decay, push, strict=True):
        state = a * state + b
        states.append(state)
    expected = torch.tensor(states, dtype=torch.float64) * inputs["C"][0, 0, 0]
    dtype = torch.float32 if backend == "mamba_ssm" else torch.float64
    moved = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    y = selective_scan(**moved, delta_softplus=True, backend=backend)
    assert relative_error(y[0, 0], expected) <= tolerance(backend, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_inputs_does_not_matter(backend):
    inputs = random_inputs(length=45)
    strided = {name: t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2]
               for name, t in inputs.items()}
    assert not strided["u"].is_contiguous() and not strided["A"].is_contiguous()
    cotangent = torch.randn_like(inputs["u"]).mT.contiguous().mT
    results = [values_and_grads(x, backend, cotangent, delta_softplus=True) for x in (inputs, strided)]
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= tolerance(backend, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, length", [(0, 40), (2, 0)])
def test_empty_batch_and_empty_sequence(batch, length, backend):
    inputs = random_inputs(batch=batch, length=length)
    y, last_state, *grads = values_and_grads(inputs, backend, torch.zeros_like(inputs["u"]))
    assert y.shape == (batch, 6, length) and last_state.shape == (batch, 6, 4) and not last_state.any()
    assert grads[2].shape == inputs["A"].shape and not grads[2].any()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradients_are_deterministic(backend):
    inputs = random_inputs(length=200, channels=70, dtype=torch.float32)
    cotangent = torch.randn_like(inputs["u"])
    first, second = (values_and_grads(inputs, backend, cotangent, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_kernels_do_not_depend_on_the_number_of_threads():
    inputs = random_inputs(length=1200, channels=140, dtype=torch.float32)
    cotangent, threads, results = torch.randn_like(inputs["u"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(values_and_grads(inputs, "cpp", cotangent, delta_softplus=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- precision ----

@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_are_scanned_in_float32_also_under_autocast(backend):
    device = device_of(backend)
    half = random_inputs(length=200, dtype=torch.bfloat16)
    half = {name: tensor.to(device) for name, tensor in half.items()}
    floats, doubles = ({name: x.to(dtype) for name, x in half.items()} for dtype in (torch.float32, torch.float64))
    y_exact = selective_scan(**doubles, delta_softplus=True, backend="reference")
    with torch.autocast(device, dtype=torch.bfloat16):
        leaves = {name: x.clone().requires_grad_() for name, x in half.items()}
        y = selective_scan(**leaves, delta_softplus=True, backend=backend)
        with torch.no_grad():
            _, state = selective_scan(**half, delta_softplus=True, return_last_state=True, backend=backend)
        float_y = selective_scan(**floats, delta_softplus=True, backend=backend)
        grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert (y.dtype, state.dtype, float_y.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative_error(y, y_exact) < 4e-3  # one rounding to bfloat16
    assert relative_error(float_y, y_exact) < 1e-6  # nothing inside ran in bfloat16
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads)


# The relative error of a result is that of its own rounding, as the inputs are taken as exact: 2^-8 in bfloat16,
# 2^-11 in float16 and, in float32, some units of the last place summed up along the sequence.
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64_of_every_tensor(dtype, rounding, backend):
    inputs = random_inputs(length=333, channels=32, state=16, dtype=dtype)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    cotangent = torch.ones_like(inputs["u"])
    y, last_state, *grads = values_and_grads(inputs, backend, cotangent, delta_softplus=True)
    y_64, last_64, *grads_64 = values_and_grads(doubles, "reference", cotangent.double(), delta_softplus=True)
    assert y.dtype == dtype and last_state.dtype == torch.float32
    assert relative_error(y, y_64) < rounding and relative_error(last_state, last_64) < 1e-6
    for name, a, b in zip(inputs, grads, grads_64, strict=True):
        assert relative_error(a, b) < tolerance(backend, rounding), name


@pytest.mark.parametrize("backend", FAST)
def test_decays_that_underflow_and_overflow(backend):
    """Steps near 10^3 times A forget at once; nothing is NaN, also in the gradients. A negative step grows."""
    inputs = random_inputs(length=70, dtype=torch.float32)
    inputs["delta"] = inputs["delta"] * 1000
    cotangent = torch.ones_like(inputs["u"])
    fast, plain = (values_and_grads(inputs, b, cotangent, delta_softplus=True) for b in (backend, "reference"))
    for name, a, b in zip(("y", "last_state", *inputs), fast, plain, strict=True):
        assert a.isfinite().all() and relative_error(a, b) < tolerance(backend, 1e-5), name
    inputs["delta"] = torch.full_like(inputs["delta"], -40)
    inputs["A"] = torch.full_like(inputs["A"], -1)
    y = values_and_grads(inputs, backend, cotangent)[0]
    assert y[..., 0].isfinite().all() and not y[..., -1].isfinite().any()


def test_not_a_number_is_passed_on():
    inputs = random_inputs(length=40, dtype=torch.float32)
    inputs["delta"][0, 0, 5] = torch.nan
    for backend in ("torch", "cpp"):
        device_of(backend)
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
        assert y[0, 0, :5].isfinite().all() and y[0, 0, 5:].isnan().all() and y[0, 1:].isfinite().all()


# ---- memory and cost ----

class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive at once in storages created inside the mode."""

    def __init__(self):
        super().__init__()
        self.peak, self.alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = (*args, *(kwargs or {}).values())
        given = {t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.Tensor)}
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_extra_memory_of_torch_is_below_a_tenth_of_the_states():
    length, channels, state = 4032, 384, 16
    inputs = random_inputs(1, channels, length, state, groups=1, dtype=torch.float32)
    inputs = {name: t.mT.contiguous().mT if name in ["u", "delta", "B", "C"] else t for name, t in inputs.items()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if name != "z"}
    cotangent = torch.ones_like(inputs["u"].detach())
    states = 4 * length * channels * state
    with PeakMemory() as memory:
        y = selective_scan(**leaves, delta_softplus=True, backend="torch")
        forward_peak = memory.peak - 4 * y.numel()
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    y_and_grads = 4 * (y.numel() + sum(grad.numel() for grad in grads))
    assert 0 < forward_peak < 0.1 * states
    assert 0 < memory.peak - y_and_grads < 0.1 * states


def test_cost_is_counted_on_every_device():
    assert scan_flops(2, 10, 6, 4) == 9 * 2 * 10 * 6 * 4 + 2 * 10 * 6
    inputs = random_inputs(length=10)
    meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    for arguments in (inputs, meta):
        with count_scan_flops() as outer:
            selective_scan(**arguments)
            with count_scan_flops() as inner:
                y = selective_scan(**arguments)
        assert (inner.calls, inner.elements, inner.flops) == (1, 2 * 6 * 10, scan_flops(2, 10, 6, 4))
        assert (outer.calls, outer.flops) == (2, 2 * inner.flops)
        assert y.shape == inputs["u"].shape and y.device == arguments["u"].device
    selective_scan(**inputs)
    assert outer.calls == 2  # nothing is counted after the block


# ---- errors and GPUs ----

@pytest.mark.parametrize("name, shape", [
    ("delta", (2, 6, 8)), ("B", (2, 2, 3, 7)), ("C", (2, 4, 4, 7)), ("D", (5,)), ("z", (2, 6)), ("A", (5, 4)),
    ("delta_bias", (6, 1))])
def test_wrong_shape_names_the_argument(name, shape):
    inputs = random_inputs() | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=rf"{name} has shape .*expected"):
        selective_scan(**inputs)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="4 groups of B, C do not divide 6 channels"):
        selective_scan(**random_inputs(groups=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
def test_gpu_backends_equal_the_reference(backend):
    kernel, reason = scan_mamba.find_mamba_kernel()
    if backend == "mamba_ssm" and kernel is None:
        pytest.skip(reason)
    inputs = {name: t.cuda() for name, t in random_inputs(length=333, dtype=torch.float32).items()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    results = []
    for name in (backend, "reference"):
        y = selective_scan(**leaves, delta_softplus=True, backend=name)
        results.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-4
