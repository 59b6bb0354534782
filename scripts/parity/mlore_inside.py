"""Where the features that MLoRE's reference numbers name are found in our model."""

from torch import Tensor, nn

from models.blocks.resize import resize
from models.model import MultiTaskModel
from scripts.parity.models import Recorder


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Hooks an MLoRE; after a forward pass the dict holds the features under the reference's names."""
    seen = Recorder()
    keep, keep_output = seen.keep, seen.keep_output
    encoder, decoder = model.encoder, model.decoder
    keep_output(encoder.patch_embed, "tokens.patch")
    keep(encoder.blocks[0], lambda inputs, _: {"tokens.pos": inputs[0]})
    keep_output(encoder.norm, "tokens.norm")
    for number, block in enumerate(encoder.blocks, start=1):
        keep_output(block, f"tokens.block{number}")
    for tap, proj in enumerate(decoder.tap_proj):
        keep_output(proj, f"fea_fuse.{tap}")
    for stage, modules in (("MLoRE_1", decoder.first), ("MLoRE_2", decoder.second)):
        for tap, module in enumerate(modules):
            _record_module(module, f"{stage}.{tap}", seen)
    for task, head in model.heads.items():
        keep_output(decoder.mix[task], f"task_mask.{task}.logits")
        keep(head, lambda inputs, out, task=task: {f"head_quarter.{task}": out,
                                                   f"head_in.{task}": resize(inputs[0], out.shape[-2:])})
    return seen


def _record_module(module: nn.Module, name: str, seen: Recorder) -> None:
    keep, keep_output = seen.keep, seen.keep_output
    keep(module, lambda _, out: {f"{name}.{task}.out": feat for task, feat in out[0].items()})
    keep(module, lambda _, out: {f"{name}.{task}.gate": gate for task, gate in out[1].items()})
    for task, router in module.router.items():
        here = f"{name}.{task}"
        keep_output(module.proj_in[task], f"{here}.conv1")
        keep_output(router.pool, f"{here}.convsp")
        keep(router.logits, lambda inputs, out, here=here: {f"{here}.route_feat": inputs[0],
                                                            f"{here}.router_logits": out})
        keep(module.mixture_norm[task], lambda inputs, out, here=here: {f"{here}.gated_sum": inputs[0],
                                                                       f"{here}.bn_all": out})
        keep(module.own_expert[task], lambda inputs, out, here=here:
             {f"{here}.task_lora": out / inputs[1][..., None, None]})
        keep_output(module.norm[task], f"{here}.bn")
