"""The obvious form of every operator: the contract that all backends are held to.

Serial in time, differentiable by autograd, in the dtype rules of the operators: inputs of fp32 or narrower are computed
in fp32, fp64 in fp64; outputs come back in the dtype of the first argument, states in the computing dtype.

A *boundary* at position t says that a document starts there: state and convolution window are dropped by selection
(never by multiplying with 0: an inf in one document must not become a NaN in the next).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
    """Mamba-1's scan (arXiv 2312.00752, algorithm 2), gated.

    Args:
        u: (B, L, E) input, after convolution and SiLU.
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
        out (B, L, E) and the state behind the last position (B, E, N).
    """
    dtype = computing_dtype(u)
    x, B, C, A = u.to(dtype), B.to(dtype), C.to(dtype), A.to(dtype)
    delta = F.softplus(dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype))  # (B, L, E)
    h = x.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        if boundaries is not None:
            h = torch.where(boundaries[:, t, None, None], 0.0, h)
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state-space dual scan (arXiv 2405.21060, section 6) in its recurrent form; the gate is the caller's.

    Args:
        x: (B, L, H, P) input, after convolution and SiLU.
        dt: (B, L, H) raw delta, before bias and softplus.
        A: (H,), negative.
        B: (B, L, G, N); head h reads group h // (H / G).
        C: (B, L, G, N).
        D: (H,) skip.
        dt_bias: (H,).
        boundaries: (B, L) bool.
        initial_state: (B, H, P, N).

    Returns:
        y (B, L, H, P) and the state behind the last position (B, H, P, N).
    """
    dtype = computing_dtype(x)
    heads, heads_per_group = x.shape[2], x.shape[2] // B.shape[2]
    v, A = x.to(dtype), A.to(dtype)
    B = B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (B, L, H, N)
    C = C.to(dtype).repeat_interleave(heads_per_group, dim=2)
    delta = F.softplus(dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype))  # (B, L, H)
    h = v.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        if boundaries is not None:
            h = torch.where(boundaries[:, t, None, None, None], 0.0, h)
        decay = torch.exp(delta[:, t] * A)[:, :, None, None]  # (B, H, 1, 1)
        h = decay * h + (delta[:, t, :, None] * v[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    if D is not None:
        y = y + D.to(dtype)[:, None] * v
    return y.to(x.dtype), h


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_window: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU; taps do not reach across a boundary.

    Args:
        x: (B, L, D).
        weight: (D, W); tap W - 1 multiplies the position itself.
        bias: (D,).
        boundaries: (B, L) bool.
        initial_window: (B, W - 1, D), the inputs before position 0, oldest first.

    Returns:
        silu(conv(x)) (B, L, D) and the window behind the last position (B, W - 1, D), in which inputs before the last
        boundary are 0.
    """
    dtype = computing_dtype(x)
    batch, length, channels = x.shape
    width = weight.shape[1]
    window = x.new_zeros(batch, width - 1, channels) if initial_window is None else initial_window
    window, taps = window.to(dtype), weight.to(dtype)
    outputs = []
    for t in range(length):
        if boundaries is not None:
            window = torch.where(boundaries[:, t, None, None], 0.0, window)
        seen = torch.cat([window, x[:, t, None].to(dtype)], dim=1)  # (B, W, D)
        p = (seen * taps.T).sum(1)
        outputs.append(F.silu(p if bias is None else p + bias.to(dtype)))
        window = seen[:, 1:]
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y.to(x.dtype), window


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over the targets that count.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64; `ignored` where a position does not count.

    Returns:
        The summed loss in nats, a scalar of the computing dtype.
    """
    dtype = computing_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return F.cross_entropy(logits, targets, ignore_index=ignored, reduction="sum")


def softmax_loss(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-log softmax(logits)[target] of each row, and its gradient: softmax(logits), less 1 at the target.

    Args:
        logits: (R, V); backends may put the gradients into their memory.
        targets: (R,) int64.
        wants_gradient: else the second result is None.

    Returns:
        (R,) in the computing dtype, and (R, V) in the dtype of the logits.
    """
    logs = torch.log_softmax(logits.to(computing_dtype(logits)), dim=1)
    losses = -logs.gather(1, targets[:, None])[:, 0]
    if not wants_gradient:
        return losses, None
    return losses, (logs.exp() - F.one_hot(targets, logits.shape[1])).to(logits.dtype)
