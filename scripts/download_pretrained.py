"""Fetches the ImageNet weights of a backbone once, so that training can run where there is no network.

    python scripts/download_pretrained.py swin_large [--out pretrained_ckpts]

The file is named <timm tag>.safetensors, the name under which `pretrained: true` looks for it.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.backbones import BACKBONES  # noqa: E402
from utils.engine.checkpoint import atomic_path, download_weights  # noqa: E402


def download(name: str, out_dir: Path) -> Path:
    """Saves the weights of a backbone name or timm tag under `out_dir`; returns the file, kept if there."""
    entry = BACKBONES[BACKBONES.find(name)] if name in (*BACKBONES, *BACKBONES.aliases) else None
    tag = entry.pretrained_tag if entry else name
    if tag is None and entry.pretrained_file:
        home = BACKBONES.load(name).pretrained_home
        raise ValueError(f"fetch {entry.pretrained_file} from {home} and put it in {out_dir}")
    if tag is None:
        raise ValueError(f"backbone '{name}' has no ImageNet weights: its sizes come from the configuration")
    path = out_dir / f"{tag}.safetensors"
    if path.is_file():
        return path
    state = {key: value.contiguous() for key, value in download_weights(tag).items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)
    return path


def main() -> int:
    """Command line; 0 on success, 1 with one sentence on failure."""
    named = [name for name, entry in BACKBONES.items() if entry.pretrained_tag]
    parser = argparse.ArgumentParser(description="Download the ImageNet weights of a backbone.")
    parser.add_argument("name", help=f"one of {', '.join(named)}, or any timm model name with its weight tag")
    parser.add_argument("--out", type=Path, default=ROOT / "pretrained_ckpts", help="folder for the file")
    arguments = parser.parse_args()
    try:
        path = download(arguments.name, arguments.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
