"""One checkpoint whose weights are the mean of several ("model soup": Wortsman et al., ICML 2022).

    python scripts/average_checkpoints.py runs/bim_nyud/step_{36000,38000,40000}.pt --out runs/bim_nyud/soup.pt

Of each file the moving average is taken where it has one (`--weights last`: never). The files must hold the same model:
the same names and shapes, and the same decoder, backbone, tasks and data. The result has no state of an optimizer: it
is for `--trained_model` and `init_from`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from utils.engine.checkpoint import compare_states, differences, read_checkpoint, save_checkpoint, weights_of
from utils.engine.resume import changed_keys

# What says which function the weights are of.
OF_THE_MODEL = ("model", "backbone", "backbone_kwargs", "neck", "neck_kwargs", "model_kwargs", "image_size",
                "label_size", "task_dictionary", "train_db_name")


def average_checkpoints(files: Sequence[Path], out: Path, weights: str) -> None:
    """Writes the mean; ValueError where there is none."""
    if len(files) < 2:
        raise ValueError("an average needs two checkpoints or more")
    if out.exists():
        raise ValueError(f"{out} is there already; name another --out, or remove it")
    first = read_checkpoint(files[0])
    own = weights_of(first, ema=weights == "ema")
    sums = {key: value.double() for key, value in own.items() if value.is_floating_point()}
    for path in files[1:]:                                     # one file at a time in memory
        checkpoint = read_checkpoint(path)
        state = weights_of(checkpoint, ema=weights == "ema")
        _require_same_model(files[0], first, own, path, checkpoint, state)
        for key, value in sums.items():
            value += state[key]
    mean = own | {key: (value / len(files)).to(own[key].dtype) for key, value in sums.items()}
    config = {"config": first["config"]} if "config" in first else {}
    save_checkpoint(out, {"model": mean, "averaged": [str(path) for path in files], **config})
    print(f"{out}: the mean of {len(files)} checkpoints, {len(mean)} tensors")


def _require_same_model(first_path: Path, first: Mapping, own: Mapping, path: Path, checkpoint: Mapping,
                        state: Mapping) -> None:
    if any(found := compare_states(own, state)):
        raise ValueError(f"{path} holds another model than {first_path}: {differences(*found)}")
    before, after = ({key: one.get("config", {}).get(key) for key in OF_THE_MODEL} for one in (first, checkpoint))
    if changed := changed_keys(after, before):
        raise ValueError(f"{path} holds another model than {first_path}: "
                         + "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items()))
    for key, value in state.items():
        if not value.is_floating_point() and "num_batches_tracked" not in key and not torch.equal(value, own[key]):
            raise ValueError(f"{path} and {first_path} differ in {key}, whose whole numbers have no mean")


main = Command(__doc__, average_checkpoints, {
    "files": dict(nargs="+", type=Path, metavar="CKPT"),
    "--out": dict(type=Path, required=True, metavar="FILE", help="the checkpoint to write"),
    "--weights": dict(choices=("ema", "last"), default="ema", help="ema: the moving average where there is one"),
})

if __name__ == "__main__":
    sys.exit(main())
