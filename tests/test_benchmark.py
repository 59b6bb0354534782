"""The counted sizes are those of the specification: BIM's on both data sets, MTMamba's as published."""

import pytest

from scripts.benchmark import count
from tests.shared import ROOT
from utils.engine.config import load_config


@pytest.mark.parametrize(("name", "parameters", "gmacs", "encoder_gmacs"), [
    ("bim_nyud", 295_860_129, 452.9, 202.5),
    ("bim_pascal", 320_856_598, 522.5, 205.6),
    ("mtmamba_plus_nyud", 315_021_249, 522.3, 202.5),
    ("demt_nyud", 32_070_259, 120.7, 22.3),            # the original: 129.1, some without effect
    ("baselines/fcn_nyud_hrnet18", 4_515_556, 17.5, 7.7),
])
def test_parameters_and_multiply_adds(name, parameters, gmacs, encoder_gmacs):
    rows = dict(count(load_config(ROOT / "configs" / f"{name}.yml")))
    assert rows["parameters, total"] == f"{parameters:,}"
    assert float(rows["GMACs, total"]) == pytest.approx(gmacs, abs=0.15)
    assert float(rows["GMACs, encoder"]) == pytest.approx(encoder_gmacs, abs=0.15)
