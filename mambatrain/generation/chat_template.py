"""How messages become text: Jinja templates as transformers renders them, sandboxed, and turn by turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mambatrain.errors import UserError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, str]
_NOT_INCREMENTAL = "with it every turn would change what was read: --template names another"


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
        import jinja2

        try:
            return self._compiled.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"the chat template {self.name} failed: {error}", "--template names another") from error

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
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template {self.name} is wrong in line {error.lineno}: {error.message}", "mend it"
            ) from error


def _environment() -> jinja2.Environment:
    """As transformers has it (utils/chat_template_utils.py): templates come with weights and must not run code."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what is trained on; to render, it is nothing."""

        tags = {"generation"}  # noqa: RUF012  (jinja's own way)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
