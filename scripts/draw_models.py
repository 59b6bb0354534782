"""Draws the data flow of every decoder, docs/models/NAME.svg, from the built networks.

    python scripts/draw_models.py [NAME ...]

The network of an official experiment is built and run on the meta device, which takes no memory. scripts/docs_site/
model_figures.py says which parts are shown and how they hang together; what they are made of, how many parameters they
have and which maps leave them is asked of the network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.docs_site.model_drawing import draw
from scripts.docs_site.model_figures import FIGURES

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "models"


def draw_models(names: list[str]) -> None:
    """Writes the figures, of all decoders where none is named."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        (FOLDER / f"{name}.svg").write_text(draw(name), encoding="utf-8")
        print(f"wrote docs/models/{name}.svg")


main = Command(__doc__, draw_models, {
    "names": dict(nargs="*", choices=[[], *FIGURES], metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all"),
})

if __name__ == "__main__":
    sys.exit(main())
