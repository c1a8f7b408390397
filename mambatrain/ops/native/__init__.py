"""The operators in C++ for CPUs (`kernels/cpu`) and in CUDA C++ for GPUs (`kernels/cuda`), behind the signatures of
`ops/reference.py`."""

from mambatrain.ops.native.availability import describe, why_unavailable
from mambatrain.ops.native.causal_conv import causal_conv
from mambatrain.ops.native.cpu.softmax_loss import softmax_loss
from mambatrain.ops.native.cpu.ssd import ssd
from mambatrain.ops.native.selective_scan import selective_scan

__all__ = ["causal_conv", "describe", "selective_scan", "softmax_loss", "ssd", "why_unavailable"]
