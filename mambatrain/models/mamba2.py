"""The Mamba-2 block (arXiv 2405.21060, section 7), parameter for parameter that of mamba-ssm.

What differs from Mamba-1: one in_proj gives z, x, B, C and dt at once (nothing is projected from the convolved x);
B and C pass the convolution too; the E channels are H heads of P, and a head shares one A, one dt and one D, so the
scan turns into matrix products; B and C are shared by the heads of a group; a gated norm stands before out_proj.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambatrain.models.norms import GatedRMSNorm
from mambatrain.models.parameters import conv_channels, require_full_precision
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import Backend

if TYPE_CHECKING:
    from mambatrain.recipe import ModelSection


class Mamba2(nn.Module):
    """Mixes a sequence along time."""

    def __init__(self, section: ModelSection, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.E, self.N, self.P = section.d_inner, section.state_size, section.head_dim
        self.H, self.G = section.num_heads, section.num_groups
        channels = conv_channels(section)  # E + 2 G N
        self.in_proj = nn.Linear(section.d_model, self.E + channels + self.H, bias=section.proj_bias)
        # Holds the weight (channels, 1, W) under its usual name; the backend's operator does the convolution.
        self.conv1d = nn.Conv1d(channels, channels, section.d_conv, groups=channels, bias=section.conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(self.H))
        self.A_log = nn.Parameter(torch.zeros(self.H))  # A = -exp(A_log): negative, whatever is learned
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = GatedRMSNorm(self.E, section.norm_eps, self.G)
        self.out_proj = nn.Linear(self.E, section.d_model, bias=section.proj_bias)

    def forward(
        self, u: Tensor, boundaries: Tensor | None = None, state: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """One path for a sequence, its continuation and a single token.

        Args:
            u: (B, L, d_model), already normed.
            boundaries: (B, L) bool, True where a document starts: state and convolution window are dropped there.
            state: what the previous call returned; None starts from zero.

        Returns:
            (B, L, d_model), and the state behind the last position.
        """
        window, h = (None, None) if state is None else state
        require_full_precision(A_log=self.A_log, D=self.D, dt_bias=self.dt_bias, state=h)
        GN = self.G * self.N
        z, xBC, dt = torch.split(self.in_proj(u), [self.E, self.E + 2 * GN, self.H], dim=-1)  # dt: (B, L, H)
        xBC, window = self.backend.causal_conv(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, boundaries=boundaries, initial_window=window
        )  # (B, L, E + 2 G N)
        x, B, C = torch.split(xBC, [self.E, GN, GN], dim=-1)
        heads, groups = (*u.shape[:2], self.H, self.P), (*u.shape[:2], self.G, self.N)
        y, h = self.backend.ssd(
            x.view(heads),  # (B, L, H, P)
            dt,
            -torch.exp(self.A_log),
            B.view(groups),  # (B, L, G, N)
            C.view(groups),
            self.D,
            self.dt_bias,
            boundaries=boundaries,
            initial_state=h,
        )  # (B, L, H, P)
        return self.out_proj(self.norm(y.flatten(-2), z)), BlockState(window, h)

    def step_sizes(self, u: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """delta (B, L, H), as the scan in `forward` has it; what came before (`boundaries`) plays no part in it."""
        return F.softplus(self.in_proj(u)[..., -self.H :].to(self.dt_bias.dtype) + self.dt_bias)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The empty memory: (B, W - 1, E + 2 G N) and (B, H, P, N)."""
        channels, _, width = self.conv1d.weight.shape
        return BlockState(
            torch.zeros(batch_size, width - 1, channels, device=device, dtype=dtype),
            torch.zeros(batch_size, self.H, self.P, self.N, device=device, dtype=dtype),
        )
