"""The scan in plain PyTorch, where no compiled kernel runs, with memory and time that a training step can afford.

Time is cut into chunks whose states fit a processor's cache. The forward pass keeps only the state before each chunk;
the backward pass computes the states of one chunk at a time again from there and runs the recurrence of the gradients
back through it. Rows are gathered and scattered along the routes chunk by chunk. Nothing is ever divided by a product
of decays exp(step * A): those underflow (step * A reaches hundreds).

Axes: S steps of a chunk; channels E are kept last so that every elementwise operation runs along contiguous channels.
Inside, u, step and y are (S, B, K, 1, E), states (S, B, K, N, E), the parameters B and C (S, B, K, N, 1).

Reference: Gu and Dao, "Mamba", 2023, section 3.3 (keep boundary states, recompute inside).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels, ScanBackend

# Tokens of a chunk: on a CPU three chunks of states should fit its cache, a GPU wants few launches.
CHUNK_TOKENS, CHUNK_TOKENS_ON_CUDA = 32, 256
SOFTPLUS_LINEAR = 20.0  # torch's softplus is the identity above this, with derivative exactly 1


def torch_forward(args: ScanArgs, keep_chunk_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, last state (B, K, E, N), and the states (chunks, B, K, N, E) before each chunk, or (0,)."""
    layout = _Layout(args)
    chunks = layout.chunks()
    y = layout.new_rows(args.u)
    decay, states = layout.workspace(), layout.workspace()
    chunk_states = layout.A.new_empty((len(chunks), *layout.state_shape) if keep_chunk_states else 0)
    state = layout.A.new_zeros(layout.state_shape)
    for index, positions in enumerate(chunks):
        if keep_chunk_states:
            chunk_states[index] = state
        chunk = layout.load(positions)
        _, states_after = layout.recompute(chunk, state, decay, states)
        out = torch.matmul(chunk.C.mT, states_after)  # (1, N) x (N, E)
        if layout.D is not None:
            out = torch.addcmul(out, layout.D, chunk.u)
        layout.store(y, positions, out)
        state = states_after[-1].clone()
    return y.to(args.u.dtype), state.mT.contiguous(), chunk_states


