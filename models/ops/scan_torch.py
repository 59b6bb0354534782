"""Selective scan in plain PyTorch with the memory and the time that a training step can afford.

The (L, D, N) states are never kept. Time is cut into short blocks whose states fit the processor's cache; the
forward pass keeps only the state at the entry of each block, the hand-written backward pass replays one block
at a time from there and runs the adjoint recurrence through it. Nothing is ever divided by a
product of decays: those underflow (step * A reaches hundreds).

Axes: S steps of a block, B batch, G groups, N state, E = D / G channels of a group, kept last so that every
elementwise operation runs along contiguous channels. Sequences are (S, B, G, 1, E), states (S, B, G, N, E),
maps (S, B, G, N, 1), or (1, 1, G, N, E) when constant in time.

Reference: Gu and Dao, "Mamba", 2023, section 3.3 (keep boundary states, recompute inside).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.scan_args import ScanArgs

# Three blocks of states should fit a CPU's cache, a GPU wants few launches.
BLOCK_STEPS = {"cpu": 32, "cuda": 256}
SOFTPLUS_LINEAR = 20.0  # torch's softplus is the identity above this, with derivative exactly 1


def torch_scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Returns y (B, D, L) in u's dtype and layout, and the last state (B, D, N) in the scan's dtype."""
    return _BlockScan.apply(args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias,
                            args.delta_softplus)


class _BlockScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.set_materialize_grads(False)
        with torch.autocast(inputs[0].device.type, enabled=False):
            y, last_state, entries = _forward(ScanArgs(*inputs))
        *tensors, ctx.delta_softplus = inputs
        ctx.save_for_backward(*tensors, entries)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last_state):
        *tensors, entries = ctx.saved_tensors
        args = ScanArgs(*tensors, ctx.delta_softplus)
        with torch.autocast(args.u.device.type, enabled=False):
            grads = _backward(args, entries, grad_y, grad_last_state)
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return *(grads.get(name) for name in names), None


class _Block(NamedTuple):
    """The inputs of S consecutive steps, time first."""

    span: slice
    u: Tensor
    raw_step: Tensor  # bias included
    step: Tensor  # after softplus
    B: Tensor
    C: Tensor
    z: Tensor | None


class _Rows(NamedTuple):
    """Workspace for the states of one block; its rows are cut once, as a view costs as much as its use."""

    block: Tensor  # (S + 1, B, G, N, E): row 0 belongs to the entry of the block, row r to its r-th step
    rows: tuple[Tensor, ...]


class _Layout:
    """Cuts (B, D, L) arguments into time-first blocks of the scan's dtype, and writes blocks back."""

    def __init__(self, args: ScanArgs):
        self.args = args
        self.batch, channels, self.length = args.u.shape
        self.groups, self.dtype = args.groups, args.scan_dtype
        self.block_steps = BLOCK_STEPS.get(args.u.device.type, BLOCK_STEPS["cpu"])
        self.A = self.per_state(args.A)  # (G, N, E)
        self.state_shape = (self.batch, *self.A.shape)
        self.D = self.per_channel(args.D)  # (G, 1, E)
        self.bias = self.per_channel(args.delta_bias)

    def spans(self) -> list[slice]:
        starts = range(0, self.length, self.block_steps)
        return [slice(start, min(start + self.block_steps, self.length)) for start in starts]

    def workspace(self) -> _Rows:
        block = self.A.new_empty(min(self.block_steps, self.length) + 1, *self.state_shape)
        return _Rows(block, block.unbind(0))

    def load(self, span: slice) -> _Block:
        args = self.args
        raw_step = self.sequence(args.delta, span)
        if self.bias is not None:
            raw_step = raw_step + self.bias
        step = F.softplus(raw_step, threshold=SOFTPLUS_LINEAR) if args.delta_softplus else raw_step
        return _Block(span, self.sequence(args.u, span), raw_step, step, self.map(args.B, span),
                      self.map(args.C, span), None if args.z is None else self.sequence(args.z, span))

    def replay(self, block: _Block, entry: Tensor, decay: _Rows, states: _Rows) -> tuple[Tensor, Tensor]:
        """Decays and states of the block's steps, in the workspaces; row 0 of decay is never read."""
        end = block.u.shape[0] + 1
        decays, inside = decay.block[1:end], states.block[1:end]
        torch.exp(torch.mul(block.step, self.A, out=decays), out=decays)
        torch.mul(block.step * block.u, block.B, out=inside)
        states.rows[0].copy_(entry)
        _recur(decay, states, end)
        return decays, inside

    def sequence(self, x: Tensor, span: slice) -> Tensor:
        """(B, D, L) -> (S, B, G, 1, E)."""
        x = x[..., span].permute(2, 0, 1).to(self.dtype).contiguous()  # (S, B, D): channels run fastest
        return x.view(x.shape[0], self.batch, *self.A.shape[::2]).unsqueeze(-2)

    def map(self, x: Tensor, span: slice) -> Tensor:
        """(B, G, N, L) -> (S, B, G, N, 1); constant (D, N) -> (1, 1, G, N, E)."""
        if x.dim() == 2:
            return self.per_state(x)[None, None]
        return x[..., span].permute(3, 0, 1, 2).to(self.dtype).contiguous()[..., None]

    def per_state(self, x: Tensor) -> Tensor:
        """(D, N) -> (G, N, E)."""
        return x.to(self.dtype).view(self.groups, -1, x.shape[1]).mT.contiguous()

    def per_channel(self, x: Tensor | None) -> Tensor | None:
        """(D,) -> (G, 1, E)."""
        return None if x is None else x.to(self.dtype).view(self.groups, 1, -1)

    @staticmethod
    def store(target: Tensor, span: slice, block: Tensor) -> None:
        """(S, B, G, 1, E) into target (B, D, L)."""
        target[..., span] = block.flatten(2).permute(1, 2, 0)


