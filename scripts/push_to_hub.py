"""Uploads a folder of `--run_mode export --format safetensors` to the Hugging Face Hub.

    python scripts/push_to_hub.py runs/bim_nyud/export OWNER/NAME

Log in first (`hf auth login`), and say in the folder's README.md under which licence the weights are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from utils.engine.hub import push_to_hub


def push(folder: Path, name: str, private: bool) -> None:
    """Uploads and prints the address."""
    print(push_to_hub(folder, name, private))


main = Command(__doc__, push, {
    "folder": dict(type=Path), "name": dict(metavar="OWNER/NAME"),
    "--private": dict(action="store_true", help="make a private repository where there is none"),
})

if __name__ == "__main__":
    sys.exit(main())
