"""A figure of boxes on a grid with arrows between them, as SVG."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

COLUMN, GAP, LINE, PAD, MARGIN = 196, 12, 15, 9, 14     # pixels
DOWN = 30                                               # between two rows
LETTERS = 30                                            # that fit into a box of one column
INDENT = "\u00a0\u00a0\u00a0"
COLOURS = {"image": "#ece9e2", "backbone": "#dbe7f3", "map": "#eaf2fa", "own": "#fbeedb", "all": "#f6dcd9",
           "head": "#e3f0e0", "note": "none"}
TEXT = 'font-family="Helvetica, Arial, sans-serif"'


@dataclass(frozen=True)
class Drawn:
    """A box: its place on the grid, how many columns it spans, a title and lines below it.

    colour: a name of COLOURS. dashed: nothing is made of it.
    """

    name: str
    row: int
    column: float
    title: str
    lines: Sequence[str]
    colour: str
    span: int = 1
    dashed: bool = False

    @property
    def text(self) -> list[str]:
        """The lines as they fit; those of a list are indented."""
        return [part for line in self.lines for part in textwrap.wrap(
            line, LETTERS * self.span + 4 * (self.span - 1), subsequent_indent=INDENT if line[:2] == "- " else "")]

    @property
    def height(self) -> int:
        return 2 * PAD + LINE * ((1 if self.title else 0) + len(self.text))

    @property
    def left(self) -> float:
        return MARGIN + self.column * (COLUMN + GAP)

    @property
    def width(self) -> float:
        return self.span * COLUMN + (self.span - 1) * GAP


@dataclass(frozen=True)
class Arrow:
    """From one box to another one below it, or, at the right side of both, `around` what is between them."""

    start: str
    end: str
    around: bool = False


def svg(boxes: Sequence[Drawn], arrows: Sequence[Arrow], columns: int, described: str) -> str:
    """The figure. described: what it shows, for whoever does not see it."""
    rows = sorted({box.row for box in boxes})
    tops, y = {}, float(MARGIN)
    for row in rows:
        tops[row] = y
        y += max(box.height for box in boxes if box.row == row) + DOWN
    width, height = 2 * MARGIN + columns * COLUMN + (columns - 1) * GAP + 18, int(y - DOWN + MARGIN)
    placed = {box.name: box for box in boxes}
    parts = [_arrow(placed[arrow.start], placed[arrow.end], arrow.around, tops) for arrow in arrows]
    parts += [_box(box, tops[box.row]) for box in boxes]
    tip = ('<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
           '<path d="M 0 0 L 6 3 L 0 6 z" fill="#345"/></marker></defs>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img">\n<title>{html.escape(described)}</title>\n<rect width="100%" height="100%" fill="#fff"/>\n'
            f'{tip}\n' + "\n".join(parts) + "\n</svg>\n")


def _box(box: Drawn, top: float) -> str:
    dash = ' stroke-dasharray="4 3"' if box.dashed else ""
    frame = "" if box.colour == "note" else (
        f'<rect x="{box.left:g}" y="{top:g}" width="{box.width:g}" height="{box.height}" rx="5" '
        f'fill="{COLOURS[box.colour]}" stroke="#678"{dash}/>')
    lines = [f'<text x="{box.left + PAD:g}" y="{top + PAD + 11:g}" font-size="13" font-weight="bold" {TEXT} '
             f'fill="#123">{html.escape(box.title)}</text>'] if box.title else []
    first = top + PAD + 11 + (LINE if box.title else 0)
    lines += [f'<text x="{box.left + PAD:g}" y="{first + LINE * number:g}" font-size="12" {TEXT} fill="#234">'
              f'{html.escape(line)}</text>' for number, line in enumerate(box.text)]
    return "\n".join(part for part in [frame, *lines] if part)


def _arrow(start: Drawn, end: Drawn, around: bool, tops: dict[int, float]) -> str:
    y1, y2 = tops[start.row] + start.height, tops[end.row]
    if around:
        x1, x2 = start.left + start.width, end.left + end.width
        y1, y2 = tops[start.row] + start.height / 2, y2 + end.height / 2
        path = f"M {x1:g} {y1:g} H {max(x1, x2) + 13:g} V {y2:g} H {x2 + 3:g}"
    else:
        narrow = min((start, end), key=lambda box: box.width)
        x1 = x2 = narrow.left + narrow.width / 2
        if start.width == end.width:
            x1, x2 = start.left + start.width / 2, end.left + end.width / 2
        x2 += 0 if x1 == x2 else 24 if x1 > x2 else -24          # beside what comes straight from above
        path = f"M {x1:g} {y1:g} V {y2 - 2:g}" if x1 == x2 else (
            f"M {x1:g} {y1:g} V {y2 - DOWN / 2:g} H {x2:g} V {y2 - 2:g}")
    return f'<path d="{path}" fill="none" stroke="#345" stroke-width="1.3" marker-end="url(#tip)"/>'
