"""The scan by our CUDA kernels (`gpu/`): how a call is cut into work for the card, and whether they run here.

One launch does a whole direction of a call, however many routes it has. Its plan (spans, blocks, the constant part of
the kernel's argument) depends on shapes, types and routes alone and is made once. Axes and terms as in `gpu/*.h`: a
span is some chunks of a route, rounds are the turns in which the routes of a group write to what they share.
"""

import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels, ScanBackend, ScanNeeds
from models.ops.scan_probe import probe
from utils.cuda_kernels import Kernel, bindings, compile_kernels
from utils.extension import first_line

FOLDER = Path(__file__).parent / "gpu"
SOURCE = FOLDER / "scan_kernels.cu"
HEADERS = tuple(FOLDER / f"scan_{name}.h" for name in ("call", "rows", "warp", "walks", "phases"))
CHUNK_TOKENS = 16  # kChunk in the sources
MAX_ROUTES, MAX_STATE, MAX_WARPS, MAX_SPANS = 128, 64, 4, 512
MAX_BLOCKS = {False: 3, True: 2}  # of MAX_WARPS warps on a multiprocessor, forward and backward
TYPES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
HEAD = "<" + "Qqqii" * 6 + "17Q" + "12i"  # struct Call up to its tables
POINTERS = ("A", "D", "bias", "grad_last", "y", "grad_u", "sums", "chunk_states", "last_state",
            "grad_B", "grad_C", "grad_A", "grad_D", "grad_bias")  # and the three of scratch memory
FIRST_OF_GROUP, LAST_OF_GROUP = 64, 128


