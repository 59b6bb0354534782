"""The optimizers by name; a new one: a file with a class like those of `torch_optimizers`, and one entry here."""

from utils.table import Table

OPTIMIZERS = Table("optimizer", {
    "adam": "utils.engine.optimizers.torch_optimizers:Adam",
    "adamw": "utils.engine.optimizers.torch_optimizers:AdamW",
    "sgd": "utils.engine.optimizers.torch_optimizers:SGD",
})
