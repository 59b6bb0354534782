"""PNG files: the same pixels from both decoders, and the same damaged files refused by both."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from utils import png
from utils.files import read_indices, read_rgb, read_uint8

RNG = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("decoder", ["Pillow", "kornia-rs"])
SMOOTH = np.add.outer(np.arange(90), np.arange(70)).astype(np.uint8)
PICTURES = {"grey": SMOOTH, "noise": RNG.integers(0, 256, (31, 33, 3), np.uint8),
            "classes": np.kron(RNG.integers(0, 40, (9, 7), np.uint8), np.ones((8, 8), np.uint8)),
            "colours": np.stack((SMOOTH, SMOOTH.T.reshape(SMOOTH.shape), SMOOTH[::-1]), -1),
            "pixel": np.array([[7]], np.uint8), "line": SMOOTH[:1]}


@pytest.fixture
def use(monkeypatch):
    """A function that chooses the decoder of plain files."""
    def choose(decoder: str) -> None:
        if decoder == "Pillow":
            monkeypatch.setattr(png, "fast_decoder", lambda: None)
        elif png.fast_decoder() is None:
            pytest.skip("kornia-rs is not installed")
    return choose


def content_of(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@BOTH
@pytest.mark.parametrize("name", PICTURES)
def test_pixels(decoder, name, use, tmp_path):
    use(decoder)
    array = PICTURES[name]
    for level, options in enumerate(({}, {"compress_level": 0}, {"compress_level": 9, "optimize": True})):
        path = tmp_path / f"{level}.png"
        path.write_bytes(content_of(array, **options))
        found = read_rgb(path, apply_exif=False) if array.ndim == 3 else read_uint8(path, 1)
        assert found.dtype == np.uint8 and np.array_equal(found, array)
        assert np.array_equal(read_rgb(path), array if array.ndim == 3 else np.repeat(array[..., None], 3, 2))


@BOTH
def test_chunks_that_change_no_pixel(decoder, use, tmp_path):
    """Gamma, colour spaces, significant bits, a background, words and pixels per metre are nobody's business here."""
    use(decoder)
    path = tmp_path / "a.png"
    extra = (chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"sRGB", b"\0") + chunk(b"sBIT", b"\5\5\5")
             + chunk(b"bKGD", bytes(6)) + chunk(b"pHYs", bytes(9)) + chunk(b"tEXt", b"a\0tRN"))
    plain = content_of(PICTURES["colours"])
    path.write_bytes(plain[:33] + extra + plain[33:])
    assert np.array_equal(read_rgb(path, apply_exif=False), PICTURES["colours"])
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "IDAT tRNS")
    path.write_bytes(content_of(PICTURES["grey"], pnginfo=info))
    assert np.array_equal(read_indices(path), PICTURES["grey"])


@BOTH
def test_files_that_are_not_plain(decoder, use, tmp_path):
    use(decoder)
    path, grey = tmp_path / "a.png", PICTURES["classes"]
    palette = Image.fromarray(grey)
    palette.putpalette(list(range(256)) * 3)
    for save in (lambda: palette.save(path), lambda: Image.fromarray(grey).save(path, transparency=3)):
        save()
        assert np.array_equal(read_indices(path), grey)
    Image.fromarray(PICTURES["noise"]).save(path, transparency=(1, 2, 3))
    assert np.array_equal(read_rgb(path, apply_exif=False), PICTURES["noise"])
    Image.fromarray(grey).save(path, save_all=True, append_images=[Image.fromarray(grey // 2)])
    with pytest.raises(ValueError, match="it holds 2 pictures"):
        read_indices(path)
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(path)
    assert np.array_equal(read_rgb(path, apply_exif=False)[..., 0], grey)


@BOTH
@pytest.mark.parametrize("name", ["grey", "classes", "colours"])
def test_every_damage_is_refused_or_changes_nothing(decoder, name, use, tmp_path):
    """One flipped bit, a hole, or an end too early: Pillow alone reads some as another picture, without a word."""
    use(decoder)
    array, path = PICTURES[name], tmp_path / "a.png"
    whole = content_of(array)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        at = int(rng.integers(len(whole)))
        kind = rng.integers(3)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at:at + 20] = bytes(len(content[at:at + 20]))
        else:
            content = content[:at]
        path.write_bytes(content)
        try:
            found = read_rgb(path, apply_exif=False) if array.ndim == 3 else read_indices(path)
        except ValueError as error:
            assert str(error).startswith(f"cannot read {path}: ") and str(error).endswith("or not a picture")
            refused += 1
        else:
            assert np.array_equal(found, array)
    assert refused > 120


@BOTH
def test_ends_and_checksums(decoder, use, tmp_path):
    use(decoder)
    path, whole = tmp_path / "a.png", content_of(PICTURES["grey"])
    for missing in (5, 8, 9, 12, 13, 20, len(whole) - 33, len(whole) - 20, len(whole) - 8):
        path.write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match="cannot read"):
            read_uint8(path, 1)
    at = whole.index(b"IDAT") + 30
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(ValueError, match="cannot read"):
        read_uint8(path, 1)
    path.write_bytes(whole + b"more")
    assert np.array_equal(read_uint8(path, 1), PICTURES["grey"])


def test_what_pillow_alone_would_miss():
    with pytest.raises(ValueError, match="chunk IDAT is not what its checksum says"):
        whole = content_of(PICTURES["grey"])
        at = whole.index(b"IDAT") + 30
        png.check_whole(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    for end in (-9, -20, 10, 8):
        with pytest.raises(ValueError, match="unexpected end of file"):
            png.check_whole(whole[:end])
    png.check_whole(whole)
