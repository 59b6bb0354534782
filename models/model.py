"""The one model class: backbone -> (neck) -> decoder -> one head per task -> resize to the label's size."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.autocast import without_autocast
from models.blocks.prompting import Prompting


class DecoderOutput(NamedTuple):
    """What every decoder returns. The dictionaries are never modified.

    feats: task -> (B, C, h, w), the input of that task's head. intermediate: task -> raw preliminary predictions
    (B, n_t, h', w'), for intermediate supervision. extra: named 0-dim losses of the decoder itself, already weighted.
    """

    feats: dict[str, Tensor]
    intermediate: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}


class Decoder(nn.Module):
    """Base of all decoders: everything that `models.build` and the model ask one for, with the usual answers.

    A decoder has to have
        Config: the dataclass of its options, the `model_kwargs` of an experiment file;
        __init__(tasks, in_channels, strides, config): `tasks` maps each task to its number of output channels;
            channels and strides of the maps, finest first. ValueError says why maps do not fit;
        forward(feats): those maps (B, C_i, h_i, w_i) -> `DecoderOutput`;
        make_head(num_outputs): a task's head, from its feats to raw outputs of any size.
    The attributes below are optional; those that depend on options or maps are set by __init__.
    """

    Config: ClassVar[type]
    head_names: ClassVar[Sequence[str]] = ()  # what `head` may say in files of the lineage besides "default"
    backbone_options: ClassVar[Mapping[str, Any]] = {}  # defaults of the backbone's arguments of these names
    needs_image_size: ClassVar[bool] = False  # __init__ also takes image_size, (height, width)
    recomputed: Sequence[type[nn.Module] | str] = ()  # for activation checkpointing, see `models.blocks.recompute`
    intermediate_weight: float = 1.0  # published factor of the preliminary predictions' losses
    input_multiple: int | None = None  # of the image's sides; None: the stride of the coarsest map
    output_size: tuple[int, int] | None = None  # (height, width) of the predictions that the options ask for

    @staticmethod
    def prompting(num_tasks: int, config: Any) -> Prompting | None:
        """The prompts that the backbone shall carry, of a decoder inside it; its __init__ also takes num_heads."""
        return None

    def make_head(self, num_outputs: int) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def reparameterise(self) -> None:
        """Merges what can be merged for inference, in eval mode; nothing by default."""


class Predictions(NamedTuple):
    """Raw outputs of a model (no softmax, no sigmoid): task -> (B, n_t, H, W), and the decoder's extras."""

    final: dict[str, Tensor]
    intermediate: dict[str, Tensor]
    extra: dict[str, Tensor]


class MultiTaskModel(nn.Module):
    """Composes the parts. The parameter tree is `encoder.*`, `neck.*`, `decoder.*`, `heads.{task}.*`.

    The decoder takes the encoder's list of feature maps, finest first, and returns a `DecoderOutput`; one whose
    prompts run inside the encoder takes a list of `PromptedMap`. `output_size` is (height, width) of the
    predictions; None means that of the image.
    """

    def __init__(self, encoder: nn.Module, neck: nn.Module | None, decoder: Decoder,
                 heads: Mapping[str, nn.Module], output_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.decoder = decoder
        self.heads = nn.ModuleDict(heads)
        self.output_size = output_size

    def forward(self, image: Tensor) -> Predictions:
        """(B, 3, H, W) float, ImageNet-normalised -> raw predictions at `output_size`."""
        size = self.output_size or image.shape[-2:]
        feats = self.encoder(image)                                 # finest first, (B, C_i, H / s_i, W / s_i)
        if self.neck is not None:
            feats = self.neck(feats)
        out = self.decoder(feats)
        with without_autocast(image):  # eight bits are too few for a depth in metres: it is the losses that show it
            final = {task: resize(head(_float32(out.feats[task])), size) for task, head in self.heads.items()}
        intermediate = {task: resize(logits, size) for task, logits in out.intermediate.items()}
        return Predictions(final, intermediate, out.extra)

    def prepare_for_inference(self) -> "MultiTaskModel":
        """In eval mode, with the layers that the decoder can merge merged (its `reparameterise`); returns itself."""
        self.eval()
        self.decoder.reparameterise()
        return self


def _float32(feat: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return feat.to(torch.promote_types(feat.dtype, torch.float32))


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners False; (B, n, h, w) -> (B, n, *size). Nothing happens at equal size."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
