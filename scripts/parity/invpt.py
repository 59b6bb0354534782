"""InvPT as published: whole models of toy size in float64, and the keys of the full-size ones."""

from collections.abc import Iterator

from models.model import MultiTaskModel
from models.released.invpt import INVPT
from scripts.parity import compare
from scripts.parity.base import Measure
from scripts.parity.case import MODEL, NO_EFFECT, System
from scripts.parity.program import build, flops, shipped


def _build(config: dict) -> MultiTaskModel:
    c, vit = config, config["backbone"]
    sizes = {key: vit[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    return build("InvPT", "vit", dict(zip(c["tasks"], c["num_output"], strict=True)), c["image_size"],
                 {**sizes, "taps": vit["tap_after_blocks"], "drop_path_rate": 0.0},
                 {"embed_dim": c["embed_dim"], "PRED_OUT_NUM_CONSTANT": c["pred_out_num_constant"],
                  "mtt_resolution_downsample_rate": c["mtt_resolution_downsample_rate"],
                  "num_heads": c["decoder_num_heads"][0]})


TOKENS = "b c h w -> b (h w) c"


def _full_size(entry: dict) -> Iterator[Measure]:
    model = shipped("invpt", entry["tasks"], entry["image_size"], entry["total_parameters"])
    yield from compare.keys(model, entry["state_dict"], entry["tasks"], entry["total_parameters"])
    operators = entry["gmacs_batch1"]["by_operator"]
    want = sum(operators[name] for name in ("conv", "linear", "matmul", "einsum"))
    macs = flops(model, entry["image_size"]).get_total_flops() / 2e9
    yield compare.difference("multiply-adds of products", macs / want, 1.0, 1e-6)


SYSTEM = System(
    released=("InvPT",),
    fits=lambda config: config.get("model") == "InvPT" and "backbone" in config,
    build=_build,
    convert=INVPT.convert,
    groups={"outputs": (lambda case: compare.outputs(case, kinds=("out",)), *MODEL),
            "preliminary predictions": (lambda case: compare.outputs(case, kinds=("inter",)), *MODEL),
            "features inside": (compare.inside, *MODEL), "training": (compare.training, *MODEL),
            "gradient norms": (compare.gradient_norms, *MODEL, "norms")},
    places=((r"backbone\.tap(\d)", r"encoder[\1]", TOKENS),
            (r"decoder\.skip0", "decoder.skip_fine"),
            (r"decoder\.skip1", "decoder.skip_middle"),
            (r"decoder\.input", "decoder.preliminary.{tasks[0]}<0"),
            (r"prelim\.(\w+)", r"decoder.preliminary.\1"),
            (r"mix\.(\w+)", r"decoder.mix.\1"),
            (r"task_feature\.(\w+)", r"decoder.project.\1"),
            (r"stage(\d)\.attn_message", r"decoder.stages.\1.attention[1]"),
            (r"stage(\d)\.norm", r"decoder.aggregate.norms.\1", TOKENS),
            (r"stage(\d)\.(\w+)", r"decoder.stages.\1[0][\2]"),
            (r"aggregated\.(\w+)", r"decoder.aggregate[\1]")),
    uncovered=lambda config, name: NO_EFFECT if name == "decoder.skip2" else "",
    full_size=_full_size)
checks = SYSTEM.checks