def _forward(args: ScanArgs) -> tuple[Tensor, Tensor, Tensor]:
    """y, last state (B, D, N), and the states (blocks, B, G, N, E) at the entry of each block."""
    layout = _Layout(args)
    spans = layout.spans()
    y = torch.empty_like(args.u)
    decay, states = layout.workspace(), layout.workspace()
    entries = decay.block.new_zeros(len(spans) + 1, *layout.state_shape)
    for index, span in enumerate(spans):
        block = layout.load(span)
        _, inside = layout.replay(block, entries[index], decay, states)
        layout.store(y, span, _output(layout, block, inside))
        entries[index + 1] = inside[-1]
    last_state = entries[-1].mT.flatten(1, 2).contiguous()  # (B, G, N, E) -> (B, D, N)
    return y, last_state, entries[:-1]


def _output(layout: _Layout, block: _Block, states: Tensor) -> Tensor:
    y = _sum_states(block.C, states)
    if layout.D is not None:
        y = torch.addcmul(y, layout.D, block.u)
    return y if block.z is None else y * F.silu(block.z)


def _backward(args: ScanArgs, entries: Tensor, grad_y: Tensor | None,
              grad_last: Tensor | None) -> dict[str, Tensor]:
    """Gradients of the tensor arguments by name; those without a time axis are summed in the scan's dtype."""
    layout = _Layout(args)
    grads = {name: torch.empty_like(tensor) for name, tensor in args.tensors.items()}
    sums = {name: torch.zeros_like(layout.per_state(tensor)) if tensor.dim() == 2
            else torch.zeros_like(layout.per_channel(tensor))
            for name, tensor in args.tensors.items() if tensor.dim() <= 2}
    work = layout.workspace(), layout.workspace(), layout.workspace()
    carry = torch.zeros_like(entries[0])  # adjoint of the state at the exit of the block
    if grad_last is not None:
        carry += grad_last.unflatten(1, (layout.groups, -1)).mT  # (B, D, N) -> (B, G, N, E)
    for index, span in reversed(list(enumerate(layout.spans()))):
        block = layout.load(span)
        grad_out = torch.zeros_like(block.u) if grad_y is None else layout.sequence(grad_y, span)
        carry = _backward_block(layout, block, entries[index], carry, grad_out, work, grads, sums)
    for name, total in sums.items():
        grads[name].copy_(total.mT.reshape(grads[name].shape))  # (G, N, E) -> (D, N), (G, 1, E) -> (D,)
    return grads


