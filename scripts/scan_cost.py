"""What the scan's CUDA kernels cost a GPU, without one: instructions of their loops, and the time they take at least.

    python scripts/scan_cost.py [--architecture sm_90] [--json FILE]

Kernels are compiled by NVRTC and taken apart by nvdisasm, which Triton brings. Counted is the longest way through
the loop over chunks, per token and warp of 32 channels, with 16 states, in float32: rows brought in with their
softplus, the recurrence, results written. Loops are known by their exponentials: a thread takes 16 for a token, and
one for the step sizes of each token that it brings in.

The bound is the time of the busiest unit of all multiprocessors together, for the spans that the plan chooses: issue
slots, special functions, 32-bit arithmetic, integers and comparisons, shared memory, or the memory of the card. The
floor is what no kernel can avoid: one exponential per state and token, or all inputs read and results written once;
three times that with gradients.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.ops import scan_cuda
from models.ops.routes import Route, four_routes
from models.ops.scan_cuda import CHUNK_TOKENS, HEADERS, SOURCE, Kind, Shape
from scripts.command_line import Command
from scripts.measuring import Row, markdown
from utils.cuda_kernels import compile_kernels

HALF, EXPONENTIALS = CHUNK_TOKENS // 2, 16  # tokens of half a chunk; of a thread for a token
KIND = Kind(torch.float32, torch.float32, lanes=4, softplus=True, vector=True)
Counts = collections.Counter  # instructions by class
INTEGER = {"IADD3", "LOP3", "ISETP", "FSETP", "FSEL", "SEL", "FMNMX", "SHF", "LEA", "VIADD", "IABS", "VIMNMX", "PLOP3",
           "PRMT", "IMNMX", "P2R", "R2P", "IADD", "MOV", "SGXT", "BREV"}


class Card(NamedTuple):
    """What a multiprocessor does in a cycle, in warps of 32 lanes; and the card. From NVIDIA's tables."""

    name: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # of memory, per second
    shared_kib: int  # of a multiprocessor
    arithmetic: float
    integer: float
    special: float = 0.5
    issue: float = 4
    shared: float = 1


CARDS = {"sm_80": Card("A100 80 GB", 108, 1.41, 2.04, 164, 2, 2),
         "sm_90": Card("H100 SXM", 132, 1.755, 3.35, 228, 4, 2),
         "sm_120": Card("RTX 5090", 170, 2.41, 1.79, 100, 4, 2)}


class Instruction(NamedTuple):
    text: str  # without its predicate
    target: int | None  # of a branch, as a number of an instruction
    conditional: bool

    @property
    def name(self) -> str:
        return self.text.split()[0]


class Loop(NamedTuple):
    begin: int  # target of a branch backwards, as a number of an instruction
    end: int  # the instruction behind that branch

    def holds(self, other: "Loop") -> bool:
        return self != other and self.begin <= other.begin and other.end <= self.end


def tools() -> Path | None:
    """The folder of Triton's copies of NVIDIA's binary tools, where they are."""
    spec = find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    return folder if folder and (folder / "nvdisasm").exists() else None


