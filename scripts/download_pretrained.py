"""Fetches the ImageNet weights of a backbone once, so that training can run where there is no network.

    python scripts/download_pretrained.py swin_large [--out pretrained_ckpts] [--check]

The file is named <timm tag>.safetensors, the name under which `pretrained: true` looks for it; the authors' own file is
taken, too, where it is there already. --check builds the backbone and loads the file, layer by layer.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.backbones import BACKBONES
from models.build import build_backbone
from scripts.command_line import Command
from utils.durable import atomic_path
from utils.engine.pretrained import PRETRAINED_DIR, download_weights, load_pretrained, with_tag
from utils.logging import setup_logging

CHECK_SIZE = (384, 384)         # of images; weights of any backbone here fit it


def download(name: str, out_dir: Path) -> Path:
    """Saves the weights of a backbone name or timm tag under `out_dir`; returns the file, kept if there."""
    entry = BACKBONES[BACKBONES.find(name)] if name in (*BACKBONES, *BACKBONES.aliases) or ":" in name else None
    tag = with_tag(entry.pretrained_tag or "") if entry else name
    if not tag and entry.pretrained_file:
        if (out_dir / entry.pretrained_file).is_file():
            return out_dir / entry.pretrained_file
        home = BACKBONES.load(name).pretrained_home
        raise ValueError(f"fetch {entry.pretrained_file} from {home} and put it in {out_dir}")
    if not tag:
        raise ValueError(f"backbone '{name}' has no ImageNet weights: its sizes come from the configuration")
    path = out_dir / f"{tag}.safetensors"
    for there in (path, out_dir / entry.pretrained_file if entry and entry.pretrained_file else path):
        if there.is_file():
            return there
    state = {key: value.contiguous() for key, value in download_weights(tag).items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)
    return path


def fetch(name: str, out: Path, check: bool) -> None:
    """Downloads, and says what is there now; with `check` also whether it fits its backbone, a ValueError if not."""
    path = download(name, out)
    print(f"{path} ({path.stat().st_size:,} bytes)")
    if check:
        setup_logging(True)                     # which prints how many layers were loaded
        known = name in (*BACKBONES, *BACKBONES.aliases) or ":" in name
        load_pretrained(build_backbone(name if known else f"timm:{name}", CHECK_SIZE), path)


NAMED = ", ".join(name for name, entry in BACKBONES.items() if entry.pretrained_tag)
main = Command(__doc__, fetch, {
    "name": dict(help=f"one of {NAMED}, or any timm model name with its weight tag"),
    "--out": dict(type=Path, default=PRETRAINED_DIR, help="folder for the file"),
    "--check": dict(action="store_true", help="also load the file into its backbone"),
})

if __name__ == "__main__":
    sys.exit(main())
