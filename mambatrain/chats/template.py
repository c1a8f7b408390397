"""How messages become text: Jinja templates as transformers renders them, sandboxed, and turn by turn."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mambatrain.errors import UserError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]
"""`role` and `content`, both text, and whatever else a template looks at."""
_NOT_INCREMENTAL = "with it every turn would change what was read: --template names another"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE = "\U000f8a01", "\U000f8a02"  # private characters that no text holds; where one does, it is noticed


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens it may name."""

    source: str
    name: str
    """Where it came from, for people."""
    bos_token: str
    eos_token: str
    stops: tuple[str, ...] = ()
    """Texts that end an answer, besides what the template itself puts behind one."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.source}\0{self.bos_token}\0{self.eos_token}".encode()).hexdigest()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of some messages; with add_generation_prompt, up to where an answer starts.

        Raises:
            UserError: the template is wrong, or refuses these messages.
        """
        return self._render(self._compiled, messages, add_generation_prompt)

    def refuse_wrong(self) -> None:
        """
        Raises:
            UserError: it is no Jinja template, whatever the messages.
        """
        self._compile(marks=("", ""))

    @property
    def marks_generation(self) -> bool:
        """Whether it says itself what is trained on: `{% generation %} ... {% endgeneration %}`."""
        return _GENERATION.search(self.source) is not None

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of some messages, and the spans of characters that the template marks as generated.

        Raises:
            UserError: the template is wrong, or refuses these messages.
        """
        text, spans = "", []
        for piece in self._render(self._compiled_with_marks, messages, False).split(_OPEN):
            marked, close, rest = piece.partition(_CLOSE)
            if close:
                spans.append((len(text), len(text) + len(marked)))
            text += marked + rest
        if text != self.render(messages):  # marks inside of what the template calculates with, or in the messages
            raise UserError(f"the marks of generation in the chat template {self.name} do not hold text", "mend it")
        return text, spans

    def _render(self, template: jinja2.Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            line = _line_of(error)
            where = f" in line {line}" if line else ""
            raise UserError(
                f"the chat template {self.name} failed{where}: {error}", "mend it, or name another template"
            ) from error

    def tail(self, messages: Sequence[Message]) -> str:
        """What stands behind the last message's text, which is an answer.

        Raises:
            UserError: the answer does not stand where it was asked for.
        """
        asked, whole = self.render(messages[:-1], add_generation_prompt=True), self.render(messages)
        behind, answer = whole.removeprefix(asked), messages[-1]["content"]
        for text in (answer, answer.strip()):  # many templates strip what is said
            if whole.startswith(asked) and behind.startswith(text):
                return behind[len(text) :]
        raise UserError(f"the chat template {self.name} puts an answer elsewhere than asked for", _NOT_INCREMENTAL)

    def continuation(self, before: Sequence[Message], messages: Sequence[Message]) -> str:
        """What the messages behind the first ones, `before`, add to the text, up to where an answer starts.

        Raises:
            UserError: the text of the first ones changes.
        """
        whole = self.render(messages, add_generation_prompt=True)
        start = self.render(before) if before else ""
        if not whole.startswith(start):
            raise UserError(
                f"the chat template {self.name} changes earlier turns once another follows", _NOT_INCREMENTAL
            )
        return whole[len(start) :]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._compile(marks=("", ""))

    @cached_property
    def _compiled_with_marks(self) -> jinja2.Template:
        return self._compile(marks=(_OPEN, _CLOSE))

    def _compile(self, marks: tuple[str, str]) -> jinja2.Template:
        import jinja2

        try:
            return _environment(marks).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template {self.name} is wrong in line {error.lineno}: {error.message}", "mend it"
            ) from error


def _line_of(error: BaseException) -> int | None:
    """The line of the template that an error came from."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":  # jinja's name for one that is no file
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _environment(marks: tuple[str, str]) -> jinja2.Environment:
    """As transformers has it (utils/chat_template_utils.py): templates come with weights and must not run code."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what is trained on; to render, it is nothing."""

        tags = {"generation"}  # noqa: RUF012  (jinja's own way)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in marks)
            return [opening, *body, closing]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
