"""Draws the floors of this program, docs/architecture.svg, from its own imports.

    python scripts/draw_architecture.py

Every band is a floor of the contract in pyproject.toml, its boxes are the folder's files and sub-folders; an arrow says
how many imports run from one floor to a lower one. Needs grimp, which requirements-dev.txt installs with import-linter.
"""

import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
SVG = ROOT / "docs" / "architecture.svg"
WIDTH, BAND, GAP, LEFT, ROW, LANES, LANE = 1200, 92, 34, 236, 74, 716, 27
SAYS = {
    "scripts": "what a person runs", "utils.engine": "what a run is", "data": "files to batches",
    "evaluation": "predictions to scores", "models": "images to predictions", "losses": "predictions to gradients",
    "utils": "leaves, used by all",
}
TEXT = 'font-family="Helvetica, Arial, sans-serif"'


def floors() -> list[str]:
    """The floors from top to bottom; the leaves are one."""
    layers = re.search(r"\nlayers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)[1]
    return [*re.findall(r'"([\w.]+)"', layers), "utils"]


def floor_of(module: str, names: list[str]) -> str:
    """The longest floor name that begins the module's."""
    return max((name for name in names if f"{module}.".startswith(f"{name}.")), key=len)


def arrows(names: list[str]) -> Counter:
    """(upper floor, lower floor) -> number of imports between their files, but for the contract's exceptions."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(*sorted({name.split(".")[0] for name in names}), cache_dir=None)
    found = Counter((floor_of(module, names), floor_of(imported, names)) for module in graph.modules
                    for imported in graph.find_modules_directly_imported_by(module))
    return Counter({(a, b): count for (a, b), count in found.items() if names.index(a) < names.index(b)})


def contents(name: str) -> list[str]:
    """Files and folders on a floor, folders with the number of files inside."""
    folder = ROOT.joinpath(*name.split("."))
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    inside = sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file() and path.name != "engine")
    return [*(f"{path.name}/({len(list(path.rglob('*.py'))) - 1})" for path in inside), *files]


def draw() -> str:
    """The picture as SVG."""
    names = floors()
    tops = {name: 20 + i * (BAND + GAP) for i, name in enumerate(names)}
    parts = ['<rect width="100%" height="100%" fill="#fff"/>']
    for i, (name, top) in enumerate(tops.items()):
        shade = 96 - 2 * i
        parts += [f'<rect x="10" y="{top}" width="{WIDTH - 20}" height="{BAND}" rx="6" fill="hsl(210, 45%, {shade}%)" '
                  f'stroke="#8aa"/>',
                  f'<text x="24" y="{top + 34}" font-size="18" {TEXT}>{name.replace(".", "/")}</text>',
                  f'<text x="24" y="{top + 56}" font-size="12.5" {TEXT} fill="#444">{SAYS[name]}</text>',
                  *(f'<text x="{LEFT}" y="{top + 26 + 17 * row}" font-size="12.5" {TEXT} fill="#333">{text}</text>'
                    for row, text in enumerate(textwrap.wrap("   ".join(contents(name)), ROW)))]
    lanes = sorted(arrows(names).items(), key=lambda item: (names.index(item[0][0]), names.index(item[0][1])))
    for i, ((upper, lower), count) in enumerate(lanes):
        x, start, end = LANES + i * LANE, tops[upper] + BAND, tops[lower]
        parts += [f'<path d="M {x} {start} V {end - 2}" stroke="#246" stroke-width="1.4" opacity="0.75" '
                  f'marker-end="url(#tip)"/>',
                  f'<text x="{x + 4}" y="{start + 14}" font-size="11" {TEXT} fill="#246">{count}</text>']
    tip = ('<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
           '<path d="M 0 0 L 6 3 L 0 6 z" fill="#246"/></marker></defs>')
    height = 20 + len(names) * (BAND + GAP)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">\n{tip}\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
    print(f"wrote {SVG}")
