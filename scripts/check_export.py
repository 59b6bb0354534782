"""Exports a small network of every decoder and compares what was written with PyTorch, at two sizes.

    python scripts/check_export.py                    # ONNX, all decoders; minutes
    python scripts/check_export.py bim mlore --format torch_export

The networks have random weights and the options of `SMALL`; the errors are those that `--run_mode export` prints. With
an open size one file of each is enough: it is checked at several.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.decoders import DECODERS
from scripts.command_line import Command
from utils.engine.build import model_from_config
from utils.engine.checkpoint import save_checkpoint
from utils.engine.config import load_config
from utils.engine.exports import DYNAMIC, EXPORTS
from utils.engine.exports.job import Job
from utils.engine.stored_model import own_config

SIZES = ((64, 64), (64, 128))
ROOT = Path(__file__).resolve().parents[1]
SWIN = "backbone_kwargs={embed_dim: 16, depths: [1, 2, 1, 1], num_heads: [1, 2, 4, 8], window_size: 4}"
VIT = "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2}"
SMALL = {   # decoder -> (backbone, its options, the decoder's)
    "bim": ("swin", SWIN, "{msst_depth: 1, d_state: 4}"),
    "bridgenet": ("swin", SWIN, "{embed_dim: 16, PRED_OUT_NUM_CONSTANT: 16, refine_depth: [1, 1, 1]}"),
    "demt": ("swin", SWIN, "{dim: 8}"), "fcn": ("swin", SWIN, "{}"),
    "invpt": ("vit", VIT, "{embed_dim: 16, PRED_OUT_NUM_CONSTANT: 16}"),
    "mlore": ("vit", VIT, "{final_embed_dim: 8, rank_list: [2, 4], topk: 1, spe_rank: 2}"),
    "mtmamba": ("swin", SWIN, "{stm_depth: 1, d_state: 4}"),
    "mtmamba_plus": ("swin", SWIN, "{stm_depth: 1, d_state: 4}"),
    "multi_scale": ("swin", SWIN, "{channels: 8}"),
    "taskdiffusion": ("vit", VIT, "{final_embed_dim: 8, timesteps: 2, module_layer: 1}"),
    "taskprompter": ("vit", VIT, "{embed_dim: 8, final_embed_dim: 8, level_embed_dim: 8, chan_embed_dim: 4}"),
}
ON_SWIN = ("backbone=swin", SWIN, "neck=one_stride", "neck_kwargs={embed_dim: 8}")
ANY_SIZE = {"invpt": ON_SWIN}   # what stands in for a ViT where the size is open


def checkpoint_of(decoder: str, size: tuple[int, int], folder: Path, *overrides: str) -> Path:
    """A checkpoint with random weights of a small network. overrides: of its experiment, as in a command line."""
    backbone, backbone_kwargs, model_kwargs = SMALL[decoder]
    config = load_config(ROOT / "configs" / "example" / "bim_nyud.yml", [
        f"model={decoder}", f"backbone={backbone}", "neck=none", "neck_kwargs=null", "backbone_kwargs=null",
        backbone_kwargs, "model_kwargs=null", f"model_kwargs={model_kwargs}", "pretrained=false", "device=cpu",
        f"image_size=[{size[0]}, {size[1]}]", "intermediate_supervision=false", *overrides])
    torch.manual_seed(0)
    state = {"model": model_from_config(config).state_dict(), "config": config.to_dict(), "step": 0}
    path = folder / f"{decoder}.pt"
    save_checkpoint(path, state)
    return path


def run(decoders: Sequence[str], format: str, dynamic: str) -> int:
    """One export per decoder and size; the number of those that failed."""
    failed, is_open = 0, dynamic in ("size", "both")
    for decoder in decoders or SMALL:
        for size in SIZES[1:] if is_open else SIZES:
            overrides = ANY_SIZE.get(decoder, ()) if is_open else ()
            with tempfile.TemporaryDirectory() as folder:
                path, start = checkpoint_of(decoder, size, Path(folder), *overrides), time.process_time()
                try:
                    EXPORTS.load(format)(Job(own_config(path), path, dynamic, Path(folder) / "export"))
                    seconds = time.process_time() - start
                    print(f"{decoder} {size}: passed, {seconds:.0f} s of processor time", flush=True)
                except ValueError as error:
                    failed += 1
                    print(f"{decoder} {size}: {error}", flush=True)
    return failed


main = Command(__doc__, run, {
    "decoders": dict(nargs="*", metavar="DECODER", help=f"default: all ({', '.join(DECODERS)})"),
    "--format": dict(choices=tuple(EXPORTS), default="onnx"),
    "--dynamic": dict(choices=DYNAMIC, default="none"),
})

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
