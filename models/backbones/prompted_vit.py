"""The plain ViT with task prompts among its tokens: TaskPrompter's encoder (see `models.blocks.prompting`).

Blocks, embedding and published weights are those of `models.backbones.vit`. Prompts and patches form one
sequence, prompts first, and share all layers of a block; what a block adds is a branch in which each prompt is
turned into a map over the grid and scored against every channel. Two linear layers run over all positions, so
the model belongs to one image size.
Letters: B batch, T prompts, C channels, H W grid, N = H W, M heads, n windows per side.
"""

import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, cat, nn

from models.backbones.vit import ViTBackbone, ViTConfig
from models.blocks.layers import init_linear
from models.blocks.prompting import PromptedMap, Prompting, channel_attention, channel_scores, new_prompts


class ChannelBranch(nn.Module):
    """A block's scores of prompts towards channels, and what they add to the prompts.

    The published models add a linear map of the query itself and make nothing of the attention that the paper
    describes; `attend_channels` takes the paper's way. The last block's prompts go nowhere: `is_last` has no
    layers for their update.
    """

    def __init__(self, channels: int, grid: tuple[int, int], prompting: Prompting, is_last: bool):
        super().__init__()
        positions, self.grid, self.num_windows = grid[0] * grid[1], grid, prompting.num_windows
        self.to_map = nn.Linear(channels, positions)
        self.attended = nn.Linear(positions, positions) if prompting.attend_channels and not is_last else None
        self.to_prompts = None if is_last else nn.Linear(positions, channels)
        init_linear(self)

    def forward(self, prompts: Tensor, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised (B, T, C), (B, N, C) -> scores (B, T, C, n, n) and an update (B, T, C)."""
        flat = self.to_map(prompts)  # (B, T, N)
        query, feat = (rearrange(x, "b a (h w) -> b a h w", h=self.grid[0]) for x in (flat, patches.mT))
        scores = channel_scores(query, feat, self.num_windows)
        if self.attended is not None:
            scale = (flat.shape[-1] / self.num_windows**2) ** -0.5  # the length of one inner product
            flat = self.attended(channel_attention(scores, feat, scale).flatten(2))
        return scores, None if self.to_prompts is None else self.to_prompts(flat)


class PromptedViT(ViTBackbone):
    """ViT that returns a `PromptedMap` per tap. ValueError where the windows do not fit its grid."""

    recomputed = ("run_block",)
    never_pretrained = ("task_prompts", "prompting")

    def __init__(self, config: ViTConfig, image_size: tuple[int, int], prompting: Prompting):
        super().__init__(config, image_size)
        if config.class_token is False:
            raise ValueError("a ViT with prompts has the class token's row of the position embedding, as the published "
                             "ones; leave backbone_kwargs.class_token out")
        grid, n = self.patch_embed.grid_size, prompting.num_windows
        if any(side % n for side in grid):
            raise ValueError(f"a token grid of {grid[0]}x{grid[1]} cannot be cut into the {n}x{n} windows of "
                             f"chan_nheads {n * n}; both sides must be multiples of {n}")
        if prompting.image_scale != 1:
            raise ValueError(f"img_ds_ratio {prompting.image_scale} is for a Swin; with a ViT it must be 1")
        self.cls_token = None  # the published models have none, though pos_embed keeps an entry for it
        self.num_prompts = prompting.num_prompts
        self.num_heads = (self.blocks[0].attn.num_heads,) * len(self.taps)
        self.task_prompts = new_prompts(self.num_prompts, self.embed_dim)
        self.prompting = nn.ModuleList(
            ChannelBranch(self.embed_dim, grid, prompting, is_last=number == len(self.blocks))
            for number in range(1, len(self.blocks) + 1))

    def forward(self, image: Tensor) -> list[PromptedMap]:
        """Normalised image (B, 3, H*patch, W*patch) -> one level per tap, shallowest first."""
        self.check_size(image)
        patches = self.patch_embed(image) + self.pos_embed[:, 1:]  # (B, N, C)
        prompts = self.task_prompts.repeat(image.shape[0], 1, 1)  # (B, T, C)
        tokens, levels = cat((prompts, patches), dim=1), []  # (B, T + N, C)
        for number, (block, branch) in enumerate(zip(self.blocks, self.prompting, strict=True), start=1):
            tokens, scores, channel = self.run_block(block, branch, tokens)
            if number in self.taps:
                tap = self.norm(tokens) if number == len(self.blocks) else tokens
                levels.append(self._level(tap, scores, channel))
        return levels

    def run_block(self, block: Block, branch: ChannelBranch, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T + N, C) -> the same, prompts' scores (B, M, T, T + N), channel scores (B, T, C, n, n)."""
        normed = block.norm1(tokens)
        out, scores = prompt_attention(block.attn, normed, self.num_prompts)
        channel, update = branch(*self.split(normed))
        for_prompts, for_patches = self.split(out)
        if update is not None:
            for_prompts = for_prompts + update
        tokens = tokens + cat((block.drop_path1(for_prompts), block.drop_path1(for_patches)), dim=1)
        out = (block.drop_path2(x) for x in self.split(block.mlp(block.norm2(tokens))))
        return tokens + cat(tuple(out), dim=1), scores, channel

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T + N, C) -> prompts (B, T, C), patches (B, N, C)."""
        return tokens[:, :self.num_prompts], tokens[:, self.num_prompts:]

    def _level(self, tokens: Tensor, scores: Tensor, channel: Tensor) -> PromptedMap:
        height, width = self.patch_embed.grid_size
        feat = rearrange(self.split(tokens)[1], "b (h w) c -> b c h w", h=height).contiguous()
        mutual, spatial = scores[..., :self.num_prompts], scores[..., self.num_prompts:]
        return PromptedMap(feat, rearrange(spatial, "b m t (h w) -> b m t h w", w=width), channel, mutual)


def prompt_attention(attention: Attention, tokens: Tensor, num_prompts: int) -> tuple[Tensor, Tensor]:
    """Attention among all tokens (B, L, C) -> its result (B, L, C), the prompts' raw scores (B, M, T, L)."""
    q, k, v = rearrange(attention.qkv(tokens), "b l (three m d) -> three b m l d", three=3, m=attention.num_heads)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.proj(rearrange(out, "b m l d -> b l (m d)")), q[:, :, :num_prompts] @ k.mT
