"""A model that reads: what it has read is held in the state alone, of one size whatever the length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.generation.token_step import TokenStep
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import TextState

PREFILL_TOKENS = 4096  # read at once; bounds the memory of a long text and changes nothing else


class Reader:
    """Takes tokens and knows what stands behind them.

    Tokens are read when something is asked about them, or when PREFILL_TOKENS are waiting: one that nobody asks
    behind costs nothing.

    Args:
        model: in any dtype, on any device.
        boundary_id: the token at which a document starts with an empty state, as in training; None: no token does.
        start: where to go on; on the model's device, in its dtype. None: nothing was read.
        step: reads what is asked about token by token; of this model and boundary. None: the model does.
    """

    def __init__(
        self,
        model: LanguageModel,
        boundary_id: int | None,
        start: TextState | None = None,
        step: TokenStep | None = None,
    ) -> None:
        assert step is None or step.boundary_id == boundary_id
        self.model = model
        self.boundary_id = boundary_id
        self._step = step
        self._state = start
        self._waiting: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        """Puts tokens behind those there are."""
        self._waiting.extend(tokens)
        while len(self._waiting) >= PREFILL_TOKENS:
            self._read(self._waiting[:PREFILL_TOKENS])

    def logits(self) -> Tensor:
        """(V,): what comes behind the last token; at least one token was given."""
        weight = self.model.head_weight
        hidden = self.state().hidden
        assert hidden is not None, "nothing was given to read behind a trained state"
        with torch.no_grad():
            return F.linear(hidden.to(weight.dtype), weight)

    def state(self) -> TextState:
        """What is known behind the last token; at least one token was given."""
        if self._waiting:
            self._read(self._waiting)
        assert self._state is not None, "nothing was given to read"
        return self._state

    @property
    def num_tokens(self) -> int:
        """How many were given in all, those before the start included."""
        return len(self._waiting) + (0 if self._state is None else self._state.num_tokens)

    @property
    def seen_ids(self) -> set[int]:
        """Which ids were given."""
        return set(self._waiting).union(() if self._state is None else self._state.seen_ids)

    @torch.no_grad()
    def _read(self, tokens: list[int]) -> None:
        before = self._state
        if self._step is not None and before is not None and len(tokens) == 1:
            last, layers = self._step.read(tokens[0], before.layers)
        else:
            row = torch.tensor([tokens], device=self.model.head_weight.device)  # (1, L)
            boundaries = None if self.boundary_id is None else row == self.boundary_id
            hidden, layers = self.model.hidden_states(row, boundaries, None if before is None else before.layers)
            last = hidden[0, -1].clone()
        num_before, seen = (0, frozenset[int]()) if before is None else (before.num_tokens, before.seen_ids)
        if not seen.issuperset(tokens):  # a copy of up to V ids, so not for each token
            seen = seen.union(tokens)
        # The state stays what it was until all is computed: an interrupt in between loses no token.
        self._state = TextState(layers, last, num_before + len(tokens), seen)
        self._waiting = self._waiting[len(tokens) :]


def boundary_behind(start: TextState | None, end_of_document: int) -> int | None:
    """Which token is a boundary for a reader of documents that starts there: `Reader`'s boundary_id.

    A boundary drops the state. A trained one stands before the token that opens the document, as in its training, so
    no token is a boundary then; the text of a document holds none anyway.
    """
    return None if start is not None and start.num_tokens == 0 else end_of_document
