"""PNG files: whether they are whole, and their pixels by kornia-rs where it is installed, in a third of Pillow's time.

Pillow looks at no checksum of the pixels: of damaged files it reads some without a word, and as another picture. Both
ways of reading refuse them.
"""

import functools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2                        # types of colour
NOT_PLAIN = (b"acTL", b"tRNS")          # chunks of animations and of transparent colours
MOST_PIXELS = 100_000_000               # of a picture that is decoded here


def png_content(path: Path) -> bytes | None:
    """What a PNG file holds; None: it is none."""
    with path.open("rb") as file:
        start = file.read(len(SIGNATURE))
        return start + file.read() if start == SIGNATURE else None


def decode(content: bytes) -> np.ndarray | None:
    """Pixels of a plain file, H x W or H x W x 3 uint8, as Pillow gives them; None: Pillow is to decode it.

    Plain: grey or RGB of 8 bits, not interlaced, without transparent colour. A damaged file is a ValueError.
    """
    head = content[:content.find(b"IDAT")]
    plain = head[12:16] == b"IHDR" and len(head) >= 33 and not any(chunk in head for chunk in NOT_PLAIN)
    width, height, bits, colour, *_, interlaced = struct.unpack(">IIBBBBB", head[16:29]) if plain else [0] * 7
    fast = fast_decoder()
    if not plain or (bits, interlaced) != (8, 0) or colour not in (GREY, RGB) or fast is None or not (
            0 < width * height <= MOST_PIXELS):
        return None
    try:
        pixels = fast(content, (height, width), "rgb" if colour == RGB else "mono")
    except Exception as error:          # it raises nothing more special
        raise ValueError(str(error)) from error
    return pixels if colour == RGB else pixels[..., 0]


@functools.cache
def fast_decoder() -> Callable[[bytes, tuple[int, int], str], np.ndarray] | None:
    """Of 8 bits, that of kornia-rs; None where it is not installed."""
    try:
        from kornia_rs import io
    except ImportError:
        return None
    return io.decode_image_png_u8


def decoder_in_words() -> str:
    """What decodes plain files here, for the log."""
    return "kornia-rs" if fast_decoder() else "Pillow (kornia-rs, which takes a third of its time, is not installed)"


def check_whole(content: bytes) -> None:
    """ValueError where the file ends too early, or a chunk that its pixels need is not what its checksum says."""
    view, start, kind = memoryview(content), len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(content[start:start + 4], "big"), content[start + 4:start + 8]
        end = start + 8 + length
        if len(kind) < 4 or len(content) < end:
            raise ValueError("unexpected end of file")
        stored = int.from_bytes(content[end:end + 4], "big")
        if kind[:1].isupper() and kind != b"IEND" and zlib.crc32(view[start + 4:end]) != stored:
            raise ValueError(f"chunk {kind.decode('ascii', 'replace')} is not what its checksum says")
        start = end + 4