def disassemble(cubin: bytes) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """Instructions and resources (registers, bytes of stack, ...) of each kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        code, usage = (subprocess.run([tools() / tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    resources = {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
                 for name, line in re.findall(r"Function (\w+):\s*\n(.*)", usage)}
    kernels = {}
    for part in re.split(r"^//-+ \.text\.", code, flags=re.M)[1:]:
        kernels[part.split()[0]] = _instructions(part.splitlines()), resources[part.split()[0]]
    return kernels


def _instructions(lines: list[str]) -> list[Instruction]:
    labels, texts = {}, []
    for line in lines:
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(texts)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            texts.append(match[1])
    found = []
    for text in texts:
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        found.append(Instruction(re.sub(r"^@!?U?P\w+\s+", "", text), labels[branch[1]] if branch else None,
                                 text.startswith("@") or bool(re.search(r"BRA\S*\s+!?U?P\d", text))))
    return found


def class_of(name: str) -> str:
    """What an instruction keeps busy; of shared memory with the number of 4-byte words."""
    kind = name.split(".")[0]
    wide = {"128": 4, "64": 2}.get(name.split(".")[-1], 1)
    if kind in ("FFMA", "FMUL", "FADD", "IMAD"):
        return "arithmetic"
    if kind == "MUFU":
        return "exponentials" if ".EX2" in name else "other special"
    if kind in ("LDS", "STS"):
        return f"shared x{wide}"
    if kind in ("LDG", "STG", "LD", "ST", "SHFL"):
        return {"SHFL": "shuffles"}.get(kind, "global")
    return "integer" if kind in INTEGER else "rest"


class Kernel:
    """The loops of a kernel and what their longest ways take."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        starts: dict[int, int] = {}
        for i, instruction in enumerate(code):
            if instruction.target is not None and instruction.target <= i:
                starts[instruction.target] = i + 1
        self.loops = [Loop(begin, end) for begin, end in sorted(starts.items()) if self._is_loop(Loop(begin, end))]

    def _is_loop(self, loop: Loop) -> bool:
        """Not a piece of code that was put behind the kernel's end and jumps back."""
        return not any(self.code[i].name == "EXIT" and not self.code[i].conditional for i in range(*loop))

    def inside(self, loop: Loop) -> list[Loop]:
        """The loops directly inside."""
        within = [other for other in self.loops if loop.holds(other)]
        return [other for other in within if not any(third.holds(other) for third in within)]

    def way(self, loop: Loop) -> Counts:
        """Instructions of the longest way from the loop's head to its end, inner loops left out."""
        inner = {other.begin: other.end for other in self.inside(loop)}
        best: dict[int, tuple[int, int | None]] = {loop.begin: (0, None)}  # longest way there, and from where
        order = []
        for i in range(*loop):
            if i not in best:
                continue
            length, _ = best[i]
            order.append(i)
            if i in inner:
                nexts, cost = [inner[i]], 0
            else:
                instruction, cost = self.code[i], 1
                nexts = [i + 1] if instruction.target is None or instruction.conditional else []
                nexts += [instruction.target] if instruction.target is not None and instruction.target > i else []
            for following in nexts:
                if following < loop.end and best.get(following, (-1, None))[0] < length + cost:
                    best[following] = length + cost, i
        at, counts = max(order, key=lambda i: (best[i][0], i)), Counts()
        while at is not None:
            if at not in inner:
                counts[class_of(self.code[at].name)] += 1
            at = best[at][1]
        return counts

    def exponentials(self, loop: Loop) -> int:
        """Of its own, not of inner loops."""
        return self.way(loop)["exponentials"]

    def is_over_tokens(self, loop: Loop) -> bool:
        return not self.inside(loop) and self.exponentials(loop) > 0 and self.exponentials(loop) % EXPONENTIALS == 0

    def is_over_rows(self, loop: Loop) -> bool:
        """Those that are brought in: an exponential for each channel and token of a chunk."""
        return not self.inside(loop) and 0 < self.exponentials(loop) < EXPONENTIALS

    def per_token(self) -> dict[str, Counts]:
        """Instructions per token of what the kernel does in the loop over chunks of its main phase ("main") and of that
        over spans from zero ("span"), by class."""
        chunks = [loop for loop in self.loops if any(self._tokens_inside(inner) for inner in self.inside(loop))
                  and (self.exponentials(loop) == EXPONENTIALS or any(map(self.is_over_rows, self.inside(loop))))]
        return {"main" if any(self.inside(inner) for inner in self.inside(loop)
                              if self._tokens_inside(inner)) else "span": self._of_chunk(loop) for loop in chunks}

    def _tokens_inside(self, loop: Loop) -> bool:
        return self.is_over_tokens(loop) or any(map(self._tokens_inside, self.inside(loop)))

    def _of_chunk(self, chunk: Loop) -> Counts:
        halves = [loop for loop in self.inside(chunk) if self.inside(loop) and self._tokens_inside(loop)]
        total = _scaled(self.way(chunk), 1 / CHUNK_TOKENS)
        for half in halves:
            total += _scaled(self.way(half), 1 / HALF)
            for loop in self.inside(half):
                if self.is_over_tokens(loop):
                    total += _scaled(self.way(loop), EXPONENTIALS / self.exponentials(loop))
        for loop in self.inside(chunk):
            if self.is_over_tokens(loop):  # beside halves: the way to the second of them, half the tokens
                total += _scaled(self.way(loop), EXPONENTIALS / self.exponentials(loop) / (2 if halves else 1))
            elif self.is_over_rows(loop):
                total += _scaled(self.way(loop), EXPONENTIALS / self.exponentials(loop) / CHUNK_TOKENS)
            elif loop not in halves and self.way(loop)["global"]:  # sums of the gradients of B and C over warps
                trips = 2 * CHUNK_TOKENS * KIND.lanes / (32 * scan_cuda.MAX_WARPS)
                total += _scaled(self.way(loop), trips / CHUNK_TOKENS)
                for inner in self.inside(loop):
                    total += _scaled(self.way(inner), (scan_cuda.MAX_WARPS - 1) * trips / CHUNK_TOKENS)
        return total


def _scaled(counts: Counts, factor: float) -> Counts:
    return Counts({key: value * factor for key, value in counts.items()})


def unit_cycles(counts: Counts, card: Card) -> dict[str, float]:
    """Cycles of a multiprocessor for one token of one warp, by unit."""
    shared = sum(counts[f"shared x{wide}"] * wide for wide in (1, 2, 4)) + counts["shuffles"]
    return {"issue": sum(counts.values()) / card.issue, "arithmetic": counts["arithmetic"] / card.arithmetic,
            "integer": counts["integer"] / card.integer, "shared": shared / card.shared,
            "special": (counts["exponentials"] + counts["other special"]) / card.special}


