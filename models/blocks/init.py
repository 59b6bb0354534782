"""Initial weights of the transformers in this field."""

from torch import nn

INIT_STD = 0.02


def init_linear(module: nn.Module) -> None:
    """Truncated normal, std 0.02, zero bias, for every linear layer inside."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
