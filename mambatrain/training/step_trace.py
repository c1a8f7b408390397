"""What a process holds in each moment of training, found by running the training step itself without memory.

Model, loss, backward pass and optimizer run on fake tensors (shapes and dtypes, no bytes) while every storage that
comes to life or dies is written down. So the figures follow the code as it is, whatever an operator keeps for its
backward pass; nothing here has to be kept in step with it. A 7B model takes seconds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambatrain.adapters.trained import whole_model
from mambatrain.devices import Precision
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import parameter_shapes
from mambatrain.models.sequence_parallel import RowNeighbours
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import Backend
from mambatrain.recipe import Recipe
from mambatrain.training.build import parameter_dtype
from mambatrain.training.carried import joined, states_of
from mambatrain.training.heap import reach
from mambatrain.training.optimizer import build_optimizers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Part = Literal["weights", "gradients", "optimizer", "activations", "loss", "states"]


@dataclass(frozen=True)
class Event:
    """A storage comes to life, or dies."""

    block: int
    """Which; each has a number of its own."""
    num_bytes: int
    """Below 0 where it dies."""


@dataclass(frozen=True)
class StepTrace:
    """Two steps: the optimizer's state is made at the end of the first, so the second is the fullest there will be."""

    events: list[Event]
    parts: dict[int, Part]
    """Block -> what it is."""

    def fullest(self, without: tuple[Part, ...] = ()) -> dict[Part, int]:
        """Bytes by part in the moment in which all of them, but for those left out, are most."""
        now: Counter[Part] = Counter()
        most, fullest = 0, dict(now)
        for event in self.events:
            if (part := self.parts[event.block]) not in without:
                now[part] += event.num_bytes
                if now.total() > most:
                    most, fullest = now.total(), dict(now)
        return fullest

    def heap_bytes(self) -> int:
        """What the heap of a process on a CPU comes to, with the holes that nothing fitted."""
        return reach((event.block, event.num_bytes) for event in self.events)


class StorageLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the storages that operators make, and their ends."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.parts: dict[int, Part] = {}
        self.now: Part = "activations"
        """What a storage is that is made now, unless `name` says another thing later."""
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            # What fakes cannot answer. Every position counts for the loss, which asks with one dimension; no document
            # starts within a row, which is asked with (B, L).
            if func is torch.ops.aten.nonzero.default:
                found = args[0].numel() if args[0].dim() == 1 else 0
                return args[0].new_empty((found, args[0].dim()), dtype=torch.int64)
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 1
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._note(result.untyped_storage())
        return results

    def name(self, tensor: Tensor | None, part: Part) -> None:
        """Says what a tensor's storage has been since it was made."""
        if tensor is not None and (known := self._alive.get(id(tensor.untyped_storage()))):
            self.parts[known[0]] = part

    @contextmanager
    def making(self, part: Part) -> Iterator[None]:
        """Whatever is made in the block is of this part."""
        self.now = part
        try:
            yield
        finally:
            self.now = "activations"

    def trace(self) -> StepTrace:
        """What was written down."""
        return StepTrace(self.events, self.parts)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._alive or not num_bytes:
            return
        block = len(self.parts)

        def forget(_: object) -> None:
            del self._alive[key]
            self.events.append(Event(block, -num_bytes))

        self._alive[key] = block, weakref.ref(storage, forget)
        self.parts[block] = self.now
        self.events.append(Event(block, num_bytes))


