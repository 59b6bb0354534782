"""Options of the training step: they change its cost, not what it computes."""

import copy
import dataclasses

import pytest
import torch

from models.blocks.recompute import recompute_blocks
from models.decoders import DECODERS
from tests.conftest import TINY
from utils.batches import batches_on
from utils.engine.build import build_criterion, model_from_config, prepare_for_training
from utils.engine.config import load_config
from utils.engine.run import build_optimizer
from utils.engine.train import train
from utils.precision import set_float32_arithmetic

SIZE = (64, 96)

def tiny_config(*overrides):
    return load_config("configs/bim_nyud.yml", [*TINY, "model_kwargs.drop_path_rate=0.3", *overrides])


def losses_and_gradients(config, steps=2):
    """Of some updates from the same seed, and the running statistics behind them."""
    torch.manual_seed(0)
    model = model_from_config(config)
    prepare_for_training(model, config)
    criterion, results = build_criterion(config, model), []
    optimizer = build_optimizer(config, model, criterion)
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(2, 3, *SIZE, generator=generator)}
    for task in config.tasks:
        channels = 3 if task == "normals" else 1
        batch[task] = torch.randint(0, 2, (2, channels, *SIZE), generator=generator).float()
    model.train()
    for step in range(steps):
        torch.manual_seed(step)  # of drop path
        out = model(batch["image"], batch)
        total = criterion(out.final, batch, out.intermediate, out.extra)["total"]
        total.backward()
        results += [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return results, model.state_dict()


def assert_same(plain, other, exact=True):
    (values, state), (other_values, other_state) = plain, other
    assert list(state) == list(other_state)
    for a, b in zip((*values, *state.values()), (*other_values, *other_state.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("parts", ["backbone", "decoder", "all"])
def test_activation_checkpointing_changes_no_number(parts):
    """Also the drop paths, which are drawn again, and the running statistics of batch norms."""
    assert_same(losses_and_gradients(tiny_config()),
                losses_and_gradients(tiny_config(f"activation_checkpointing={parts}")))


def test_activation_checkpointing_keeps_less():
    kept = []
    for parts in ("none", "all"):
        config = tiny_config(f"activation_checkpointing={parts}")
        model = model_from_config(config).train()
        prepare_for_training(model, config)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
            model(torch.randn(2, 3, *SIZE))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.7 * kept[0]


def test_batch_norms_inside_recomputed_blocks_count_once():
    class Part(torch.nn.Module):
        recomputed = (torch.nn.Sequential,)

        def __init__(self):
            super().__init__()
            self.block = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))

    plain, recomputed = Part().train(), Part().train()
    recomputed.load_state_dict(plain.state_dict())
    assert recompute_blocks(recomputed) == 1 and list(recomputed.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 5, 5)
    for part in (plain, recomputed):
        torch.manual_seed(0)
        part.block(x).square().sum().backward()
    assert recomputed.block[1].num_batches_tracked == 1 and recomputed.block[1].momentum == 0.1
    for a, b in zip(plain.state_dict().values(), recomputed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.block[0].weight.grad, recomputed.block[0].weight.grad)


def test_a_model_without_blocks_says_so():
    config = tiny_config("model=fcn", "model_kwargs={}", "activation_checkpointing=decoder")
    with pytest.raises(ValueError, match="model 'fcn' on backbone 'swin' names no blocks for it; set it to none"):
        prepare_for_training(model_from_config(config), config)


@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"fcn", "multi_scale"}))
def test_every_larger_decoder_names_its_blocks(name):
    assert DECODERS.load(name).recomputed


def test_methods_can_be_recomputed():
    class Part(torch.nn.Linear):
        recomputed = ("twice",)

        def twice(self, x):
            calls.append(1)
            return self(torch.relu(self(x)))

    calls, part = [], Part(3, 3).train()
    expected = torch.autograd.grad(part.twice(torch.ones(2, 3)).sum(), part.weight)[0]
    assert recompute_blocks(part) == 1 and len(calls) == 1
    assert torch.equal(torch.autograd.grad(part.twice(torch.ones(2, 3)).sum(), part.weight)[0], expected)
    assert len(calls) == 3


