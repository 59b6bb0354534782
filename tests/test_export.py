"""Exported files: what they hold equals PyTorch, they say what they are, and what cannot be exported says why."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.layers import Conv2dSame

from models import load_model
from models.ops.routes import Route, four_routes
from models.ops.scan_args import ScanArgs
from models.ops.scan_reference import reference_scan
from models.ops.scan_standard import standard_scan
from scripts.check_export import ON_SWIN, checkpoint_of
from tests.shared import ROOT
from tests.watched_run import experiment
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import save_checkpoint
from utils.engine.exports import EXPORTS
from utils.engine.exports.job import Deployed, Job, check, example
from utils.engine.exports.open_size import sizes_said
from utils.engine.first_weights import begin
from utils.engine.hub import push_to_hub, save_pretrained
from utils.engine.stored_model import own_config


@pytest.fixture(scope="module")
def fcn(tmp_path_factory):
    """A small FCN's checkpoint."""
    return checkpoint_of("fcn", (64, 96), tmp_path_factory.mktemp("fcn"))


@pytest.fixture(scope="module")
def onnx_file(fcn):
    """The same as ONNX for any number of images of any size."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    [path] = EXPORTS.load("onnx")(Job(own_config(fcn), fcn, "both", fcn.parent / "onnx"))
    return path


def export(format, checkpoint, folder, dynamic="none"):
    return EXPORTS.load(format)(Job(own_config(checkpoint), checkpoint, dynamic, folder))


# ------------------------------------------------------------ scans


@pytest.mark.parametrize("routes, groups", [(four_routes(3, 4) * 2, 2),
                                            ((Route(6, 2, True), Route(6, 2, True, True)), 1)])
def test_the_standard_scan_is_the_reference(routes, groups):
    torch.manual_seed(0)
    K, E, N, P = len(routes), 5, 3, 12
    u, delta, B, C = (torch.randn(2, P, *shape) for shape in ((groups, E), (K, E), (K, N), (K, N)))
    args = ScanArgs(u, delta, -torch.rand(K, E, N), B, C, torch.randn(K, E), torch.randn(K, E), None, routes, True)
    with torch.no_grad():
        for ours, theirs in zip(standard_scan(args), reference_scan(args), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rates", -torch.rand(4, 3, 2))
        self.register_buffer("skip", torch.randn(4, 3))

    def args(self, *maps):
        """Of maps (B, H, W, G, C)."""
        u, delta, B, C = (x.flatten(1, 2) for x in maps)
        return ScanArgs(u, delta, self.rates, B, C, self.skip, None, None, four_routes(*maps[0].shape[1:3]), True)

    def forward(self, *maps):
        return standard_scan(self.args(*maps))


def scan_maps(*size):
    return [torch.randn(1, *size, groups, width) for groups, width in ((2, 3), (4, 3), (4, 2), (4, 2))]


def test_a_scan_over_maps_of_any_size_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.manual_seed(0)
    scan = Scan()
    sides = {1: torch.export.Dim("rows"), 2: torch.export.Dim("columns")}
    with torch.no_grad():
        graph = torch.export.export(scan, tuple(scan_maps(3, 4)), dynamic_shapes=((sides,) * 4,), strict=False)
        program = torch.onnx.export(graph, verbose=False, optimize=False)
    program.save(str(tmp_path / "scan.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "scan.onnx"))
    names = [entry.name for entry in session.get_inputs()]
    for maps in (scan_maps(3, 4), scan_maps(5, 2)):
        found = session.run(None, {name: value.numpy() for name, value in zip(names, maps, strict=True)})
        for ours, theirs in zip(found, reference_scan(scan.args(*maps)), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
    assert "Scan" in {node.op_type for node in program.model.graph}


class Strides(torch.nn.Module):
    """An encoder of two convolutions of stride 2: one map at stride 4."""

    strides = (4,)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(Conv2dSame(3, 3, 3, 2) for _ in range(2)))

    def forward(self, image):
        return [self.layers(image)]


def test_sizes_behind_strides_are_no_floors_of_floors():
    encoder = Strides()
    network, image = torch.nn.Sequential(encoder), torch.rand(1, 3, 44, 52)
    sides = {2: 4 * torch.export.Dim("rows", min=2), 3: 4 * torch.export.Dim("columns", min=2)}
    with sizes_said(network, encoder, 4):
        graph = torch.export.export(network, (image,), dynamic_shapes=(sides,), strict=False)
    sizes = [str(side) for node in graph.graph.nodes for side in getattr(node.meta.get("val"), "shape", ())]
    assert max(size.count("//") for size in sizes) == 1
    torch.testing.assert_close(graph.module()(image), encoder(image))


# ------------------------------------------------------------ files


@pytest.fixture
def photo(tmp_path):
    """A picture of noise; in tmp_path it lies as photo.npy and photo.ppm."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    np.save(tmp_path / "photo.npy", pixels)
    (tmp_path / "photo.ppm").write_bytes(b"P6\n70 50\n255\n" + pixels.tobytes())
    return pixels


