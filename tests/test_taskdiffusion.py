"""TaskDiffusion: reference numbers, noise that repeats, codes by hand, training, folding, what does not fit."""

import math

import pytest
import torch
from torch import nn

from models.blocks.diffusion import log_snr, signal_and_noise
from models.blocks.label_codes import ClassCode, LabelCodes, ValueCode
from models.build import build_model
from scripts.check_parity import main as check_parity
from tests.shared import ROOT, golden
from tests.test_train import rows
from utils.engine.config import load_config
from utils.engine.predict import infer
from utils.engine.train import train

NYUD, MLORE_PASCAL = (str(ROOT / "configs" / f"taskdiffusion_{name}.yml") for name in ("nyud", "mlore_pascal"))
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
TASKS = {"semseg": 5, "depth": 1, "sal": 2, "edge": 1}
EXPERTS = {"experts": True, "topk": 2, "rank_list": (1, 2, 3), "spe_rank": 2}
SMALL = ["backbone=vit", "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2, patch_size: 8, taps: [2, 4]}",
         "boundary_infer=off", "max_iter=4", "val_interval=4"]


def build(tasks=TASKS, **options):
    """A small model in eval mode whose norms are not the identity, in float64."""
    torch.manual_seed(0)
    model = build_model("taskdiffusion", "vit", tasks, (32, 48), backbone_kwargs=VIT,
                        model_kwargs={"final_embed_dim": 8, **options})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.double().eval()


def labels_like(tasks=TASKS, batch=2):
    return {task: torch.randint(0, 2, (batch, 1, 32, 48)).float() for task in tasks}


@pytest.mark.parametrize("dtype, only, count", [("float64", "_small/", 10), ("float32", "nyud_small/", 4),
                                                ("float64", "pascal_vitBp16", 1)])
def test_everything_agrees_with_the_original(dtype, only, count, capsys):
    code = check_parity(["--golden", str(golden("taskdiffusion")), "--dtype", dtype, "--only", only])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    assert f"{count} passed, 0 failed, 0 not covered" in out


# ------------------------------------------------------------ noise


def test_the_schedule():
    """Values of the paper's sampler with three steps; the floor holds the log-SNR near time 0."""
    ratios = log_snr(torch.tensor([1, 2 / 3, 1 / 3, 0.0], dtype=torch.float64))
    assert ratios.tolist() == pytest.approx([-18.90431, -1.098854, 1.097766, -math.log(1e-5)], abs=1e-5)
    alpha, sigma = signal_and_noise(ratios)
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(4, dtype=torch.float64))
    assert log_snr(torch.tensor([1.0])).item() == ratios[0].item(), "in float64 whatever comes in"