def test_a_copy_recomputes_with_its_own_weights():
    """As `AveragedModel` copies the model. The weights of the original must not be reached through the copy."""
    class Part(torch.nn.Module):
        recomputed = (torch.nn.Linear, "double")

        def __init__(self):
            super().__init__()
            self.block = torch.nn.Linear(3, 3)

        def double(self, x):
            return 2 * self.block(x)

    part = Part().train()
    assert recompute_blocks(part) == 2 and type(part.block) is torch.nn.Linear
    other = copy.deepcopy(part)
    with torch.no_grad():
        other.block.weight.fill_(1), other.block.bias.zero_()
    out = other.double(torch.ones(2, 3))
    assert torch.equal(out, torch.full((2, 3), 6.0))
    out.sum().backward()
    assert part.block.weight.grad is None and other.block.weight.grad is not None


def test_channels_last_changes_no_number():
    plain, last = (losses_and_gradients(tiny_config(f"channels_last={value}")) for value in ("false", "true"))
    assert_same(plain, last, exact=False)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_compiles_without_a_graph_break(part):
    torch._dynamo.reset()
    model = model_from_config(tiny_config("scan_backend=torch")).eval()
    image = torch.randn(1, 3, *SIZE)
    given = image if part == "encoder" else model.encoder(image)
    compiled = torch.compile(getattr(model, part), fullgraph=True, backend="aot_eager")
    expected, found = getattr(model, part)(given), compiled(given)
    pairs = zip(expected, found, strict=True) if part == "encoder" else (
        (expected.feats[task], found.feats[task]) for task in expected.feats)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_trains_and_keeps_the_names_of_the_weights(tiny, monkeypatch):
    """Without compiling: that takes minutes. The test above sees that it can be done."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__)
                        or setattr(self, "_compiled_call_impl", self._call_impl))
    config = load_config("configs/bim_nyud.yml", [*tiny, "compile=true", "max_iter=2", "val_interval=2"])
    results = train(config, resume=False)
    assert compiled == ["SwinBackbone", "BIMDecoder"] and results
    keys = torch.load(config.run_dir / "last.pt", weights_only=False)["model"].keys()
    assert not any("_orig_mod" in key for key in keys)


def test_batches_arrive_in_order():
    batches = [{"image": torch.full((1,), float(i)), "meta": [i]} for i in range(3)]
    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    for device in devices:
        found = list(batches_on(device, batches))
        assert [(b["image"].item(), b["meta"]) for b in found] == [(i, [i]) for i in range(3)]
        assert all(b["image"].device == device for b in found)


def test_fp32_is_float32_in_convolutions_too():
    try:
        for precision, rounded in (("tf32", True), ("fp32", False), ("bf16", True)):
            set_float32_arithmetic(precision)
            assert torch.backends.cudnn.allow_tf32 is rounded
            assert torch.get_float32_matmul_precision() == ("high" if rounded else "highest")
    finally:
        set_float32_arithmetic("fp32")


def test_options_are_what_the_file_says():
    config = tiny_config("compile=true", "channels_last=true", "activation_checkpointing=decoder", "precision=tf32")
    assert dataclasses.asdict(config).items() >= {"compile": True, "channels_last": True, "precision": "tf32"}.items()
    with pytest.raises(ValueError, match="activation_checkpointing"):
        tiny_config("activation_checkpointing=some")


def test_heads_stay_in_float32_under_autocast():
    model, seen = model_from_config(tiny_config()).eval(), []
    for head in model.heads.values():
        head.register_forward_hook(lambda module, given, out: seen.append((given[0].dtype, out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        final = model(torch.randn(1, 3, *SIZE)).final
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(logits.dtype == torch.float32 for logits in final.values())
