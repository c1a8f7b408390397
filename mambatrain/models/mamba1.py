"""The Mamba-1 block (arXiv 2312.00752, figure 3), parameter for parameter that of mamba-ssm.

           input u (B, L, d_model)
                 |
              in_proj
             /       \\
            x         z            (B, L, E) each, E = expand * d_model
            |         |
       causal conv    |            each channel sees its last W = 4 inputs
          + SiLU      |
            |         |
       x_proj -> dt, B, C          what to write, what to read, how long to keep: chosen by the token itself
            |         |
     selective scan   |            h = exp(dt A) h + dt B x ;  y = C h + D x
            |         |
            y * silu(z)
                 |
             out_proj
                 |
           output (B, L, d_model)

Each of the E channels keeps N = 16 numbers h. A is fixed and negative, so exp(dt A) lies in (0, 1): a large dt makes a
channel forget and take the token in, a small one makes it pass the token by. That is the whole memory: a state of E * N
numbers, whatever the length of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambatrain.models.parameters import require_full_precision
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import Backend

if TYPE_CHECKING:
    from mambatrain.recipe import ModelSection


class Mamba1(nn.Module):
    """Mixes a sequence along time."""

    def __init__(self, section: ModelSection, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.E, self.N, self.R = section.d_inner, section.state_size, section.dt_rank_size
        self.in_proj = nn.Linear(section.d_model, 2 * self.E, bias=section.proj_bias)
        # Holds the weight (E, 1, W) under its usual name; the backend's operator does the convolution.
        self.conv1d = nn.Conv1d(self.E, self.E, section.d_conv, groups=self.E, bias=section.conv_bias)
        self.x_proj = nn.Linear(self.E, self.R + 2 * self.N, bias=False)
        self.dt_proj = nn.Linear(self.R, self.E)
        self.A_log = nn.Parameter(torch.zeros(self.E, self.N))  # A = -exp(A_log): negative, whatever is learned
        self.D = nn.Parameter(torch.ones(self.E))
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
        require_full_precision(A_log=self.A_log, D=self.D, dt_bias=self.dt_proj.bias, state=h)
        x, z = torch.split(self.in_proj(u), self.E, dim=-1)  # (B, L, E) each
        x, window = self.backend.causal_conv(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, boundaries=boundaries, initial_window=window
        )  # (B, L, E)
        dt, B, C = torch.split(self.x_proj(x), [self.R, self.N, self.N], dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        dt = F.linear(dt, self.dt_proj.weight)  # (B, L, E); its bias is added in fp32, inside the scan
        y, h = self.backend.selective_scan(
            x, dt, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias, boundaries=boundaries, initial_state=h
        )  # (B, L, E)
        return self.out_proj(y), BlockState(window, h)

    def step_sizes(self, u: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """delta (B, L, E) of a sequence that starts from nothing, as the scan in `forward` has it."""
        x = self.in_proj(u)[..., : self.E]
        x, _ = self.backend.causal_conv(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, boundaries=boundaries, initial_window=None
        )
        dt = F.linear(self.x_proj(x)[..., : self.R], self.dt_proj.weight)
        return F.softplus(dt.to(self.dt_proj.bias.dtype) + self.dt_proj.bias)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The empty memory: (B, W - 1, E) and (B, E, N)."""
        return BlockState(
            torch.zeros(batch_size, self.conv1d.weight.shape[2] - 1, self.E, device=device, dtype=dtype),
            torch.zeros(batch_size, self.E, self.N, device=device, dtype=dtype),
        )
