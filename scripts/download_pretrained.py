"""Fetches the ImageNet weights of a backbone once, so that training can run where there is no network.

    python scripts/download_pretrained.py swin_large [--out pretrained_ckpts]

The file is named <timm tag>.safetensors, the name under which `pretrained: true` looks for it.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.backbones import BACKBONES
from scripts.command_line import Command
from utils.engine.checkpoint import atomic_path
from utils.engine.pretrained import PRETRAINED_DIR, download_weights, with_tag


def download(name: str, out_dir: Path) -> Path:
    """Saves the weights of a backbone name or timm tag under `out_dir`; returns the file, kept if there."""
    entry = BACKBONES[BACKBONES.find(name)] if name in (*BACKBONES, *BACKBONES.aliases) or ":" in name else None
    tag = with_tag(entry.pretrained_tag or "") if entry else name
    if not tag and entry.pretrained_file:
        home = BACKBONES.load(name).pretrained_home
        raise ValueError(f"fetch {entry.pretrained_file} from {home} and put it in {out_dir}")
    if not tag:
        raise ValueError(f"backbone '{name}' has no ImageNet weights: its sizes come from the configuration")
    path = out_dir / f"{tag}.safetensors"
    if path.is_file():
        return path
    state = {key: value.contiguous() for key, value in download_weights(tag).items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)
    return path


def fetch(name: str, out: Path) -> None:
    """Downloads, and says what is there now."""
    path = download(name, out)
    print(f"{path} ({path.stat().st_size:,} bytes)")


NAMED = ", ".join(name for name, entry in BACKBONES.items() if entry.pretrained_tag)
main = Command(__doc__, fetch, {
    "name": dict(help=f"one of {NAMED}, or any timm model name with its weight tag"),
    "--out": dict(type=Path, default=PRETRAINED_DIR, help="folder for the file"),
})

if __name__ == "__main__":
    sys.exit(main())
