"""The mutation sample: what counts as a mutant, who judges it, and that a sample is repeatable."""

import json
import sys

import pytest

from scripts import mutation_sample as sampler

SOURCE = '''
import logging
logger = logging.getLogger(__name__)

def half(x: int | None, near: float = 0.5) -> int | str:
    limit: int | None = 3
    logger.info("%d", x + 1)
    assert x < 7, x - 1
    if x is None:
        raise ValueError(f"{x * 2}")
    return x / limit
'''


def test_annotations_messages_and_log_lines_are_left_out():
    mutants = list(sampler.mutants_of("a.py", SOURCE))
    assert {mutant.line for mutant in mutants} == {5, 6, 8, 9, 11}
    names = {mutant.operator.partition("/")[2] for mutant in mutants}
    assert {"NumberReplacer", "ReplaceBinaryOperator_Div_Mul", "AddNot", "ReplaceComparisonOperator_Is_IsNot"} <= names
    assert all("Binary" not in name or name.startswith("ReplaceBinaryOperator_Div_") for name in names)
    codes = [sampler.changed(SOURCE, mutant) for mutant in mutants]
    assert all(codes) and len(set(codes)) == len(codes) and SOURCE not in codes


def test_what_does_not_compile_or_means_the_same_is_no_mutant():
    def changes(source: str) -> list[str]:
        return [code for mutant in sampler.mutants_of("a.py", source) if (code := sampler.changed(source, mutant))]
    assert changes("def f(a, *, b): pass\n") == []         # the star is not a product
    assert changes("x = 2\n") == ["x = 3\n", "x = 1\n"]


def mutants(**numbers: int) -> list[sampler.Mutant]:
    return [sampler.Mutant(f"{folder}/{i}.py", 1, "core/NumberReplacer", 0, "") for folder, number in numbers.items()
            for i in range(number)]


def test_a_sample_has_each_folders_share_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "ROOT", tmp_path)
    everything = mutants(a=60, b=30, c=9)
    for mutant in everything:
        (tmp_path / mutant.file).parent.mkdir(exist_ok=True)
        (tmp_path / mutant.file).write_text("x = 1\n")
    drawn = sampler.draw(everything, 10, seed=0)
    assert [sum(mutant.file.startswith(folder) for mutant in drawn) for folder in "abc"] == [6, 3, 1]
    assert drawn == sampler.draw(everything, 10, seed=0) != sampler.draw(everything, 10, seed=1)
    assert len(sampler.draw(everything, 500, seed=0)) == 99
    assert drawn[0].diff.splitlines() == ["@@ -1 +1 @@", "-x = 1", "+x = 2"]


def test_every_source_is_judged_by_tests_that_exist(tmp_path, monkeypatch):
    config = sampler.yaml.safe_load((sampler.ROOT / "scripts" / "mutation_sample.yml").read_text())
    for path in sampler.sources(config["folders"], ""):
        assert all((sampler.ROOT / test).is_file()
                   for test in sampler.tests_for(path.relative_to(sampler.ROOT).as_posix(), config))
    monkeypatch.setattr(sampler, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    for name in ("loss", "loss_sums", "losses", "slow_run", "edge", "other"):
        (tmp_path / "tests" / f"test_{name}.py").touch()
    config = {"slow": ["slow"], "tests": {"a/": ["loss"], "a/b/": ["other", "edge"]}}

    def judges(file: str) -> list[str]:
        return [test.removeprefix("tests/test_").removesuffix(".py") for test in sampler.tests_for(file, config)]

    assert judges("a/edge.py") == ["loss", "loss_sums", "edge"] and judges("a/b/edge.py") == ["other", "edge"]
    assert judges("c/sums.py") == ["loss_sums"] and judges("c/nothing.py") == ["edge", "loss", "loss_sums", "losses",
                                                                               "other"]
    with pytest.raises(FileNotFoundError, match="tests that do not exist: gone"):
        sampler.tests_for("a/edge.py", config | {"slow": ["gone"]})


def test_a_run_judges_resumes_and_leaves_the_tree_alone(tmp_path, monkeypatch):
    """A tree with one function and one test that pins `+`, but not the 3."""
    tree = tmp_path / "tree"
    for folder in ("judged", "tests", "scripts"):
        (tree / folder).mkdir(parents=True)
    (tree / "judged" / "sums.py").write_text("def f(x):\n    return x + 1 if x < 3 else 0\n")
    (tree / "tests" / "test_sums.py").write_text("from judged.sums import f\n\ndef test_f():\n    assert f(1) == 2\n")
    (tree / "scripts" / "mutation_sample.yml").write_text("folders: [judged]\nslow: []\ntests: {}\n")
    (tree / "conftest.py").touch()
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    monkeypatch.setattr(sampler, "ROOT", tree)
    monkeypatch.setattr(sampler, "__file__", str(tree / "scripts" / "mutation_sample.py"))
    out = tmp_path / "out.json"

    def run(*more: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["x", "--sample", "4", "--seed", "3", "--out", str(out), *more])
        sampler.main()
        return json.loads(out.read_text())
    rows = run()
    assert len(rows) == 4 and {row["outcome"] for row in rows} <= {"killed", "survived"}
    assert all(row["killed_by"] == "tests/test_sums.py::test_f" for row in rows if row["outcome"] == "killed")
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before
    assert run() == rows and "| all | " in out.with_suffix(".md").read_text()
