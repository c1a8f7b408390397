"""What must hold before weights change (promise: nothing bad is applied)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mambatrain.data.drawn_rows import rows_of_draw
from mambatrain.data.training_order import TrainingOrder
from mambatrain.errors import UserError
from mambatrain.runs.progress import Running
from mambatrain.training.sharding import float_of

if TYPE_CHECKING:
    from mambatrain.recipe import GuardsSection

MAX_NAMED = 5  # parameters in a message
MAX_DOCUMENTS = 20  # of a source, in a message


def find_fault(
    loss: float, gradient_norm: float, num_targets: int, running: dict[str, Running], guards: GuardsSection
) -> str | None:
    """Why an update must not be applied, or None. The arguments are those of all ranks together.

    Args:
        loss, gradient_norm, num_targets: of the draw.
        running: of the applied draws before.
        guards: the limits.
    """
    if num_targets == 0:
        return "no target counts"
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient norm is {gradient_norm}"
    if guards.max_sigma is not None:
        for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
            before = running.get(what, Running())
            if before.count >= guards.memory_draws / 2 and value > before.mean + guards.max_sigma * before.deviation:
                sigmas = (value - before.mean) / before.deviation if before.deviation else math.inf
                return f"the {what} is {value:.4g}, {sigmas:.1f} deviations above {before.mean:.4g}"
    return None


def take_note(running: dict[str, Running], loss: float, gradient_norm: float, guards: GuardsSection) -> None:
    """Moves mean and variance on by one applied draw.

    Both are exponential averages over about `memory_draws`; until there are as many, plain ones (Welford).
    """
    for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
        before = running.get(what, Running())
        share = 1 / min(before.count + 1, guards.memory_draws)
        distance = value - before.mean
        running[what] = Running(
            count=min(before.count + 1, guards.memory_draws),
            mean=before.mean + share * distance,
            variance=(1 - share) * (before.variance + share * distance * distance),
        )


@torch.no_grad()
def name_gradients(model: nn.Module) -> list[str]:
    """`NAME (norm)` of the parameters whose gradients are not finite, else of those whose are largest."""
    norms = {
        name: float_of(torch.linalg.vector_norm(parameter.grad))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    named = bad or sorted(norms, key=lambda name: -norms[name])
    more = f"and {len(bad) - MAX_NAMED} more that are not finite"
    return [f"{name} ({norms[name]:.3g})" for name in named[:MAX_NAMED]] + ([more] if len(bad) > MAX_NAMED else [])


def name_documents(order: TrainingOrder, draws: Sequence[int]) -> dict[str, list[int]]:
    """Source -> the documents of which some draws show something, as the shard's index counts them."""
    documents: dict[str, set[int]] = defaultdict(set)
    for draw in draws:
        for row in rows_of_draw(order, draw):
            documents[row.source] |= row.documents
    return {source: sorted(numbers) for source, numbers in documents.items()}


def refuse_endless_skipping(
    skipped_in_a_row: int,
    draw: int,
    fault: str,
    gradients: Sequence[str],
    order: TrainingOrder,
    guards: GuardsSection,
) -> None:
    """
    Args:
        skipped_in_a_row: with this draw.
        draw, fault, gradients: the last of them, why it was skipped, and what `name_gradients` said of it.
        order: which documents they showed.
        guards: the limit.

    Raises:
        UserError: too many draws in a row were skipped.
    """
    if skipped_in_a_row < guards.max_skipped_in_a_row:
        return
    first = draw - skipped_in_a_row + 1
    lines = [
        f"  {source}: documents {', '.join(map(str, numbers[:MAX_DOCUMENTS]))}"
        + (f" and {len(numbers) - MAX_DOCUMENTS} more" if len(numbers) > MAX_DOCUMENTS else "")
        for source, numbers in name_documents(order, range(first, draw + 1)).items()
    ]
    raise UserError(
        f"{skipped_in_a_row} draws in a row were skipped, the last one (draw {draw}) because {fault}\n"
        f"  gradients of draw {draw}: {', '.join(gradients) or 'none'}\n"
        f"shown in draws {first} to {draw}:\n" + "\n".join(lines),
        "the newest checkpoint is whole: `mambatrain pretrain --branch-from` goes on from it with a lower "
        f"optimizer.learning_rate, or past the data with --set data.skip_draws=[[{first},{draw}]]",
    )


def first_draw_not_skipped(draw: int, ranges: Sequence[Sequence[int]]) -> int:
    """The draw itself, or the first one behind the ranges `[first, last]` that hold it."""
    for first, last in sorted(map(tuple, ranges)):
        if first <= draw <= last:
            draw = last + 1
    return draw
