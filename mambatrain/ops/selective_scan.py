"""Mamba-1's scan in plain torch, linear in the length forward and backward.

Time is cut into chunks. Forward keeps the state at the entry of each chunk and nothing else that is not an input;
backward takes the chunks from the last to the first and recomputes the states inside each. The mathematics is that of
`kernels/README.md`.

Inside, states are (R, q, N, E) for R rows and q positions: channels innermost, so that every elementwise operation runs
along contiguous memory, and rows outermost, so that a core meets the same rows in every operation and finds them in its
own cache. Rows are taken in groups that keep the buffers of a chunk near the size of that cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_selective_scan

CHUNK = 16  # positions; the entry states that forward keeps are 1 / CHUNK of all states
STATES_PER_GROUP = (
    49_152  # R N E on a CPU; below 32,768 torch's overhead per call shows, far above it the cache is lost
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of `reference.selective_scan`, fast: same arguments, same results, differentiable once.

    Args:
        u: (B, L, E); it and all others may be strided views.
        dt: (B, L, E) raw delta, before bias and softplus.
        A: (E, N), negative.
        B: (B, L, N).
        C: (B, L, N).
        D: (E,) skip.
        z: (B, L, E) gate.
        dt_bias: (E,).
        boundaries: (B, L) bool.
        initial_state: (B, E, N).

    Returns:
        out (B, L, E) in the dtype of u, and the state behind the last position (B, E, N) in fp32 (fp64 for fp64).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_selective_scan(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    floats = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    keep_entries = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    out, state = _SelectiveScan.apply(*floats, boundaries, keep_entries)  # type: ignore[no-untyped-call]
    return out, state


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, keep_entries = arguments
        u, dt, A, B, C, D, z, dt_bias, initial_state, boundaries = tensors
        with torch.autocast(u.device.type, enabled=False):
            scan = _Scan(u, dt, A, B, C, D, z, dt_bias, boundaries)
            out, state, entries = scan.run(initial_state, keep_entries)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *entries)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, initial_state, boundaries, *entries = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            scan = _Scan(u, dt, A, B, C, D, z, dt_bias, boundaries)
            grads = scan.run_back(entries, grad_out, grad_state)
        return (
            grads.u,
            grads.dt,
            grads.A.T.to(A.dtype),
            grads.B,
            grads.C,
            None if D is None else grads.D.to(D.dtype),
            grads.z,
            None if dt_bias is None else grads.dt_bias.to(dt_bias.dtype),
            None if initial_state is None else grads.initial_state.to(initial_state.dtype),
            None,
            None,
        )


class _Chunk(NamedTuple):
    """q positions of R rows, in the computing dtype."""

    u: Tensor  # (R, q, E)
    raw: Tensor  # (R, q, E), delta before softplus
    delta: Tensor  # (R, q, E)
    B: Tensor  # (R, q, N)
    C: Tensor  # (R, q, N)
    starts: dict[int, Tensor]  # position in the chunk -> rows in which a document starts there, (R, 1, 1) bool


class _Gradients(NamedTuple):
    """Sums over positions stay in the computing dtype."""

    u: Tensor  # (B, L, E)
    dt: Tensor  # (B, L, E)
    A: Tensor  # (N, E)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor  # (E,)
    z: Tensor | None  # (B, L, E)
    dt_bias: Tensor  # (E,)
    initial_state: Tensor  # (B, E, N)


class _Scan:
    """One call: its inputs and the memory that its chunks share."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        boundaries: Tensor | None,
    ) -> None:
        self.dtype = computing_dtype(u)
        self.u, self.dt, self.B, self.C, self.z, self.boundaries = u, dt, B, C, z, boundaries
        self.A = A.to(self.dtype).T.contiguous()  # (N, E)
        self.A_log2e = self.A * math.log2(math.e)  # 2 ** (x log2 e) takes a quarter of the time of exp(x) on x86
        self.D = None if D is None else D.to(self.dtype)
        self.dt_bias = None if dt_bias is None else dt_bias.to(self.dtype)
        # One list a call: reading the boundaries position by position would wait for a GPU at each.
        self.some_start = [] if boundaries is None else boundaries.any(0).tolist()
        self.num_rows, self.length, _ = u.shape
        self.rows_per_group = max(1, self.num_rows)
        if u.device.type == "cpu":
            self.rows_per_group = max(1, min(self.num_rows, STATES_PER_GROUP // max(1, A.numel())))
        size = self.rows_per_group * min(CHUNK, self.length) * A.numel()
        self.memory = [self.A.new_empty(size) for _ in range(3)]
        self.buffers: dict[tuple[int, torch.Size], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def run(self, initial_state: Tensor | None, keep_entries: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """out (B, L, E), final state (B, E, N), entry states (R, N, E) in the order of `_places`."""
        out = _empty_like(self.u)
        states = self._inner_states(initial_state)
        entries = []
        for rows, span in self._places():
            if keep_entries:
                entries.append(states[rows].clone())
            chunk = self._chunk(rows, span)
            h, _ = self._states(chunk, states[rows])
            y = self._ungated(chunk, h)
            out[rows, span] = y if self.z is None else y.mul_(F.silu(self.z[rows, span].to(self.dtype)))
            states[rows] = h[:, -1]
        return out, states.transpose(1, 2).contiguous(), entries

    def run_back(self, entries: list[Tensor], grad_out: Tensor | None, grad_state: Tensor | None) -> _Gradients:
        """Every gradient; `carries` (B, N, E) hold what reaches the state behind the chunk from later positions."""
        carries = self._inner_states(grad_state)
        du, ddt, dB, dC = (_empty_like(tensor) for tensor in (self.u, self.dt, self.B, self.C))
        dz = None if self.z is None else _empty_like(self.z)
        dD, dbias = self.A.new_zeros(2, self.A.shape[1])
        grads = _Gradients(du, ddt, torch.zeros_like(self.A), dB, dC, dD, dz, dbias, carries.transpose(1, 2))
        for (rows, span), entry in zip(reversed(list(self._places())), reversed(entries), strict=True):
            chunk = self._chunk(rows, span)
            g = torch.zeros_like(chunk.u) if grad_out is None else grad_out[rows, span].to(self.dtype)
            self._chunk_back((rows, span), chunk, g, entry, carries[rows], grads)
        return grads

    def _chunk_back(
        self, place: tuple[slice, slice], chunk: _Chunk, g: Tensor, entry: Tensor, carry: Tensor, grads: _Gradients
    ) -> None:
        h, decay = self._states(chunk, entry)
        if self.z is not None and grads.z is not None:
            gate = self.z[place].to(self.dtype)
            grads.z[place] = torch.ops.aten.silu_backward(g * self._ungated(chunk, h), gate)
            g = g * F.silu(gate)
        grads.C[place] = _sum_over_channels(g, h)
        d = self._adjoints(chunk, g, carry)
        grads.B[place] = _sum_over_channels(chunk.delta * chunk.u, d)
        q1 = _sum_over_states(chunk.B, d)
        k = self._exponent_gradients(chunk, d, decay, h, entry, carry)
        grads.A.add_(torch.mul(k, chunk.delta[:, :, None], out=h).sum((0, 1)))  # h is spent
        ddelta = k.mul_(self.A).sum(2).addcmul_(q1, chunk.u)
        draw = torch.ops.aten.softplus_backward(ddelta, chunk.raw, 1, 20)
        grads.dt[place] = draw
        grads.dt_bias.add_(draw.sum((0, 1)))
        du = q1.mul_(chunk.delta)
        if self.D is not None:
            du.addcmul_(g, self.D)
            grads.D.add_((g * chunk.u).sum((0, 1)))
        grads.u[place] = du

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and positions of every chunk, in the order of forward."""
        for row in range(0, self.num_rows, self.rows_per_group):
            for start in range(0, self.length, CHUNK):
                yield slice(row, row + self.rows_per_group), slice(start, start + CHUNK)

    def _inner_states(self, states: Tensor | None) -> Tensor:
        """(B, E, N) or None -> a fresh (B, N, E)."""
        inner = self.A.new_zeros(self.num_rows, *self.A.shape)
        return inner if states is None else inner.copy_(states.transpose(1, 2))

    def _chunk(self, rows: slice, span: slice) -> _Chunk:
        u, raw, B, C = (x[rows, span].to(self.dtype) for x in (self.u, self.dt, self.B, self.C))
        raw = raw if self.dt_bias is None else raw + self.dt_bias
        starts = {}
        if self.boundaries is not None:
            some_start = enumerate(self.some_start[span])
            starts = {t: self.boundaries[rows, span.start + t, None, None] for t, some in some_start if some}
        return _Chunk(u, raw, F.softplus(raw), B, C, starts)

    def _buffer(self, index: int, chunk: _Chunk) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Memory (R, q, N, E) and its views at each position (R, N, E), made once: they cost 5% of the time."""
        shape = chunk.u.shape[:2] + self.A.shape
        if (index, shape) not in self.buffers:
            buffer = self.memory[index][: math.prod(shape)].view(shape)
            self.buffers[index, shape] = buffer, buffer.unbind(1)
        return self.buffers[index, shape]

    def _states(self, chunk: _Chunk, before: Tensor) -> tuple[Tensor, Tensor]:
        """h and decay, each (R, q, N, E); `before` is the state at the entry (R, N, E)."""
        (decay, decay_at), (h, h_at) = self._buffer(0, chunk), self._buffer(1, chunk)
        torch.mul(chunk.delta[:, :, None], self.A_log2e, out=decay).exp2_()
        torch.mul((chunk.delta * chunk.u)[:, :, None], chunk.B[..., None], out=h)
        for t, (decay_t, h_t) in enumerate(zip(decay_at, h_at, strict=True)):
            if t in chunk.starts:
                before = before.masked_fill(chunk.starts[t], 0)
            before = torch.addcmul(h_t, decay_t, before, out=h_t)
        return h, decay

    def _ungated(self, chunk: _Chunk, h: Tensor) -> Tensor:
        """y (R, q, E) with the skip and without the gate."""
        y = _sum_over_states(chunk.C, h)
        return y if self.D is None else y.addcmul_(chunk.u, self.D)

    def _adjoints(self, chunk: _Chunk, g: Tensor, carry: Tensor) -> Tensor:
        """d, the gradient of each state (R, q, N, E), behind `_states`; g is that of y (R, q, E)."""
        (_, decay_at), (d, d_at) = self._buffer(0, chunk), self._buffer(2, chunk)
        torch.mul(g[:, :, None], chunk.C[..., None], out=d)
        d_at[-1].add_(carry)
        for t in range(len(d_at) - 2, -1, -1):
            if t + 1 in chunk.starts:
                d_at[t].add_((decay_at[t + 1] * d_at[t + 1]).masked_fill_(chunk.starts[t + 1], 0))
            else:
                torch.addcmul(d_at[t], decay_at[t + 1], d_at[t + 1], out=d_at[t])
        return d

    def _exponent_gradients(
        self, chunk: _Chunk, d: Tensor, decay: Tensor, h: Tensor, entry: Tensor, carry: Tensor
    ) -> Tensor:
        """k, the gradient of delta A (R, q, N, E), in the memory of decay; carry becomes that of the entry state."""
        k = decay.mul_(d)
        carry.copy_(k[:, 0])
        if 0 in chunk.starts:
            carry.masked_fill_(chunk.starts[0], 0)
        k[:, 1:].mul_(h[:, :-1])
        k[:, 0].mul_(entry)
        for t, rows in chunk.starts.items():
            k[:, t].masked_fill_(rows, 0)  # by selection: the state before may have been inf
        return k


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _sum_over_states(weights: Tensor, states: Tensor) -> Tensor:
    """(R, q, N), (R, q, N, E) -> (R, q, E)."""
    return torch.bmm(weights.reshape(-1, 1, weights.shape[2]), states.flatten(0, 1)).view(*states.shape[:2], -1)


def _sum_over_channels(weights: Tensor, states: Tensor) -> Tensor:
    """(R, q, E), (R, q, N, E) -> (R, q, N). A row times a transposed view: the column form takes 10 times as long."""
    return torch.bmm(weights.reshape(-1, 1, weights.shape[2]), states.flatten(0, 1).mT).view(*states.shape[:2], -1)