class Kind(NamedTuple):
    """What the kernels are compiled for."""

    tokens: torch.dtype  # of u and y
    features: torch.dtype  # of delta, B and C
    lanes: int  # that share the states of a channel
    softplus: bool
    vector: bool  # can 4 columns of all rows be read at once?

    @property
    def channels(self) -> int:
        """Of a warp."""
        return 128 // self.lanes

    def shared_bytes(self, back: bool) -> int:
        """Shared memory of a warp."""
        rows, maps = CHUNK_TOKENS * self.channels, CHUNK_TOKENS * 4 * self.lanes
        shares = self.lanes * (self.channels + max(32 // self.lanes, 4))
        if back:
            return 4 * (4 * rows + 2 * maps + 2 * CHUNK_TOKENS + max(CHUNK_TOKENS // 2 * 512, 3 * rows + 2 * maps))
        return 4 * (4 * rows + 4 * maps + 2 * CHUNK_TOKENS + CHUNK_TOKENS // 2 * shares)

    def defines(self, shared_bytes: int) -> dict[str, object]:
        """For multiprocessors with so much shared memory: registers are given out for as many blocks as that holds."""
        blocks = {back: max(1, min(most, shared_bytes // (MAX_WARPS * self.shared_bytes(back) + 1024)))
                  for back, most in MAX_BLOCKS.items()}
        return {"SCAN_U": TYPES[self.tokens], "SCAN_F": TYPES[self.features], "SCAN_LANES": self.lanes,
                "SCAN_SOFTPLUS": str(self.softplus).lower(), "SCAN_VECTOR": str(self.vector).lower(),
                "SCAN_THREADS": 32 * MAX_WARPS, "SCAN_FORWARD_BLOCKS": blocks[False],
                "SCAN_BACKWARD_BLOCKS": blocks[True]}


class Card:
    """Compiled kernels of one kind on one device."""

    def __init__(self, kind: Kind, device: torch.device):
        self.device, properties = device, torch.cuda.get_device_properties(device)
        self.multiprocessors = properties.multi_processor_count
        self.shared_limit = properties.shared_memory_per_block_optin
        cubin = compile_kernels(SOURCE, HEADERS, f"sm_{properties.major}{properties.minor}",
                                kind.defines(properties.shared_memory_per_multiprocessor))
        self.kernels = {back: Kernel(cubin, name) for back, name in ((False, "scan_forward"), (True, "scan_backward"))}
        for back, kernel in self.kernels.items():
            kernel.allow_shared(min(self.shared_limit, MAX_WARPS * kind.shared_bytes(back)))

    def resident_blocks(self, back: bool, warps: int, shared_bytes: int) -> int:
        """Blocks that the card runs at once."""
        return self.multiprocessors * self.kernels[back].resident_blocks(32 * warps, shared_bytes)

    def launch(self, back: bool, arguments: bytes, blocks: int, warps: int, shared_bytes: int,
               barrier: int | None) -> None:
        """`barrier`: address of a counter where blocks wait for each other."""
        if torch.cuda.current_device() == self.device.index:
            self.kernels[back].launch(arguments, blocks, 32 * warps, shared_bytes, barrier)
        else:
            with torch.cuda.device(self.device):
                self.kernels[back].launch(arguments, blocks, 32 * warps, shared_bytes, barrier)


class Plan(NamedTuple):
    """How a direction of a call is cut."""

    card: Card
    chunks: int
    spans: int
    blocks: int  # of channels
    warps: int
    grid: int
    shared_bytes: int
    together: bool  # do blocks wait for each other?
    sizes: tuple[int, ...]
    tables: bytes


class Shape(NamedTuple):
    """Sizes of a call; channels and states are those of a group."""

    batch: int
    tokens: int
    routes: int
    groups: int
    channels: int
    states: int


@functools.cache
def load_card(kind: Kind, device: torch.device) -> Card:
    """Compiled at the first call of a process, CudaError where that fails."""
    with torch.cuda.device(device):
        return Card(kind, device)


@functools.lru_cache(maxsize=1024)
def make_plan(kind: Kind, shape: Shape, routes: tuple[Route, ...], device: torch.device, back: bool) -> Plan:
    """With blocks of so many warps that most of them run at once. Kept: a network asks for few shapes."""
    card, shared = load_card(kind, device), kind.shared_bytes(back)
    warps_in_all = -(-shape.channels // kind.channels)

    def warps_at_once(warps: int) -> float:
        """Those of the card that have channels to work on."""
        blocks = -(-warps_in_all // warps)
        return card.resident_blocks(back, warps, warps * shared) * warps_in_all / blocks
    warps = max(range(1, min(MAX_WARPS, card.shared_limit // shared, warps_in_all) + 1),
                key=lambda count: (warps_at_once(count), count))
    blocks, resident = -(-warps_in_all // warps), card.resident_blocks(back, warps, warps * shared)
    rounds = rounds_of(routes, shape.groups)
    num_rounds = 1 + max(flags % FIRST_OF_GROUP for flags in rounds)
    chunks = -(-shape.tokens // CHUNK_TOKENS)
    span_chunks = choose_span(chunks, shape.batch * shape.groups * blocks, resident)
    spans = -(-chunks // span_chunks)
    together = spans > 1 or num_rounds > 1
    tasks = shape.batch * blocks * spans * (shape.routes if spans > 1 else shape.groups)
    rules = b"".join(struct.pack("<4i", *route.index_rule[1:]) for route in routes)
    tables = rules.ljust(16 * MAX_ROUTES, b"\0") + bytes(rounds).ljust(MAX_ROUTES, b"\0")
    return Plan(card, chunks, spans, blocks, warps, min(tasks, resident) if together else tasks, warps * shared,
                together, (*shape, chunks, span_chunks, spans, blocks, num_rounds, 0), tables)


def rounds_of(routes: tuple[Route, ...], groups: int) -> list[int]:
    """The round of each route, with flags on the first and the last of a group. Routes of one round go through the same
    slots, forwards or backwards, so that a block can scan them over its span one after the other."""
    flagged = []
    for first in range(0, len(routes), len(routes) // groups):
        rules = [route.index_rule[:4] for route in routes[first:first + len(routes) // groups]]
        rounds = [list(dict.fromkeys(rules)).index(rule) for rule in rules]
        order = sorted(range(len(rounds)), key=rounds.__getitem__)
        rounds[order[0]] += FIRST_OF_GROUP
        rounds[order[-1]] += LAST_OF_GROUP
        flagged += rounds
    return flagged


def choose_span(chunks: int, tasks: int, resident: int) -> int:
    """Chunks of a span, so that as many blocks run at once as can, where a span makes that many tasks; a whole route,
    where this gains less than it costs to scan each span twice."""
    spans = min(resident // tasks, chunks, MAX_SPANS)
    return -(-chunks // spans) if spans > 2 else chunks


class _Call:
    """One direction of a call, ready for its launch: tensors of types and strides that the kernels read."""

    def __init__(self, args: ScanArgs, back: bool):
        (batch, tokens, groups, channels), states = args.u.shape, args.A.shape[2]
        self.shape = Shape(batch, tokens, len(args.routes), groups, channels, states)
        self.back, self.device = back, args.u.device
        types = {x.dtype for x in (args.delta, args.B, args.C)}
        features = types.pop() if len(types) == 1 else torch.float32
        self.u, *rows = (_dense(x, dtype) for x, dtype in ((args.u, args.u.dtype), (args.delta, features),
                                                           (args.B, features), (args.C, features)))
        self.delta, self.B, self.C = rows
        self.A, self.D, self.bias = (None if x is None else x.float().contiguous()
                                     for x in (args.A, args.D, args.delta_bias))
        vector = states % 4 == 0 == self.A.data_ptr() % 16 and all(map(_in_fours, (self.u, *rows)))
        self.kind = Kind(args.u.dtype, features, _lanes(states), args.delta_softplus, vector)
        self.plan = None
        if self.u.numel():
            self.plan = make_plan(self.kind, self.shape, args.routes, self.device, back)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_rows(self) -> tuple[Tensor, Tensor]:
        """Like u: the result, and where routes of a group are added up until it is known."""
        rows = self.new(*self.u.shape, dtype=self.kind.tokens)
        whole = self.kind.tokens == torch.float32 or self.shape.routes == self.shape.groups
        return rows, rows if whole else self.new(*self.u.shape)

    def launch(self, **tensors: Tensor | None) -> None:
        """`tensors`: results and intermediate ones, by their name in struct Call."""
        plan, shape = self.plan, self.shape
        step_sums = plan.spans * shape.batch * shape.routes * shape.channels if plan.spans > 1 else 0
        scratch = self.new(step_sums * (1 + shape.states) + 4)  # is kept until the launch: its memory is the stream's
        barrier = scratch.data_ptr()  # then, at the next multiple of 16 bytes, the states and the sums of steps
        tensors |= {"A": self.A, "D": self.D, "bias": self.bias}
        rows = self.u, self.delta, self.B, self.C, tensors.get("grad_y", self.u), tensors.get("grad_delta", self.delta)
        numbers = [n for x in rows for n in _in_bytes(x)]
        pointers = [0 if (x := tensors.get(name)) is None else x.data_ptr() for name in POINTERS]
        pointers += barrier, barrier + 16, barrier + 16 + 4 * step_sums * shape.states
        plan.card.launch(self.back, struct.pack(HEAD, *numbers, *pointers, *plan.sizes) + plan.tables, plan.grid,
                         plan.warps, plan.shared_bytes, barrier if plan.together else None)


def cuda_forward(args: ScanArgs, keep_chunk_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, last state (B, K, E, N), and the states (chunks, B, K, N, E) before each chunk, or (0,).

    In memory each of the latter is an (E, N) matrix.
    """
    call = _Call(args, back=False)
    routes, channels, states = args.A.shape
    if call.plan is None:
        last_state = torch.zeros(call.shape.batch, *args.A.shape, device=call.device)
        chunks = -(-call.shape.tokens // CHUNK_TOKENS)
        return torch.empty_like(args.u), last_state, call.new(*(chunks, call.shape.batch, routes, states, channels)
                                                              if keep_chunk_states else (0,))
    y, sums = call.new_rows()
    last_state = call.new(call.shape.batch, *args.A.shape)
    chunk_states = call.new(*(call.plan.chunks, call.shape.batch, routes, states, channels)
                            if keep_chunk_states else (0,))
    call.launch(y=y, sums=sums, last_state=last_state, chunk_states=chunk_states if keep_chunk_states else None)
    return y, last_state, chunk_states


def cuda_backward(args: ScanArgs, chunk_states: Tensor, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias; those without a token axis in float32."""
    call = _Call(args, back=True)
    if call.plan is None:
        return tuple(torch.zeros_like(x) for x in (args.u, args.delta, args.A, args.B, args.C, args.A[..., 0],
                                                   args.A[..., 0]))
    plan, shape = call.plan, call.shape
    grad_u, u_sums = call.new_rows()
    # A block has read the steps of a chunk before it writes their gradients.
    grad_delta = call.delta if args.delta_is_scratch else call.new(*args.delta.shape, dtype=call.kind.features)
    # One part of the gradients of B and C from each block of channels, one of A, D and the bias from each span.
    maps = plan.blocks, shape.batch, shape.tokens, shape.routes, shape.states
    grad_B, grad_C = call.new(*maps), call.new(*maps)
    grad_A = call.new(plan.spans * shape.batch, *args.A.shape)
    grad_D, grad_bias = (call.new(plan.spans * shape.batch, *args.A.shape[:2]) for _ in range(2))
    grad_y, grad_last = _dense(grad_y, call.kind.tokens), grad_last.float().contiguous()
    if call.kind.vector:
        grad_y = grad_y if _in_fours(grad_y) else grad_y.clone(memory_format=torch.contiguous_format)
        grad_last = grad_last if grad_last.data_ptr() % 16 == 0 else grad_last.clone()
    sums = {"grad_A": grad_A, "grad_B": grad_B, "grad_C": grad_C, "grad_D": grad_D, "grad_bias": grad_bias}
    call.launch(grad_y=grad_y, grad_last=grad_last, chunk_states=chunk_states, grad_u=grad_u, sums=u_sums,
                grad_delta=grad_delta, **sums)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (x.squeeze(0) if len(x) == 1 else x.sum(0) for x in sums.values())
    return (grad_u, grad_delta.to(args.delta.dtype), grad_A, grad_B.to(args.B.dtype), grad_C.to(args.C.dtype), grad_D,
            grad_bias)


def _lanes(states: int) -> int:
    """Lanes that share the states of a channel, 4 each."""
    return 1 << max(-(-states // 4) - 1, 0).bit_length()


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of that type, columns side by side."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _in_bytes(x: Tensor) -> tuple[int, ...]:
    """Address and strides of rows, as struct Rows has them."""
    batch, token, row, _ = x.stride()
    size = x.element_size()
    return x.data_ptr(), batch * size, row * size, token * size, 0


def _in_fours(x: Tensor) -> bool:
    """Do rows consist of groups of 4 columns that can be read at once?"""
    batch, token, row, _ = x.stride()
    return (x.shape[3] | batch | token | row) % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0


@functools.cache
def find_cuda(device: str, tokens: torch.dtype) -> str | None:
    """Why the kernels cannot run for tokens of that type on such devices, or None; on CUDA they are tried once."""
    if device != "cuda":
        return f"the cuda kernels need CUDA tensors, got tensors on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        bindings()
    except ImportError as error:
        return f"cuda-bindings cannot be imported: {first_line(error)}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the cuda kernels need compute capability 8.0, {torch.cuda.get_device_name()} is older"
    reason = probe(CUDA.kernels, torch.device("cuda", torch.cuda.current_device()), tokens)
    return reason and f"the cuda kernels cannot be used: {reason}"


def cuda_refusal(needs: ScanNeeds) -> str | None:
    """Why such a call cannot go to the kernels, or None."""
    if needs.dtype != torch.float32:
        return "the cuda kernels compute in float32, got float64 input"
    if needs.num_states > MAX_STATE:
        return f"the cuda kernels hold at most {MAX_STATE} states per channel, got {needs.num_states}"
    if needs.num_routes > MAX_ROUTES:
        return f"the cuda kernels take at most {MAX_ROUTES} routes in one call, got {needs.num_routes}"
    return find_cuda(needs.device, needs.tokens)


CUDA = ScanBackend(cuda_refusal, Kernels(cuda_forward, cuda_backward, lambda device: CHUNK_TOKENS),
                   fastest_on=("cuda",))
