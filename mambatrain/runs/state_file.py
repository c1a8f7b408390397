"""State files: what a model remembers of a text, as safetensors.

layers.N.window    (W - 1, D)                 the last inputs of layer N's convolution
layers.N.ssm       (E, N) or (H, P, N)        its recurrent state (Mamba-1, Mamba-2)
hidden             (d_model,)                 the last position behind the last norm: the head makes the logits of it;
                                              not in a trained state, which stands before a text
seen_ids           (at most the vocabulary,)  int32: which ids were read

The metadata, JSON under the key `mambatrain`, says whose state it is, weights and tokenizer by digest, has the digest
of the tensors themselves, and the chat template of a conversation, or of those that a state was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambatrain.chats.template import ChatTemplate
from mambatrain.errors import UserError
from mambatrain.files import write_bytes_whole, write_errors_named
from mambatrain.models.parameters import conv_channels
from mambatrain.models.state import BlockState, TextState
from mambatrain.recipe import ModelSection
from mambatrain.runs.tensor_files import digest_of_tensors
from mambatrain.runs.weights import Weights

FORMAT = "mambatrain state 2"
_KEY = "mambatrain"
_OTHER_FILE = "name a file that `mambatrain state make`, `generate --save-state` or /save in `chat` wrote"


@dataclass(frozen=True)
class Chat:
    """A conversation that stands at the end of the text."""

    messages: list[dict[str, str]]
    """OpenAI's form: role and content."""
    unread: str
    """What the template puts behind the last answer, not read yet: it is encoded with what comes next."""


@dataclass(frozen=True)
class StateFacts:
    """What a state file says about itself."""

    block: str
    weights_sha256: str
    """`Weights.digest` of the only weights that understand the state."""
    weights_origin: str
    """Where these were, for people."""
    tokenizer_sha256: str
    """Empty where the state was trained on tokens of a tokenizer that is not known."""
    text: str
    """What was read, for people."""
    num_tokens: int
    chat: Chat | None = None
    template: ChatTemplate | None = None
    """That of the conversation, or of those that the state was trained on; None: there were none."""


@dataclass(frozen=True)
class StateFile:
    facts: StateFacts
    state: TextState
    """On the CPU, in the dtype of the file."""

    @property
    def dtype(self) -> torch.dtype:
        return self.state.layers[0].ssm.dtype


def facts_of(
    weights: Weights,
    tokenizer_sha256: str,
    text: str,
    state: TextState,
    chat: Chat | None = None,
    template: ChatTemplate | None = None,
) -> StateFacts:
    """What a file of this state has to say."""
    return StateFacts(
        weights.section.block, weights.digest, weights.origin, tokenizer_sha256, text, state.num_tokens, chat, template
    )


def refuse_to_replace(file: Path) -> None:
    """Only a state file is replaced by one: asked before a long text is read.

    Raises:
        UserError: something else lies there, or the folder does not exist.
    """
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written: there is no folder {file.parent}", "make it, or name another file")
    if file.exists():
        try:
            read_state_file(file)
        except UserError as error:
            raise UserError(f"{file} is there and is no state file", "name another, or remove it") from error


def write_state_file(file: Path, state: TextState, facts: StateFacts, dtype: torch.dtype = torch.float32) -> None:
    """Writes a state, whole or not at all; an earlier state file is replaced.

    Raises:
        UserError: something else lies there, or it cannot be written.
    """
    from safetensors.torch import save

    refuse_to_replace(file)
    tensors: dict[str, Tensor] = {}
    for index, (window, ssm) in enumerate(state.layers):
        tensors[f"layers.{index}.window"] = window[0]
        tensors[f"layers.{index}.ssm"] = ssm[0]
    if state.hidden is not None:
        tensors["hidden"] = state.hidden
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    stored["seen_ids"] = torch.tensor(sorted(state.seen_ids), dtype=torch.int32)
    described = {"format": FORMAT, "tensors_sha256": digest_of_tensors(stored), **asdict(facts)}
    with write_errors_named(file):
        write_bytes_whole(file, save(stored, {_KEY: json.dumps(described)}))