@pytest.mark.parametrize("options", [{}, {"randsteps": 2}, EXPERTS])
def test_a_result_repeats_and_does_not_depend_on_the_batch(options):
    model, images = build(**options), torch.randn(3, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        first, again, alone = model(images).final, model(images).final, model(images[1:2]).final
    for task in TASKS:
        assert torch.equal(first[task], again[task])
        assert torch.allclose(first[task][1:2], alone[task], rtol=1e-10, atol=1e-12)


def test_training_draws_times_and_noise():
    model, image, labels = build().train(), torch.randn(2, 3, 32, 48, dtype=torch.float64), labels_like()
    torch.manual_seed(1)
    first = model(image, labels).final["depth"]
    torch.manual_seed(1)
    assert torch.equal(first, model(image, labels).final["depth"])
    assert not torch.equal(first, model(image, labels).final["depth"])


# ------------------------------------------------------------ codes


def test_the_code_of_classes_is_that_of_the_cell_s_corner():
    code, label = ClassCode(3, 2), torch.full((1, 1, 8, 8), 2.0)
    label[0, 0, 0, 0], label[0, 0, 0, 4] = 1, 255
    got = code.of_label(label, (2, 2))
    for y, x, row in ((0, 0, 1), (0, 1, 3), (1, 0, 2), (1, 1, 2)):
        assert torch.equal(got[0, :, y, x], code.weight[row])


@pytest.mark.parametrize("masked, void_as, mean, share", [
    (True, None, 4.0, 0.25), (False, None, (4 * 3 + 255) / 4, 0.25), (False, 0.0, 3.0, 0.0), (True, 0.0, 4.0, 0.25)])
def test_the_code_of_values_with_void_pixels(masked, void_as, mean, share):
    """A cell whose four middle pixels are 4, 4, 4 and void."""
    code, label = ValueCode(1, 3, masked, void_as), torch.full((1, 1, 4, 4), 4.0)
    label[0, 0, 1, 1] = 255
    want = share * code.void + (1 - share) * (code.weight[:, 0, 0, 0] * mean + code.bias)
    assert torch.allclose(code.of_label(label, (1, 1))[0, :, 0, 0], want, rtol=1e-5)


def test_the_code_of_a_label_that_is_void_everywhere_is_finite():
    codes = LabelCodes(TASKS, 8, 0.01, masked=True)
    latent = codes.of_labels({task: torch.full((1, 1, 16, 16), 255.0) for task in TASKS}, (2, 2))
    assert latent.shape == (1, 10, 2, 2) and latent.isfinite().all() and latent.abs().max() <= 0.01


def test_a_task_that_is_named_apart_is_coded_like_its_kind():
    tasks = {"semseg": 5, "semseg@street": 3, "sal": 2, "sal@people": 2}
    codes = LabelCodes(tasks, 8, 0.01, masked=True)
    assert {task: code.num_embeddings for task, code in codes.codes.items()} == {
        task: number + 1 for task, number in tasks.items()}
    latent = codes.of_labels({task: torch.zeros(1, 1, 16, 16) for task in tasks}, (2, 2))
    assert latent.shape == (1, 12, 2, 2)        # two of saliency beside what is mixed


def test_saliency_is_coded_from_a_high_probability_on_and_beside_the_others():
    codes, logits = LabelCodes({"depth": 1, "sal": 2}, 8, 0.01, masked=False), torch.zeros(1, 2, 1, 2)
    logits[0, 1] = torch.tensor([math.log(0.84 / 0.16), math.log(0.86 / 0.14)])
    latent = codes.of_predictions({"depth": torch.tensor([[[[-3.0, 100.0]]]]), "sal": logits})
    table = codes.squashed(codes.codes["sal"].weight)
    assert torch.allclose(latent[0, :2, 0], table[:2].T)
    depths = codes.mix(codes.codes["depth"](torch.tensor([[[[0.0, 80.0]]]])))
    assert torch.allclose(latent[0, 2:], codes.squashed(depths)[0])
    assert codes.bounded({"depth": torch.tensor([-1.0, 90.0]), "sal": logits})["depth"].tolist() == [0, 80]


# ------------------------------------------------------------ training, inference, refusals


@pytest.mark.parametrize("config_file, options", [
    (NYUD, "{final_embed_dim: 8}"),
    (MLORE_PASCAL, "{final_embed_dim: 8, experts: true, topk: 2, rank_list: [1, 2, 3], spe_rank: 2}")])
def test_a_small_one_trains_and_is_evaluated_like_infer(tiny, config_file, options):
    config = load_config(config_file, [*tiny, *SMALL, f"model_kwargs={options}"])
    results = train(config, resume=False)
    first, *_ = rows(config.run_dir, "train")
    weights, preliminary = config.loss_kwargs.loss_weights, config.loss_kwargs.intermediate_weight
    total = sum(weights[task] * (first[f"loss/{task}"] + preliminary * first[f"loss/inter/{task}"])
                for task in config.tasks) + first.get("loss/load_balancing", 0)
    assert first["loss/total"] == pytest.approx(total, rel=1e-5)
    again = infer(config, config.run_dir / "last.pt", config.run_dir / "infer")
    for task in config.tasks:
        assert results[task] == pytest.approx(again[task], rel=1e-4)


@pytest.mark.parametrize("options", [{}, EXPERTS])
def test_every_parameter_is_trained(options):
    model, labels = build(**options).train(), labels_like()
    labels["edge"][..., 7:9] = 255
    out = model(torch.randn(2, 3, 32, 48, dtype=torch.float64), labels)
    sum(part.square().mean() for group in out for part in group.values()).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_experts_fold():
    model, image = build(**EXPERTS), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        want, got = model(image).final, model.prepare_for_inference()(image).final
    assert model.decoder.features[0].first.folded is not None
    assert all(torch.allclose(got[task], want[task], rtol=1e-9, atol=1e-11) for task in TASKS)


def test_training_without_labels_says_what_is_missing():
    with pytest.raises(ValueError, match=r"in training mode call model\(image, labels\)"):
        build().train()(torch.randn(1, 3, 32, 48, dtype=torch.float64))


@pytest.mark.parametrize("tasks, message", [
    ({"semseg": 5, "boxes": 3}, "no code for the labels of task 'boxes'; it codes: semseg, depth"),
    ({"sal": 2}, "needs a task whose code is mixed with others; got only sal")])
def test_tasks_that_cannot_be_coded(tasks, message):
    with pytest.raises(ValueError, match=message):
        build(tasks)
