"""Trained models as folders of the Hugging Face Hub: safetensors, config.json, a model card.

`models.load_model("OWNER/NAME")` is the way back.
"""

from pathlib import Path

from utils.engine.exports.job import Job
from utils.engine.exports.safetensors_file import export_safetensors
from utils.engine.stored_model import find_checkpoint, own_config


def save_pretrained(source: str | Path, folder: str | Path) -> list[Path]:
    """Writes the folder of a checkpoint or a run; adapters are merged into the weights."""
    checkpoint = find_checkpoint(source)
    return export_safetensors(Job(own_config(checkpoint), checkpoint, "none", Path(folder)))


def push_to_hub(folder: str | Path, name: str, private: bool = False) -> str:
    """Uploads what `save_pretrained` wrote to OWNER/NAME, which is made where it is not there; returns its address.

    Who may write there is told by the token of `hf auth login`. ValueError for a folder without model or card.
    """
    folder = Path(folder)
    if lacking := [file for file in ("model.safetensors", "config.json", "README.md") if not (folder / file).is_file()]:
        raise ValueError(f"{folder} holds no {', '.join(lacking)}: write it with --run_mode export --format "
                         "safetensors")
    from huggingface_hub import HfApi
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=name,
                      allow_patterns=["model.safetensors", "config.json", "README.md"])
    return str(address)
