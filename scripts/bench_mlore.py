"""What the fused experts, the folding and the head on the small grid are worth: one table of a whole MLoRE.

    python scripts/bench_mlore.py --config_exp configs/backbones/mlore_nyud_vit_base.yml [--repeats 5] [key=value ...]

Every row computes the same function of one image with the same random weights and differs from the row above in one
thing; gains are over that row. Times are medians in float32; the forms take turns, so that other programs slow all of
them alike, and processor time (of all threads) leaves out the waiting for them: on a shared CPU it is what to compare.
The difference is the largest one of any output from the first row's, in float64, relative to the largest entry.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.blocks.mlore import LowRankExperts, UpsampledConv
from models.decoders.mlore import MLoREDecoder
from models.model import MultiTaskModel
from scripts.command_line import Command
from scripts.measuring import medians, seconds
from utils.distributed import pick_device
from utils.engine.build import model_from_config
from utils.engine.config import Config, load_config


def _use(model: MultiTaskModel, kind: type[nn.Module], name: str | None = None) -> None:
    """From now on modules of this kind compute what their method of this name does; None: their forward again."""
    for module in model.modules():
        if isinstance(module, kind):
            module.__dict__.pop("forward", None)
            if name:
                module.forward = getattr(module, name)


def _as_defined(model: MultiTaskModel) -> None:
    model.train().eval()                                        # training mode drops folded kernels
    _use(model, LowRankExperts, "plain")
    _use(model, UpsampledConv, "plain")


# Name -> what changes the form of the row above into this one.
FORMS: dict[str, Callable[[MultiTaskModel], object]] = {
    "expert by expert, heads on the enlarged map": _as_defined,
    "the same, heads on the small grid": lambda model: _use(model, UpsampledConv),
    "experts fused": lambda model: _use(model, LowRankExperts),
    "folded (infer, predict)": MultiTaskModel.prepare_for_inference,
}


@torch.inference_mode()
def measure(config: Config, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and processor seconds of a forward pass of one image; the first round is not counted."""
    device = pick_device(config.device)
    model = random_model(config).to(device)
    image = torch.randn(1, 3, *config.input_size, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in range(repeats + 1):
        for name, change in FORMS.items():
            change(model)
            times[name].append(seconds(lambda: model(image), device))
    return {name: medians(values[1:]) for name, values in times.items()}


@torch.inference_mode()
def differences(config: Config) -> dict[str, float]:
    """Largest difference from the first form, relative, in float64."""
    model = random_model(config).double()
    image = torch.randn(1, 3, *config.input_size, dtype=torch.float64)
    found, first = {}, {}
    for name, change in FORMS.items():
        change(model)
        out = model(image).final
        first = first or out
        found[name] = max(((out[task] - want).abs().max() / want.abs().max()).item() for task, want in first.items())
    return found


def random_model(config: Config) -> MultiTaskModel:
    """The configured model; its norms are made different from the identity, which a folding could lose unseen."""
    torch.manual_seed(0)
    model = model_from_config(config)
    if not isinstance(model.decoder, MLoREDecoder):
        raise ValueError(f"model '{config.model}' is not an MLoRE; give e.g. configs/mlore_nyud.yml")
    for norm in model.decoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (norm.bias, norm.running_mean):
                nn.init.normal_(values, std=0.2)
    return model.eval()


def show(config_exp: str, repeats: int, overrides: list[str]) -> None:
    """Prints the table."""
    config = load_config(config_exp, overrides)
    times, errors = measure(config, repeats), differences(config)
    height, width = config.input_size
    print(f"{' '.join((config_exp, *overrides))}: one image of {height} x {width}, "
          f"{torch.get_num_threads()} thread(s), median of {repeats}")
    print(f"{'form':<46}{'ms':>8}{'gain':>7}{'CPU ms':>9}{'gain':>7}{'difference':>12}")
    above = next(iter(times.values()))
    for name, (wall, processor) in times.items():
        print(f"{name:<46}{wall * 1e3:>8.0f}{above[0] / wall:>7.2f}{processor * 1e3:>9.0f}"
              f"{above[1] / processor:>7.2f}{errors[name]:>12.1e}")
        above = wall, processor


main = Command(__doc__, show, {
    "--config_exp": dict(required=True, metavar="YAML"),
    "--repeats": dict(type=int, default=5),
    "overrides": dict(nargs="*", metavar="key=value"),
})

if __name__ == "__main__":
    sys.exit(main())
