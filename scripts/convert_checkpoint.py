"""Writes the weights of a checkpoint that the authors of a published system released as a plain file of ours.

    python scripts/convert_checkpoint.py checkpoint.pth.tar invpt_nyud.safetensors

Not needed for `--trained_model`, which takes the original as it is; the new file holds no Python objects and no
optimiser state, and is read by every safetensors reader.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.released import RELEASED, describe, recognise
from scripts.command_line import Command
from utils.durable import atomic_path
from utils.engine.checkpoint import convert_released, read_checkpoint


def convert(source: Path, target: Path) -> None:
    """Writes `target` and says what it holds."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors, the format that is written")
    original = read_checkpoint(source)["model"]
    name = recognise(original)
    if name is None:
        raise ValueError(f"{source} is not a released checkpoint of a known kind ({', '.join(RELEASED)}); "
                         f"its first keys: {', '.join(list(original)[:3])}")
    state, dead = convert_released(original)
    with atomic_path(target) as temporary:
        save_file({key: value.contiguous() for key, value in state.items()}, temporary)
    print(f"{source} holds the released {name} ({describe(original)})\n{target}: {len(state)} tensors; "
          f"left out {len(dead)} without effect: {', '.join(dead) or 'none'}")


main = Command(__doc__, convert, {
    "source": dict(type=Path, metavar="IN", help="released file, e.g. checkpoint.pth.tar"),
    "target": dict(type=Path, metavar="OUT.safetensors", help="file to write"),
})

if __name__ == "__main__":
    sys.exit(main())
