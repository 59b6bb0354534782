"""HRNetV2 as an image backbone (Wang et al., PAMI 2020): four branches that stay at strides 4, 8, 16, 32.

The multi-task baselines were trained on the segmentation variant, which differs from timm's classifier in one
way that changes numbers: a coarse branch joins a finer one by bilinear interpolation, not by repeating pixels.
timm's modules hold the layers and therefore its keys, which are those of the original release and of
OpenMMLab, too; the forward pass is ours. It also takes images of any size, where timm's needs multiples of 32.
Letters: B batch, C channels of a branch, H W its size, i the finer and j the coarser of two branches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm.models.hrnet import HighResolutionModule, HighResolutionNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from models.blocks.resize import resize
from utils.options import Options

STEM_WIDTH = 64


@dataclass(frozen=True)
class HRNetConfig(Options):
    """Options of the backbone.

    width: channels of the finest map; the four maps have 1, 2, 4, 8 times as many.
    num_blocks: residual blocks of every branch in every module.
    num_modules: modules of the stages with two, three and four branches.
    stem_blocks: bottleneck blocks before the first branching.
    """

    width: int
    num_blocks: int
    num_modules: tuple[int, int, int]
    stem_blocks: int

    def __post_init__(self):
        self.require_counts("width", "num_blocks", "stem_blocks")
        self.require(min(self.num_modules) >= 1, "num_modules", "numbers of at least 1")


class HRNetBackbone(HighResolutionNet):
    """HRNet without classifier; accepts any image size (sizes round up)."""

    Config = HRNetConfig
    recomputed = (BasicBlock, Bottleneck)
    never_pretrained = ()

    def __init__(self, config: HRNetConfig, image_size: tuple[int, int]):
        channels = tuple(config.width * 2**branch for branch in range(4))
        stages = {f"stage{branches}": _stage("BASIC", modules, (config.num_blocks,) * branches, channels[:branches])
                  for branches, modules in zip((2, 3, 4), config.num_modules, strict=True)}
        stem = _stage("BOTTLENECK", 1, (config.stem_blocks,), (STEM_WIDTH,))
        super().__init__({"stem_width": STEM_WIDTH, "stage1": stem, **stages}, head="none")
        self.channels, self.strides = channels, (4, 8, 16, 32)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normalised image (B, 3, H, W) -> four maps (B, C_i, ceil(H/s_i), ceil(W/s_i)), finest first."""
        feat = self.act1(self.bn1(self.conv1(image)))  # (B, 64, H/2, W/2)
        maps = [self.layer1(self.act2(self.bn2(self.conv2(feat))))]  # (B, 256, H/4, W/4)
        stages = ((self.transition1, self.stage2), (self.transition2, self.stage3), (self.transition3, self.stage4))
        for transition, stage in stages:
            # The last step makes the new branch, out of the coarsest one there is.
            maps = [step(maps[min(index, len(maps) - 1)]) for index, step in enumerate(transition)]
            for module in stage:
                maps = _run_module(module, maps)
        return maps

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every published layout has this module's keys; those of the classifier remain over."""
        return dict(state)


def _stage(block: str, num_modules: int, num_blocks: Sequence[int], channels: Sequence[int]) -> dict:
    """A stage in timm's words."""
    return {"block_type": block, "num_modules": num_modules, "num_branches": len(channels),
            "num_blocks": num_blocks, "num_channels": channels, "fuse_method": "SUM"}


def _run_module(module: HighResolutionModule, maps: Sequence[Tensor]) -> list[Tensor]:
    """One exchange of all branches: residual blocks, then each branch receives the sum of all of them."""
    maps = [branch(feat) for branch, feat in zip(module.branches, maps, strict=True)]
    out = []
    for i, row in enumerate(module.fuse_layers):
        terms = [_to_finer(step, maps[j], 2 ** (j - i), maps[i].shape[-2:]) if j > i else step(maps[j])
                 for j, step in enumerate(row)]
        out.append(module.fuse_act(sum(terms[1:], start=terms[0])))
    return out


def _to_finer(step: nn.Sequential, feat: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """(B, C_j, h, w) -> (B, C_i, *size): 1 x 1 convolution, norm, then two resizes.

    First by the exact factor, then to the finer branch's own size; they differ where sizes were rounded up.
    """
    convolution, norm, _ = step  # the third is timm's repetition of pixels
    height, width = feat.shape[-2:]
    return resize(resize(norm(convolution(feat)), (height * factor, width * factor)), size)
