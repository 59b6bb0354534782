"""What an installed library offers, read from its files: importing timm would load PyTorch, which takes seconds."""

import functools
import importlib.util
import re
from pathlib import Path


def package_dir(name: str) -> Path | None:
    """The folder of an installed top-level package, or None."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@functools.cache
def names_in(package: str, files: str, pattern: str) -> tuple[str, ...]:
    """What the first group of `pattern` matches in the package's files (a glob), sorted; () where it is absent."""
    folder = package_dir(package)
    found = {name for path in (folder.glob(files) if folder else ())
             for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)}
    return tuple(sorted(found))
