"""docs/ as a site: it builds without a warning, needs no network, and links to the repository's files hold there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT
from tests.test_report import browser_is_there

pytest.importorskip("mkdocs", reason="needs mkdocs-material and mkdocstrings (requirements-dev.txt)")

from scripts.docs_site.source_pages import address, linked_files, listing, origin, relinked, titled

CONFIG = ROOT / "scripts" / "docs_site" / "mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages. Strict: a dead link or anchor, or a page in no menu, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", CONFIG, "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_needs_no_network(site):
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    for path in (ROOT / "docs").glob("*.md"):
        assert f"{path.stem}.html" in pages
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?(https?:[^" >]+)', text)
        loaded += [link for link in re.findall(r"<link [^>]*>", text) if "http" in link and "canonical" not in link]
        assert not loaded, (name, loaded)
    assert "__index" in (site / "search" / "search_index.js").read_text(encoding="utf-8")[:40]


def test_links_to_code_lead_to_its_page(site):
    assert 'href="source/models/decoder.py.html"' in (site / "extending.html").read_text(encoding="utf-8")
    assert "class BuildContext" in re.sub("<[^>]+>", "", (site / "source/models/decoder.py.html").read_text("utf-8"))
    folder = (site / "source/models/decoders/index.html").read_text(encoding="utf-8")
    assert 'href="bim.py.html"' in folder and "BIM: a multi-task decoder" in folder


def test_the_interface_is_made_from_docstrings(site):
    page = re.sub("<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for words in ("a checkpoint (ours or a released .pth.tar)", "read ahead and decoded by threads, in constant memory",
                  "Names -&gt; entries of one kind"):
        assert words in page, words


def test_links_are_led_from_where_a_file_stands():
    assert relinked("[a](../models/decoder.py)", "docs/x.md") == "[a](source/models/decoder.py.md)"
    assert relinked("[a](../../models/decoder.py)", "docs/models/x.md") == "[a](../source/models/decoder.py.md)"
    assert relinked("[a](../docs/data.md#b)", "configs/README.md") == "[a](../../data.md#b)"
    assert relinked("[a](../models/blocks)", "docs/x.md") == "[a](source/models/blocks/index.md)"
    for kept in ("[a](data.md)", "[a](#here)", "[a](https://x.org/y)", "[a](../models/no_such.py)", "[a](../../etc)",
                 "```\n[a](../models/decoder.py)\n```"):
        assert relinked(kept, "docs/x.md") == kept
    for path in ("models/decoder.py", "models/decoders", "configs/README.md", "docs/data.md"):
        assert origin(address(path)) == path


def test_pages_are_called_by_their_titles():
    assert titled("see [glossary.md](glossary.md#training)", "docs/x.md") == "see [Glossary](glossary.md#training)"
    for kept in ("[words](glossary.md)", "[no_such.md](no_such.md)", "[bim.py](../models/decoders/bim.py)"):
        assert titled(kept, "docs/x.md") == kept


def test_pages_of_files_say_what_they_are():
    assert "configs/README.md" in linked_files() and not any(path.startswith("docs/") for path in linked_files())
    assert "` {.python linenums=1}\n" in listing("models/decoder.py")
    assert "| [`bim.py`](bim.py) | BIM: a multi-task decoder" in listing("models/decoders")


@pytest.mark.skipif(not browser_is_there(), reason="needs node, Chromium, and puppeteer-core and axe-core on NODE_PATH")
def test_pages_in_a_browser(site):
    pages = [str(site / page) for page in ("index.html", "faq.html", "api.html", "source/models/decoder.py.html")]
    done = subprocess.run(["node", str(ROOT / "scripts" / "check_page.js"), *pages], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
