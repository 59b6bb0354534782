"""The HTML of a report: one file that fetches nothing and runs nothing, in the order a screen reader reads it."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from utils.engine.views import Legend

STYLE, KEY_STYLE = (Path(__file__).with_name(name) for name in ("page.css", "key.css"))
FEW = 12                            # colours that are shown unasked
Section = tuple[str, str]           # heading, HTML


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole document; headings become the links above."""
    anchors = {heading: re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading, _ in sections}
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for heading, anchor in anchors.items())
    body = "\n".join(f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(heading)}</h2>\n{content}\n'
                     "</section>" for (heading, content), anchor in zip(sections, anchors.values(), strict=True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="ascii")}{KEY_STYLE.read_text(encoding="ascii")}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main id="content" tabindex="-1">
{body}
</main>
</body>
</html>
"""


def heading(level: int, words: str) -> str:
    """Below a section's own, which is of level 2."""
    return f"<h{level}>{escape(words)}</h{level}>"


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """The first row holds the columns' names, the first cell of each other row its own. A wide one can be scrolled."""
    head, *body = rows
    heads = "".join(f'<th scope="col">{_heading(cell)}</th>' for cell in head)
    lines = "\n".join('<tr><th scope="row">' + escape(first) + "</th>"
                      + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>" for first, *rest in body)
    name = escape(caption, quote=True)
    return (f'<div class="wide" role="region" aria-label="{name}" tabindex="0"><table>\n<caption>{escape(caption)}'
            f"</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>")


def _heading(cell: str) -> str:
    """A column's name; the arrow of its direction gets words."""
    words, _, arrow = cell.rpartition(" ")
    sign = {"^": ("&uarr;", "higher is better"), "v": ("&darr;", "lower is better")}.get(arrow)
    if not words or sign is None:
        return escape(cell) or '<span class="hidden">name</span>'
    return (f'{escape(words)} <span aria-hidden="true">{sign[0]}</span>'
            f'<span class="hidden">, {sign[1]}</span>')


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def folded(summary: str, content: str) -> str:
    """Opens where the reader wants it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def key_to_colours(task: str, legend: Legend) -> str:
    """What the colours of a task's pictures mean; a long one opens where the reader wants it, and on paper."""
    title = f"{task}: colours"
    return folded(f"{title} ({len(legend)})", swatches(title, legend)) if len(legend) > FEW else swatches(title, legend)


def swatches(title: str, legend: Legend) -> str:
    """A list of colours with their words; drawn, since backgrounds are left out on paper. Empty without a colour."""
    drawn = ('<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true"><rect width="1" height="1" '
             'fill="#{:02x}{:02x}{:02x}"/></svg>')
    items = "".join(f"<li>{drawn.format(*colour)}{escape(words)}</li>" for colour, words in legend)
    return f'<ul class="key" aria-label="{escape(title, quote=True)}">{items}</ul>' if items else ""


def code(text: str) -> str:
    """As it stands, line by line."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def plot(svg: str, caption: str, alternative: str) -> str:
    """A drawn figure. `alternative` says in words what it shows."""
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    return (f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(alternative, quote=True)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def pictures(caption: str, items: Iterable[tuple[str, Path]]) -> str:
    """Small pictures side by side with a word below each; a file that is not there is said to be missing."""
    cells = []
    for words, path in items:
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            shown = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(f"{words}, {caption}", quote=True)}">'
        else:
            shown = "<p>no picture</p>"
        cells.append(f"<div>{shown}<span>{escape(words)}</span></div>")
    return (f'<figure class="pictures"><div class="row">{"".join(cells)}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")
