"""What the options of all decoders have in common. No PyTorch here: experiment files are checked without it."""

from dataclasses import dataclass
from typing import Literal

from utils.options import Options


class DecoderOptions(Options):
    """Base of a decoder's options dataclass, the `model_kwargs` of an experiment file."""

    @property
    def label_size(self) -> tuple[int, int] | None:
        """(height, width) of predictions and labels that these options ask for; None: the data set's own size."""
        return None


@dataclass(frozen=True)
class CoarseToFineOptions(DecoderOptions):
    """What BIM, MTMamba and MTMamba++ share."""

    upsample_init: Literal["plain", "icnr"] = "plain"  # how layers that make finer pixels start: icnr, all pixels alike
