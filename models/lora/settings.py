"""What an experiment file says of adapters, the key `lora`."""

import math
from dataclasses import dataclass

from utils.options import Options, given


@dataclass(frozen=True)
class LoraSettings(Options):
    """Layers W x become W x + scale B A dropout(x), with W as it was and B zero at the start.

    rank, scale, dropout: of these adapters; rank 0: there are none.
    task_rank: of each task's own adapters beside them, in the last block of every stage of the backbone, so that every
        task gets maps of its own (MTLoRA); 0: there are none.
    parts: what is adapted. Their own weights stay as they are.
    layers: last words of the names of the linear layers and convolutions that get adapters; `all`: all of these parts.
    trained: what else of the parts is trained: `norms`, `biases`, or parts by name.
    base: a checkpoint that the parts' own weights come from, in place of `init_from`.
    """

    rank: int = given(0, at_least=0)
    task_rank: int = given(0, at_least=0)
    scale: float = given(4.0, above=0, below=math.inf)
    dropout: float = given(0.05, at_least=0, below=1)
    parts: tuple[str, ...] = ("encoder",)
    layers: tuple[str, ...] = ("qkv", "attn.proj", "fc1", "fc2")
    trained: tuple[str, ...] = ("norms",)
    base: str = ""

    def __post_init__(self):
        self.require(self.rank or not self.task_rank, "task_rank", "0 where lora.rank is 0")
        self.require(self.parts, "parts", "one or more parts of the model, e.g. [encoder]")
        self.require(self.layers, "layers", "one or more names of layers, e.g. [qkv, proj], or [all]")
