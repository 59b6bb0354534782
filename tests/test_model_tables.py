"""The tables of decoders, backbones and necks: light to read, options equal to the real ones, values checked."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from models.backbones import BACKBONES
from models.build import build_backbone, build_model
from models.decoder import Decoder, DecoderOutput
from models.decoders import DECODERS
from models.model import MultiTaskModel
from models.necks import NECKS
from models.necks.none import NoNeck, NoNeckConfig
from tests.shared import ROOT
from utils.options import ConfigError, parse

TABLES = {"decoders": DECODERS, "backbones": BACKBONES, "necks": NECKS}
ENTRIES = [(folder, name) for folder, table in TABLES.items() for name in table]
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def described(options: type) -> list[list[str]]:
    return [[field.name, str(field.type), str(field.default).partition(" object at")[0]]
            for field in dataclasses.fields(options)]


READ_ALL = """
import json, sys
from dataclasses import fields
from models.backbones import BACKBONES
from models.decoders import DECODERS
from models.necks import NECKS
found = {folder: {name: [[f.name, str(f.type), str(f.default).partition(" object at")[0]]
                         for f in fields(table.options(name))] for name in table}
         for folder, table in (("decoders", DECODERS), ("backbones", BACKBONES), ("necks", NECKS))}
print(json.dumps({"heavy": sorted({"torch", "timm", "numpy"} & set(sys.modules)), "found": found}))
"""


@pytest.fixture(scope="module")
def read_without_torch():
    """What a process that loads no PyTorch reads from the tables."""
    done = subprocess.run([sys.executable, "-c", READ_ALL], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_reading_every_table_loads_no_pytorch(read_without_torch):
    assert read_without_torch["heavy"] == []


@pytest.mark.parametrize("folder, name", ENTRIES)
def test_options_are_those_of_the_class(read_without_torch, folder, name):
    table = TABLES[folder]
    own = table.load(name).Config
    assert set(table.defaults(name)) <= {field.name for field in dataclasses.fields(own)}
    assert read_without_torch["found"][folder][name] == described(own) == described(table.options(name))


@pytest.mark.parametrize("folder, name", ENTRIES)
def test_options_are_frozen_and_their_defaults_valid(folder, name):
    required = {"swin": SWIN, "vit": VIT, "hrnet": {"width": 4, "num_blocks": 1, "num_modules": [1, 1, 1],
                                                    "stem_blocks": 1},
                "internimage": {"embed_dim": 8, "depths": [1, 1, 1, 1], "groups": [1, 1, 2, 2]},
                "pyramid": {"embed_dim": 8}, "one_stride": {"embed_dim": 8}}
    table = TABLES[folder]
    options = parse(table.options(name), required.get(name, table.defaults(name)))
    for field in dataclasses.fields(options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, field.name, None)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_answers_what_it_may_be_asked(decoder):
    cls = DECODERS.load(decoder)
    wanted = cls.backbone_options({"depth": 1}, cls.Config())
    assert issubclass(cls, Decoder) and isinstance(wanted, dict) and 0 < cls.intermediate_weight <= 1
    assert cls.Config().label_size is None


@pytest.mark.parametrize("table, spelling, name", [
    (DECODERS, "MTMamba++", "mtmamba_plus"), (DECODERS, "BIM", "bim"), (BACKBONES, "swinL", "swin_large"),
    (BACKBONES, "vitB", "vit_base"), (BACKBONES, "intern_l", "internimage_l"), (NECKS, "none", "none")])
def test_other_spellings(table, spelling, name):
    assert table.find(spelling) == name


@pytest.mark.parametrize("model, options, message", [
    ("bim", {"msst_depth": 1.5}, "model 'bim': 'model_kwargs.msst_depth' must be a whole number, got 1.5"),
    ("bim", {"msst_depth": "two"}, "a whole number, got 'two'"), ("bim", {"d_state": True}, "whole number, got True"),
    ("bim", {"drop_path_rate": "a"}, "must be a number, got 'a'"), ("mlore", {"fold": 1}, "true or false, got 1"),
    ("bmi", {}, "unknown model 'bmi'; did you mean 'bim'"), ("bim", {"order": "first"}, "one of msst_first, bcfr_fi")])
def test_values_of_a_wrong_type_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(model, "swin", {"depth": 1}, (64, 64), backbone_kwargs=SWIN, model_kwargs=options)


def test_parsed_options_and_plain_mappings_build_the_same_model():
    values = {"model_kwargs": {"channels": 8}, "backbone_kwargs": {**VIT, "patch_size": 8}, "neck_kwargs": {}}
    tables = {"model_kwargs": (DECODERS, "multi_scale"), "backbone_kwargs": (BACKBONES, "vit"),
              "neck_kwargs": (NECKS, "none")}
    parsed = {key: parse(table.options(name), values[key]) for key, (table, name) in tables.items()}
    states = []
    for options in (values, parsed):
        torch.manual_seed(0)
        states.append(build_model("multi_scale", "vit", {"depth": 1}, (32, 32), **options).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_users_class_token_stands_above_the_decoders_wish():
    small = {"final_embed_dim": 8, "rank_list": [1, 2], "topk": 1}
    for asked, has_token in (({}, False), ({"class_token": True}, True), ({"class_token": None}, False)):
        model = build_model("mlore", "vit", {"depth": 1}, (32, 32), model_kwargs=small, backbone_kwargs=VIT | asked)
        assert (model.encoder.cls_token is not None) == has_token
    assert build_backbone("vit", (32, 32), VIT).cls_token is not None
    with torch.device("meta"):      # a wish that means another kind of backbone is none of its options
        assert build_backbone("swin", (32, 32), SWIN, wanted={"class_token": False}).channels == (8, 16, 32, 64)


def test_a_row_of_sizes_stands_under_what_the_user_gives():
    with torch.device("meta"):
        small = build_backbone("swinT", (64, 64), {"window_size": 5})
        assert small.channels == (96, 192, 384, 768) and small.layers[0].blocks[0].window_size == (5, 5)
        with pytest.raises(ConfigError, match=r"num_heads' must be divisors of .* \(100, 200, 400, 800\)"):
            build_backbone("swin_tiny", (64, 64), {"embed_dim": 100})


def test_windows_may_differ_from_stage_to_stage():
    plain = build_backbone("swin", (64, 64), {**SWIN, "window_size": [4, 4, 2, 3]})
    assert [layer.blocks[0].window_size for layer in plain.layers] == [(4, 4), (4, 4), (2, 2), (3, 3)]


class Lister(Decoder):
    """A decoder whose task predicts lists of boxes, not a map."""

    def forward(self, feats):
        return DecoderOutput({"boxes": feats, "depth": feats})


class Boxes(nn.Module):
    def forward(self, feat):
        return {"scores": feat.mean((2, 3)), "boxes": feat[:, :1]}


def test_outputs_that_are_no_maps_pass_unresized():
    model = MultiTaskModel(nn.Conv2d(3, 2, 1, stride=4), NoNeck((2,), (4,), NoNeckConfig()), Lister(),
                           {"boxes": Boxes(), "depth": nn.Conv2d(2, 1, 1)}, label_size=(8, 10))
    out = model(torch.randn(1, 3, 16, 20)).final
    assert out["depth"].shape == (1, 1, 8, 10)
    assert out["boxes"]["scores"].shape == (1, 2) and out["boxes"]["boxes"].shape == (1, 1, 4, 5)


def test_no_neck_leaves_no_trace():
    model = build_model("fcn", "vit", {"depth": 1}, (32, 32), backbone_kwargs=VIT)
    assert isinstance(model.neck, NoNeck) and not any(key.startswith("neck") for key in model.state_dict())
    with pytest.raises(ValueError, match="unknown key 'neck_kwargs.embed_dim'"):
        build_model("fcn", "vit", {"depth": 1}, (32, 32), backbone_kwargs=VIT, neck_kwargs={"embed_dim": 8})
