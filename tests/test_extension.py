"""Building C++ on first use: no compiler, broken sources, interrupted builds and several processes at once."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.shared import ROOT
from utils.extension import first_line, load_extension, untrusted

LOAD = """
import logging, pathlib, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from utils.extension import load_extension
print(load_extension("answer", (pathlib.Path(sys.argv[1]),))[1])
"""
SOURCE = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_CPP", raising=False)
    load_extension.cache_clear()
    yield tmp_path / "cache"
    load_extension.cache_clear()


def write(folder: Path, text: str = SOURCE) -> tuple[Path]:
    (folder / "answer.cpp").write_text(text)
    return (folder / "answer.cpp",)


def test_no_cpp_switches_everything_off(tmp_path, monkeypatch, empty_cache):
    monkeypatch.setenv("NO_CPP", "1")
    assert load_extension("answer", write(tmp_path)) == (None, "NO_CPP=1 is set")
    assert not empty_cache.exists()


def test_absent_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_extension("answer", write(tmp_path)) == (None, "the compiler 'no-such-compiler' was not found")


@needs_compiler
def test_compiler_message_is_the_reason(tmp_path):
    module, reason = load_extension("answer", write(tmp_path, "int answer() { return forty_two; }\n"))
    assert module is None and reason.startswith("compiling failed: ") and "forty_two" in reason


def test_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    module, reason = load_extension("answer", write(tmp_path))
    assert module is None and reason.startswith("no usable library in ")


@needs_compiler
def test_compiles_once_and_says_how_long_it_took(tmp_path, caplog):
    sources = write(tmp_path)
    with caplog.at_level(logging.INFO, logger="utils.extension"):
        assert load_extension("answer", sources) == (torch.ops, "")
        load_extension.cache_clear()
        assert load_extension("answer", sources) == (torch.ops, "")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "compiling answer.cpp (once on this machine)"
    assert len(lines) == 2 and lines[1].startswith("compiled in ")


@needs_compiler
def test_changed_header_is_compiled_anew(tmp_path, empty_cache):
    text = '#include "value.h"\nextern "C" int answer() { return VALUE; }\n'
    sources = (*write(tmp_path, text), tmp_path / "value.h")
    for value in (1, 2):
        sources[1].write_text(f"#define VALUE {value}\n")
        load_extension.cache_clear()
        assert load_extension("answer", sources) == (torch.ops, "")
    assert len(list(empty_cache.iterdir())) == 2


@needs_compiler
def test_interrupted_build_is_done_again(tmp_path, empty_cache):
    """What a Ctrl-C leaves: torch's lock file, for which torch would wait forever, and half a library."""
    sources = write(tmp_path)
    assert load_extension("answer", sources) == (torch.ops, "")
    folder, = empty_cache.iterdir()
    (folder / "complete").unlink()
    (folder / "lock").touch()
    next(folder.glob("*.so")).unlink()  # a new file: the loaded one must not change under this process
    (folder / f"{folder.name}.so").write_bytes(b"half")
    load_extension.cache_clear()
    assert load_extension("answer", sources) == (torch.ops, "")
    assert (folder / "complete").exists() and (folder / f"{folder.name}.so").stat().st_size > 1000


@needs_compiler
def test_processes_at_once_compile_once_and_stay_quiet(tmp_path):
    sources = write(tmp_path)
    running = [subprocess.Popen([sys.executable, "-c", LOAD, str(sources[0])], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in running]
    assert [out for out, _ in printed] == ["\n", "\n"]
    messages = [line for _, err in printed for line in err.splitlines()]
    assert sum(line.startswith("compiling ") for line in messages) == 1
    assert len(messages) == 2  # that it compiles and how long it took; no word about CUDA


def test_an_error_is_told_by_its_first_line():
    assert first_line(ValueError("what was wrong\nand much more")) == "what was wrong"
    assert first_line(KeyError()) == "KeyError"


def test_a_cache_that_everybody_can_write_is_not_trusted(tmp_path, empty_cache):
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    module, reason = load_extension("answer", write(tmp_path))
    assert module is None and reason.startswith(f"everybody can write into {empty_cache}; set TORCH_EXTENSIONS_DIR")
    assert untrusted(tmp_path) == ""                        # below /tmp, where everybody can write but not rename


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user_is_not_trusted(tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    assert "belongs to another user" in untrusted(tmp_path / "theirs")
