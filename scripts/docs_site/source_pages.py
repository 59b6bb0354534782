"""A hook of mkdocs: files of the repository that pages link to are pages of the site, too.

A page of docs/ links to a file outside docs/ by its path (`../models/decoders/bim.py`), which a reader of the
repository can follow. Here such a file becomes a page `source/PATH.html`: Markdown as it is, anything else as a
listing, a folder as the list of its files, which then have pages as well. Links to what does not exist stay as they
are, and a strict build ends with them.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS, SOURCE = "docs", "source"
PAGE_LINK = re.compile(r"\[[\w/.]+\.md\](\(([\w/.]+\.md)(?:#[^)]*)?\))")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".js": "javascript"}
HIDDEN = "---\nsearch: {exclude: true}\nhide: [navigation, footer]\n---\n\n"


def links(text: str, path: str) -> Iterator[str]:
    """Paths of the repository's files to which the text of such a file links."""
    for match in LINK.finditer(FENCED.sub("", text)):
        if (target := resolved(match[2], path)) is not None:
            yield target


def resolved(link: str, path: str) -> str | None:
    """The path, from the root, to which a link in a file points; None where there is nothing of the repository."""
    if ":" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def address(path: str) -> str:
    """The place of a path among the site's files."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    file = ROOT / path
    return f"{SOURCE}/{path}" if file.suffix == ".md" else f"{SOURCE}/{path}{'/index' if file.is_dir() else ''}.md"


def origin(address: str) -> str:
    """The path of the repository's file that a page of the site shows."""
    if not address.startswith(f"{SOURCE}/"):
        return f"{DOCS}/{address}"
    path = address.removeprefix(f"{SOURCE}/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md").removesuffix("/index")


def relinked(text: str, path: str) -> str:
    """The text of a repository's file with links that hold on the site."""
    start = posixpath.dirname(address(path))

    def moved(match: re.Match) -> str:
        target = resolved(match[2], path)
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(address(target), start)}{match[3] or ''}{match[4]}"
    whole, end = [], 0
    for block in FENCED.finditer(text):
        whole += [LINK.sub(moved, text[end:block.start()]), block[0]]
        end = block.end()
    return "".join([*whole, LINK.sub(moved, text[end:])])


def titled(text: str, path: str) -> str:
    """The text with links that are called by a page's file, `[data.md](data.md)`, called by its title."""
    def named(match: re.Match) -> str:
        target = resolved(match[2], path)
        return match[0] if target is None else f"[{title(ROOT / target)}]{match[1]}"
    return PAGE_LINK.sub(named, text)


def title(page: Path) -> str:
    """The first heading of a page."""
    return re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[1]


def listing(path: str) -> str:
    """A page about a file that is not Markdown, or about a folder; its links are those of a page in the repository."""
    place = ROOT / path
    if place.is_dir():
        rows = [f"| [`{name.name}`]({name.name}) | {first_line(name)} |" for name in contents(place)]
        return "\n".join([f"{HIDDEN}# {path}/", "", "| file | what it is |", "| --- | --- |", *rows, ""])
    text = place.read_text(encoding="utf-8").rstrip("\n")
    return f"{HIDDEN}# {path}\n\n````` {{.{LANGUAGES.get(place.suffix, 'text')} linenums=1}}\n{text}\n`````\n"


def contents(folder: Path) -> list[Path]:
    """The files of a folder that can be shown."""
    return sorted(file for file in folder.iterdir() if file.suffix in (*LANGUAGES, ".md"))


def first_line(file: Path) -> str:
    """What a Python file says that it is."""
    if file.suffix != ".py":
        return ""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0].replace("|", r"\|")


def linked_files() -> set[str]:
    """All files and folders outside docs/ to which pages lead, directly or over others of them."""
    waiting = [path.relative_to(ROOT).as_posix() for path in (ROOT / DOCS).rglob("*.md")]
    found: set[str] = set()
    while waiting:
        path = waiting.pop()
        file, targets = ROOT / path, []
        if file.is_dir():
            targets = [entry.relative_to(ROOT).as_posix() for entry in contents(file)]
        elif file.suffix == ".md":
            targets = [*links(file.read_text(encoding="utf-8"), path)]
        new = {target for target in targets if not target.startswith(f"{DOCS}/")} - found
        found |= new
        waiting += sorted(new)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of linked files; they belong to no menu."""
    for path in sorted(linked_files()):
        file = ROOT / path
        text = HIDDEN + file.read_text(encoding="utf-8") if file.suffix == ".md" else listing(path)
        files.append(File.generated(config, address(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to the repository's files to their pages, and calls pages by their titles."""
    path = origin(page.file.src_uri)
    path = f"{path}/." if (ROOT / path).is_dir() else path
    return relinked(titled(markdown, path), path)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Names the theme's search for screen readers."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
