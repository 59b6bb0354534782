"""A card that is none: the CUDA kernels of the scan, compiled for the CPU, whose blocks run one after the other."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from models.ops import scan_cuda
from models.ops.scan_cuda import HEADERS, Kind
from utils.extension import cache_root

FOLDER = Path(__file__).parent / "emulator"
COMPILER = shutil.which("c++")


@functools.cache
def compiled(kind: Kind) -> ctypes.CDLL:
    """The emulator for calls of that kind, built once per machine and version of the sources."""
    sources = (*HEADERS, FOLDER / "emulator.h", FOLDER / "scan_emulator.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{FOLDER}", f"-I{HEADERS[0].parent}",
             *(f"-D{name}={value}" for name, value in kind.defines(EmulatedCard.shared_limit).items())]
    name = hashlib.sha256(b"".join(map(Path.read_bytes, sources)) + " ".join(flags).encode()).hexdigest()[:16]
    library = cache_root() / "mtdp_emulator" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run([COMPILER, *flags, sources[-1], "-o", built], check=True)
            built.replace(library)
    return ctypes.CDLL(str(library))


class EmulatedCard:
    """Stands in for `models.ops.scan_cuda.Card`; the number of blocks at once decides how a call is cut."""

    multiprocessors, shared_limit = 2, 160 * 1024

    def __init__(self, kind: Kind, blocks_at_once: int):
        self.kind, self.library, self.blocks_at_once, self.launches = kind, compiled(kind), blocks_at_once, []

    def resident_blocks(self, back: bool, warps: int, shared_bytes: int) -> int:
        assert shared_bytes == warps * self.library.shared_bytes(int(back))
        return self.blocks_at_once

    def launch(self, back: bool, arguments: bytes, blocks: int, warps: int, shared_bytes: int,
               barrier: int | None) -> None:
        assert len(arguments) == self.library.bytes_of_call()
        assert barrier is None or blocks <= self.blocks_at_once
        self.launches.append((back, blocks, warps, barrier is not None))
        status = self.library.emulate(ctypes.c_char_p(arguments), int(back), blocks, warps)
        assert status == 0, ("", "threads wait for others in vain", "written behind shared memory")[status]


def emulate(monkeypatch, blocks_at_once: int = 5) -> dict[Kind, EmulatedCard]:
    """Lets the backend `cuda` run on CPU tensors during a test; returns the cards, one for each kind of call."""
    cards: dict[Kind, EmulatedCard] = {}

    def load_card(kind, device):
        if kind not in cards:
            cards[kind] = EmulatedCard(kind, blocks_at_once)
        return cards[kind]
    monkeypatch.setattr(scan_cuda, "load_card", load_card)
    monkeypatch.setattr(scan_cuda, "find_cuda", lambda device, tokens: None)
    scan_cuda.make_plan.cache_clear()
    return cards
