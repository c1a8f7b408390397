"""Mamba-1's scan by `kernels/cuda/selective_scan_{forward,backward}.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mambatrain.ops.native.cuda import launching
from mambatrain.ops.native.cuda.programs import ELEMENTS, THREADS, Program
from mambatrain.ops.native.cuda.tensors import View, as_dtype, can_pack, common_dtype, room_for, view, write_to
from mambatrain.ops.native.inputs import ScanInputs
from mambatrain.ops.native.operators import address, full_precision
from mambatrain.ops.triton import steps

FLOATS = tuple(ELEMENTS)
PACK = 4  # channels that are read at once, where memory allows
FEW_STATES = 4  # the fewest states that are padded to
PARTIAL_BYTES = 2  # for each channel and position: what the partial sums of dB and dC may take


class _Arguments(ctypes.Structure):
    """ScanArguments of `kernels/cuda/selective_scan.cuh`: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "length", "channels", "states")),
        *((name, View) for name in ("u", "dt", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial_state", "boundaries", "entries")),
        ("out", View),
        ("final_state", ctypes.c_void_p),
        ("grad_out", View),
        ("grad_state", ctypes.c_void_p),
        *((name, View) for name in ("du", "ddt", "dz", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("dA", "dD", "dinitial", "partial")),
        ("slices", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Layout:
    """How the threads of a block share states and channels; `kernels/cuda/selective_scan.cuh` says what each is."""

    states: int  # of one thread, like channels
    lanes: int
    channels: int

    @classmethod
    def for_sizes(cls, num_states: int, num_channels: int, rows: int, processors: int) -> Layout:
        """Two channels a thread, which shares what is read of B and C; one where warps would be too few."""
        padded = pad_states(num_states)
        lanes = min(32, max(4, padded // 4))
        layout = cls(padded // lanes, lanes, 1 if padded > 128 else 2)
        warps = rows * layout.num_groups(num_channels) * THREADS // 32
        return cls(layout.states, lanes, 1) if warps < 4 * processors else layout

    @property
    def block(self) -> int:
        """Channels of a block."""
        return THREADS // self.lanes * self.channels

    def num_groups(self, num_channels: int) -> int:
        """Blocks' worth of channels."""
        return -(-num_channels // self.block)

    def program(self, name: str, dtype: torch.dtype, pack: int) -> Program:
        """The source selective_scan_NAME for this layout."""
        padded = self.states * self.lanes
        chunk = chunk_of(padded)
        shared_bytes = 4 * chunk * (2 * padded + 3 * self.block)
        if name == "backward":
            shared_bytes += 4 * chunk * (3 * self.block + 2 * (THREADS + self.lanes) * self.states)
        sizes = {"STATES": self.states, "LANES": self.lanes, "CHANNELS": self.channels, "PACK": pack, "CHUNK": chunk}
        return Program.of(f"selective_scan_{name}.cu", dtype, sizes, _Arguments, shared_bytes)


def pad_states(num_states: int) -> int:
    """A power of 2: what lanes can share."""
    return max(FEW_STATES, 1 << (num_states - 1).bit_length())


def chunk_of(padded_states: int) -> int:
    """Positions between two saved states; backward keeps the states of a chunk in at most 99 KB of shared memory."""
    return 16 if padded_states <= 128 else 8


def entries_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Of the states at the entry of each chunk."""
    padded = pad_states(A.shape[1])
    return u.shape[0], -(-u.shape[1] // chunk_of(padded)), u.shape[2], padded


def forward(inputs: ScanInputs, out: Tensor, state: Tensor, entries: Tensor | None) -> None:
    """Writes the output, the final state and, where wanted, the states at the entry of each chunk."""
    if entries is None and steps.is_step(inputs.u):
        steps.step_selective_scan(*inputs.readable(), out, state)
        return
    inputs = _as_kernels_take_them(inputs)
    layout = _layout(inputs)
    written = room_for(out, inputs.u.dtype)
    arguments = _arguments(inputs)
    arguments.entries = address(entries)
    arguments.out, arguments.final_state = view(written), address(state)
    pack = PACK if can_pack(PACK, inputs.u, inputs.dt, inputs.z, written) else 1
    program = layout.program("forward", inputs.u.dtype, pack)
    num_blocks = inputs.u.shape[0] * layout.num_groups(inputs.u.shape[2])
    launching.launch(program, "selective_scan_forward", num_blocks, arguments, inputs.u.device)
    write_to(out, written)


def backward(
    inputs: ScanInputs, grad_out: Tensor | None, grad_state: Tensor | None, entries: Tensor, gradients: ScanInputs
) -> None:
    """Writes the gradients; those of parameters and states are fp32."""
    inputs = _as_kernels_take_them(inputs)
    (rows, length, channels), states = inputs.u.shape, inputs.A.shape[1]
    dtype, device, layout = inputs.u.dtype, inputs.u.device, _layout(inputs)
    grad_out, grad_state = as_dtype(grad_out, dtype), full_precision(grad_state)
    du, ddt, dB, dC = (room_for(gradient, dtype) for gradient in (gradients.u, gradients.dt, gradients.B, gradients.C))
    dz = None if gradients.z is None else room_for(gradients.z, dtype)
    slices = count_slices(layout, rows, channels, states, launching.count_processors(device))
    partial = inputs.A.new_empty(slices, rows, length, 2, pad_states(states))
    dA, dD = inputs.A.new_empty(rows, channels, states), inputs.A.new_empty(2, rows, channels)
    arguments = _arguments(inputs)
    arguments.entries, arguments.slices = address(entries), slices
    arguments.grad_out, arguments.grad_state = view(grad_out), address(grad_state)
    arguments.du, arguments.ddt, arguments.dz = view(du), view(ddt), view(dz)
    arguments.dB, arguments.dC, arguments.partial = view(dB), view(dC), address(partial)
    arguments.dA, arguments.dD, arguments.dinitial = address(dA), address(dD), address(gradients.initial_state)
    pack = PACK if can_pack(PACK, inputs.u, inputs.dt, inputs.z, grad_out, du, ddt, dz) else 1
    program = layout.program("backward", dtype, pack)
    launching.launch(program, "selective_scan_backward", rows * slices, arguments, device)
    launching.launch(program, "sum_slices", -(-2 * dB.numel() // THREADS), arguments, device)
    torch.sum(dA, 0, out=gradients.A)
    for target, parts in zip((gradients.D, gradients.dt_bias), dD, strict=True):
        if target is not None:
            torch.sum(parts, 0, out=target)
    for target, written in zip((gradients.u, gradients.dt, gradients.B, gradients.C), (du, ddt, dB, dC), strict=True):
        write_to(target, written)
    if gradients.z is not None and dz is not None:
        write_to(gradients.z, dz)


def count_slices(layout: Layout, rows: int, num_channels: int, num_states: int, processors: int) -> int:
    """Blocks that share a row in backward. Each writes a part of dB and dC: few where that would take much memory."""
    groups = layout.num_groups(num_channels)
    bytes_per_position = 8 * pad_states(num_states)
    wanted = -(-num_channels * PARTIAL_BYTES // bytes_per_position)
    enough = -(-2 * processors // max(rows, 1))  # blocks to keep the device busy
    step = -(-groups // max(1, min(groups, max(wanted, enough))))
    return -(-groups // max(step, 1))


def _layout(inputs: ScanInputs) -> Layout:
    rows, _, channels = inputs.u.shape
    return Layout.for_sizes(inputs.A.shape[1], channels, rows, launching.count_processors(inputs.u.device))


def _as_kernels_take_them(inputs: ScanInputs) -> ScanInputs:
    """One dtype for all that has a length."""
    dtype = common_dtype(inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z)
    u, dt, B, C = (tensor.to(dtype) for tensor in (inputs.u, inputs.dt, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z.to(dtype)
    return inputs._replace(u=u, dt=dt, B=B, C=C, z=z).readable()


def _arguments(inputs: ScanInputs) -> _Arguments:
    """What forward and backward share; it points to the memory of the inputs."""
    u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state = inputs
    return _Arguments(
        *(*u.shape, A.shape[1], view(u), view(dt), view(z), view(B), view(C)),
        *(address(A), address(D), address(dt_bias), address(initial_state), address(boundaries), None),
    )
