"""Depthwise causal convolution and SiLU in plain torch: one shifted multiply-add a tap over the whole row.

Positions whose taps would reach across a boundary are few; they are computed a second time, by themselves, with those
taps left out by selection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.shapes import check_causal_conv


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_window: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of `reference.causal_conv`, fast: same arguments, same results, differentiable once.

    Args:
        x: (B, L, D); it and all others may be strided views.
        weight: (D, W); tap W - 1 multiplies the position itself.
        bias: (D,).
        boundaries: (B, L) bool.
        initial_window: (B, W - 1, D), the inputs before position 0, oldest first.

    Returns:
        silu(conv(x)) (B, L, D) in the dtype of x, and the window behind the last position (B, W - 1, D) in fp32 (fp64
        for fp64), in which inputs before the last boundary are 0.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; nothing was computed.
    """
    check_causal_conv(x, weight, bias, boundaries, initial_window)
    y, window = _CausalConv.apply(x, weight, bias, initial_window, boundaries)  # type: ignore[no-untyped-call]
    return y, window


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_window: Tensor | None,
        boundaries: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, initial_window, boundaries)
        with torch.autocast(x.device.type, enabled=False):
            inputs = _extend(x, weight, initial_window)
            cut = _find_cut_taps(boundaries, weight)
            sums = _sum_taps(inputs, weight, bias, cut)
            window = inputs[:, x.shape[1] :]
            window = window.clone() if cut is None else window.masked_fill(cut.window, 0)
            return F.silu(sums, inplace=True).to(x.dtype), window

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_window: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_window, boundaries = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            inputs = _extend(x, weight, initial_window)
            cut = _find_cut_taps(boundaries, weight)
            dinputs = torch.zeros_like(inputs)
            if grad_window is not None:
                dinputs[:, x.shape[1] :] = grad_window if cut is None else grad_window.masked_fill(cut.window, 0)
            sums = _sum_taps(inputs, weight, bias, cut)
            g = torch.zeros_like(sums) if grad_y is None else grad_y.to(sums.dtype)
            g = torch.ops.aten.silu_backward(g, sums)
            dbias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
            dweight = _taps_back(inputs, weight, g, cut, dinputs)
        before = weight.shape[1] - 1
        dwindow = None if initial_window is None else dinputs[:, :before].to(initial_window.dtype)
        return dinputs[:, before:].to(x.dtype), dweight, dbias, dwindow, None


class _CutTaps(NamedTuple):
    """The n positions whose taps reach across a boundary, and which of their taps do."""

    rows: Tensor  # (n,)
    positions: Tensor  # (n,)
    taps: Tensor  # (n, W, 1) bool
    window: Tensor  # (B, W - 1, 1) bool, the same for the window behind the last position


def _extend(x: Tensor, weight: Tensor, initial_window: Tensor | None) -> Tensor:
    """(B, W - 1 + L, D) in the computing dtype: tap k of position t reads place t + k."""
    rows, length, channels = x.shape
    before = weight.shape[1] - 1
    inputs = x.new_empty(rows, before + length, channels, dtype=computing_dtype(x))
    inputs[:, :before] = 0 if initial_window is None else initial_window
    inputs[:, before:] = x
    return inputs


def _find_cut_taps(boundaries: Tensor | None, weight: Tensor) -> _CutTaps | None:
    if boundaries is None:
        return None
    width, length = weight.shape[1], boundaries.shape[1]
    document = F.pad(boundaries.cumsum(1), (width - 1, 0))  # (B, W - 1 + L)
    cut = torch.stack([document[:, k : k + length] != document[:, width - 1 :] for k in range(width)], dim=-1)
    rows, positions = cut[..., 0].nonzero(as_tuple=True)  # the oldest tap is cut wherever any is
    window = document[:, length:] != document[:, -1:]
    return _CutTaps(rows, positions, cut[rows, positions, :, None], window[..., None])


def _read_uncut(inputs: Tensor, cut: _CutTaps) -> Tensor:
    """What each tap of the cut positions may see (n, W, D)."""
    places = cut.positions[:, None] + torch.arange(cut.taps.shape[1], device=inputs.device)
    return inputs[cut.rows[:, None], places].masked_fill_(cut.taps, 0)


def _sum_taps(inputs: Tensor, weight: Tensor, bias: Tensor | None, cut: _CutTaps | None) -> Tensor:
    """conv(x) + bias (B, L, D)."""
    taps = weight.to(inputs.dtype).T.contiguous()  # (W, D)
    width = taps.shape[0]
    length = inputs.shape[1] - width + 1
    sums = inputs[:, width - 1 :] * taps[-1]
    for k in range(width - 1):
        sums.addcmul_(inputs[:, k : k + length], taps[k])
    if cut is not None:
        sums[cut.rows, cut.positions] = (_read_uncut(inputs, cut) * taps).sum(1)
    return sums if bias is None else sums.add_(bias.to(sums.dtype))


def _taps_back(inputs: Tensor, weight: Tensor, g: Tensor, cut: _CutTaps | None, dinputs: Tensor) -> Tensor:
    """The gradient of weight (D, W) from that of the sums (B, L, D); adds that of the inputs to dinputs."""
    taps = weight.to(inputs.dtype).T.contiguous()
    length = g.shape[1]
    dtaps = torch.empty_like(taps)
    if cut is not None:
        g_cut = g[cut.rows, cut.positions]  # (n, D)
        g[cut.rows, cut.positions] = 0
    for k in range(len(taps)):
        dinputs[:, k : k + length].addcmul_(g, taps[k])
        dtaps[k] = (g * inputs[:, k : k + length]).sum((0, 1))
    if cut is not None:
        dtaps += (g_cut[:, None] * _read_uncut(inputs, cut)).sum(0)
        for k in range(len(taps)):
            reaches = (g_cut * taps[k]).masked_fill_(cut.taps[:, k], 0)
            dinputs[cut.rows, cut.positions + k] += reaches  # within a tap every place occurs once
    return dtaps.T.to(weight.dtype)
