"""Rows shared by ranks: threads of this process, each with its copy of the model and its part of every row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from typing import Any

import pytest
import torch
from adapted_models import adapted, base_model, everything
from torch import Tensor
from torch.distributed import HashStore, ProcessGroupGloo

from mambatrain.data.batches import IGNORED_TARGET, MicroBatch
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.sequence_parallel import RowNeighbours, bytes_sent
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.native import why_unavailable
from mambatrain.planning.sharding import traffic_of
from mambatrain.recipe import ModelSection, Recipe, parse_recipe
from mambatrain.training.build import build_objective
from mambatrain.training.optimizer import build_optimizers
from mambatrain.training.step_trace import StorageLog, trace_steps

SECTIONS = {
    "mamba1": ModelSection(d_model=8, num_layers=3, vocab_size=40, d_state=4),
    "mamba2": ModelSection(
        block="mamba2", d_model=8, num_layers=6, vocab_size=40, d_state=4, head_dim=4, tie_embeddings=False
    ),
}
ROWS, LENGTH = 3, 26
CPU = torch.device("cpu")


class CountingGroup:
    """One rank's end of a gloo group, and what it sent."""

    def __init__(self, store: HashStore, rank: int, size: int) -> None:
        self._group = ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        self._rank = rank
        self.sent: list[tuple[int, int]] = []  # (to, bytes)

    def join(self, num_parts: int) -> RowNeighbours:
        """Kept with the group: a rank may end before its last message was taken."""
        self._neighbours = RowNeighbours(self, self._rank, num_parts)  # type: ignore[arg-type]
        return self._neighbours

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        self.sent.append((rank, sum(tensor.nbytes for tensor in tensors)))
        return self._group.send(tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._group.recv(tensors, rank, tag)


def on_ranks(num_ranks: int, work: Callable[[int, CountingGroup], Any]) -> list[Any]:
    """What `work` returns on each of several ranks, which are threads."""
    store = HashStore()
    groups: list[CountingGroup] = []  # kept until all are done

    def begin(rank: int) -> Any:
        groups.append(group := CountingGroup(store, rank, num_ranks))
        return work(rank, group)

    with ThreadPoolExecutor(num_ranks) as threads:
        begun = [threads.submit(begin, rank) for rank in range(num_ranks)]
        for future in as_completed(begun):  # the first that failed, not one that waited for it
            future.result()
        return [future.result() for future in begun]


def build(block: str, kernels: str = "torch", dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = LanguageModel(SECTIONS[block], choose_backend(kernels, CPU, dtype)).to(dtype)
    initialise(model, SECTIONS[block], seed=0)
    return model


def make_batch(length: int = LENGTH) -> MicroBatch:
    """Row 0 begins in the middle of a document and has no boundary; row 1 has one at the edges of parts."""
    torch.manual_seed(0)
    tokens, targets = (torch.randint(0, 40, (ROWS, length)) for _ in range(2))
    boundaries = torch.zeros(ROWS, length, dtype=torch.bool)
    for num_parts in (2, 3, 4):
        boundaries[1, [part * length // num_parts for part in range(num_parts)]] = True
    boundaries[2, [length // 4 + 1, length // 2 - 1]] = True
    targets[0, : 3 * length // 4] = IGNORED_TARGET  # what counts of this row lies in one part
    return MicroBatch(tokens, boundaries, targets)


def train_on(model: LanguageModel, batches: list[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """The summed loss over micro-batches, and its gradients."""
    total = 0.0
    for batch in batches:
        loss = model.summed_loss(batch.tokens, batch.boundaries, batch.targets)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_in_parts(
    model: LanguageModel, batches: list[MicroBatch], num_parts: int, num_ranks: int | None = None
) -> tuple[float, dict[str, Tensor], list[list[tuple[int, int]]]]:
    """The same over ranks that share rows, summed; and what each rank sent."""

    def work(rank: int, group: CountingGroup) -> Any:
        own = copy.deepcopy(model)
        own.neighbours = group.join(num_parts)
        return *train_on(own, [batch.part(rank % num_parts, num_parts) for batch in batches]), group.sent

    losses, gradients, sent = zip(*on_ranks(num_ranks or num_parts, work), strict=True)
    assert all(of_rank.keys() == gradients[0].keys() for of_rank in gradients)
    summed = {name: torch.stack([of_rank[name] for of_rank in gradients]).sum(0) for name in gradients[0]}
    return sum(losses), summed, list(sent)


def assert_same(found: tuple[Any, ...], wanted: tuple[Any, ...], tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("block", SECTIONS)
@pytest.mark.parametrize("num_parts", [2, 3, 4])
def test_loss_and_gradients_are_those_of_whole_rows(block: str, num_parts: int) -> None:
    model, batches = build(block), [make_batch(), make_batch(LENGTH + 1)]
    found = train_in_parts(model, batches, num_parts)
    assert_same(found, train_on(model, batches), 1e-12)


@pytest.mark.parametrize("block", SECTIONS)
def test_parts_may_be_shorter_than_the_window_of_the_convolution(block: str) -> None:
    model, batches = build(block), [make_batch(5)]
    assert_same(train_in_parts(model, batches, 4), train_on(model, batches), 1e-12)


@pytest.mark.parametrize("block", SECTIONS)
def test_groups_of_ranks_have_rows_of_their_own(block: str) -> None:
    model, batches = build(block), [make_batch()]
    loss, gradients = train_on(copy.deepcopy(model), batches)
    found = train_in_parts(model, batches, num_parts=2, num_ranks=4)  # both groups are given the same rows
    assert_same(found, (2 * loss, {name: 2 * gradient for name, gradient in gradients.items()}), 1e-12)


@pytest.mark.parametrize(
    "kernels",
    [
        "torch",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(why_unavailable(CPU, torch.float32) is not None, reason="no native kernels"),
        ),
    ],
)
@pytest.mark.parametrize("block", SECTIONS)
def test_in_fp32_with_blocks_computed_again(block: str, kernels: str) -> None:
    model, batches = build(block, kernels, torch.float32), [make_batch()]
    model.recompute_every = 2
    assert_same(train_in_parts(model, batches, 3), train_on(model, batches), 1e-5)


@pytest.mark.parametrize("block", SECTIONS)
def test_under_autocast_states_are_fp32(block: str) -> None:
    """Activations are rounded where they were, states nowhere: nothing but the order of sums differs."""
    model, batch = build(block, "torch", torch.float32), make_batch()

    def loss_of(model: LanguageModel, batch: MicroBatch) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float(model.summed_loss(*batch).detach())

    def work(rank: int, group: CountingGroup) -> float:
        own = copy.deepcopy(model)
        own.neighbours = group.join(3)
        return loss_of(own, batch.part(rank, 3))

    assert sum(on_ranks(3, work)) == pytest.approx(loss_of(model, batch), rel=1e-4)


def test_layers_that_are_not_trained_pass_their_states_on() -> None:
    """Rank 0 has nothing to train in the embedding and layer 0; its messages must travel all the same."""
    model, batches = build("mamba1"), [make_batch()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layers.1.", "layers.2.mixer.out_proj")))
    found = train_in_parts(model, batches, 3)
    wanted = train_on(model, batches)
    assert len(wanted[1]) == 11
    assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("block", SECTIONS)
def test_an_adapter_is_trained_as_on_whole_rows(block: str) -> None:
    model, batches = base_model(SECTIONS[block], dtype=torch.float64), [make_batch()]
    adapted(model, everything(block, "lora", tied=block == "mamba1"))
    found = train_in_parts(model, batches, 3)
    assert_same(found, train_on(model, batches), 1e-12)


def test_the_two_functions_alone() -> None:
    """h = a h + x over a row in two parts: the state goes right, its gradient left, the residual passes."""
    values = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=torch.float64)

    def scan(x: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for value in x:
            h = a * h + value
            outputs.append(h)
        return torch.stack(outputs), h

    def work(rank: int, group: CountingGroup) -> tuple[Tensor, Tensor]:
        neighbours = group.join(2)
        a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        x = values[2 * rank : 2 * rank + 2].clone().requires_grad_()
        one = torch.zeros(1, 1, 1, dtype=torch.float64)
        residual, before = neighbours.receive(x.view(1, 2, 1), BlockState(one, one))
        assert (before is None) == (rank == 0)
        start = torch.zeros((), dtype=torch.float64) if before is None else before.ssm[0, 0, 0] + before.window[0, 0, 0]
        y, h = scan(residual.flatten(), a, start)
        # half of the state travels as window: both parts of the message are in order
        after = BlockState((0.25 * h).view(1, 1, 1), (0.75 * h).view(1, 1, 1))
        y = neighbours.send(y.view(1, 2, 1), after)
        (y**2).sum().backward()
        assert x.grad is not None and a.grad is not None
        return x.grad, a.grad

    (left, a_left), (right, a_right) = on_ranks(2, work)
    a, x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), values.clone().requires_grad_()
    (scan(x, a, torch.zeros((), dtype=torch.float64))[0] ** 2).sum().backward()
    torch.testing.assert_close(torch.cat([left, right]), x.grad)
    torch.testing.assert_close(a_left + a_right, a.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", SECTIONS)
def test_bytes_sent_are_as_computed(block: str, dtype: torch.dtype) -> None:
    *_, sent = train_in_parts(build(block, dtype=dtype), [make_batch(), make_batch(LENGTH + 7)], 3)
    for part, messages in enumerate(sent):
        assert {to for to, _ in messages} == {part - 1, part + 1} & {0, 1, 2}
        assert len(messages) == 2 * SECTIONS[block].num_layers * len({part - 1, part + 1} & {0, 1, 2})
        counted = sum(size for _, size in messages)
        assert counted == bytes_sent(SECTIONS[block], 2 * ROWS, part, 3, dtype.itemsize)


def recipe_in_parts(block: str, length: int, rows_per_step: int) -> Recipe:
    content = {
        "model": SECTIONS[block].model_dump(),
        "data": {"shards": "nowhere", "row_tokens": length},
        "training": {"rows_per_step": rows_per_step, "total_steps": 2, "precision": "fp32", "micro_batch_rows": ROWS},
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_recipe(content, "a test")


@pytest.mark.parametrize("num_parts", [2, 3])
def test_what_is_planned_to_travel_is_what_the_rank_with_most_neighbours_sends(num_parts: int) -> None:
    recipe = recipe_in_parts("mamba2", LENGTH, 2 * ROWS)
    *_, sent = train_in_parts(build("mamba2", dtype=torch.float32), [make_batch(), make_batch()], num_parts)
    counted = max((sum(size for _, size in messages), len(messages)) for messages in sent)
    planned = traffic_of(recipe, "fp32", num_parts, 1, 2, num_parts)[-1]
    assert (planned.kind, planned.num_bytes, planned.count) == ("states", *counted)
    # Twice the ranks and rows, in two groups, are the same for each.
    more = recipe_in_parts("mamba2", LENGTH, 4 * ROWS)
    assert traffic_of(more, "fp32", 2 * num_parts, 1, 2, num_parts)[-1] == planned


@pytest.mark.parametrize("num_parts", [2, 3])
@pytest.mark.parametrize("block", SECTIONS)
def test_a_rank_holds_what_is_traced_without_memory(block: str, num_parts: int) -> None:
    length = 66  # divides into 2 and 3
    recipe = recipe_in_parts(block, length, ROWS)

    def work(rank: int, group: CountingGroup) -> int:
        part = make_batch(length).part(rank, num_parts)
        with StorageLog() as log:
            objective, trained = build_objective(recipe, choose_backend("torch", CPU), CPU, "fp32", None, 1, True)
            objective.model.neighbours = group.join(num_parts)
            optimizers = build_optimizers(trained, recipe.optimizer)
            for _ in range(2):
                objective(part.tokens, torch.zeros_like(part.boundaries), part.targets.clamp(min=0)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                objective.zero_grad(set_to_none=True)
        return sum(log.trace().fullest().values())

    real = on_ranks(num_parts, work)[1]
    traced = trace_steps(recipe, choose_backend("torch", CPU), "fp32", ROWS, 1, num_parts=num_parts)
    assert sum(traced.fullest().values()) == pytest.approx(real, rel=0.02)
    whole = trace_steps(recipe, choose_backend("torch", CPU), "fp32", ROWS, 1)
    assert sum(whole.fullest().values()) > 1.2 * real
