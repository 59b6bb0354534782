"""The floors of the house: imports run down only, no two files import each other, tables are light and complete."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from data.datasets import DATASETS
from losses.balancing import BALANCING
from models.backbones import BACKBONES
from models.decoders import DECODERS
from models.necks import NECKS
from tests.shared import ROOT
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.schedules import SCHEDULES
from utils.engine.tasks import TASKS
from utils.table import Table

grimp = pytest.importorskip("grimp", reason="grimp and import-linter, which need Python 3.11, are not installed")

PACKAGES = ("scripts", "utils", "data", "evaluation", "models", "losses")
TABLES = {"task": TASKS, "data set": DATASETS, "decoder": DECODERS, "backbone": BACKBONES, "neck": NECKS,
          "balancing": BALANCING, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
SOURCES = [path for package in ("main.py", *PACKAGES) for path in
           ([ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py")))]


@pytest.fixture(scope="module")
def graph():
    sys.path.insert(0, str(ROOT))
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_imports_run_down_only():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_leaf_is_in_the_contract():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in (ROOT / "utils").glob("*.py"):
        assert path.stem == "__init__" or text.count(f"utils.{path.stem}") == 2, path.name


def test_no_two_files_import_each_other(graph):
    sorter = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    sorter.prepare()                        # CycleError names the files


def test_nothing_imports_the_command_line():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert "main" not in names and not any(str(name).startswith("tests") for name in names), path


def test_no_condition_asks_for_a_task_by_name():
    """Outside the tasks' own files no comparison holds a task's name, and no dictionary is looked up by one."""
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if relative.parts[:3] == ("utils", "engine", "tasks") or relative.parts[:2] in (
                ("scripts", "parity"), ("scripts", "example_data"), ("utils", "engine/official_files.py")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & set(TASKS)
                assert not named, f"{relative}:{node.lineno} compares with {named}"


def test_sizes():
    """Functions of at most 60 lines, files of at most 320 (tests: 450)."""
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        relative = path.relative_to(ROOT)
        limit = 450 if relative.parts[0] == "tests" else 320
        assert text.count("\n") <= limit, f"{relative} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{relative}:{node.lineno} {node.name}"
    assert (ROOT / "main.py").read_text(encoding="utf-8").count("\n") < 80


@pytest.mark.parametrize("kind", TABLES)
def test_every_entry_can_be_loaded(kind):
    table = TABLES[kind]
    for name in table:
        assert table.find(name.upper()) == name and table.load(name) is not None


FIELDS = """
from dataclasses import fields
from losses.balancing import BALANCING
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.schedules import SCHEDULES
found = [(table.kind, name, [(f.name, str(f.type), repr(f.default)) for f in fields(table.options(name))])
         for table in (BALANCING, OPTIMIZERS, SCHEDULES) for name in table]
"""


def test_options_are_read_without_pytorch_and_equal_the_real_ones():
    """Of the tables above the models (tests/test_model_tables.py has those of the models)."""
    code = f"{FIELDS}\nimport sys; print(found); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for table in (BALANCING, OPTIMIZERS, SCHEDULES):
        for name in table:
            assert table.load(name).Config is table.options(name)       # loaded now: the class itself
    names: dict = {}
    exec(FIELDS, names)
    assert done.stdout.strip() == str(names["found"])


def test_help_and_a_wrong_key_answer_at_once():
    """Under half a second of processor time, before PyTorch is imported."""
    code = ("import resource, subprocess, sys; subprocess.run([sys.executable, 'main.py', *sys.argv[1:]], "
            "capture_output=True); used = resource.getrusage(resource.RUSAGE_CHILDREN); "
            "print(used.ru_utime + used.ru_stime)")
    for arguments in (["--help"], ["--config_exp", "configs/bim_nyud.yml", "max_itr=5"],
                      ["--config_exp", "configs/bim_nyud.yml", "model_kwargs.msst_depth=two"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
                              check=True)
        assert float(done.stdout) < 0.5, arguments


def test_options_read_before_and_after_an_import_are_equal():
    code = ("import sys; from utils.engine.config import load_config; "
            "before = load_config('configs/bim_nyud.yml'); assert 'torch' not in sys.modules; "
            "import utils.engine.train; "
            "after = load_config('configs/bim_nyud.yml'); assert before == after and after == before; "
            "assert before != load_config('configs/bim_nyud.yml', ['optimizer_kwargs.eps=1e-3'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_picture_is_that_of_the_imports():
    from scripts.draw_architecture import SVG, draw
    assert SVG.read_text(encoding="utf-8") == draw(), "run python scripts/draw_architecture.py"


@pytest.mark.parametrize(("body", "light"), [
    ("class P:\n    Config = C\n", True),
    ("WIDTHS: tuple = (8, 16)\n@dataclass(frozen=True)\nclass D(C):\n    width: int = WIDTHS[0]\n"
     "class P:\n    Config = D\n", False),
    ("def helper(x):\n    return x\n@dataclass(frozen=True)\nclass D(C):\n    def __post_init__(self):\n"
     "        helper(1)\nclass P:\n    Config = D\n", False),
    ("class Q:\n    Config = C\nclass P(Q):\n    pass\n", False)])
def test_options_that_need_more_than_their_source_are_imported(tmp_path, monkeypatch, body, light):
    head = "from dataclasses import dataclass\nfrom utils.options import Options\n"
    base = "@dataclass(frozen=True)\nclass C(Options):\n    width: int = 8\n"
    name = f"toy_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(head + base + body)
    monkeypatch.syspath_prepend(tmp_path)
    assert Table("toy", {"a": f"{name}:P"}).options("a")().width == 8
    assert (name in sys.modules) != light


def test_options_are_those_of_the_file_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file, table = tmp_path / "changing.py", Table("toy", {"a": "changing:P"})
    for number, width in enumerate((8, 9)):
        file.write_text("from dataclasses import dataclass\nfrom utils.options import Options\n"
                        f"@dataclass(frozen=True)\nclass C(Options):\n    width: int = {width}\n"
                        "class P:\n    Config = C\n")
        os.utime(file, ns=(number, number))
        assert table.options("a")().width == width


@pytest.mark.parametrize("target", ["no_such_module:P", "utils.options:NoSuchClass", "utils:", "tests.no_such:P"])
def test_an_entry_that_cannot_be_imported_is_named(target):
    for use in (Table.options, Table.load):
        with pytest.raises(ValueError, match=f"toy 'a' stands for {target}, which cannot be imported"):
            use(Table("toy", {"a": target}), "a")
