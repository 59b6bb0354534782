"""What the terminal says: overview, help, keys in words, completion, errors with a next step, readers that leave."""

import dataclasses
import errno
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from losses.balancing import BALANCING
from models.backbones import BACKBONES
from models.decoders import DECODERS
from models.necks import NECKS
from tests.shared import ROOT
from utils import exits
from utils.engine.arguments import FLAGS, MODES, build_parser, overview, parse_arguments
from utils.engine.completion import script
from utils.engine.config import Config
from utils.engine.help_config import describe, keys
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.schedules import SCHEDULES
from utils.options import ConfigError

TABLES = {"model_kwargs": DECODERS, "backbone_kwargs": BACKBONES, "neck_kwargs": NECKS, "optimizer_kwargs": OPTIMIZERS,
          "scheduler_kwargs": SCHEDULES, "loss_kwargs.scheme_kwargs": BALANCING}


def main(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def test_without_arguments_there_is_an_overview():
    done = main()
    assert done.returncode == exits.USAGE and not done.stderr
    assert all(f"--run_mode {mode}" in done.stdout for mode in MODES)
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("  python ")][:3]
    assert [words[1] for words in commands] == ["scripts/render_example.py", "main.py", "main.py"]
    for words in commands[1:]:
        parse_arguments(words[2:], None)                       # they are commands of this program
    for file in ("scripts/render_example.py", "configs/example/lite0_nyud.yml", "docs/demo_panel.png"):
        assert file in done.stdout and (ROOT / file).is_file()


def test_examples_are_arguments_of_this_program():
    for mode in MODES.values():
        args = parse_arguments(mode.example.split()[2:], None)
        assert MODES[args.run_mode] is mode
    assert all(mode.example in overview("") for mode in MODES.values())


def test_help_has_a_group_for_the_arguments_of_every_run_mode():
    groups = {group.title: [name for action in group._group_actions for name in action.option_strings]
              for group in build_parser("")._action_groups}
    for flag, (modes, _) in FLAGS.items():
        assert flag in groups[f"--run_mode {' and '.join(modes)}"]
    assert {"--help", "--help_config", "--completion", "--traceback"} <= set(groups["help"])


def test_overrides_may_stand_behind_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.png").touch()
    line = "--run_mode predict --trained_model c --input x.jpg a=b.png precision=bf16"
    args = parse_arguments(line.split(), None)
    assert args.input == ["x.jpg", "a=b.png"] and args.overrides == ["precision=bf16"]


# keys in words --------------------------------------------------------------------------------------------------


def test_every_key_is_explained():
    everything = describe()
    for field in dataclasses.fields(Config):
        line = next(line for line in everything.splitlines() if re.match(rf"  {field.name} = ", line))
        assert len(line.split("=", 1)[1].split()) > 1 or f"{line}\n     " in everything, field.name
        assert describe(field.name).startswith(f"{field.name}: ")
    for title in ("what is trained", "data", "schedule", "machine"):
        assert f"\n{title}\n" in everything
    assert max(map(len, everything.splitlines())) <= 120


@pytest.mark.parametrize("key", TABLES)
def test_options_of_every_entry_are_listed(key):
    table = TABLES[key]
    assert all(name in describe(key) for name in table)
    for name in table:
        text = describe(f"{key}.{name}")
        assert f"{table.kind} '{name}'" in text
        assert all(f"  {field.name} = " in text for field in dataclasses.fields(table.options(name)))
    [*entries] = table
    for field in dataclasses.fields(table.options(entries[0])):
        assert describe(f"{key}.{entries[0]}.{field.name}")


def test_what_a_key_says():
    assert describe("trBatch") == "trBatch: a whole number, at least 1; default: 1\n  images per process"
    assert describe("precision").startswith("precision: one of fp32, tf32, bf16, fp16; default: fp32")
    assert "image_size: a list of 2, each a whole number or empty; default: empty" in describe("image_size")
    assert "names: none, one_stride, pyramid" in describe("neck")
    assert "  embed_dim = 192\n" in describe("backbone_kwargs.swin_large")           # of the entry, not of the class
    assert "  flip = false" in describe("test_time") and "also the mirrored image" in describe("test_time.flip")
    for key, words in (("max_itr", "did you mean 'max_iter'"), ("model_kwargs.bmi", "unknown decoder|unknown model"),
                       ("optimizer_kwargs.adamw.weight", "did you mean 'weight_decay'"), ("seed.x", "holds no keys")):
        with pytest.raises(ValueError, match=words):
            describe(key)
    assert keys()["loss_kwargs.loss_scope"] == ("process", "image") and keys()["compile"] == ("true", "false")


def test_help_config_answers_on_the_command_line():
    done = main("--help_config", "optimizer_kwargs.adamw")
    assert done.returncode == 0 and "weight_decay = " in done.stdout
    done = main("--help_config", "optimzer")
    assert done.returncode == exits.USAGE and "did you mean 'optimizer'?" in done.stderr and not done.stdout


# completion -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("words", "wanted"), [
    ("python main.py --run_", "--run_mode"), ("python main.py --run_mode pr", "predict"),
    ("torchrun --nproc_per_node 2 main.py --config_exp a.yml opti", "optimizer= optimizer_kwargs="),
    ("python main.py precision = b", "bf16"), ("python main.py precision =", "fp32 tf32 bf16 fp16"),
    ("python main.py model = bi", "bim"), ("python other.py --run_", ""), ("python main.py --config_exp ", "")])
def test_bash_completes(words, wanted):
    """As bash cuts words: `=` is one of its own."""
    parts = [*words.split(), *([""] if words.endswith(" ") else [])]
    line = " ".join(f"'{word}'" for word in parts)
    call = f"COMP_WORDS=({line}); COMP_CWORD={len(parts) - 1}\n_mtdp\necho ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", f"{script('bash', build_parser(''))}\n{call}"], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == wanted and not done.stderr
    assert script("zsh", build_parser("")).startswith("autoload -U +X bashcompinit")


# errors, and readers that leave ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "words"), [
    (ConfigError("x"), "--help_config"), (FileNotFoundError("no file x"), "a relative one begins at /"),
    (PermissionError(errno.EACCES, "not allowed", "x"), "get the right"), (ValueError("bad"), "--traceback"),
    (OSError(errno.ENOSPC, "No space left", "x"), "free some space and start the same line again"),
    (RuntimeError("CUDA out of memory"), "when that is mended")])
def test_every_error_ends_with_what_to_do_next(error, words):
    sentence, _, step = str(exits.ending_of(error)).partition(" Next: ")
    assert sentence.startswith("error: ") and sentence.endswith(".") and words in step
    assert exits.told("who?", "ask") == "error: who? Next: ask"


@pytest.mark.parametrize("arguments", ["--help", "--help_config", "--completion bash", ""])
def test_a_reader_that_leaves_is_no_error(arguments):
    line = f"{sys.executable} main.py {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, exits.USAGE) and not done.stderr
