"""Which backend runs a scan: requests, fallbacks and their reasons, the log line, and what mamba_ssm is given."""

import dataclasses
import importlib.abc
import logging
import subprocess
import sys
import types

import pytest
import torch

from models.ops import SCAN_BACKENDS, scan_choice, scan_cpp, scan_mamba
from models.ops import selective_scan as selective_scan_module
from models.ops.routes import Route
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import ScanNeeds, choose_backend, set_scan_backend
from models.ops.scan_reference import reference_scan
from models.ops.selective_scan import selective_scan
from tests.scan_backends import device_of, random_inputs
from tests.shared import ROOT


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """No test inherits a backend from the environment, or an earlier log line."""
    monkeypatch.delenv("SCAN_BACKEND", raising=False)
    monkeypatch.setattr(scan_choice, "_configured", "auto")
    monkeypatch.setattr(scan_choice, "_logged", set())
    forget_kernel = scan_mamba.find_mamba_kernel.cache_clear
    forget_kernel()
    yield
    forget_kernel()


def test_the_table_is_read_without_pytorch_and_every_row_is_a_backend():
    """An experiment file is checked before anything heavy is imported."""
    code = "import sys; from models.ops import SCAN_BACKENDS; print(SCAN_BACKENDS.find('cpp'), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "cpp False\n", run.stderr
    for name in set(SCAN_BACKENDS) - {"auto"}:
        backend = SCAN_BACKENDS.load(name)
        assert (backend.kernels is None) != (backend.scan is None)
    assert SCAN_BACKENDS.load("auto") is None


def scan_log(caplog, level="INFO", **kwargs):
    """Log lines of a scan, which all have that level."""
    with caplog.at_level(logging.INFO, logger="models.ops.scan_choice"):
        selective_scan(**random_inputs(), **kwargs)
    assert {record.levelname for record in caplog.records} <= {level}
    return [record.getMessage() for record in caplog.records]


def test_auto_on_cpu_is_cpp_where_it_builds_and_says_so_once(caplog):
    device_of("cpp")
    scan_log(caplog)
    assert scan_log(caplog) == ["selective scan: cpp backend (the fastest here)"]


def test_auto_without_compiled_kernels_is_torch_and_says_why_once(caplog, monkeypatch):
    monkeypatch.setattr(scan_cpp, "find_cpp_kernel", lambda: "no compiled kernels: the compiler 'c++' was not found")
    reason = "no compiled kernels: the compiler 'c++' was not found"
    scan_log(caplog, "WARNING")
    assert scan_log(caplog, "WARNING") == [
        f"selective scan: torch backend (training and inference are slower than with cpp: {reason})"]
    with pytest.raises(ValueError, match="'cpp' was requested by the backend argument but cannot run: no compiled"):
        selective_scan(**random_inputs(), backend="cpp")


@pytest.mark.parametrize("refused, chosen", [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "mamba_ssm"),
                                             (("cuda", "triton", "mamba_ssm"), "torch")])
def test_a_slower_backend_on_cuda_is_a_warning_with_the_consequence(refused, chosen, caplog, monkeypatch):
    for name in ("cuda", "triton", "mamba_ssm"):
        backend = SCAN_BACKENDS.load(name)
        refusal = f"{name} is broken" if name in refused else None
        monkeypatch.setitem(scan_choice._loaded, name, dataclasses.replace(backend, refusal=lambda _, r=refusal: r))
    with caplog.at_level(logging.INFO, logger="models.ops.scan_choice"):
        assert choose_backend(ScanNeeds("cuda", torch.float32, 16, False), "auto")[0] == chosen
    record, = caplog.records
    assert record.levelname == ("WARNING" if refused else "INFO")
    why = (f"training and inference are slower than with {' or '.join(refused)}: "
           + "; ".join(f"{name} is broken" for name in refused)) if refused else "the fastest here"
    assert record.getMessage() == f"selective scan: {chosen} backend ({why})"


