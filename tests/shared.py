"""Where the reference numbers live: `../shared` beside the checkout, or the folder named by SHARED_DIR."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


def golden(name: str) -> Path:
    """Folder of one family of reference numbers; skips the calling test where it is absent."""
    path = SHARED / "golden" / name
    if not path.is_dir():
        pytest.skip(f"reference numbers not found: {path} (set SHARED_DIR to the folder that holds golden/)")
    return path


def real_data() -> Path:
    """Folder of the real RGB-D capture; skips the calling test where it is absent."""
    path = SHARED / "real"
    if not path.is_dir():
        pytest.skip(f"real capture not found: {path} (set SHARED_DIR to the folder that holds real/)")
    return path
