"""How many small changes of the code the tests notice: mutation testing on a seeded sample.

    python scripts/mutation_sample.py --seed 0 --sample 320 --workers 2 --out mutation.json [--only losses/]

cosmic-ray (requirements-dev.txt) finds and makes the mutants; the folders and the tests that judge each source stand in
mutation_sample.yml beside this file. The sample is drawn per folder, in proportion to its mutants. Each mutant lives in
a fresh copy of the tree with a compiler cache of its own, so neither this tree nor the next mutant sees anything of it.
A mutant is killed when a test fails or the tests take several times as long as they should. Left out are mutants that
no test of behaviour can or should kill: type annotations, decorators, the wording of messages and log lines, `is` in
place of `==`, and what does not compile or compiles to the same code.

Started again with the same arguments, it goes on where it stopped; `--again` also runs the survivors again, after tests
were added. Beside FILE.json a FILE.md holds the table and the survivors' differences.
"""

import argparse
import ast
import compileall
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

import yaml
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = {".git", ".venv", "datasets", "runs", "pretrained_ckpts"}      # of the tree's first level
NOT_USED = ("RemoveDecorator", "VariableInserter", "VariableReplacer", "ReplaceComparisonOperator_Eq_Is",
            "ReplaceComparisonOperator_NotEq_IsNot", "ReplaceComparisonOperator_Is_Eq",
            "ReplaceComparisonOperator_IsNot_NotEq")
LIMIT_FACTOR, LIMIT_EXTRA_S = 3, 30         # a mutant's tests may take 3 times as long as without it, and 30 s


@dataclass
class Mutant:
    """One change of one source, and what became of it: "killed", "timeout" (which counts as killed), "survived"."""

    file: str
    line: int
    operator: str
    occurrence: int
    source_hash: str
    diff: str = ""
    outcome: str = ""
    killed_by: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple:
        """Names the mutant as long as its source is unchanged."""
        return self.file, self.operator, self.occurrence, self.source_hash


def sources(folders: Sequence[str], only: str) -> list[Path]:
    """The Python files of these folders, sorted, whose relative path contains `only`."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")
                  if only in path.relative_to(ROOT).as_posix())


def mutants_of(name: str, source: str) -> Iterator[Mutant]:
    """All mutants of a source text, in a fixed order."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    nodes = [node for node in ast_nodes(get_ast(source)) if node.type not in ("name", "string", "newline", "endmarker")]
    for operator in sorted(operator_names()):
        if operator.partition("/")[2] in NOT_USED:
            continue
        find = get_operator(operator)().mutation_positions
        places = ((node, start) for node in nodes for start, _ in find(node))
        for occurrence, (node, start) in enumerate(places):
            if not is_silly(node):
                yield Mutant(name, start[0], operator, occurrence, digest)


def is_silly(node) -> bool:
    """Does this node of the parso tree lie in a type annotation, a message or a log line?"""
    child, parent = node, node.parent
    while parent is not None:
        kind, children = parent.type, parent.children
        if (kind in ("raise_stmt", "tfpdef") or (kind == "parameters" and child is node)    # `name: type`; a lone `*`
                or (kind == "annassign" and child is children[1])
                or (kind == "funcdef" and child is parent.annotation)
                or (kind == "assert_stmt" and child is not children[1])
                or (kind == "atom_expr" and re.match(r"\s*(logger\.\w+|print|warnings\.warn)\(", parent.get_code()))):
            return True
        child, parent = parent, parent.parent
    return False


def changed(source: str, mutant: Mutant) -> str | None:
    """The mutated source, or None if it is not Python or means the same."""
    code = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    try:
        same = code is None or ast.dump(ast.parse(code)) == ast.dump(ast.parse(source))
    except (SyntaxError, ValueError):
        return None
    return None if same else code


def draw(mutants: Sequence[Mutant], number: int, seed: int) -> list[Mutant]:
    """A sample with each folder's share of mutants (largest remainders), with their differences filled in."""
    folders: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        folders.setdefault(mutant.file.partition("/")[0], []).append(mutant)
    exact = {folder: min(number, len(mutants)) * len(those) / len(mutants) for folder, those in folders.items()}
    shares = {folder: int(value) for folder, value in exact.items()}
    by_remainder = sorted(exact, key=lambda folder: shares[folder] - exact[folder])
    for folder in by_remainder[:min(number, len(mutants)) - sum(shares.values())]:
        shares[folder] += 1
    sample = []
    for folder, those in folders.items():
        taken = 0
        for mutant in random.Random(f"{seed} {folder}").sample(those, len(those)):
            if taken == shares[folder]:
                break
            source = (ROOT / mutant.file).read_text(encoding="utf-8")
            if code := changed(source, mutant):
                difference = difflib.unified_diff(source.splitlines(), code.splitlines(), mutant.file, mutant.file,
                                                  lineterm="", n=1)
                mutant.diff = "\n".join(list(difference)[2:])
                sample.append(mutant)
                taken += 1
    return sample


