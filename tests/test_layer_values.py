"""Which layers of checkpoints put out the largest numbers."""

import math

import torch

from scripts.layer_values import main
from tests.test_train import NYUD, QUIET
from utils.engine.build import model_from_config
from utils.engine.config import load_config

CROSS_TASK = "decoder.stages.0.bcfr"


def listed(capsys, files) -> list[list[str]]:
    """The rows of the table: a layer, and its largest number in each checkpoint."""
    assert main([*map(str, files), "--images", "1", "--layers", "1000"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]     # and not the log
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_second_pass_of_bim_overflows_unless_a_norm_stands_before_it(tiny, tmp_path, capsys):
    """The same weights; then what goes into the coarsest stage's scans is some hundred times as large."""
    found = {}
    for between in ("nothing", "norm"):
        config = load_config(NYUD, [*tiny, *QUIET, f"model_kwargs.between_passes={between}"])
        torch.manual_seed(0)
        model = model_from_config(config)
        files = [tmp_path / between / name for name in ("fresh.pt", "grown.pt")]
        files[0].parent.mkdir()
        for path, factor in zip(files, (1.0, 200.0), strict=True):
            with torch.no_grad():
                model.decoder.stages[0].bcfr.conv.weight.mul_(factor)
            torch.save({"model": model.state_dict(), "config": config.to_dict(), "step": 0}, path)
        rows = listed(capsys, files)
        assert all(math.isfinite(float(fresh)) for _, fresh, _ in rows)
        found[between] = {layer: float(grown) for layer, _, grown in rows}
    assert math.isnan(found["nothing"][f"{CROSS_TASK}.out_proj"])          # behind the norm that squares
    assert next(iter(found["nothing"])) == f"{CROSS_TASK}.out_proj"         # what is not finite comes first
    assert math.isfinite(found["nothing"][f"{CROSS_TASK}.scan.between"])
    assert all(map(math.isfinite, found["norm"].values()))
    assert list(found["norm"].values()) == sorted(found["norm"].values(), reverse=True)
