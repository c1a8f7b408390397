"""`chat`: a conversation in the terminal, remembered by the state alone."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from mambatrain.cli.open_model import BaseOption, EndOption, TokenizerOption, WeightsArgument
from mambatrain.cli.sampling_options import (
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    sampling_settings,
)
from mambatrain.cli.state import StateOption, open_state, size_in_words
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption
from mambatrain.errors import UserError, nearest

if TYPE_CHECKING:
    from mambatrain.cli.open_model import OpenModel
    from mambatrain.data.tokenizer import LoadedTokenizer
    from mambatrain.generation.conversation import Conversation, Place

COMMANDS = {
    "/save FILE": "keep the conversation; `mambatrain chat --state FILE` and /load go on with it",
    "/load FILE": "go on with a conversation, or behind a text, that a state file keeps",
    "/reset": "begin again",
    "/system TEXT": "begin again with TEXT as the system message; without TEXT, with none",
    "/help": "this list; a message that starts with / is written with //",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
ENDINGS = {"length": "(--max-new-tokens reached)", "interrupted": "(stopped)"}


def chat(
    weights: WeightsArgument,
    state: StateOption = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before all others.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="chatml, plain, or a Jinja file. [default: that of --state, else the tokenizer's own, else one that "
            "it has the tokens of]",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer; repeatable.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest answer.")
    ] = 512,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    end_of_document: EndOption = None,
) -> None:
    """Talk with a model: answers on stdout as they come, all else on stderr; a turn is a line, /help lists commands.

    Example: mambatrain chat runs/tuned --system "Answer in one sentence." --temperature 0.5
    """
    if "" in (stop or []):
        raise typer.BadParameter("an empty text would end every answer", param_hint="'--stop'")
    from mambatrain.chats.template_files import find_template
    from mambatrain.cli.open_model import open_model, open_tokenizer, record_step
    from mambatrain.generation.conversation import Conversation
    from mambatrain.runs.state_file import read_state_file

    settings = sampling_settings(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    opened = open_model(weights, kernels.value, device.value, base)
    loaded = open_tokenizer(opened, tokenizer, end_of_document)
    kept = None if state is None else read_state_file(state).facts.template
    found = kept if kept is not None and template is None else find_template(template, loaded)
    step = record_step(opened, None)
    conversation = Conversation(opened.model, loaded, found, settings, max_new_tokens, tuple(stop or ()), step)
    session = Session(opened, loaded, conversation)
    if state is not None:
        session.load(state)
        session.origin, session.origin_text = conversation.place, session.text
    if system is not None:
        session.begin(system)
    typer.echo(f"template {found.name}", err=True)
    typer.echo(f"seed     {settings.seed}; /help lists the commands, Ctrl-D leaves", err=True)
    _converse(session)


class Session:
    """A conversation, where it began, and what the user's commands do to it."""

    def __init__(self, opened: OpenModel, loaded: LoadedTokenizer, conversation: Conversation) -> None:
        self.opened, self.loaded, self.conversation = opened, loaded, conversation
        self.system: str | None = None
        self.origin: Place = conversation.place
        self.origin_text = self.text = ""
        """What the place's state had read before the conversation, for people."""

    def answer(self, text: str) -> None:
        """Says a turn and prints the answer as it comes; Ctrl-C ends the answer, a second one drops the turn."""
        with Interruption() as interruption:
            for piece in self.conversation.ask(text, self.system, lambda: interruption.asked):
                print(piece, end="", flush=True)
            print(flush=True)
        if note := ENDINGS.get(self.conversation.ending):
            typer.echo(note, err=True)

    def obey(self, line: str) -> None:
        """Does what a line that starts with / says.

        Raises:
            UserError: there is no such command, or it cannot be done.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/save" | "/load" if not rest:
                raise UserError(f"{command} needs the name of a file", f"e.g. {command} x.state.safetensors")
            case "/save":
                self.save(Path(rest).expanduser())
            case "/load":
                self.load(Path(rest).expanduser())
            case "/reset":
                self.begin(self.system)
            case "/system":
                self.begin(rest or None)
            case "/help":
                for name, meaning in COMMANDS.items():
                    typer.echo(f"  {name:<14}{meaning}", err=True)
            case _:
                known = [name.split()[0] for name in COMMANDS]
                close = nearest(command, known)
                hint = (
                    f"did you mean {close}?" if close else f"there are {', '.join(known)}; // starts a message with /"
                )
                raise UserError(f"there is no command {command}", hint)

    def begin(self, system: str | None) -> None:
        """Back to where the chat was opened."""
        if system is not None and self.origin.messages:
            raise UserError(
                "a system message stands before all others, and the state is in the middle of a conversation",
                "start without --state, or from the state of a text",
            )
        self.system, self.text = system, self.origin_text
        self.conversation.place = self.origin
        told = f"with the system message: {system}" if system else "without a system message"
        typer.echo(f"the conversation begins {told}", err=True)

    def save(self, file: Path) -> None:
        """Keeps the place in a state file."""
        from mambatrain.runs.state_file import facts_of, write_state_file

        place = self.conversation.place
        if place.state is None or not place.messages:
            raise UserError("there is nothing to save yet", "say something first")
        text = ", ".join([part for part in (self.text, f"a chat of {len(place.messages)} messages") if part])
        kept, template = self.conversation.chat_of(place), self.conversation.template
        facts = facts_of(self.opened.weights, self.loaded.sha256, text, place.state, kept, template)
        write_state_file(file, place.state, facts)
        typer.echo(f"wrote {file}: {place.state.num_tokens:,} tokens in {size_in_words(file.stat().st_size)}", err=True)

    def load(self, file: Path) -> None:
        """Goes on from a state file."""
        found = open_state(file, self.opened, self.loaded)
        assert found is not None
        self.conversation.place = self.conversation.place_of(found.state, found.facts.chat, found.facts.template)
        self.text = "" if found.facts.chat else found.facts.text
        typer.echo(f"read {file}: {found.facts.text} ({found.facts.num_tokens:,} tokens)", err=True)


class Interruption:
    """While entered, the first Ctrl-C asks and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _converse(session: Session) -> None:
    """Turn by turn until /quit or the end of the input; a mistake costs its line, not the conversation."""
    while True:
        try:
            line = _read_line()
            if line is None or line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                session.obey(line)
            elif line:
                session.answer(line[1:] if line.startswith("//") else line)
        except UserError as error:
            typer.echo(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), err=True)
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit leaves)", err=True)


def _read_line() -> str | None:
    """The next line without white space around it; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401  (arrow keys and history in input())

    try:
        return input("> ").strip()
    except EOFError:
        typer.echo("", err=True)
        return None