def test_argument_beats_environment_beats_configuration(caplog, monkeypatch):
    set_scan_backend("reference")
    assert scan_log(caplog)[-1] == "selective scan: reference backend (requested by the configuration)"
    monkeypatch.setenv("SCAN_BACKEND", "torch")
    assert scan_log(caplog)[-1] == "selective scan: torch backend (requested by SCAN_BACKEND)"
    lines = scan_log(caplog, backend="reference")
    assert lines[-1] == "selective scan: reference backend (requested by the backend argument)"


def test_requested_mamba_that_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="by the backend argument but cannot run: .*CUDA tensors.*cpu"):
        selective_scan(**random_inputs(), backend="mamba_ssm")
    monkeypatch.setenv("SCAN_BACKEND", "mamba_ssm")
    with pytest.raises(ValueError, match="requested by SCAN_BACKEND but cannot run"):
        selective_scan(**random_inputs())


def test_unknown_backend_names_the_choices(monkeypatch):
    for call in (lambda: set_scan_backend("gpu"), lambda: selective_scan(**random_inputs(), backend="gpu")):
        with pytest.raises(ValueError, match="unknown scan_backend 'gpu'; .*auto, cuda, triton, cpp, mamba_ssm"):
            call()
    monkeypatch.setenv("SCAN_BACKEND", "fast")
    with pytest.raises(ValueError, match="SCAN_BACKEND: unknown scan_backend 'fast'"):
        selective_scan(**random_inputs())


def install_fake_mamba(monkeypatch, kernel):
    package = "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"
    for name in package:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[package[-1]].selective_scan_fn = kernel


def test_mamba_failure_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    kernel, reason = scan_mamba.find_mamba_kernel("cpu")
    assert kernel is None and reason.startswith("mamba_ssm cannot be imported: ")


def test_mamba_failure_library_does_not_load(monkeypatch):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.startswith("mamba_ssm"):
                raise OSError("libcudart.so.11.0: cannot open shared object file\nsecond line")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    kernel, reason = scan_mamba.find_mamba_kernel("cpu")
    assert kernel is None
    assert reason == "the mamba_ssm library does not load: libcudart.so.11.0: cannot open shared object file"


def test_mamba_failure_probe_call(monkeypatch):
    def kernel(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    install_fake_mamba(monkeypatch, kernel)
    kernel, reason = scan_mamba.find_mamba_kernel("cpu")
    assert kernel is None
    assert reason == "the mamba_ssm probe call failed: no kernel image is available"


def test_mamba_arguments_and_result(monkeypatch):
    """A stand-in kernel with mamba_ssm's signature, on the CPU: the wrapper passes everything through."""
    calls = []

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
               return_last_state=False):
        calls.append(u.dtype)
        args = [x.unflatten(0, (B.shape[1], -1)) if x is not None else None for x in (A, D, delta_bias)]
        rows = (x.mT.unflatten(2, (B.shape[1], -1)) for x in (u, delta))
        maps = (x.permute(0, 3, 1, 2) for x in (B, C))
        line = (Route(1, u.shape[2]),) * B.shape[1]
        y, state = reference_scan(ScanArgs(*rows, args[0], *maps, *args[1:], None, line, delta_softplus))
        y = y.flatten(2).mT
        return (y, state.flatten(1, 2)) if return_last_state else y

    install_fake_mamba(monkeypatch, kernel)
    real = scan_mamba.find_mamba_kernel
    monkeypatch.setattr(scan_mamba, "find_mamba_kernel", lambda: real("cpu"))
    monkeypatch.setattr(selective_scan_module, "choose_backend", lambda *_: ("mamba_ssm", scan_mamba.MAMBA_SSM))
    inputs = random_inputs(dtype=torch.bfloat16)
    y, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    monkeypatch.undo()
    expected = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend="reference")
    assert calls == [torch.float32, torch.float32]  # the probe, then the call
    assert torch.equal(y, expected[0]) and torch.equal(last_state, expected[1])
