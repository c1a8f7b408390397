"""The language model: embedding, blocks around a residual stream, a norm, a head."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mambatrain.models.mamba1 import Mamba1
from mambatrain.models.mamba2 import Mamba2
from mambatrain.models.norms import RMSNorm
from mambatrain.models.segments import segmented_loss
from mambatrain.models.sequence_parallel import RowNeighbours
from mambatrain.models.state import BlockState
from mambatrain.ops.backends import Backend
from mambatrain.ops.cross_entropy import chunked_cross_entropy
from mambatrain.ops.reference import computing_dtype
from mambatrain.ops.token_losses import chunked_token_losses

if TYPE_CHECKING:
    from mambatrain.recipe import ModelSection

_MIXERS: dict[str, type[Mamba1] | type[Mamba2]] = {"mamba1": Mamba1, "mamba2": Mamba2}


class Layer(nn.Module):
    """residual + mixer(norm(residual)), the residual in fp32 under every precision."""

    def __init__(self, section: ModelSection, backend: Backend) -> None:
        super().__init__()
        self.norm = RMSNorm(section.d_model, section.norm_eps)
        self.mixer = _MIXERS[section.block](section, backend)

    def forward(
        self, residual: Tensor, boundaries: Tensor | None = None, state: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """(B, L, d_model) fp32 -> the same, and the block's state behind the last position."""
        # Narrow only where the weights are; a projection's may be computed at each look (adapters).
        u = self.norm(residual).to(self.mixer.conv1d.weight.dtype)
        y, state = self.mixer(u, boundaries, state)
        return residual + y, state

    def step_sizes(self, residual: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """delta of every token (B, L, E for Mamba-1; B, L, H for Mamba-2): how much of it is written, to look at."""
        u = self.norm(residual).to(self.mixer.in_proj.weight.dtype)
        return self.mixer.step_sizes(u, boundaries)


class LanguageModel(nn.Module):
    """Tokens in, logits out, with the recurrent state as an argument and a result.

    Build it on `torch.device("meta")` where the weights come from elsewhere; `parameters.initialise` gives first ones.
    """

    def __init__(self, section: ModelSection, backend: Backend) -> None:
        super().__init__()
        self.section = section
        self.backend = backend
        self.recompute_every = 0
        """Of every so many blocks the last keeps its input alone, and computes the rest again in the backward pass."""
        self.neighbours: RowNeighbours | None = None
        """Ranks that work on other parts of the same rows; None: rows are whole."""
        self.segment_tokens = 0
        """`loss_and_state` takes longer rows in segments of so many tokens; 0: whole."""
        # Filled by whoever builds the model; torch's own first values on a meta device would import its compiler (2 s).
        shape = section.padded_vocab_size, section.d_model
        self.embedding = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Layer(section, backend) for _ in range(section.num_layers))
        self.norm_f = RMSNorm(section.d_model, section.norm_eps)
        if not section.tie_embeddings:
            self.lm_head = nn.Linear(section.d_model, section.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, d_model), the embedding's own when they are tied."""
        return self.embedding.weight if self.section.tie_embeddings else self.lm_head.weight

    def hidden_states(
        self, tokens: Tensor, boundaries: Tensor | None = None, state: list[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """Everything before the head.

        Args:
            tokens: (B, L) int64.
            boundaries: (B, L) bool, True where a document starts; a boundary at 0 discards `state`.
            state: one per layer, as the previous call returned it; None starts from zero.

        Returns:
            (B, L, d_model) after the last norm, fp32, and the state behind the last position, one per layer.
        """
        residual = self.embedding(tokens)
        residual = residual.to(computing_dtype(residual))  # (B, L, d_model)
        states: list[BlockState] = []
        for index, layer in enumerate(self.layers):
            before = None if state is None else state[index]
            if self.neighbours is not None:
                shapes = cast(Layer, layer).mixer.init_state(len(tokens), torch.device("meta"), residual.dtype)
                residual, before = self.neighbours.receive(residual, shapes)
            if self.recompute_every and (index + 1) % self.recompute_every == 0 and torch.is_grad_enabled():
                residual, after = checkpoint(layer, residual, boundaries, before, use_reentrant=False)
            else:
                residual, after = layer(residual, boundaries, before)
            if self.neighbours is not None:
                residual = self.neighbours.send(residual, after)
            states.append(after)
        return self.norm_f(residual), states

    def forward(
        self, tokens: Tensor, boundaries: Tensor | None = None, state: list[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """Logits (B, L, V), at least fp32, and the state; the arguments are those of `hidden_states`."""
        hidden, state = self.hidden_states(tokens, boundaries, state)
        logits = F.linear(hidden.to(self.head_weight.dtype), self.head_weight)
        return logits.to(computing_dtype(logits)), state

    def summed_loss(
        self, tokens: Tensor, boundaries: Tensor | None, targets: Tensor, state: list[BlockState] | None = None
    ) -> Tensor:
        """Next-token loss in nats, summed over the targets that count; the logits (B, L, V) are never held.

        Args:
            tokens: (B, L) int64.
            boundaries: (B, L) bool, True where a document starts.
            targets: (B, L) int64, -100 where a position does not count.
            state: as in `hidden_states`.

        Returns:
            A scalar in fp32 (fp64 for fp64).
        """
        return self.loss_and_state(tokens, boundaries, targets, state)[0]

    def loss_and_state(
        self, tokens: Tensor, boundaries: Tensor | None, targets: Tensor, state: list[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """`summed_loss`, and the state behind the last position, detached.

        Rows longer than `segment_tokens` go through in segments (`segments.py`), to the same loss and gradients.
        """
        if self.segment_tokens and tokens.shape[1] > self.segment_tokens:
            if state is None:
                state = self.init_state(len(tokens), tokens.device, self.norm_f.weight.dtype)
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            batch = tokens, boundaries, targets
            return segmented_loss(self._loss_and_state, parameters, batch, state, self.segment_tokens)
        loss, state = self._loss_and_state(tokens, boundaries, targets, state)
        # Copied: a window is a view into what its layer computed of the whole row, and would keep all of that.
        return loss, [BlockState(layer.window.detach().clone(), layer.ssm.detach()) for layer in state]

    def _loss_and_state(
        self, tokens: Tensor, boundaries: Tensor | None, targets: Tensor, state: list[BlockState] | None
    ) -> tuple[Tensor, list[BlockState]]:
        hidden, state = self.hidden_states(tokens, boundaries, state)
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets.flatten(), self.backend.softmax_loss
        )
        return loss, state

    def token_losses(
        self, tokens: Tensor, boundaries: Tensor | None, targets: Tensor, state: list[BlockState] | None = None
    ) -> Tensor:
        """As `summed_loss`, but of each target by itself: (B, L), 0 where a position does not count."""
        hidden, _ = self.hidden_states(tokens, boundaries, state)
        losses = chunked_token_losses(
            hidden.flatten(0, 1), self.head_weight, targets.flatten(), self.backend.softmax_loss
        )
        return losses.view(targets.shape)

    def init_state(
        self, batch_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[BlockState]:
        """The empty state, one per layer; what state=None starts from."""
        device = torch.device(device)
        return [cast(Layer, layer).mixer.init_state(batch_size, device, dtype) for layer in self.layers]
