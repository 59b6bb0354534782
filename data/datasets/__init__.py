"""The data sets by name. A new one: a module with a `data.spec.DatasetSpec`, and one entry here."""

from utils.table import Table

DATASETS = Table("data set", {
    "NYUD": "data.datasets.nyud:NYUD",
    "PASCALContext": "data.datasets.pascal_context:PASCALContext",
    "Cityscapes": "data.datasets.cityscapes:Cityscapes",
    "CityscapesMTMamba": "data.datasets.cityscapes:CityscapesMTMamba",      # invalid disparity is trained on
    "Cityscapes3D": "data.datasets.cityscapes:Cityscapes3D",
    "Cityscapes3DTaskPrompter": "data.datasets.cityscapes:Cityscapes3DTaskPrompter",    # as its released weights need
})