def tests_for(file: str, config: dict) -> tuple[str, ...]:
    """Paths of the tests that judge a source, see mutation_sample.yml; FileNotFoundError for a name that none has."""
    there = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    named = {name: [test for test in there if f"{test}_".startswith(f"{name}_")]
             for names in (*config["tests"].values(), config["slow"]) for name in names}
    if absent := [name for name, tests in named.items() if not tests]:
        raise FileNotFoundError(f"mutation_sample.yml names tests that do not exist: {', '.join(absent)}")
    prefix = max((prefix for prefix in config["tests"] if file.startswith(prefix)), key=len, default=None)
    stem = Path(file).stem.strip("_")
    chosen = [test for name in config["tests"].get(prefix, ()) for test in named[name]]
    chosen += [test for test in there if f"_{stem}_" in f"_{test}_"]
    slow = {test for name in config["slow"] for test in named[name]}
    return tuple(f"tests/test_{test}.py" for test in dict.fromkeys(chosen or [t for t in there if t not in slow]))


def run_tests(tree: Path, tests: Sequence[str], limit_s: float | None) -> tuple[str, str, float]:
    """Outcome ("survived", "killed", "timeout"), the first failing test, and the seconds that it took."""
    shared = os.environ.get("SHARED_DIR", str(ROOT.parent / "shared"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "SHARED_DIR": shared,
                   "TORCH_EXTENSIONS_DIR": str(tree / ".extensions")}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
                               cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "killed" if process.returncode else "survived"
    except subprocess.TimeoutExpired:
        output, outcome = "", "timeout"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)          # also what the tests may have left running
        except ProcessLookupError:
            process.wait()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return outcome, failed.group(1) if failed else "", time.monotonic() - start


def judge(mutant: Mutant, master: Path, tests: Sequence[str], limit_s: float) -> Mutant:
    """Applies the mutant in a copy of its own and runs its tests there."""
    with tempfile.TemporaryDirectory(prefix="mutant_", ignore_cleanup_errors=True) as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(master, tree, symlinks=True)
        path = tree / mutant.file
        path.write_text(changed(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        mutant.outcome, mutant.killed_by, mutant.seconds = run_tests(tree, tests, limit_s)
    return mutant


def summary(mutants: Sequence[Mutant]) -> str:
    """Markdown: killed of total per folder, then every survivor."""
    done = [mutant for mutant in mutants if mutant.outcome]
    survivors = [mutant for mutant in done if mutant.outcome == "survived"]
    folders = [*sorted({mutant.file.partition("/")[0] for mutant in done}), ""]
    lines = ["| folder | killed | of | share |", "|---|---|---|---|"]
    for folder in folders:
        total = sum(mutant.file.startswith(folder) for mutant in done)
        alive = sum(mutant.file.startswith(folder) for mutant in survivors)
        share = 100 * (total - alive) / max(total, 1)
        lines.append(f"| {folder or 'all'} | {total - alive} | {total} | {share:.1f} % |")
    for mutant in survivors:
        operator = mutant.operator.partition("/")[2]
        lines += ["", f"`{mutant.file}:{mutant.line}` {operator}", "```diff", mutant.diff, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draws, runs, and writes after every mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, number in {"--seed": 0, "--sample": 320, "--workers": 2}.items():
        parser.add_argument(option, type=int, default=number, metavar="N", help=f"default {number}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", default="", metavar="PART", help="only sources whose path contains this")
    parser.add_argument("--again", action="store_true", help="run the survivors of FILE.json again")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # which tests inherit; a background shell ignores it
    config = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
    everything = [mutant for path in sources(config["folders"], args.only)
                  for mutant in mutants_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))]
    mutants = draw(everything, args.sample, args.seed)
    print(f"{len(mutants)} of {len(everything)} mutants", flush=True)
    if args.out.exists():
        known = {mutant.key: mutant for mutant in (Mutant(**row) for row in json.loads(args.out.read_text()))}
        mutants = [known.get(mutant.key, mutant) for mutant in mutants]
    waiting = [m for m in mutants if not m.outcome or (args.again and m.outcome == "survived")]
    tests = {mutant.file: tests_for(mutant.file, config) for mutant in waiting}
    with tempfile.TemporaryDirectory(prefix="mutation_", ignore_cleanup_errors=True) as folder, \
            ThreadPoolExecutor(args.workers) as pool:
        master = Path(folder) / "tree"
        shutil.copytree(ROOT, master, symlinks=True,
                        ignore=lambda place, names: NOT_COPIED & set(names) if place == str(ROOT) else {"__pycache__"})
        compileall.compile_dir(master, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        needed = sorted({test for names in tests.values() for test in names})
        usual = dict(zip(needed, pool.map(lambda test: run_tests(master, [test], None), needed), strict=True))
        if broken := [f"{test} ({usual[test][1]})" for test in needed if usual[test][0] != "survived"]:
            sys.exit(f"error: these tests fail without any mutant: {', '.join(broken)}")
        limits = {file: LIMIT_FACTOR * sum(usual[test][2] for test in names) + LIMIT_EXTRA_S
                  for file, names in tests.items()}
        running = [pool.submit(judge, m, master, tests[m.file], limits[m.file]) for m in waiting]
        for number, future in enumerate(as_completed(running), start=1):
            mutant = future.result()
            print(f"{number}/{len(running)} {mutant.outcome:8} {mutant.file}:{mutant.line} {mutant.seconds:.0f} s",
                  flush=True)
            args.out.write_text(json.dumps([asdict(mutant) for mutant in mutants], indent=1), encoding="utf-8")
            args.out.with_suffix(".md").write_text(summary(mutants), encoding="utf-8")
    print(summary(mutants).partition("\n\n")[0])


if __name__ == "__main__":
    main()
