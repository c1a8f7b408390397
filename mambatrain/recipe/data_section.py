"""Which tokens are trained on, from which sources, and how that changes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.recipe.chat_section import ChatSection
from mambatrain.recipe.section import PositiveInt, Section

CHATS = "chats"
"""What `data.chats` is called where sources have names."""


class SourceSection(Section):
    """One of several folders of tokens: give a weight or a budget."""

    shards: str
    """As `data.shards`."""
    weight: Annotated[float, Field(gt=0.0)] | None = None
    """Rows drawn from it, in proportion to the other weights; they need not sum to 1."""
    tokens: PositiveInt | None = None
    """Tokens drawn from it in its stage; all budgets of a stage together are its length."""
    max_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """How often its windows may be shown over the whole run; more is refused before the run begins."""

    @model_validator(mode="after")
    def check_share(self) -> Self:
        if (self.weight is None) == (self.tokens is None):
            raise ValueError("give exactly one of weight and tokens")
        return self


class StageSection(Section):
    """What changes at some point of the training; what a stage leaves out stays as it was before."""

    from_tokens: PositiveInt
    """Tokens drawn before it begins; rounded up to whole steps."""
    sources: Annotated[list[SourceSection], Field(min_length=1)] | None = None
    """In place of the sources before."""
    row_tokens: PositiveInt | None = None
    """In place of the row length before; needs training.tokens_per_step, which stays the same."""


class DataSection(Section):
    """Where the tokens come from and in which order."""

    shards: str | None = None
    """Folder that `mambatrain tokenize` wrote, or a .bin/.idx pair without its ending; or give `sources` or `chats`."""
    sources: Annotated[list[SourceSection], Field(min_length=1)] | None = None
    """A mixture: several of them, each `{shards, weight}` or `{shards, tokens}`, with `max_epochs` where wanted."""
    chats: ChatSection | None = None
    """Conversations instead of shards, `{files, template, ...}`: see ChatSection."""
    row_tokens: PositiveInt
    """L, tokens in one training row."""
    packing: Literal["auto", "windows", "best_fit"] = "auto"
    """windows: rows cut the stream anywhere. best_fit: rows hold whole documents; only what is longer is cut.
    auto: best_fit for conversations, windows for text."""
    carry_state: bool = False
    """A row goes on where the same slot's row of the draw before ended, with the state that it left, without gradients:
    documents are followed to their ends."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Key of the permutation of windows."""
    stages: list[StageSection] = Field(default_factory=list)
    """Curriculum: `{from_tokens, sources, row_tokens}` of each change, in their order."""
    skip_draws: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list
    )
    """Draws that are passed over, `[first, last]` each, as the log counts them; their data is not trained on."""
    held_out: str | None = None
    """Whose held-out documents are measured (all documents of a pair); null: those of the first source."""

    @model_validator(mode="after")
    def check_sources(self) -> Self:
        if [self.shards, self.sources, self.chats].count(None) != 2:
            raise ValueError("give exactly one of shards, sources and chats; null unsets")
        if self.carry_state:
            others = {"sources": self.sources, "chats": self.chats, "stages": self.stages}
            refused = [name for name, given in others.items() if given] + ["packing"] * (self.packing != "auto")
            if refused:
                raise ValueError(f"carry_state follows the documents of data.shards; {refused[0]} does not go with it")
        if self.chats is not None and (self.stages or self.packing == "windows"):
            what = "stages" if self.stages else "packing windows, which cuts conversations anywhere,"
            raise ValueError(f"{what} does not go with chats; leave it out")
        for place, sources in self._named_sources():
            names = [source.shards for source in sources]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{place} name {twice} twice")
            if len({source.weight is None for source in sources}) > 1:
                raise ValueError(f"{place} mix weights and budgets of tokens; give one kind")
        for first, last in self.skip_draws:
            if last < first:
                raise ValueError(f"skip_draws holds [{first}, {last}], which ends before it begins")
        starts = [stage.from_tokens for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages must begin one after the other, not at {', '.join(map(str, starts))} tokens")
        for number, stage in enumerate(self.stages):
            if stage.sources is None and stage.row_tokens is None:
                raise ValueError(f"stages.{number} changes nothing; give sources or row_tokens")
        return self

    def _named_sources(self) -> list[tuple[str, list[SourceSection]]]:
        named = [("sources", self.sources), *((f"stages.{n}.sources", s.sources) for n, s in enumerate(self.stages))]
        return [(place, sources) for place, sources in named if sources is not None]

    @property
    def all_shards(self) -> list[str]:
        """What is drawn from at any time, each once, in the order of appearance."""
        first = [self.shards or CHATS] if self.sources is None else []
        named = [source.shards for _, sources in self._named_sources() for source in sources]
        return list(dict.fromkeys([*first, *named]))

    @property
    def longest_row_tokens(self) -> int:
        """The longest row of any stage; held-out text is read in rows of this length."""
        return max([self.row_tokens, *(stage.row_tokens or 0 for stage in self.stages)])


@dataclass(frozen=True)
class Stage:
    """A stretch of draws in which nothing changes.

    Attributes:
        first_draw, num_draws: where it begins, and how long it is; the last one lasts as long as it must.
        place: what its sources are called in the recipe.
    """

    first_draw: int
    num_draws: int
    row_tokens: int
    rows_per_step: int
    sources: Sequence[SourceSection]
    place: str


def resolve_stages(data: DataSection, rows_per_step: int, total_steps: int) -> list[Stage]:
    """The stages of a run whose steps have `rows_per_step` rows of `data.row_tokens`.

    Raises:
        ValueError: a stage would have no step, its rows do not fill a step, or its budgets are not its length.
    """
    tokens_per_step = rows_per_step * data.row_tokens
    starts = [0, *(-(-stage.from_tokens // tokens_per_step) for stage in data.stages)]
    sources = data.sources or [SourceSection(shards=data.shards or CHATS, weight=1.0)]
    row_tokens, place = data.row_tokens, "data.sources" if data.sources else "data.shards"
    stages = []
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], total_steps], strict=True)):
        if number:
            change = data.stages[number - 1]
            row_tokens = change.row_tokens or row_tokens
            if change.sources:
                sources, place = change.sources, f"data.stages.{number - 1}.sources"
        if stop <= start:
            raise ValueError(
                f"data.stages: no step lies between {start * tokens_per_step:,} and {stop * tokens_per_step:,} tokens"
            )
        if tokens_per_step % row_tokens:
            raise ValueError(f"a step of {tokens_per_step} tokens does not hold whole rows of {row_tokens}")
        stages.append(Stage(start, stop - start, row_tokens, tokens_per_step // row_tokens, sources, place))
        _check_budgets(stages[-1], tokens_per_step)
    return stages


def _check_budgets(stage: Stage, tokens_per_step: int) -> None:
    budgets = [source.tokens for source in stage.sources if source.tokens is not None]
    if budgets and -(-sum(budgets) // tokens_per_step) != stage.num_draws:
        raise ValueError(
            f"{stage.place}: the budgets sum to {sum(budgets):,} tokens where the stage has "
            f"{stage.num_draws * tokens_per_step:,} ({stage.num_draws:,} steps of {tokens_per_step:,})"
        )