def torch_backward(args: ScanArgs, chunk_states: Tensor, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias; those without a token axis in the scan's dtype."""
    layout = _Layout(args)
    grads = {"u": layout.new_rows(args.u),
             **{name: args.tensors[name].new_empty(args.tensors[name].shape) for name in ("delta", "B", "C")}}
    sums = {"A": torch.zeros_like(layout.A), "D": layout.A.new_zeros(layout.A.shape[0], 1, layout.A.shape[2])}
    sums["delta_bias"] = sums["D"].clone()
    work = layout.workspace(), layout.workspace(), layout.workspace()
    grad_state = grad_last.to(layout.dtype).mT.contiguous()  # (B, K, N, E), behind a chunk
    for index, positions in reversed(list(enumerate(layout.chunks()))):
        chunk, grad_out = layout.load(positions), layout.sequence(grad_y, positions)
        grad_state = _backward_chunk(layout, chunk, chunk_states[index], grad_state, grad_out, work, grads, sums)
    return (grads["u"].to(args.u.dtype), grads["delta"], sums["A"].mT.contiguous(), grads["B"], grads["C"],
            sums["D"].squeeze(1), sums["delta_bias"].squeeze(1))


class _Chunk(NamedTuple):
    """The inputs of S consecutive steps, time first."""

    positions: slice
    u: Tensor
    raw_step: Tensor  # bias included
    step: Tensor  # after softplus
    B: Tensor
    C: Tensor


class _Workspace(NamedTuple):
    """Memory for the states of one chunk; its rows are cut once, as a view costs as much as its use."""

    chunk: Tensor  # (S + 1, B, K, N, E): row 0 is before the chunk, row r belongs to its r-th step
    rows: tuple[Tensor, ...]


class _Layout:
    """Gathers rows along the routes into time-first chunks of the scan's dtype, and scatters them back."""

    def __init__(self, args: ScanArgs):
        self.args, self.dtype = args, args.scan_dtype
        batch, self.length, num_routes = args.delta.shape[:3]
        self.chunk_tokens = chunk_tokens(args.u.device)
        self.tokens = torch.stack([route.tokens(args.u.device) for route in args.routes])  # (K, P)
        self.route_numbers = torch.arange(num_routes, device=args.u.device)[:, None]
        self.A = args.A.to(self.dtype).mT.contiguous()  # (K, N, E)
        self.state_shape = (batch, *self.A.shape)
        self.D, self.bias = (None if x is None else x.to(self.dtype).unsqueeze(1) for x in (args.D, args.delta_bias))

    def chunks(self) -> list[slice]:
        starts = range(0, self.length, self.chunk_tokens)
        return [slice(start, min(start + self.chunk_tokens, self.length)) for start in starts]

    def workspace(self) -> _Workspace:
        chunk = self.A.new_empty(min(self.chunk_tokens, self.length) + 1, *self.state_shape)
        return _Workspace(chunk, chunk.unbind(0))

    def load(self, positions: slice) -> _Chunk:
        raw_step = self.sequence(self.args.delta, positions)
        if self.bias is not None:
            raw_step = raw_step + self.bias
        step = F.softplus(raw_step, threshold=SOFTPLUS_LINEAR) if self.args.delta_softplus else raw_step
        B, C = (self.gather(x, positions)[..., None] for x in (self.args.B, self.args.C))
        return _Chunk(positions, self.sequence(self.args.u, positions), raw_step, step, B, C)

    def recompute(self, chunk: _Chunk, first_state: Tensor, decay: _Workspace,
                  states: _Workspace) -> tuple[Tensor, Tensor]:
        """Decays of the chunk's steps and the states after them, in the workspaces; row 0 of decay is never read."""
        end = chunk.u.shape[0] + 1
        decays, states_after = decay.chunk[1:end], states.chunk[1:end]
        torch.exp(torch.mul(chunk.step, self.A, out=decays), out=decays)
        torch.mul(chunk.step * chunk.u, chunk.B, out=states_after)
        states.rows[0].copy_(first_state)
        _recurrence(decay, states, end)
        return decays, states_after

    def gather(self, x: Tensor, positions: slice) -> Tensor:
        """(B, P, K, C), or (B, P, G, C) of groups of routes, to (S, B, K, C)."""
        group = self.route_numbers // (len(self.route_numbers) // x.shape[2])
        rows = x.permute(2, 1, 0, 3)[group, self.tokens[:, positions]]
        return rows.permute(1, 2, 0, 3).to(self.dtype).contiguous()

    def sequence(self, x: Tensor, positions: slice) -> Tensor:
        """As `gather`, to (S, B, K, 1, E)."""
        return self.gather(x, positions).unsqueeze(-2)

    def new_rows(self, x: Tensor) -> Tensor:
        """Target of `store`: the routes of a group are added up, in the scan's dtype."""
        added = self.args.routes_per_group > 1
        return x.new_zeros(x.shape, dtype=self.dtype) if added else x.new_empty(x.shape)

    def store(self, target: Tensor, positions: slice, chunk: Tensor) -> None:
        """Writes (S, B, K, 1, E) into (B, P, K, E), or adds the routes of each group into (B, P, G, E)."""
        rows, tokens = chunk.flatten(-2).permute(2, 0, 1, 3), self.tokens[:, positions]  # (K, S, B, C)
        if target.shape[2] == len(rows):
            target.permute(2, 1, 0, 3)[self.route_numbers, tokens] = rows.to(target.dtype)
            return
        for k, (route_tokens, route_rows) in enumerate(zip(tokens, rows, strict=True)):
            group = k * target.shape[2] // len(rows)
            target[:, :, group].transpose(0, 1).index_add_(0, route_tokens, route_rows)


def _backward_chunk(layout: _Layout, chunk: _Chunk, first_state: Tensor, grad_state: Tensor, grad_out: Tensor,
                    work: tuple[_Workspace, _Workspace, _Workspace], grads: dict[str, Tensor],
                    sums: dict[str, Tensor]) -> Tensor:
    """Adds one chunk's share to grads and sums. `grad_state` is the gradient of the state behind the chunk; returned is
    that of the state before it."""
    decay, states, grad = work
    decays, states_after = layout.recompute(chunk, first_state, decay, states)
    end = len(states_after) + 1
    grad_states = torch.mul(grad_out, chunk.C, out=grad.chunk[1:end])
    grad_states[-1] += grad_state
    grad.rows[0].zero_()
    _reverse_recurrence(decay, grad, end)
    layout.store(grads["C"], chunk.positions, torch.matmul(grad_out, states_after.mT))  # (1, E) x (E, N)
    layout.store(grads["B"], chunk.positions, torch.matmul(chunk.step * chunk.u, grad_states.mT))
    grad_step_u = torch.matmul(chunk.B.mT, grad_states)  # (S, B, K, 1, E), of step * u

    exponent, scratch = grad_states.mul_(decays).mul_(states.chunk[: end - 1]), decays  # gradient of step * A
    sums["A"] += torch.mul(exponent, chunk.step, out=scratch).sum((0, 1))
    grad_step = torch.mul(exponent, layout.A, out=scratch).sum(-2, keepdim=True)
    grad_step.addcmul_(grad_step_u, chunk.u)
    grad_u = grad_step_u * chunk.step
    if layout.D is not None:
        grad_u.addcmul_(layout.D, grad_out)
        sums["D"] += (grad_out * chunk.u).sum((0, 1))
    if layout.args.delta_softplus:
        grad_step *= torch.sigmoid(chunk.raw_step).masked_fill_(chunk.raw_step > SOFTPLUS_LINEAR, 1.0)
    sums["delta_bias"] += grad_step.sum((0, 1))
    layout.store(grads["u"], chunk.positions, grad_u)
    layout.store(grads["delta"], chunk.positions, grad_step)
    return grad.rows[0].clone()


def _recurrence(decay: _Workspace, states: _Workspace, end: int) -> None:
    """states[r] += decay[r] * states[r - 1] for r = 1 .. end - 1, in place."""
    if states.chunk.is_cuda:
        return _recurrence_by_doubling(decay.chunk[:end], states.chunk[:end])
    for r in range(1, end):
        states.rows[r].addcmul_(decay.rows[r], states.rows[r - 1])


def _reverse_recurrence(decay: _Workspace, grad: _Workspace, end: int) -> None:
    """grad[r] += decay[r + 1] * grad[r + 1] for r = end - 2 .. 0, in place."""
    if grad.chunk.is_cuda:
        return _reverse_recurrence_by_doubling(decay.chunk[:end], grad.chunk[:end])
    for r in range(end - 2, -1, -1):
        grad.rows[r].addcmul_(decay.rows[r + 1], grad.rows[r + 1])


def _recurrence_by_doubling(decay: Tensor, states: Tensor) -> None:
    """The same in log2(S) launches: after the round of stride s a row holds the last 2 s terms of its sum."""
    window, stride = decay.clone(), 1  # window[r]: product of the last `stride` decays up to row r
    while stride < len(states):
        states[stride:] = torch.addcmul(states[stride:], window[stride:], states[:-stride])
        window[stride:] = window[stride:] * window[:-stride]
        stride *= 2


def _reverse_recurrence_by_doubling(decay: Tensor, grad: Tensor) -> None:
    window, stride = decay[1:].clone(), 1  # window[r]: product of the next `stride` decays after row r
    while stride < len(grad):
        reach = len(grad) - stride
        grad[:reach] = torch.addcmul(grad[:reach], window[:reach], grad[stride:])
        window[: reach - 1] = window[: reach - 1] * window[stride:]
        stride *= 2


def chunk_tokens(device: torch.device) -> int:
    """Tokens of a chunk on such a device."""
    return CHUNK_TOKENS_ON_CUDA if device.type == "cuda" else CHUNK_TOKENS


TORCH = ScanBackend(refusal=lambda needs: None, kernels=Kernels(torch_forward, torch_backward, chunk_tokens))
