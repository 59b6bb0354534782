"""A model card: what a folder of weights is, for people and for the Hugging Face Hub."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.engine.checkpoint import read_checkpoint
from utils.engine.config import Config
from utils.engine.results import format_table

CARD = """\
---
library_name: mtdp
license: other
license_name: see-model-card
pipeline_tag: image-segmentation
tags: [multi-task-learning, dense-prediction, {tags}]
---

# {model} on {backbone}, {data}

A network for several dense prediction tasks at once, trained on {data}; its input has {height} x {width} pixels.

| task | unit | classes |
| --- | --- | --- |
{tasks}

## Use

```python
from models import load_model

model = load_model("OWNER/NAME")            # or this folder
print(model.predict("photo.jpg"))
```

`python main.py --run_mode infer --trained_model OWNER/NAME` scores it, `config.json` is its whole experiment.

## Scores

{scores}

## Licence

The code is under the MIT licence. The weights are bound by the terms of the data they were trained on ({data}) and of
the weights that their backbone started from ({start}): whoever publishes this folder says here which they are.
"""


def model_card(config: Config, about: Mapping[str, Any], checkpoint: Path) -> str:
    """README.md of a model. Its scores are those of the checkpoint's last evaluation; none are made up."""
    stored = read_checkpoint(checkpoint)
    scores = "No evaluation is stored with these weights."
    if metrics := stored.get("metrics"):
        table = format_table({"in training": metrics}, units=config.dataset.units)
        scores = (f"Of the evaluation at update {stored['step']} of the training (weights: {about['weights']}):\n\n"
                  f"{table}")
    rows = [f"| {task} | {entry['unit'] or '-'} | {_classes(entry['classes'])} |"
            for task, entry in about["tasks"].items()]
    return CARD.format(tags=", ".join(config.tasks), model=config.model, backbone=config.backbone, data=about["data"],
                       height=about["input"]["height"], width=about["input"]["width"], tasks="\n".join(rows),
                       scores=scores, start=config.init_from or f"pretrained: {config.pretrained}")


def _classes(names: list[str]) -> str:
    return textwrap.shorten(f"{len(names)}: {', '.join(names)}", 300, placeholder=" ...") if names else "-"
