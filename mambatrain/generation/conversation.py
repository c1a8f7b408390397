"""A conversation whose memory is the state: each turn is read from it, and nothing is read twice.

What the model has read is, token for token: answers as the model spelled them, and all that the template puts around
them, and between them, as the tokenizer encodes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from mambatrain.chats.template import ChatTemplate, Message
from mambatrain.chats.turn_end import PROBE, find_turn_end
from mambatrain.data.tokenizer import LoadedTokenizer
from mambatrain.errors import UserError
from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings, sample
from mambatrain.generation.text_stream import TextStream
from mambatrain.generation.token_step import TokenStep
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.state import TextState
from mambatrain.runs.state_file import Chat

Ending = Literal["turn", "stop", "length", "interrupted"]
_CONTEXT_IDS = 8  # that a tokenizer may look back at to spell a word's space


@dataclass(frozen=True)
class Place:
    """Where a conversation stands; nothing changes it, so that one may always return."""

    state: TextState | None = None
    """Behind what was read; None: nothing was."""
    messages: tuple[Message, ...] = ()
    unread: str = ""
    """What stands behind that and was not read yet: it is encoded with what comes next, as it is in training."""


class Conversation:
    """Messages, and a model that has read them.

    No token starts a document in here: the end-of-document token may end each answer, and makes nothing forgotten.

    Args:
        model: in any dtype, on any device.
        tokenizer: of the model.
        template: how messages become text; names of special tokens in it are special tokens, whoever wrote them.
        settings: how tokens are drawn; the drawing goes on from turn to turn.
        max_new_tokens: the most tokens of an answer.
        stops: texts that end an answer, and are no part of it; the template may add some.
        step: reads the tokens of answers, as `Reader` has it; without a boundary.

    Raises:
        UserError: the template does not go on by adding text.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: LoadedTokenizer,
        template: ChatTemplate,
        settings: SamplingSettings,
        max_new_tokens: int,
        stops: tuple[str, ...] = (),
        step: TokenStep | None = None,
    ) -> None:
        self.template = template
        self.place = Place()
        self.ending: Ending = "turn"
        """Why the last answer ended."""
        self._model, self._step, self._vocab_size = model, step, tokenizer.vocab_size
        self._settings, self._generator, self._max_new_tokens = settings, settings.generator(), max_new_tokens
        self._tokenizer = Tokenizer.from_str(tokenizer.tokenizer.to_str())  # the other takes no text for special tokens
        self._tokenizer.encode_special_tokens = False
        self._end_ids, self._stops = self._find_ends(tokenizer.end_of_document_id, stops)

    def ask(
        self, text: str, system: str | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """A turn of the user's; gives the pieces of the answer as they come.

        The place changes when all was given; a turn that is left in the middle, or fails, was never there.

        Args:
            text: what the user says.
            system: what stands before all messages; only where there is none yet.
            interrupted: asked before each token; True ends the answer there.

        Raises:
            UserError: the template refuses the messages, or does not go on by adding text.
        """
        place = self.place
        opening = () if system is None or place.messages else ({"role": "system", "content": system},)
        messages: tuple[Message, ...] = (*place.messages, *opening, {"role": "user", "content": text})
        added = self.template.continuation(place.messages, messages)
        if place.state is not None and place.state.num_tokens and not place.messages:
            added = added.removeprefix(self.template.bos_token)  # the document before has been opened already
        ids = self._encode(place.unread + added)
        reader = Reader(self._model, None, place.state, self._step)
        reader.add(ids)
        answer, state, unread = yield from self._answer(
            reader, TextStream(self._tokenizer, ids[-_CONTEXT_IDS:]), interrupted
        )
        messages = (*messages, {"role": "assistant", "content": answer})
        self.place = Place(state, messages, unread + self.template.tail(messages))

    def _answer(
        self, reader: Reader, stream: TextStream, interrupted: Callable[[], bool]
    ) -> Generator[str, None, tuple[str, TextState, str]]:
        """Draws an answer; gives its text in pieces, and in the end the text, the state and what this has not read."""
        text, num_shown, self.ending = "", 0, "length"
        longest = max(map(len, self._stops), default=1)
        places: list[
            tuple[int, TextState]
        ] = []  # where an answer could have to be cut: characters, and the state there
        for _ in range(self._max_new_tokens):
            if interrupted():
                self.ending = "interrupted"
                break
            logits = reader.logits()
            if stream.is_whole:
                places = [*_from(places, len(text) - longest + 1), (len(text), reader.state())]
            seen = reader.seen_ids - self._end_ids if self._settings.repetition_penalty != 1.0 else ()
            token = sample(logits, self._settings, self._generator, seen, self._vocab_size)
            if token in self._end_ids:
                self.ending = "turn"
                break
            reader.add([token])
            text += stream.add(token)
            stop = _find_first(text, self._stops, num_shown)
            if stop is not None:
                self.ending = "stop"
                num_read, state = next(one for one in reversed(places) if one[0] <= stop)
                yield text[num_shown:stop]
                return text[:stop], state, text[num_read:stop]
            if (num_sure := len(text) - _held(text, self._stops)) > num_shown:
                yield text[num_shown:num_sure]
                num_shown = num_sure
        text += stream.rest()
        yield text[num_shown:]
        return text, reader.state(), ""

    def place_of(self, state: TextState, chat: Chat | None, template: ChatTemplate | None) -> Place:
        """Behind a text, in a conversation that was kept, or at the beginning of one, behind a trained state.

        Raises:
            UserError: that was held, or the state was trained, with another template.
        """
        if template is not None and template.sha256 != self.template.sha256:
            what = "the conversation was held" if chat else "the state was trained"
            raise UserError(
                f"{what} with another chat template ({template.name}) than {self.template.name}",
                "`mambatrain chat --state FILE` without --template takes the one of the file",
            )
        return Place(state) if chat is None else Place(state, tuple(chat.messages), chat.unread)

    def chat_of(self, place: Place) -> Chat | None:
        """What a state file keeps besides the state; None where nothing was said."""
        return Chat(list(place.messages), place.unread) if place.messages else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _find_ends(self, end_of_document: int, stops: tuple[str, ...]) -> tuple[frozenset[int], tuple[str, ...]]:
        """The ids and the texts that end an answer, found by how the template ends one."""
        token, mark = find_turn_end(self.template, self._tokenizer)
        self.template.continuation(PROBE[:2], PROBE)
        stops = (*stops, *self.template.stops)
        if token is not None:
            return frozenset([end_of_document, token]), stops
        return frozenset([end_of_document]), (*stops, mark) if mark else stops


def _from(places: list[tuple[int, TextState]], character: int) -> list[tuple[int, TextState]]:
    """The places needed to return to `character` or behind it: the last that is not behind it, and the rest."""
    num_before = sum(place[0] <= character for place in places)
    return places[max(0, num_before - 1) :]


def _find_first(text: str, stops: tuple[str, ...], start: int) -> int | None:
    """Where the first of some texts starts, looked for from a character on."""
    return min((found for stop in stops if (found := text.find(stop, start)) >= 0), default=None)


def _held(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of a text may be the start of one of these."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
