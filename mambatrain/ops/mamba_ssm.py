"""The CUDA operators of mamba-ssm 2.2 and causal-conv1d 1.4 behind the signatures of `reference.py`.

What they cannot do is refused by name, and never computed otherwise:

- Mamba-1's scan has no document boundaries and takes no state from before; the state behind has no gradient.
- Mamba-2's maps boundaries to `seq_idx`, and takes and hands on states with their gradients.
- The convolution takes 2 to 4 taps. Boundaries and a window from before, which it does not take together, go in as one
  row; the window behind is read off the inputs here.
- fp32 is multiplied as TF32 in Mamba-2's scan, and gradients are added up by atomics: no run gives the same bits twice.

mamba-ssm can neither be installed nor run where this was written. The tests hold these functions to the reference on
stand-ins, which check what they are given as mamba-ssm's sources do; nobody has run them with mamba-ssm itself yet.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.errors import UserError
from mambatrain.ops.shapes import check_causal_conv, check_selective_scan, check_ssd

CHUNK = 256  # positions, mamba-ssm's own default
TOLERANCE = 1e-2  # of the largest value, in the check before step 1: TF32 keeps 11 bits of a factor
ALIGNMENT = 8  # channels, and elements of strides, of the convolution
FUNCTIONS = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "causal_conv1d_fn": "causal_conv1d",
}
HINT = "--kernels native, which has them"


def why_unavailable(device: torch.device) -> str | None:
    """Why mamba-ssm cannot run on a device, as a clause; None where it can."""
    for module in FUNCTIONS.values():
        package = module.partition(".")[0].replace("_", "-")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module.partition(".")[0]:
                return f"{package} is not installed"
            return f"{package} cannot be imported: {error}"
        except (ImportError, OSError) as error:  # compiled for another version of torch
            return f"{package} cannot be imported: {error}"
    return None if device.type == "cuda" else f"it runs on CUDA, and the device is {device.type}"


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
    """`reference.selective_scan` by `selective_scan_fn`; copies into its layout, time last.

    Raises:
        UserError: boundaries or an initial state were given.
        RuntimeError: in backward, if the state behind had a part in the loss.
    """
    check_selective_scan(u, dt, A, B, C, D, z, dt_bias, boundaries, initial_state)
    if boundaries is not None:
        raise UserError("mamba-ssm's scan of Mamba-1 knows no document boundaries, and these rows have them", HINT)
    if initial_state is not None:
        raise UserError("mamba-ssm's scan of Mamba-1 takes no state from before", HINT)
    dtype = u.dtype
    time_last = [None if tensor is None else tensor.to(dtype).mT.contiguous() for tensor in (u, dt, B, C, z)]
    D, dt_bias = (None if tensor is None else tensor.float() for tensor in (D, dt_bias))
    u, dt, B, C, z = time_last  # type: ignore[assignment]
    out, state = _function("selective_scan_fn")(
        u, dt, A.float(), B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return out.mT, _WithoutGradient.apply(state.float())  # type: ignore[no-untyped-call]


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
    """`reference.ssd` by `mamba_chunk_scan_combined`."""
    check_ssd(x, dt, A, B, C, D, dt_bias, boundaries, initial_state)
    D, dt_bias, initial_state = (None if tensor is None else tensor.float() for tensor in (D, dt_bias, initial_state))
    y, state = _function("mamba_chunk_scan_combined")(
        x,
        dt,
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size=CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        seq_idx=_number_documents(boundaries),
        dt_softplus=True,
        return_final_states=True,
    )
    return y, state.float()


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    initial_window: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.causal_conv` by `causal_conv1d_fn`.

    Raises:
        UserError: there are fewer than 2 or more than 4 taps.
    """
    check_causal_conv(x, weight, bias, boundaries, initial_window)
    length, channels, width = x.shape[1], *weight.shape
    if not 2 <= width <= 4:
        raise UserError(f"mamba-ssm's convolution takes 2 to 4 taps, and model.d_conv is {width}", HINT)
    if initial_window is None:
        seen, documents = x, _number_documents(boundaries)
    else:
        seen = torch.cat([initial_window.to(x.dtype), x], dim=1)
        documents = _number_documents(None if boundaries is None else F.pad(boundaries, (width - 1, 0)))
    y = _function("causal_conv1d_fn")(
        _align(seen).mT,  # (B, channels, positions), channels contiguous
        F.pad(weight, (0, 0, 0, -channels % ALIGNMENT)),
        None if bias is None else F.pad(bias.to(weight.dtype), (0, -channels % ALIGNMENT)),
        seq_idx=documents,
        activation="silu",
    )
    return y.mT[:, seen.shape[1] - length :, :channels], _window_behind(seen, documents, width)


def _window_behind(seen: Tensor, documents: Tensor | None, width: int) -> Tensor:
    """(B, W - 1, D) in fp32: the last inputs, 0 for those of an earlier document and before the first."""
    window = F.pad(seen, (0, 0, max(0, width - 1 - seen.shape[1]), 0))[:, 1 - width :].float()
    if documents is None:
        return window
    numbers = F.pad(documents, (max(0, width - 1 - documents.shape[1]), 0))
    return torch.where((numbers[:, 1 - width :] == numbers[:, -1:])[..., None], window, 0.0)


def _align(x: Tensor) -> Tensor:
    """(B, L, D), D and the strides of rows and positions multiples of 8: itself where it is a slice that fits."""
    padded = F.pad(x, (0, -x.shape[2] % ALIGNMENT))
    fits = padded.stride(2) == 1 and all(stride % ALIGNMENT == 0 for stride in padded.stride()[:2])
    return padded if fits else padded.contiguous()


def _number_documents(boundaries: Tensor | None) -> Tensor | None:
    """(B, L) int32: 0 continues what came before the row."""
    return None if boundaries is None else boundaries.cumsum(1, dtype=torch.int32)


def _function(name: str) -> Any:
    return getattr(importlib.import_module(FUNCTIONS[name]), name)


class _WithoutGradient(torch.autograd.Function):
    """The identity, for what mamba-ssm gives no gradient: a loss that asks for one must not get 0 in silence."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> None:
        if grad is not None:
            raise RuntimeError("mamba-ssm's scan of Mamba-1 gives no gradient to the state behind a row")
