"""docs/combinations.md's tables are those that the doors' tables give."""

import pytest

from scripts import combinations
from scripts.combinations import PART
from scripts.docs_site.parts import part_of, with_part

PAGE = combinations.PAGE.read_text(encoding="utf-8")


def test_the_page_shows_what_can_be_combined():
    tables = combinations.text()
    assert part_of(PAGE, PART) == tables, f"run python scripts/combinations.py --write\n{tables}"


def test_what_is_refused_is_meant():
    """A dash would also stand where the small backbones of the table do not fit a decoder that takes all others."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part_of(PAGE, PART).splitlines()]
    refusing = {row[0]: row.count("-") for row in rows if row and row[0].strip("`") in combinations.DECODERS}
    assert refusing == {f"`{name}`": 4 if name == "taskprompter" else 0 for name in combinations.DECODERS}


def test_tables_are_put_in_their_place():
    page = "above\n<!-- x -->\n<!-- /x -->\nbelow\n"
    filled = with_part(page, "x", "| a |\n")
    assert filled == "above\n<!-- x -->\n| a |\n<!-- /x -->\nbelow\n" and with_part(filled, "x", "") == page
    with pytest.raises(ValueError, match="no place for the part y"):
        with_part(page, "y", "| a |\n")
