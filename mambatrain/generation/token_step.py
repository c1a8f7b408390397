"""One token read by a CUDA graph: the kernels of a step, started all at once instead of one by one from Python.

The same kernels on the same numbers: what a graph computes is, to the bit, what the model computes without it. Not yet
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import BlockState
from mambatrain.ops.reference import computing_dtype

ALIGNMENT = (
    128  # elements: where tensors of their own begin; kernels may add in another order where memory is not aligned
)
WARM_UP_STEPS = 3  # kernels are compiled and loaded in the first, which no graph can hold


def why_not_recorded(model: LanguageModel) -> str | None:
    """Why a step of the model cannot be a CUDA graph, as a clause; None where it can, as far as is known before.

    Only the native operators neither wait for the device nor take memory that a graph does not own.
    """
    device, backend = model.head_weight.device, model.backend.name
    if device.type != "cuda":
        return f"the device is {device.type}"
    return None if backend == "native" else f"only native kernels are recorded, and these are {backend}"


class TokenStep:
    """Reads one token behind a state, in memory that a recorded graph works on.

    Args:
        model: on CUDA; its weights stay where they are as long as this is used.
        boundary_id: the token at which a document starts, as `reading.Reader` has it.

    Raises:
        RuntimeError: CUDA cannot record it; the model reads without.
    """

    def __init__(self, model: LanguageModel, boundary_id: int | None) -> None:
        self.boundary_id = boundary_id
        weight = model.head_weight
        self._model = model
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        self._hidden = torch.zeros(weight.shape[1], dtype=computing_dtype(weight), device=weight.device)
        empty = model.init_state(1, weight.device, computing_dtype(weight))
        self._shapes = [[tensor.shape for tensor in layer] for layer in empty]
        # One piece of memory, so that a state is copied by one kernel.
        self._memory = torch.zeros(sum(self._padded_sizes()), dtype=self._hidden.dtype, device=weight.device)
        self._layers = self._views_of(self._memory)
        self._held: list[BlockState] | None = None
        """What was returned last, if that is what the memory holds."""
        self._replay = record(self._run, weight.device)

    def read(self, token: int, before: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
        """The last position behind the last norm (d_model,), and the state behind the token; nothing changes them.

        Args:
            token: its id.
            before: the state, one per layer, B = 1; that which the last call returned costs no copy.
        """
        if before is not self._held:
            self._held = None
            self._copy_in(before)
        self._held = None  # an interrupt from here on leaves memory that is neither before nor behind the token
        self._token.fill_(token)
        self._replay()
        behind = self._views_of(self._memory.clone())
        self._held = behind
        return self._hidden.clone(), behind

    @torch.no_grad()
    def _run(self) -> None:
        """What is recorded: reads the memory, and leaves the state behind in it."""
        boundaries = None if self.boundary_id is None else self._token == self.boundary_id
        hidden, layers = self._model.hidden_states(self._token, boundaries, self._layers)
        self._hidden.copy_(hidden[0, -1])
        self._copy_in(layers)

    def _copy_in(self, layers: list[BlockState]) -> None:
        torch._foreach_copy_(
            [own for layer in self._layers for own in layer], [one for layer in layers for one in layer]
        )

    def _views_of(self, memory: Tensor) -> list[BlockState]:
        pieces = iter(torch.split(memory, self._padded_sizes()))
        return [BlockState(*(next(pieces)[: shape.numel()].view(shape) for shape in layer)) for layer in self._shapes]

    def _padded_sizes(self) -> list[int]:
        return [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for layer in self._shapes for shape in layer]


def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does on the device what `run` does there, without Python: a CUDA graph's replay.

    It reads and writes the memory that `run` did: the caller keeps all of it but what is allocated in `run`.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay
