"""What many tests use. The reference numbers live in `../shared` beside the checkout, or where SHARED_DIR says."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

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


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Two models hold the same, key by key and bit for bit."""
    own, others = model.state_dict(), other.state_dict()
    assert own.keys() == others.keys()
    assert [key for key, value in own.items() if not torch.equal(value, others[key])] == []
