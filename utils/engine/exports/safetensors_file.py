"""safetensors: the weights alone, adapters merged, and the experiment in the header; --trained_model takes the file."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.lora.settings import LoraSettings
from utils.durable import atomic_path
from utils.engine.build import loaded_model
from utils.engine.checkpoint import ABOUT
from utils.engine.exports.job import Job
from utils.engine.exports.model_card import model_card


def export_safetensors(job: Job) -> list[Path]:
    """Writes model.safetensors, config.json and a model card, README.md: a folder as the Hugging Face Hub has them."""
    if job.dynamic != "none":
        raise ValueError("export: --dynamic says nothing of safetensors, which are weights without a graph; leave it "
                         "out")
    model, chosen = job.model()
    config = dataclasses.replace(job.config, lora=LoraSettings(), init_from="", db_root="")
    stored = json.dumps({"config": config.to_dict(), "selection": chosen})
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = job.folder / "model.safetensors"
    job.folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={ABOUT: stored})
    again, _ = loaded_model(config, path)
    written = again.state_dict()
    if not all(torch.equal(value, written[key]) for key, value in model.state_dict().items()):
        raise ValueError(f"export: {path} does not hold what was written; is the disk sound?")
    (job.folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="ascii")
    card = job.folder / "README.md"
    card.write_text(model_card(config, job.about(chosen), job.checkpoint), encoding="utf-8")
    return [path, job.folder / "config.json", card]
