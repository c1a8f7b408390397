"""The loss of a row that goes through a model in segments: the gradients of the whole, in the memory of one of them.

Forward keeps the states between segments and nothing else, in room that is taken before the first: among the large
tensors of the segments they would cut the heap to pieces. Backward computes one segment again at a time, from the last
to the first, and hands the gradient of its first state to the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mambatrain.models.state import BlockState

Batch = tuple[Tensor, Tensor | None, Tensor]
"""Tokens, boundaries, targets: (B, L) each."""
SegmentLoss = Callable[[Tensor, Tensor | None, Tensor, list[BlockState]], tuple[Tensor, list[BlockState]]]
"""Those of a segment and the state before it -> summed loss, and the state behind it."""


def segmented_loss(
    loss_of: SegmentLoss, parameters: Sequence[nn.Parameter], batch: Batch, state: list[BlockState], num_tokens: int
) -> tuple[Tensor, list[BlockState]]:
    """The loss of all segments, differentiable once, and the state behind the last, detached.

    Args:
        loss_of: what is computed of a segment.
        parameters: all that need a gradient.
        batch: whole rows.
        state: what the rows go on from, one per layer; gradients reach it.
        num_tokens: of a segment; the last may have fewer.
    """
    device = batch[0].device.type
    # Each segment narrows the weights for itself: of one narrowed for all, gradients would be summed in bf16.
    autocast = torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        cache_enabled=False,
    )
    tensors = _flat(state)
    loss, *behind = _SegmentedLoss.apply(  # type: ignore[no-untyped-call]
        loss_of, autocast, _cut(batch, num_tokens), len(tensors), *tensors, *parameters
    )
    return loss, _layers(behind)


class _SegmentedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: SegmentLoss, autocast: Any, pieces: list[Batch], num_states: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        states = [list(inputs[:num_states]), *([torch.empty_like(t) for t in inputs[:num_states]] for _ in pieces)]
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        loss = total
        for piece, before, room in zip(pieces, states, states[1:], strict=False):
            with autocast:
                loss, after = loss_of(*piece, _layers(before))
            total += loss
            for kept, tensor in zip(room, _flat(after), strict=True):
                kept.copy_(tensor)
            del after  # its windows are views into what the layers computed of the whole segment
        ctx.save_for_backward(*inputs)
        ctx.loss_of, ctx.autocast, ctx.pieces, ctx.between = loss_of, autocast, pieces, states[1:-1]
        ctx.mark_non_differentiable(*states[-1])
        return total.to(loss.dtype), *states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        num_states = len(ctx.between[0])  # there are two segments at least
        first, parameters = ctx.saved_tensors[:num_states], ctx.saved_tensors[num_states:]
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        of_state: list[Tensor | None] = []  # nothing is behind the last segment
        for piece, before in zip(reversed(ctx.pieces), [*reversed(ctx.between), first], strict=True):
            state = [tensor.detach().requires_grad_() for tensor in before]
            with torch.enable_grad(), ctx.autocast:
                loss, after = ctx.loss_of(*piece, _layers(state))
            outputs = [loss, *(_flat(after) if of_state else [])]
            gradients = torch.autograd.grad(outputs, [*state, *parameters], [grad_loss, *of_state], allow_unused=True)
            del loss, after, outputs
            of_state = [torch.zeros_like(s) if g is None else g for s, g in zip(state, gradients, strict=False)]
            for index, gradient in enumerate(gradients[num_states:]):
                before_it = of_parameters[index]
                if gradient is not None:
                    of_parameters[index] = gradient if before_it is None else before_it + gradient
        return None, None, None, None, *of_state, *of_parameters


def _cut(batch: Batch, num_tokens: int) -> list[Batch]:
    tokens, boundaries, targets = batch
    places = [slice(first, first + num_tokens) for first in range(0, tokens.shape[1], num_tokens)]
    return [(tokens[:, here], None if boundaries is None else boundaries[:, here], targets[:, here]) for here in places]


def _flat(state: list[BlockState]) -> list[Tensor]:
    return [tensor for layer in state for tensor in layer]


def _layers(tensors: Sequence[Tensor]) -> list[BlockState]:
    return [BlockState(*tensors[index : index + 2]) for index in range(0, len(tensors), 2)]
