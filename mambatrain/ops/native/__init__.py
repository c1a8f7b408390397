"""The operators in C++ for CPUs (`kernels/cpu`), behind the signatures of `ops/reference.py`."""

from mambatrain.ops.native.causal_conv import causal_conv
from mambatrain.ops.native.library import FLOATS, describe_library, why_unavailable
from mambatrain.ops.native.selective_scan import selective_scan
from mambatrain.ops.native.softmax_loss import softmax_loss
from mambatrain.ops.native.ssd import ssd

__all__ = ["FLOATS", "causal_conv", "describe_library", "selective_scan", "softmax_loss", "ssd", "why_unavailable"]
