"""The decoders that an experiment file may name. A new one is one file and one row here.

The contract is the class `Decoder` in `models.decoder`. Where a paper and its published models differ, a decoder
follows the models, so that released weights give the same numbers.
"""

from utils.table import Table

DECODERS = Table("model", {
    "bim": "models.decoders.bim:BIMDecoder",
    "bridgenet": "models.decoders.bridgenet:BridgeNetDecoder",
    "demt": "models.decoders.demt:DeMTDecoder",
    "fcn": "models.decoders.fcn:FCNDecoder",
    "invpt": "models.decoders.invpt:InvPTDecoder",
    "mlore": "models.decoders.mlore:MLoREDecoder",
    "mtmamba": "models.decoders.mtmamba:MTMambaDecoder",
    "mtmamba_plus": "models.decoders.mtmamba_plus:MTMambaPlusDecoder",
    "multi_scale": "models.decoders.multi_scale:MultiScaleDecoder",
    "taskdiffusion": "models.decoders.taskdiffusion:TaskDiffusionDecoder",
    "taskprompter": "models.decoders.taskprompter:TaskPrompterDecoder",
}, aliases={"mtmamba++": "mtmamba_plus"})       # the paper's spelling
