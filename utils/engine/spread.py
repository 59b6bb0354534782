"""How a model is spread over the processes of a run (`parallel`): a whole one on each (DDP), or parts of one (FSDP2).

With parts, weights, gradients, optimizer and moving average take the memory of one process divided by their number, and
the blocks of the backbone are brought together one after the other. References: Li et al., "PyTorch Distributed", VLDB
2020; Zhao et al., "PyTorch FSDP", VLDB 2023.
"""

import logging
from contextlib import nullcontext

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses.balancing.base import Balancing
from models.blocks.recompute import blocks_of
from utils import distributed
from utils.engine.averages import MovingAverage
from utils.engine.config import Config
from utils.engine.optimizers import OPTIMIZERS
from utils.recording import recording_stream
from utils.sharded import shard

logger = logging.getLogger(__name__)


def in_parts(config: Config) -> bool:
    """Whether the model of this run is spread in parts; a process alone holds all of it."""
    return config.parallel == "fsdp" and distributed.world_size() > 1


def spread(model: nn.Module, config: Config, device: torch.device) -> tuple[nn.Module, MovingAverage | None]:
    """What to call in training, and the moving average; `model` itself is changed in place.

    Several processes synchronise their batch norms on CUDA.
    """
    alone = distributed.world_size() == 1
    if not alone:
        _synchronise_batch_norm(model, device)
    ema = MovingAverage(model, config.ema_decay) if config.ema_decay else None
    if alone:
        return model, ema
    if in_parts(config):
        for whole in (model,) if ema is None else (model, ema.module):
            shard(whole, blocks := blocks_of(whole.encoder), device)
        logger.info("every process holds 1/%d of the model: in %d blocks of the backbone, and of the rest",
                    distributed.world_size(), len(blocks))
        return model, ema
    on_cuda = device.type == "cuda"
    # What DDP keeps must not belong to the default stream where updates are recorded on another.
    with torch.cuda.stream(recording_stream(device)) if on_cuda and config.cuda_graph else nullcontext():
        return DistributedDataParallel(model, device_ids=[device.index] if on_cuda else None,
                                       find_unused_parameters=config.find_unused_parameters), ema


def check_spread(config: Config, balancing: Balancing, images: int) -> None:
    """A ValueError for what cannot be trained in parts. images: of the split that is evaluated."""
    if not in_parts(config):
        return
    if balancing.needs_gradients:
        raise ValueError(f"loss_scheme {config.loss_kwargs.loss_scheme} compares whole gradients of single tasks, of "
                         "which parallel fsdp keeps parts; set parallel=ddp, or another loss_kwargs.loss_scheme")
    fit = [name for name in OPTIMIZERS if getattr(OPTIMIZERS.load(name), "in_parts", False)]
    if config.optimizer not in fit:
        raise ValueError(f"optimizer {config.optimizer} does not work on the parts that parallel fsdp keeps; set "
                         f"parallel=ddp, or one of {', '.join(fit)}")
    if images < distributed.world_size():
        raise ValueError(f"with parallel fsdp every process evaluates an image, but there are {images} for "
                         f"{distributed.world_size()} processes; set parallel=ddp")


def _synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    if device.type == "cuda":
        convert_sync_batchnorm(model)               # in place; timm's: it keeps the activation inside its batch norms
    else:
        logger.warning("batch norm is synchronised on CUDA only: every CPU process uses its own batch statistics")
