"""BridgeNet as published: whole models of toy size, their losses and scores, and the keys of the full-size ones.

The evaluation was computed in float32, the training step in float64 and stored in float32.
"""

import math
from collections.abc import Iterator

from einops import rearrange

from models.blocks.resize import resize
from models.model import MultiTaskModel
from models.released.bridgenet import BRIDGENET
from scripts.parity import compare
from scripts.parity.base import Bound, Measure, absolute_error, stored_error, stored_share
from scripts.parity.case import MODEL, NO_EFFECT, Bounds, Case, System
from scripts.parity.program import build, filled, flops, losses_and_gradients, meter, parameters, shipped
from scripts.parity.scores import SCORE, compare_losses

VIT_SIZES = ("embed_dim", "depth", "num_heads", "patch_size")
INTERN_SIZES = {"channels": "embed_dim", "core_kernel": "kernel_size",      # the reference's name -> ours
                **{name: name for name in ("depths", "groups", "offset_scale", "mlp_ratio", "layer_scale", "post_norm",
                                           "center_feature_scale")}}
TRAINED = Bound(stored_error, 1e-9, 5e-5)


def _build(config: dict) -> MultiTaskModel:
    c, sizes = config, config["backbone"]
    if sizes["type"] == "vit":
        name, kwargs = "vit", {key: sizes[key] for key in VIT_SIZES}
        kwargs["taps"] = [*sizes["select_list"], sizes["depth"]]
    else:
        name, kwargs = "internimage", {ours: sizes[key] for key, ours in INTERN_SIZES.items() if key in sizes}
    return build("BridgeNet", name, c["tasks"], c["image_size"], {**kwargs, "drop_path_rate": 0.0}, {
        "embed_dim": c["embed_dim"], "PRED_OUT_NUM_CONSTANT": c["pred_out_num_constant"],
        "mtt_resolution_downsample_rate": c["mtt_resolution_downsample_rate"],
        "refine_depth": tuple(c["refine_depth"]), "dilations": tuple(c["dilated_ratio"][0][:3]),
        "squeeze_ratio": c["squeeze_ratio"][0][0], "drop_path_rate": 0.0})


def _outputs(case: Case) -> Iterator[Measure]:
    yield from compare.outputs(case)
    intermediate = case.predict().intermediate
    for task, low in case.below("eval.mid.inter_low.").items():
        want = resize(low, tuple(case.config["image_size"]))
        yield case.measure("value", f"inter.{task}", intermediate[task], want)


def _scores(case: Case) -> Iterator[Measure]:
    """Losses and meters on the stored outputs."""
    table, size, final = case.table("metrics"), tuple(case.config["image_size"]), case.below("eval.out.")
    inter = {task: resize(low.to(case.options.dtype), size)
             for task, low in case.below("eval.mid.inter_low.").items()}
    labels = {task: label.float() for task, label in case.below("target.").items()}
    losses, _ = losses_and_gradients(final, labels, table["loss_weights"], case.options, inter,
                                     intermediate_weight=table["intermediate_weight"])
    yield from compare_losses(losses, table["losses"], case.options, "loss ")
    for task, scores in table["metrics"].items():
        scored = filled(meter(task, final[task].shape[1]), task, [(final[task], labels[task])], case.options)
        for name, want in scores.items():
            yield SCORE.measure(f"{task} {name}", scored.compute()[name], want, case.options)


def _full_size(entry: dict) -> Iterator[Measure]:
    model = shipped("bridgenet", entry["tasks"], entry["image_size"], entry["params_total"])
    yield from compare.keys(model, entry["keys"], entry["tasks"], entry["params_total"], entry["params_unused"])
    yield compare.difference("encoder", parameters(model.encoder), entry["params_backbone"])
    yield compare.difference("heads", parameters(model.heads), entry["params_heads"])
    # The original computes one layer without using it, 3 x 3 on the finest map: of a ViT a transposed convolution, else
    # one without padding.
    is_vit = entry["backbone"]["type"] == "vit"
    height, width = (side // 16 if is_vit else side // 4 - 2 for side in entry["image_size"])
    unused = height * width * math.prod(entry["keys"]["multi_task_decoder.scale_embed.0.weight"])
    gmacs = (flops(model.eval(), entry["image_size"]).get_total_flops() / 2 + unused) / 1e9
    yield compare.difference("gmacs", gmacs, entry["gmacs"]["total"], 0.006)  # two decimals are given


SYSTEM = System(
    released=("BridgeNet",),
    fits=lambda config: {"pred_out_num_constant", "dilated_ratio", "backbone"} <= config.keys(),
    build=_build,
    convert=BRIDGENET.convert,
    groups={"outputs": (_outputs, *MODEL, "eval.out."), "features inside": (compare.inside, *MODEL, "eval.mid."),
            "losses and scores": (_scores, "eval.out.", "target.", "metrics"),
            "training": (compare.training, *MODEL, "train."),
            "gradient norms": (compare.gradient_norms, *MODEL, "train.", "norms")},
    names=((r"(image|target\..*)", r"\1"),
           (r"out\.(\w+)", r"eval.out.\1"),
           (r"R\.(\w+)", r"train.fixed.\1"),
           (r"train\.bn_after\.(.*)", r"train.after.\1"),
           (r"train\.(logits|inter_low)\.(\w+)", r"train.mid.\1.\2"),
           (r"(?!train\.)(.*)", r"eval.mid.\1")),
    places=((r"backbone\.(\d)", r"encoder[\1]"),
            (r"scale_embed\.1", "decoder.lateral_fine"),
            (r"scale_embed\.2", "decoder.lateral_middle"),
            (r"decoder_in", "decoder.preliminary.{tasks[0]}<0"),
            (r"prelim\.(\w+)", r"decoder.preliminary.\1"),
            (r"tpp\.fused\.(\w+)", r"decoder.fuse.\1"),
            (r"tpp\.score\.(\w+)", r"decoder.produce.\1[0]"),
            (r"tpp\.value\.(\w+)", r"decoder.produce.\1[1]"),
            (r"mix\.(\w+)", r"decoder.mix.\1"),
            (r"feat\.(\w+)", r"decoder.project.\1"),
            (r"inter_low\.(\w+)", r"decoder.intermediate.\1"),
            (r"logits\.(\w+)", r"heads.\1"),
            (r"stage(\d)\.(up\.\w+|query)", r"decoder.stages.\1.\2"),
            (r"stage(\d)\.attn", r"decoder.stages.\1.extract.restore"),
            (r"stage(\d)\.bfe_block", r"decoder.stages.\1.extract"),
            (r"stage(\d)\.bridge", r"decoder.stages.\1[1]"),
            (r"stage(\d)\.task\.(\w+)", r"decoder.stages.\1[0][\2]")),
    bounds=Bounds(value=Bound(absolute_error, 5e-5, 5e-5), train=TRAINED, after=TRAINED,
                  gradient=Bound(stored_share, 1e-9, 1e-2)),
    uncovered=lambda config, name: NO_EFFECT if name == "scale_embed.0" else "",
    as_stored=lambda got, want: got if got.ndim == want.ndim else rearrange(got, "b c h w -> b (h w) c"),
    shapes="keys",
    full_size=_full_size)
checks = SYSTEM.checks
