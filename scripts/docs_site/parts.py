"""Parts of a page that a script writes: what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""


def part_of(page: str, name: str) -> str:
    """What a page shows there; ValueError where it has no such place."""
    begin, end = _marks(name)
    if begin not in page or end not in page:
        raise ValueError(f"the page has no place for the part {name}: {begin.strip()} ... {end.strip()}")
    return page.partition(begin)[2].partition(end)[0]


def with_part(page: str, name: str, text: str) -> str:
    """The page with this text there."""
    begin, end = _marks(name)
    return page.replace(f"{begin}{part_of(page, name)}{end}", f"{begin}{text}{end}")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