def read_state_file(file: Path) -> StateFile:
    """Reads and checks a state file; nothing in it can execute code.

    Raises:
        UserError: there is none, or it is damaged.
    """
    metadata, tensors = _read(file)
    try:
        described: dict[str, Any] = json.loads(metadata[_KEY])
        if described.pop("format") != FORMAT:
            raise UserError(f"{file} is a state file of another version of mambatrain", "make it again")
        if described.pop("tensors_sha256") != digest_of_tensors(tensors):
            raise UserError(f"{file} was changed: its digest is not that of its tensors", "make it again")
        chat, template = described.pop("chat"), described.pop("template")
        if template is not None:
            template = ChatTemplate(**template | {"stops": tuple(template["stops"])})
        facts = StateFacts(**described, chat=None if chat is None else Chat(**chat), template=template)
        seen = frozenset(tensors.pop("seen_ids").tolist())
        hidden = tensors.pop("hidden") if facts.num_tokens else None
        layers = [
            BlockState(tensors[f"layers.{index}.window"][None], tensors[f"layers.{index}.ssm"][None])
            for index in range(len(tensors) // 2)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no state file", _OTHER_FILE) from error
    return StateFile(facts, TextState(layers, hidden, facts.num_tokens, seen))


def place_state(found: StateFile, file: Path, weights: Weights, tokenizer_sha256: str, like: Tensor) -> TextState:
    """The state for a model of these weights.

    Args:
        found: what the file holds.
        file: its name, for the message.
        weights: the model's.
        tokenizer_sha256: of the tokenizer in use.
        like: a tensor of the model: its device; the dtype is fp32 (fp64 in an fp64 model).

    Raises:
        UserError: the state is that of other weights, or of another tokenizer.
    """
    facts, section = found.facts, weights.section
    if facts.weights_sha256 != weights.digest:
        raise UserError(
            f"{file} is a state of other weights: {facts.weights_origin} ({facts.weights_sha256[:12]}), "
            f"not {weights.origin} ({weights.digest[:12]})",
            "numbers of one model mean nothing to another: read the text again with `mambatrain state make`",
        )
    if facts.tokenizer_sha256 not in ("", tokenizer_sha256):
        raise UserError(
            f"{file} was made with another tokenizer ({facts.tokenizer_sha256[:12]}, here {tokenizer_sha256[:12]})",
            "name that one: --tokenizer FILE",
        )
    if shapes_of(found.state) != state_shapes(section):
        raise UserError(f"{file} has other shapes than a state of {weights.origin}", "it is damaged: make it again")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return _converted(found.state, like.device, dtype)


def blend_states(one: StateFile, other: StateFile, weight: float) -> tuple[TextState, StateFacts]:
    """(1 - weight) of one and weight of the other, in fp32.

    The next token's logits are blended likewise. Behind it nothing is promised: each layer is linear in its state, the
    model is not.

    Raises:
        UserError: they belong to different weights or tokenizers.
    """
    for field, what in (("weights_sha256", "weights"), ("tokenizer_sha256", "tokenizers")):
        if getattr(one.facts, field) != getattr(other.facts, field):
            raise UserError(
                f"the two states belong to different {what}: {one.facts.weights_origin} and "
                f"{other.facts.weights_origin}",
                "blend states that were made with the same weights and tokenizer",
            )
    if shapes_of(one.state) != shapes_of(other.state):
        raise UserError("the two states have different shapes, though they name the same weights", "make them again")
    if (one.state.hidden is None) != (other.state.hidden is None):
        raise UserError("a trained state stands before a text and the other behind one", "blend two of a kind")
    first, second = (_converted(part.state, torch.device("cpu"), torch.float32) for part in (one, other))
    layers = [
        BlockState(torch.lerp(a.window, b.window, weight), torch.lerp(a.ssm, b.ssm, weight))
        for a, b in zip(first.layers, second.layers, strict=True)
    ]
    state = TextState(
        layers,
        None if first.hidden is None or second.hidden is None else torch.lerp(first.hidden, second.hidden, weight),
        first.num_tokens + second.num_tokens,
        first.seen_ids | second.seen_ids,
    )
    text = f"{1 - weight:g} x ({one.facts.text}) + {weight:g} x ({other.facts.text})"
    templates = [facts.template for facts in (one.facts, other.facts) if facts.template is not None]
    alike = len(templates) == 2 and templates[0].sha256 == templates[1].sha256
    template = templates[0] if alike else None
    return state, replace(one.facts, text=text, num_tokens=state.num_tokens, chat=None, template=template)


def state_shapes(section: ModelSection) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of window and recurrent state, for each layer, without the batch."""
    channels = conv_channels(section) if section.block == "mamba2" else section.d_inner
    window = (section.d_conv - 1, channels)
    heads = (section.num_heads, section.head_dim) if section.block == "mamba2" else (section.d_inner,)
    return [(window, (*heads, section.state_size))] * section.num_layers


def shapes_of(state: TextState) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of window and recurrent state, for each layer, without the batch."""
    return [(tuple(layer.window.shape[1:]), tuple(layer.ssm.shape[1:])) for layer in state.layers]


def count_numbers(shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, int]:
    """How many numbers the windows and the recurrent states of all layers are."""
    windows, states = zip(*shapes, strict=True)
    return sum(map(_product, windows)), sum(map(_product, states))


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _converted(state: TextState, device: torch.device, dtype: torch.dtype) -> TextState:
    layers = [BlockState(*(tensor.to(device, dtype) for tensor in layer)) for layer in state.layers]
    return replace(state, layers=layers, hidden=None if state.hidden is None else state.hidden.to(device, dtype))


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            metadata: dict[str, str] = content.metadata() or {}
            return metadata, {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        if not file.exists():
            raise UserError(f"there is no file {file}", _OTHER_FILE) from error
        raise UserError(f"{file} cannot be read: {error.strerror or error}", _OTHER_FILE) from error
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}", _OTHER_FILE) from error
