"""Which conversations are trained on, and what of them counts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.section import Section

Role = Literal["system", "user", "assistant", "tool"]
ChatFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "preference"]
PAIRS: ChatFormat = "preference"
"""Two answers to one prompt, `chosen` and `rejected`: two conversations of which one was preferred."""


class ChatSection(Section):
    """Conversations: read, put into a chat template and tokenized when a run begins, and kept in its folder."""

    files: Annotated[list[str], Field(min_length=1)]
    """.jsonl, .json, .parquet, .arrow (.gz, .zst), folders of them, patterns, and hf://NAME[:CONFIG][@REVISION][#SPLIT]."""
    format: ChatFormat | Literal["auto"] = "auto"
    """auto: by the fields that a conversation has, and told. preference: pairs; needs a `preferences` section."""
    prompt_field: str | None = None
    """Of prompt_completion and preference: the field that holds the prompt; null: prompt or question."""
    completion_field: str | None = None
    """Of prompt_completion: the field that holds the completion; null: completion, response or answer."""
    template: str = "auto"
    """chatml, plain, raw, or a Jinja file; auto: the tokenizer's own, else chatml if it has its tokens, else plain."""
    tokenizer: str | None = None
    """tokenizer.json, its folder or hf://NAME, where none lies beside the weights."""
    new_tokens: list[str] = Field(default_factory=list)
    """Special tokens that the tokenizer gets; their embeddings begin as the mean of all."""
    count: Annotated[list[Role], Field(min_length=1)] = Field(default=["assistant"])
    """Roles whose turns are trained on, with what ends a turn; a message's own `weight` or `train` goes before that."""
    turns: Literal["all", "last"] = "all"
    """last: of the turns that would count, only the last one of each conversation does."""
    too_long: Literal["truncate", "skip", "refuse"] = "truncate"
    """What happens to a conversation that does not fit a row: its end is cut off, it is left out, or nothing begins."""
    skip_bad: bool = False
    """Leave out conversations that cannot be used, and count them, instead of naming the first and stopping."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Fraction of the conversations that is held out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which are held out."""

    @model_validator(mode="after")
    def check_fields(self) -> Self:
        for name, formats in (
            ("prompt_field", ("prompt_completion", PAIRS)),
            ("completion_field", ("prompt_completion",)),
        ):
            if getattr(self, name) is not None and self.format not in ("auto", *formats):
                raise ValueError(f"{name} belongs to format {' and '.join(formats)}; remove it")
        for values, name in ((self.new_tokens, "new_tokens"), (self.count, "count")):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice")
        if "-" in self.files:
            raise ValueError("files names standard input, which a resumed run could not read again; write it to a file")
        if "" in self.new_tokens:
            raise ValueError("new_tokens names an empty token")
        return self