def _backward_block(layout: _Layout, block: _Block, entry: Tensor, carry: Tensor, grad_out: Tensor,
                    work: tuple[_Rows, _Rows, _Rows], grads: dict[str, Tensor],
                    sums: dict[str, Tensor]) -> Tensor:
    """Adds one block's share to grads and sums; from the adjoint of its exit state to that of its entry."""
    decay, states, adjoint = work
    decays, inside = layout.replay(block, entry, decay, states)
    end = len(inside) + 1
    scaled_u = block.step * block.u
    if block.z is not None:
        grad_z, grad_out = _gate_backward(block.z, _output(layout, block._replace(z=None), inside), grad_out)
        layout.store(grads["z"], block.span, grad_z)
    adjoints = torch.mul(grad_out, block.C, out=adjoint.block[1:end])
    adjoints[-1] += carry
    adjoint.rows[0].zero_()
    _recur_back(decay, adjoint, end)
    _store_map_grad(grads["C"], sums.get("C"), block.span, inside, grad_out)
    _store_map_grad(grads["B"], sums.get("B"), block.span, adjoints, scaled_u)
    grad_scaled_u = _sum_states(block.B, adjoints)  # (S, B, G, 1, E)

    exponent, scratch = adjoints.mul_(decays).mul_(states.block[: end - 1]), decays  # gradient of step * A
    sums["A"] += torch.mul(exponent, block.step, out=scratch).sum((0, 1))
    grad_step = torch.mul(exponent, layout.A, out=scratch).sum(-2, keepdim=True)
    grad_step.addcmul_(grad_scaled_u, block.u)
    grad_u = grad_scaled_u * block.step
    if layout.D is not None:
        grad_u.addcmul_(layout.D, grad_out)
        sums["D"] += (grad_out * block.u).sum((0, 1))
    if layout.args.delta_softplus:
        grad_step *= torch.sigmoid(block.raw_step).masked_fill_(block.raw_step > SOFTPLUS_LINEAR, 1.0)
    if layout.bias is not None:
        sums["delta_bias"] += grad_step.sum((0, 1))
    layout.store(grads["u"], block.span, grad_u)
    layout.store(grads["delta"], block.span, grad_step)
    return adjoint.rows[0].clone()


def _gate_backward(z: Tensor, ungated: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and of the ungated output, for output = ungated * SiLU(z)."""
    gate = torch.sigmoid(z)
    return grad_out * ungated * gate * (1 + z * (1 - gate)), grad_out * z * gate


def _sum_states(maps: Tensor, states: Tensor) -> Tensor:
    """Sum over n of maps * states: (S, B, G, 1, E)."""
    if maps.shape[-1] == 1:
        return torch.matmul(maps.mT, states)  # (1, N) x (N, E)
    return (maps * states).sum(-2, keepdim=True)


def _store_map_grad(grad: Tensor, total: Tensor | None, span: slice, states: Tensor,
                    sequence: Tensor) -> None:
    """Sum over a group's channels of states * sequence, into grad (B, G, N, L) or a constant map's total."""
    if total is not None:
        total += (states * sequence).sum((0, 1))
        return
    per_step = torch.matmul(sequence, states.mT).squeeze(-2)  # (1, E) x (E, N) -> (S, B, G, N)
    grad[..., span] = per_step.permute(1, 2, 3, 0)


def _recur(decay: _Rows, states: _Rows, end: int) -> None:
    """states[r] += decay[r] * states[r - 1] for r = 1 .. end - 1, in place."""
    if states.block.is_cuda:
        return _recur_by_doubling(decay.block[:end], states.block[:end])
    for r in range(1, end):
        states.rows[r].addcmul_(decay.rows[r], states.rows[r - 1])


def _recur_back(decay: _Rows, adjoint: _Rows, end: int) -> None:
    """adjoint[r] += decay[r + 1] * adjoint[r + 1] for r = end - 2 .. 0, in place."""
    if adjoint.block.is_cuda:
        return _recur_back_by_doubling(decay.block[:end], adjoint.block[:end])
    for r in range(end - 2, -1, -1):
        adjoint.rows[r].addcmul_(decay.rows[r + 1], adjoint.rows[r + 1])


def _recur_by_doubling(decay: Tensor, states: Tensor) -> None:
    """The same in log2(S) launches: after the round of stride s a row holds the last 2 s terms of its sum."""
    window, stride = decay.clone(), 1  # window[r]: product of the last `stride` decays up to row r
    while stride < len(states):
        states[stride:] = torch.addcmul(states[stride:], window[stride:], states[:-stride])
        window[stride:] = window[stride:] * window[:-stride]
        stride *= 2


def _recur_back_by_doubling(decay: Tensor, adjoint: Tensor) -> None:
    window, stride = decay[1:].clone(), 1  # window[r]: product of the next `stride` decays after row r
    while stride < len(adjoint):
        reach = len(adjoint) - stride
        adjoint[:reach] = torch.addcmul(adjoint[:reach], window[:reach], adjoint[stride:])
        window[: reach - 1] = window[: reach - 1] * window[stride:]
        stride *= 2