def trace_steps(
    recipe: Recipe,
    backend: Backend,
    precision: Precision,
    micro_batch_rows: int,
    num_micro_batches: int,
    is_sharded: bool = False,
    num_parts: int = 1,
) -> StepTrace:
    """Runs two steps of one process without memory.

    Args:
        recipe: what is trained.
        backend: whose operators; on CPUs and GPUs those of the same name keep the same.
        precision: of matrix products.
        micro_batch_rows: rows at once.
        num_micro_batches: of a step; all from the second on are alike, so that two are run at most.
        is_sharded: whether matrices come gathered in the precision that they are multiplied in, as `shard_model` has
            it; weights, gradients and optimizer are then not what a rank holds.
        num_parts: ranks that share each row; the second of them is run, which has two neighbours from three on.
    """
    with FakeTensorMode(), StorageLog() as log:
        model = build_fake_model(recipe, backend, precision, log)
        if is_sharded and precision == "bf16":
            _narrow_matrices(model)
        if num_parts > 1:
            model.neighbours = RowNeighbours(cast("ProcessGroup", _Silence()), 1, num_parts)
        trained = whole_model(model)
        # A state in 8 bits is torchao's compiled update, which fakes cannot go through: who plans adds it by table.
        is_narrow = recipe.optimizer.state_precision == "8bit"
        optimizers = [] if is_narrow else build_optimizers(trained, recipe.optimizer)
        tokens = torch.zeros(micro_batch_rows, -(-recipe.data.row_tokens // num_parts), dtype=torch.int64)
        boundaries = torch.zeros(tokens.shape, dtype=torch.bool)
        with autocast_of(precision), torch.no_grad():  # held-out loss at step 0: the holes that it leaves stay
            model.summed_loss(tokens, boundaries, tokens)

        def states(rows: int) -> list[BlockState] | None:
            with log.making("states"):
                return model.init_state(rows, dtype=parameter_dtype(precision)) if recipe.data.carry_state else None

        carried, behind = states(micro_batch_rows * num_micro_batches), None
        for _ in range(2):
            parts = []
            for index in range(min(2, num_micro_batches)):
                state = None if carried is None else states_of(carried, 0, micro_batch_rows)
                with autocast_of(precision):
                    loss, after = model.loss_and_state(tokens, boundaries, tokens, state)
                if carried is not None:
                    parts.append(after)
                    for tensor in _tensors_of(after):
                        log.name(tensor, "states")
                del state, after
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                for parameter in trained.parameters.values():
                    log.name(parameter.grad, "gradients")
                if (
                    index == 0
                    and num_micro_batches > 2
                    and (left := states((num_micro_batches - 2) * micro_batch_rows))
                ):
                    parts.append(left)
            with log.making("states"):
                behind = joined(parts) if carried is not None else None
            del parts
            with log.making("optimizer"):
                for optimizer in optimizers:
                    optimizer.step()
            carried = behind
            model.zero_grad(set_to_none=True)
    trace: StepTrace = log.trace()
    return trace


class _Silence:
    """In place of a process group: what is sent is taken at once, and what is received is what was there."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> _Silence:
        return self

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> _Silence:
        return self

    def wait(self) -> None:
        return None


def _tensors_of(states: list[BlockState]) -> list[Tensor]:
    return [tensor for layer in states for tensor in layer]


def build_fake_model(recipe: Recipe, backend: Backend, precision: Precision, log: StorageLog) -> LanguageModel:
    """The recipe's model without memory, under FakeTensorMode; from its last norm on, `log` counts for the loss.

    In the dtype of its parameters from the start: those of fake tensors cannot be cast afterwards.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(parameter_dtype(precision))
    log.now = "weights"
    try:
        model = LanguageModel(recipe.model, backend)
    finally:
        torch.set_default_dtype(before)
    log.now = "activations"
    for shape in parameter_shapes(recipe.model).values():  # the first values, which are made beside it one by one
        torch.empty(shape, dtype=torch.float32)
    model.recompute_every = recipe.recompute_every
    model.segment_tokens = recipe.training.segment_tokens or 0
    # Again and again: of a row in segments each has its loss, and behind it the gradients of its layers.
    loss_and_state = model._loss_and_state

    def marked(*arguments: Any) -> Any:
        result = loss_and_state(*arguments)
        log.now = "activations"
        return result

    model.norm_f.register_forward_hook(lambda *_: setattr(log, "now", "loss"))
    setattr(model, "_loss_and_state", marked)  # noqa: B010
    return model


def autocast_of(precision: Precision) -> AbstractContextManager[object]:
    """What Accelerate wraps forward in."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def _narrow_matrices(model: LanguageModel) -> None:
    for module in model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.empty_like(module.weight, dtype=torch.bfloat16))