@pytest.fixture
def run_onnx(tmp_path, monkeypatch):
    """The script's main function, for words of its command line, in tmp_path."""
    def run(*words):
        from scripts.run_onnx import main
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["run_onnx.py", *map(str, words)])
        main()
    return run


def test_onnx_says_what_it_is_and_predicts_without_this_program(onnx_file, fcn, photo, run_onnx, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "run_onnx.py"), str(onnx_file)]
    done = subprocess.run([*script, "photo.npy", "--output", "npy"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "depth.npy: " in done.stdout and done.stdout.count("\n") == 4
    run_onnx(onnx_file, "photo.ppm", "--output", "ppm")
    expected = load_model(fcn, device="cpu").predict(photo)
    for task in ("semseg", "depth", "normals", "edge"):
        arrays = [np.load(tmp_path / folder / f"{task}.npy") for folder in ("npy", "ppm")]
        np.testing.assert_array_equal(*arrays)
        ours = expected[task].array
        assert arrays[0].shape == ours.shape
        if task == "semseg":
            assert (arrays[0] == ours).mean() > 0.7              # pixels between two classes: scaled in another order
        else:
            assert np.abs(arrays[0] - ours).mean() < 0.1 * np.abs(ours).max()
    run_onnx(onnx_file, "photo.npy", "--image_size", 128, 64)
    depth = np.load(tmp_path / "predictions" / "depth.npy")
    other = load_model(fcn, device="cpu", overrides=["image_size=[128, 64]"]).predict(photo)["depth"].array
    assert np.abs(depth - other).mean() < 0.1 * np.abs(other).max()


@pytest.mark.parametrize("words, said", [
    (("MODEL", "photo.npy", "--image_size", 100, 64), "sides must be multiples of 32, from 64 on"),
    (("MODEL", "none.png"), "no file none.png"),
    (("MODEL", "torn.png"), "torn.png cannot be read as a picture"),
    (("torn.onnx", "photo.npy"), "torn.onnx cannot be loaded by onnxruntime")])
def test_what_run_onnx_cannot_use_is_told(words, said, onnx_file, photo, run_onnx, tmp_path):
    for name in ("torn.onnx", "torn.png"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(SystemExit, match=said):
        run_onnx(*(onnx_file if word == "MODEL" else word for word in words))


def test_torch_export_is_read_without_this_program(fcn, tmp_path):
    [path] = export("torch_export", fcn, tmp_path)
    about = {"about.json": ""}
    loaded = torch.export.load(path, extra_files=about).module()
    with torch.no_grad():
        outputs = loaded(255 * torch.rand(1, 3, 64, 96))
    assert [tuple(output.shape) for output in outputs[:4]] == [(1, n, 64, 96) for n in (1, 1, 3, 1)]
    assert json.loads(about["about.json"])["tasks"]["depth"] == {"classes": [], "unit": "m"}


def test_safetensors_hold_the_experiment_too(fcn, tmp_path):
    paths = export("safetensors", fcn, tmp_path)
    assert [path.name for path in paths] == ["model.safetensors", "config.json", "README.md"]
    with safe_open(paths[0], "pt") as file:
        assert json.loads(file.metadata()["mtdp"])["config"]["model"] == "fcn"
    photo = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ours, theirs = (load_model(source, device="cpu").predict(photo) for source in (tmp_path, fcn))
    for task in ("semseg", "depth"):
        np.testing.assert_array_equal(ours[task].array, theirs[task].array)


def test_adapters_are_merged_into_a_whole_file(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    plain = model_from_config(experiment(tmp_path, tmp_path))
    save_checkpoint(tmp_path / "base.pt", {"model": plain.state_dict(), "step": 1})
    config = experiment(tmp_path, tmp_path, f"lora.base={tmp_path / 'base.pt'}", "lora.rank=2")
    model = model_from_config(config)
    base = begin(model, config, resumed=False)
    for parameter in model.parameters():
        parameter.data += 0.05 if parameter.requires_grad else 0
    save_checkpoint(tmp_path / "lora.pt", {"model": base.left_out(model.state_dict()), "base": base.about(),
                                           "config": config.to_dict(), "step": 1})
    (path, *_) = export("safetensors", tmp_path / "lora.pt", tmp_path / "whole")
    (tmp_path / "base.pt").unlink()
    whole, _ = trained_model(own_config(path), path, torch.device("cpu"))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(whole(image).final.values(), model.eval()(image).final.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_mixture_of_experts_takes_any_number_of_images(tmp_path):
    [path] = export("torch_export", checkpoint_of("mlore", (32, 64), tmp_path), tmp_path / "graph", "batch")
    with torch.no_grad():
        assert torch.export.load(path).module()(255 * torch.rand(5, 3, 32, 64))[0].shape == (5, 1, 32, 64)


def test_a_diffusion_begins_with_the_same_noise_in_onnx(tmp_path, caplog):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    with caplog.at_level("INFO"):
        [path] = export("onnx", checkpoint_of("taskdiffusion", (32, 64), tmp_path), tmp_path / "onnx")
    assert path.is_file() and "100.0000 % of the predictions are the same" in caplog.text


# ------------------------------------------------------------ hub


def test_a_folder_for_the_hub(fcn, tmp_path, monkeypatch):
    save_pretrained(fcn, tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "| depth | m | - |" in card and "No evaluation is stored" in card
    assert "| semseg | class | 40: " in card
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://example.org/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(tmp_path / "hub", "me/net", private=True) == "https://example.org/me/net"
    assert calls[0] == ("me/net", {"private": True, "exist_ok": True}) and calls[1]["repo_id"] == "me/net"
    (tmp_path / "hub" / "README.md").unlink()
    with pytest.raises(ValueError, match=r"holds no README.md: write it with --run_mode export --format safetensors"):
        push_to_hub(tmp_path / "hub", "me/net")


# ------------------------------------------------------------ refusals


def test_what_differs_is_told_and_removed(fcn, tmp_path, caplog):
    job = Job(own_config(fcn), fcn, "none", tmp_path)
    network = Deployed(job.model()[0])
    (tmp_path / "wrong").write_text("")
    with pytest.raises(ValueError, match="differs from PyTorch by .*, more than 1e-04; the file.s. are removed again"):
        check(job, network, lambda image: {name: value + 0.1 for name, value in zip(
            network.names, network(image), strict=True)}, [tmp_path / "wrong"])
    assert not (tmp_path / "wrong").exists()


class Multiples(torch.nn.Module):
    """So many of the image, quickly traced."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, image):
        return tuple(n * image for n in range(self.number))


def test_what_onnxruntime_cannot_load_is_told_and_removed(fcn, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession
    monkeypatch.setattr("utils.engine.exports.onnx_file.traced", lambda job, network: torch.export.export(
        Multiples(len(network.names)), (example(job, 1),)))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, *args, **kwargs: session(b"", *args, **kwargs))
    with pytest.raises(ValueError, match="cannot run what PyTorch wrote of model .*removed again: "):
        export("onnx", fcn, tmp_path)
    assert not any(tmp_path.iterdir())


def refuse(*_, **__):
    raise RuntimeError("\non purpose\nand more")


def test_what_cannot_be_exported_says_why(fcn, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--dynamic says nothing of safetensors"):
        export("safetensors", fcn, tmp_path, "batch")
    with pytest.raises(ValueError, match="--dynamic both leaves the image size open, which only --format onnx can"):
        export("torch_export", fcn, tmp_path, "both")
    with pytest.raises(ValueError, match=r"export: model 'fcn' on 'swin' cannot be traced: RuntimeError: on purpose$"):
        monkeypatch.setattr("torch.export.export", refuse)
        export("torch_export", fcn, tmp_path)


@pytest.mark.parametrize("decoder, overrides, said", [
    ("taskprompter", (), "'vit' does not take images of any size, .* ViT was built for images of 32x64"),
    ("mlore", ON_SWIN, "its routers weigh 8 positions one by one but got a map of 24")])
def test_what_belongs_to_one_size_says_why(decoder, overrides, said, tmp_path):
    checkpoint = checkpoint_of(decoder, (32, 64), tmp_path, *overrides)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    with pytest.raises(ValueError, match=said):
        export("onnx", checkpoint, tmp_path / "graph", "size")
