"""What the options of all decoders have in common. No PyTorch here: experiment files are checked without it."""

from utils.options import Options


class DecoderOptions(Options):
    """Base of a decoder's options dataclass, the `model_kwargs` of an experiment file."""

    @property
    def label_size(self) -> tuple[int, int] | None:
        """(height, width) of predictions and labels that these options ask for; None: the data set's own size."""
        return None
