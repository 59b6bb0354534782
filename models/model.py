"""The one model class: backbone -> neck -> decoder -> one head per task -> resize to the label's size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.blocks.layers import without_autocast
from models.blocks.resize import resize
from models.blocks.task_maps import of_maps
from models.decoder import Decoder


class Predictions(NamedTuple):
    """Raw outputs of a model (no softmax, no sigmoid): task -> (B, n_t, H, W), and the decoder's extras.

    In `final` a task that is no map has what its head returns.
    """

    final: dict[str, Any]
    intermediate: dict[str, Tensor]
    extra: dict[str, Tensor]


class MultiTaskModel(nn.Module):
    """Composes the parts. The parameter tree is `encoder.*`, `neck.*`, `decoder.*`, `heads.{task}.*`.

    Neck and decoder take a list of feature maps, finest first; a decoder whose prompts run inside the encoder takes a
    list of `PromptedMap`. `label_size` is (height, width) of the predictions; None means that of the image.
    """

    def __init__(self, encoder: nn.Module, neck: nn.Module, decoder: Decoder, heads: Mapping[str, nn.Module],
                 label_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.decoder = decoder
        self.heads = nn.ModuleDict(heads)
        self.label_size = label_size

    def forward(self, image: Tensor, labels: Mapping[str, Tensor] | None = None) -> Predictions:
        """(B, 3, H, W) float, ImageNet-normalised -> raw predictions.

        labels: task -> (B, C, H, W), void 255; only a decoder that codes them (`needs_labels`) looks at them, in
        training mode.

        Maps (B, n, h, w) are resized to `label_size`. Whatever else a head returns (a dictionary, a tuple, a tensor
        without grid, such as scores of a list of boxes) passes as it is.
        """
        size = self.label_size or image.shape[-2:]
        feats = of_maps(self.neck, self.encoder(image))  # finest first, (B, C_i, H / s_i, W / s_i)
        out = self.decoder(feats, labels) if self.decoder.needs_labels else self.decoder(feats)
        # Heads run in float32: bfloat16 has 8 significant bits, too few for a depth in metres; the losses would differ
        # from those of float32 (docs/training_speed.md).
        with without_autocast(image):
            final = {task: _fit(head(_at_least_float32(out.feats[task])), size) for task, head in self.heads.items()}
        intermediate = {task: _fit(logits, size) for task, logits in out.intermediate.items() if _is_map(final[task])}
        return Predictions(final, intermediate, out.extra)

    def prepare_for_inference(self) -> "MultiTaskModel":
        """In eval mode, with the layers that the decoder can merge merged (its `reparameterise`); returns itself."""
        self.eval()
        self.decoder.reparameterise()
        return self


def _at_least_float32(feat: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(feat, Tensor):
        return feat.to(torch.promote_types(feat.dtype, torch.float32))
    return [_at_least_float32(level) for level in feat]


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4


def _fit(output: Any, size: tuple[int, int]) -> Any:
    return resize(output, size) if _is_map(output) else output