def kernel_row(architecture: str, name: str, cost: dict[str, Counts], resources: dict[str, int]) -> Row:
    """Instructions of a warp for one token, by class, and what the kernel holds."""
    main = cost["main"]
    shared = sum(main[f"shared x{wide}"] for wide in (1, 2, 4))
    kinds = ("arithmetic", "exponentials", "other special", "integer", "shuffles", "global", "rest")
    return {"architecture": architecture, "kernel": name, "registers": resources["REG"],
            "spilled bytes": resources["STACK"],
            "shared KiB of a warp": KIND.shared_bytes(name == "scan_backward") / 1024,
            "instructions": sum(main.values()), **{key: main[key] for key in kinds}, "shared": shared,
            "first pass over spans": sum(cost["span"].values())}


SHAPES = {
    "scan of 16128 tokens": (Shape(1, 16128, 1, 1, 384, 16), [Route(1, 16128)]),
    "scan of 64512 tokens": (Shape(1, 64512, 1, 1, 384, 16), [Route(1, 64512)]),
    "SS2D 112 x 144": (Shape(1, 16128, 4, 1, 384, 16), list(four_routes(112, 144))),
    "SS2D 112 x 144, batch 4": (Shape(4, 16128, 4, 1, 384, 16), list(four_routes(112, 144))),
    "BI-Scan 4 x 112 x 144": (Shape(1, 64512, 2, 2, 192, 16), [Route(1, 64512), Route(1, 64512, reverse=True)]),
}


def bound_row(architecture: str, shape_name: str, kernels: dict[str, tuple[dict[str, Counts], dict[str, int]]]) -> Row:
    """Milliseconds at least, forward and with gradients, and their floors."""
    card, (shape, _) = CARDS[architecture], SHAPES[shape_name]
    row: Row = {"architecture": architecture, "card": card.name, "what": shape_name}
    token_warps = shape.batch * shape.routes * shape.tokens * -(-shape.channels // KIND.channels)
    rate = card.multiprocessors * card.gigahertz * 1e6  # cycles of all multiprocessors in a millisecond
    total = 0.0
    for name, back in (("forward", False), ("backward", True)):
        cost, resources = kernels[f"scan_{name}"]
        cycles = unit_cycles(cost["main"] + (cost["span"] if spans_of(shape, back, card, resources) > 1 else Counts()),
                             card)
        passes = 3 if back else 1
        moved = 4 * shape.batch * shape.tokens * (shape.channels * (2 * shape.groups + shape.routes)
                                                  + 2 * shape.routes * shape.states)
        times = {unit: token_warps * count / rate for unit, count in cycles.items()}
        times["memory"] = moved * (2 if back else 1) / card.terabytes / 1e9
        unit = max(times, key=times.__getitem__)
        total += times[unit]
        floor = max(passes * token_warps * EXPONENTIALS / card.special / rate, passes * moved / card.terabytes / 1e9)
        row |= {f"{'both' if back else name}, ms": total, f"{'both' if back else name}, of the floor": total / floor,
                f"{name}: busiest": unit}
    return row


def spans_of(shape: Shape, back: bool, card: Card, resources: dict[str, int]) -> int:
    """Spans of the plan for such a card."""
    warps_in_all, shared = -(-shape.channels // KIND.channels), KIND.shared_bytes(back)
    warps = min(scan_cuda.MAX_WARPS, (card.shared_kib - 1) * 1024 // shared)
    registers = -(-resources["REG"] // 8) * 8 * 32 * warps
    resident = card.multiprocessors * min(65536 // registers, card.shared_kib * 1024 // (warps * shared + 1024))
    chunks, tasks = -(-shape.tokens // CHUNK_TOKENS), shape.batch * shape.groups * -(-warps_in_all // warps)
    return -(-chunks // scan_cuda.choose_span(chunks, tasks, resident))


def costs(architecture: str) -> dict[str, tuple[dict[str, Counts], dict[str, int]]]:
    """Instructions per token and resources of both kernels."""
    defines = KIND.defines(1024 * CARDS[architecture].shared_kib)
    return {name: (Kernel(code).per_token(), resources) for name, (code, resources)
            in disassemble(compile_kernels(SOURCE, HEADERS, architecture, defines)).items()}


def report(architecture: str | None, json_file: Path | None) -> int:
    if tools() is None:
        print("error: there is no nvdisasm here: pip install triton", file=sys.stderr)
        return 1
    kernel_rows, bound_rows = [], []
    for name in [architecture] if architecture else CARDS:
        if name not in CARDS:
            raise ValueError(f"--architecture {name}: known are {', '.join(CARDS)}")
        found = costs(name)
        kernel_rows += [kernel_row(name, kernel, *cost) for kernel, cost in found.items()]
        bound_rows += [bound_row(name, shape, found) for shape in SHAPES]
    print(markdown(kernel_rows), markdown(bound_rows), sep="\n\n")
    if json_file:
        json_file.write_text(json.dumps({"kernels": kernel_rows, "bounds": bound_rows}, indent=1))
    return 0


main = Command(__doc__, report, {
    "--architecture": dict(help="one of " + ", ".join(CARDS) + "; without it all of them"),
    "--json": dict(type=Path, metavar="FILE", dest="json_file", help="also write the numbers there"),
})

if __name__ == "__main__":
    sys.exit(main())
