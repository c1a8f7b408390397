"""Rows too long for one device: neighbouring ranks share each row, and the state of every layer travels between them.

Rank r of N works on positions [r L / N, (r + 1) L / N) of a row. All that a layer has to know of what lies to the left
is its state behind the left neighbour's last position, which is of one size however long the row is. Nothing is
approximated: the loss and its gradients are those of the whole row, up to the order of sums.

    rank 0   layer 0   layer 1   layer 2   layer 3
    rank 1             layer 0   layer 1   layer 2   layer 3
    rank 2                       layer 0   layer 1   layer 2   layer 3

Layer l needs layer l of the left neighbour and none of its later ones, so ranks work as a wavefront: rank r is r layers
behind rank 0, and in the backward pass, where gradients of states travel to the left, as much ahead of it. With K
layers a pass takes the time of K + N - 1 layers over an N-th of the row.

Nobody waits for ever. Order what happens by micro-batch, forward before backward, then by layer in the order in which
it is computed, then by rank in the direction of travel. A rank does its own part in this order; it waits for a message
of the same layer from the neighbour that comes before it, or (`_MOST_UNDER_WAY`) until one of an earlier layer has been
taken: always for something earlier. The two ends of a pair meet their messages in the same order, since each function
passes the residual on, too: autograd cannot run two of them in another order than that of the layers. Messages have a
process group of their own, in which reductions that are under way (DDP's) stand in nobody's way.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambatrain.models.parameters import conv_channels
from mambatrain.models.state import BlockState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    from mambatrain.recipe import ModelSection

# Messages sent that nobody has taken yet. More would let a rank run further ahead, at the price of their memory.
_MOST_UNDER_WAY = 4


class RowNeighbours:
    """The ranks to the left and right that work on other parts of the same rows."""

    def __init__(self, group: ProcessGroup, rank: int, num_parts: int) -> None:
        """
        Args:
            group: for these messages alone.
            rank: of this process in `group`; ranks k num_parts .. (k + 1) num_parts - 1 share rows.
            num_parts: N.
        """
        self._group = group
        self._left = rank - 1 if rank % num_parts else None
        self._right = rank + 1 if (rank + 1) % num_parts else None
        # Requires a gradient, so that messages travel back on every rank or on none: layers may be frozen.
        self._anchor = torch.zeros(0, requires_grad=True)
        self._under_way: deque[tuple[Work, Tensor]] = deque()

    def receive(self, residual: Tensor, empty: BlockState) -> tuple[Tensor, BlockState | None]:
        """What a layer begins with: waits for the left neighbour's state of the same layer.

        Args:
            residual: (B, l, d_model), the layer's input, which comes back as it is.
            empty: of the layer, for its shapes alone.

        Returns:
            The residual, and the state; None where the row begins here.
        """
        if self._left is None:
            return residual, None
        sizes = empty.window.numel(), empty.ssm.numel()
        residual, message = _Receive.apply(  # type: ignore[no-untyped-call]
            residual, self._anchor, self, self._left, sum(sizes)
        )
        window, ssm = message.split(sizes)
        return residual, BlockState(window.view(empty.window.shape), ssm.view(empty.ssm.shape))

    def send(self, residual: Tensor, state: BlockState) -> Tensor:
        """Sends a layer's state behind the last position to the right neighbour, and does not wait.

        Args:
            residual: (B, l, d_model), the layer's output; it is what comes back, and must be used in its place.
            state: in the residual's dtype, as operators return it.
        """
        if self._right is None:
            return residual
        message = torch.cat([state.window.flatten(), state.ssm.flatten()])
        sent: Tensor = _Send.apply(residual, message, self._anchor, self, self._right)  # type: ignore[no-untyped-call]
        return sent

    def post(self, message: Tensor, rank: int) -> None:
        """Begins to send, and keeps the message alive until it is taken."""
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way.popleft()[0].wait()
        message = message.contiguous()
        self._under_way.append((self._group.send([message], rank, 0), message))

    def take(self, message: Tensor, rank: int) -> Tensor:
        """Waits for a message and fills it in."""
        self._group.recv([message], rank, 0).wait()
        return message


class _Receive(torch.autograd.Function):
    """Forward: a state from the left. Backward: its gradient to the left."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, anchor: Tensor, neighbours: RowNeighbours, left: int, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.neighbours, ctx.left = neighbours, left
        return residual.view_as(residual), neighbours.take(residual.new_empty(size), left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor, grad_message: Tensor) -> tuple[Tensor | None, ...]:
        ctx.neighbours.post(grad_message, ctx.left)
        return grad_residual, None, None, None, None


class _Send(torch.autograd.Function):
    """Forward: a state to the right. Backward: its gradient from the right, before the layer's own backward pass."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, message: Tensor, anchor: Tensor, neighbours: RowNeighbours, right: int
    ) -> Tensor:
        ctx.neighbours, ctx.right, ctx.size = neighbours, right, len(message)
        neighbours.post(message, right)
        return residual.view_as(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        grad_message = ctx.neighbours.take(grad_residual.new_empty(ctx.size), ctx.right)
        return grad_residual, grad_message, None, None, None


def bytes_sent(section: ModelSection, rows: int, part: int, num_parts: int, bytes_per_number: int = 4) -> int:
    """What the rank with part `part` of some rows sends in a forward and a backward pass over them.

    For each layer and row W - 1 inputs of the convolution and E N states: forward to the right, their gradients in the
    backward pass to the left. The row's length is no factor.

    Args:
        section: the model.
        rows: of all micro-batches of a step, to have the bytes of a step.
        part, num_parts: which part of how many.
        bytes_per_number: 4 for fp32, which states have under bf16, too; 8 for fp64.
    """
    channels = section.d_inner if section.block == "mamba1" else conv_channels(section)
    state = (section.d_conv - 1) * channels + section.d_inner * section.state_size
    num_neighbours = int(part > 0) + int(part < num_parts - 1)
    return section.num_layers * rows * state * bytes_per_number * num_neighbours
