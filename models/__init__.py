"""Networks: backbones, necks, decoders and what they are built of; and the door to a trained one, `load_model`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.engine.predictor import Predictor


def load_model(source: str | Path, device: str = "auto", config: str | Path | None = None,
               overrides: Sequence[str] = (), batch: int | None = None) -> "Predictor":
    """A trained network that predicts: `load_model("runs/bim_nyud").predict("photo.jpg")["depth"].array`.

    Args:
        source: a checkpoint (ours or a released .pth.tar), the folder of a run, or a name on the Hugging Face Hub.
        device: auto, cpu, cuda or cuda:N.
        config: the experiment file, for a checkpoint that does not hold its configuration.
        overrides: `key=value` arguments as on the command line, e.g. ["precision=bf16"].
        batch: pictures in one forward pass of `stream`; default: 1 on a CPU, the experiment's valBatch on a GPU.

    This is the one place where a lower floor opens a higher one: a network alone knows neither classes nor units. The
    import is made when the function is called, and pyproject.toml names it as the exception.
    """
    from utils.engine.predictor import Predictor
    return Predictor.load(source, device, config, overrides, batch)
