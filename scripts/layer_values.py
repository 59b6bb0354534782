"""The layers of trained networks with the largest numbers: where they grow before one is not finite any more.

    python scripts/layer_values.py runs/bim_nyud/step_{1000,5000,20000}.pt [--images 16] [--layers 20]

The first images of the validation split run through each network as in an evaluation. One row per layer, the largest
magnitude that it puts out in each checkpoint; sorted by the last.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.measuring import markdown
from utils.batches import to_device
from utils.distributed import pick_device
from utils.engine.build import build_split, loaded_model
from utils.engine.layer_values import largest_values
from utils.engine.stored_model import own_config
from utils.precision import autocast


def layer_values(files: Sequence[Path], images: int, layers: int) -> None:
    """Prints the table."""
    columns = {f"{path.parent.name}/{path.stem}": values_of(path, images) for path in files}
    last = list(columns.values())[-1]
    rows = [{"layer": name, **{of: f"{values.get(name, float('nan')):.3g}" for of, values in columns.items()}}
            for name in sorted(last, key=lambda name: (last[name] == last[name], -last[name]))[:layers]]
    print(markdown(rows))


def values_of(path: Path, images: int) -> dict[str, float]:
    """`largest_values` of a checkpoint's network."""
    config = own_config(path)
    device = pick_device(config.device)
    model = loaded_model(config, path)[0].to(device).eval()
    split = build_split(config, "val")

    def look() -> None:
        for index in range(min(images, len(split))):
            with autocast(device, config.precision):
                model(to_device(torch.as_tensor(split[index]["image"])[None], device))

    return largest_values(model, look)


main = Command(__doc__, layer_values, {
    "files": {"nargs": "+", "type": Path, "help": "checkpoints of one network"},
    "--images": {"type": int, "default": 16},
    "--layers": {"type": int, "default": 20, "help": "rows of the table"},
})

if __name__ == "__main__":
    sys.exit(main())
