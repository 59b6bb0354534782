"""The contract between a decoder and everything else: what it is built for, what it returns, what it may ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from models.decoders.options import DecoderOptions


@dataclass(frozen=True)
class BuildContext:
    """What a decoder is built for; ValueError without tasks or maps.

    tasks: the number of output channels of every task; their order is part of the model.
    channels, strides: of the maps that the decoder receives, finest first.
    image_size: (height, width) in pixels.
    num_heads: attention heads of every level of a backbone that carries prompts, else ().
    leveled: the tasks whose head also takes a list of maps, finest first (`models.heads`).
    """

    tasks: Mapping[str, int]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: tuple[int, int]
    num_heads: tuple[int, ...] = ()
    leveled: frozenset[str] = frozenset()

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("a decoder needs one or more tasks, got none")
        self.require_maps(self.channels, "one or more maps")

    def require_maps(self, condition: object, needed: str, neck: str = "") -> None:
        """ValueError that says which maps are needed and which there are, unless the condition holds.

        neck: the name of the neck that makes such maps out of others, if there is one.
        """
        if not condition:
            hint = f"; `neck: {neck}` with `neck_kwargs: {{embed_dim: WIDTH}}` makes them out of others" if neck else ""
            raise ValueError(f"the decoder needs {needed}; got widths {self.channels} and strides "
                             f"{self.strides}{hint}")


class DecoderOutput(NamedTuple):
    """What every decoder returns. The dictionaries are never modified.

    feats: task -> (B, C, h, w), the input of that task's head; for a task of `BuildContext.leveled` it may be a list of
    four such maps, finest first. intermediate: task -> raw preliminary predictions (B, n_t, h', w'), for intermediate
    supervision; those of tasks that are no maps are not supervised. extra: named 0-dim losses of the decoder itself,
    already weighted.
    """

    feats: dict[str, Tensor | list[Tensor]]
    intermediate: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}


class Decoder(nn.Module):
    """Base of all decoders.

    A decoder has to have
        Config: the dataclass of its options, derived from `DecoderOptions`;
        __init__(context, config): a `BuildContext` and an instance of `Config`. ValueError says why they do not fit;
        forward(feats): maps (B, C_i, h_i, w_i), finest first -> `DecoderOutput`.
    The rest has a usual answer, given here; what depends on options or maps is set by __init__.
    """

    Config: ClassVar[type[DecoderOptions]]
    intermediate_weight: ClassVar[float] = 1.0  # published factor of the preliminary predictions' losses
    needs_labels: ClassVar[bool] = False  # whether forward(feats, labels) takes the labels, None but in training
    recomputed: ClassVar[Sequence[type[nn.Module] | str]] = ()  # see `models.blocks.recompute`
    input_multiple: int | None = None  # of the image's sides; None: the stride of the coarsest map
    takes_task_maps: ClassVar[bool] = False  # whether forward also takes `TaskMaps`, every task's own
    unread_maps: ClassVar[Sequence[int]] = ()  # of those it is given, counted from the finest
    logit_std: ClassVar[float | None] = None  # of the usual head's initial weights, beside zero biases; None: PyTorch's

    @classmethod
    def backbone_options(cls, tasks: Mapping[str, int], config: Any) -> dict[str, Any]:
        """What the backbone is built with where the experiment file leaves it open: option -> value.

        Options that the backbone does not have are ignored. The entry `prompting`, an object of the class of that name
        in `models.blocks.prompting`, asks for the variant of the backbone that carries task prompts.
        """
        return {}

    def make_head(self, num_outputs: int) -> nn.Module:
        """The head of a task that is a map, from its feats to raw outputs of any size.

        One linear layer per pixel, on `self.channels`.
        """
        head = nn.Conv2d(self.channels, num_outputs, kernel_size=1)
        if self.logit_std is not None:
            nn.init.normal_(head.weight, std=self.logit_std)
            nn.init.zeros_(head.bias)
        return head

    def reparameterise(self) -> None:
        """Merges what can be merged for inference, in eval mode; nothing by default."""
