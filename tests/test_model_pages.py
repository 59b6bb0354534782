"""The models' pages say what the program says: figures, options, parameters and multiply-adds."""

import pytest

from models.decoders import DECODERS
from scripts.docs_site.measured import kind_of
from scripts.docs_site.model_drawing import Drawing
from scripts.docs_site.model_figures import FIGURES
from scripts.docs_site.parts import part_of
from scripts.model_pages import DOCS, cost_part, experiments, options_part
from utils.engine.help_config import options


def page(name: str) -> str:
    return (DOCS / "models" / f"{name}.md").read_text(encoding="utf-8")


def test_every_decoder_has_a_figure():
    assert set(FIGURES) == set(DECODERS)


@pytest.mark.parametrize("name", FIGURES)
def test_the_figure_is_that_of_the_built_network(name):
    drawing = Drawing(name)
    assert (DOCS / "models" / f"{name}.svg").read_text(encoding="utf-8") == drawing.svg(), \
        f"run python scripts/draw_models.py {name}"
    assert drawing.covered() > 0.98                     # of the decoder's parameters are in its boxes
    assert f"({name}.svg)" in page(name) and f"`{drawing.figure.experiment}`" in page(name)


@pytest.mark.parametrize("name", FIGURES)
def test_options_are_those_of_the_decoder(name):
    assert part_of(page(name), "options") == options_part(name), f"run python scripts/model_pages.py {name} --write"
    for row in part_of(page(name), "options").splitlines():
        assert not row.endswith("|  |"), f"{name}: {row} says nothing of what it means"
    assert all(f"| `{option.name}` |" in page(name) for option in options(DECODERS, name))


@pytest.mark.parametrize("name", FIGURES)
def test_every_experiment_has_its_cost(name):
    names = [line.split("|")[1].strip() for line in part_of(page(name), "cost").splitlines()[2:]]
    assert names == [path.rpartition("/")[2].removesuffix(".yml") for path in experiments()[name]]


@pytest.mark.parametrize("name", ["bim", "demt", "multi_scale"])
def test_the_cost_is_that_of_the_built_network(name):
    row = cost_part([FIGURES[name].experiment]).splitlines()[-1]
    assert row in part_of(page(name), "cost").splitlines()
    assert row in part_of((DOCS / "models.md").read_text(encoding="utf-8"), "cost").splitlines()


def test_layers_in_words():
    from torch import nn
    conv, norm = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)
    block = nn.Sequential(conv, norm, nn.ReLU())
    assert kind_of(block) == "3 x 3 conv + batch norm + ReLU"
    assert kind_of(nn.Sequential(block, block)) == "2 x (3 x 3 conv + batch norm + ReLU)"
    assert kind_of(nn.ModuleDict({"depth": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})) == "2 x linear"
    assert kind_of(nn.ConvTranspose2d(1, 1, 2)) == "2 x 2 transposed conv" and kind_of(nn.GELU()) == "GELU"
