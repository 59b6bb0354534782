"""Plain Vision Transformer as an image backbone (Dosovitskiy et al., ICLR 2021), four maps at stride 16.

InvPT and its successors tap a ViT at four depths instead of using a pyramid. The module is timm's
`VisionTransformer` without classifier, so that its state dict keeps timm's keys; only the forward pass (taps)
and the resizing of the position embedding at load time are ours.
Letters: B batch, C channels, H W token grid, N = H * W.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from utils.options import Options

logger = logging.getLogger(__name__)

PATCH_KEY_NPZ = "embedding/kernel"  # names in the original AugReg files
POSITION_KEY_NPZ = "Transformer/posembed_input/pos_embedding"


@dataclass(frozen=True)
class ViTConfig(Options):
    """Options of the backbone.

    embed_dim, depth, num_heads: width, number of blocks, attention heads.
    patch_size: side of a patch in pixels, also the stride of the maps.
    taps: blocks (counted from 1) after which to read the tokens; empty: the four quarters of the depth.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    class_token: false leaves it out, with its row of the position embedding; empty: as the decoder's published
    models have it, and true where they say nothing.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    taps: tuple[int, ...] | None = None
    drop_path_rate: float = 0.15
    class_token: bool | None = None

    def __post_init__(self):
        self.require_counts("embed_dim", "depth", "num_heads", "patch_size")
        self.require_rates("drop_path_rate")
        self.require(self.embed_dim % self.num_heads == 0, "num_heads", f"a divisor of embed_dim, {self.embed_dim}")
        rising = list(self.tapped) == sorted(set(self.tapped))
        self.require(self.tapped and rising and self.tapped[0] >= 1 and self.tapped[-1] <= self.depth, "taps",
                     f"numbers that rise within 1 to {self.depth}, the depth; by default its four quarters")

    @property
    def tapped(self) -> tuple[int, ...]:
        """The blocks after which tokens are read."""
        if self.taps is not None:
            return self.taps
        return tuple(self.depth * quarter // 4 for quarter in (1, 2, 3, 4))


class ViTBackbone(VisionTransformer):
    """ViT whose maps are the tokens after some of its blocks, without the class token.

    A tap on the last block is read after the final LayerNorm, the others are not normalised. The position embedding
    belongs to one grid: images have `image_size`, (height, width) in pixels, both multiples of the patch size.
    """

    Config = ViTConfig
    recomputed = (Block,)
    never_pretrained = ()

    def __init__(self, config: ViTConfig, image_size: tuple[int, int]):
        height, width = image_size
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(f"a ViT needs an image size of multiples of {config.patch_size} but got {height}x{width}")
        super().__init__(
            img_size=(height, width), patch_size=config.patch_size, embed_dim=config.embed_dim, depth=config.depth,
            num_heads=config.num_heads, num_classes=0, global_pool="", class_token=config.class_token is not False,
            drop_path_rate=config.drop_path_rate)
        self.image_size = (height, width)
        self.taps = config.tapped
        self.channels = (config.embed_dim,) * len(self.taps)
        self.strides = (config.patch_size,) * len(self.taps)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normalised image (B, 3, H*patch, W*patch) -> one map (B, C, H, W) per tap, shallowest first."""
        self.check_size(image)
        tokens = self.patch_embed(image)  # (B, N, C), row-major
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)  # (B, 1+N, C)
        tokens = tokens + self.pos_embed
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.taps:
                tap = self.norm(tokens) if number == len(self.blocks) else tokens
                grid_h, _ = self.patch_embed.grid_size
                maps.append(rearrange(tap[:, self.num_prefix_tokens:], "b (h w) c -> b c h w", h=grid_h).contiguous())
        return maps

    def check_size(self, image: Tensor) -> None:
        """Raises ValueError unless the image has the size that the module was built for."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError("ViT was built for images of {}x{} (height x width; its position embedding has that grid) "
                             "but got {}x{}".format(*self.image_size, *image.shape[-2:]))

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm weights -> the same with the position embedding resized to this module's grid.

        Without a class token that of the file is dropped.
        """
        state, own = dict(state), self.pos_embed.shape
        has_class_row = own[1] > self.patch_embed.num_patches
        if "pos_embed" in state and (has_class_row or state["pos_embed"].shape != own):
            embedding = resize_position_embedding(state["pos_embed"], self.patch_embed.grid_size)  # (1, 1+N, C)
            state["pos_embed"] = embedding[:, -own[1]:]
        if self.cls_token is None:
            state.pop("cls_token", None)
        return state

    def read_npz(self, path: Path) -> dict[str, Tensor]:
        """Original AugReg `.npz` file -> state dict in timm's keys, with the sizes of the file."""
        with np.load(path, allow_pickle=False) as arrays:
            shapes = {key: arrays[key].shape for key in (PATCH_KEY_NPZ, POSITION_KEY_NPZ) if key in arrays}
            depth = len({key.split("/")[1] for key in arrays if key.startswith("Transformer/encoderblock_")})
        if len(shapes) < 2:
            raise ValueError(f"{path} is not an AugReg ViT file: it lacks '{PATCH_KEY_NPZ}' or "
                             f"'{POSITION_KEY_NPZ}'")
        patch_size, _, _, embed_dim = shapes[PATCH_KEY_NPZ]
        side = round((shapes[POSITION_KEY_NPZ][1] - 1) ** 0.5) * patch_size
        # A module of the file's own sizes takes the arrays: timm's reader would resize with another kernel.
        reader = VisionTransformer(
            img_size=side, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_classes=0,
            num_heads=self.blocks[0].attn.num_heads, global_pool="")
        reader.load_pretrained(str(path))
        return reader.state_dict()


def resize_position_embedding(embedding: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(1, 1+n, C) -> (1, 1+H*W, C): class entry kept, grid bicubic, no antialiasing, align_corners False.

    Antialiasing, timm's default, is another kernel even when enlarging (cubic coefficient -0.5, not -0.75). The source
    grid is taken as square; only an n that is no square number but equal to H * W is taken as the grid of this model
    already.
    """
    height, width = grid_size
    num_patches = embedding.shape[1] - 1
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        if num_patches == height * width:
            return embedding
        raise ValueError(f"position embedding of {num_patches} patches is not a square grid and not the "
                         f"{height}x{width} grid of this model; use a checkpoint of the same image size")
    resized = resample_abs_pos_embed(embedding, grid_size, antialias=False)
    if resized is not embedding:
        logger.info("position embedding resized from %dx%d to %dx%d (bicubic)", side, side, height, width)
    return resized
