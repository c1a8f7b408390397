"""What is trained in place of the weights: small matrices beside the projections, or the state a text begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from mambatrain.errors import nearest
from mambatrain.recipe.section import PositiveInt, Section

if TYPE_CHECKING:
    from mambatrain.recipe.model_section import ModelSection

_PROJECTIONS = {
    "mamba1": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "mamba2": ("in_proj", "out_proj"),
}
_TUNABLE = ("conv1d", "A_log", "D", "dt_bias")
_OF_KIND = {
    "state": ("window", "start", "state_dtype"),
    "lora and dora": ("rank", "alpha", "rank_stabilised", "targets", "tune"),
}


class AdapterSection(Section):
    """What `finetune` trains in place of the weights, which stay as they are; null: the weights themselves."""

    kind: Literal["lora", "dora", "state"] = "lora"
    """lora: W + scale B A. dora: that with a trained norm for each output. state: the state that a text begins with."""
    rank: PositiveInt = 16
    """r, the inner size of B A."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """scale is alpha / rank."""
    rank_stabilised: bool = False
    """scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    targets: list[str] | Literal["auto"] = "auto"
    """Of in_proj, x_proj, dt_proj, out_proj (mamba2: in_proj, out_proj), embedding, lm_head. auto: the projections."""
    tune: list[str] = Field(default_factory=list)
    """Trained themselves, in every layer: of conv1d, A_log, D, dt_bias."""
    window: bool = False
    """state: train what stands in the convolution's window before the text, too."""
    start: str | None = None
    """state: a state file that training begins with, of a text or of another run; null: an empty state."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """state: of the state file; bf16 halves it, rounded."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first values of A."""

    @model_validator(mode="after")
    def check_kind(self) -> Self:
        for kinds, names in _OF_KIND.items():
            if self.kind in kinds:
                continue
            for name in names:
                default = type(self).model_fields[name].get_default(call_default_factory=True)
                if getattr(self, name) != default:
                    raise ValueError(f"{name} belongs to {kinds}, not to {self.kind}; remove it")
        for place, named in (("targets", self.targets), ("tune", self.tune)):
            if twice := next((name for name in named if named != "auto" and named.count(name) > 1), None):
                raise ValueError(f"{place} name {twice} twice")
        if self.kind != "state" and not self.targets and not self.tune:
            raise ValueError("nothing would be trained: name targets, or what to tune")
        return self

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def targets_in(self, model: ModelSection) -> tuple[str, ...]:
        """The targets, auto resolved, in the order of the model."""
        if self.kind == "state":
            return ()
        chosen = _PROJECTIONS[model.block] if self.targets == "auto" else self.targets
        return tuple(name for name in known_targets(model) if name in chosen)

    def check_model(self, model: ModelSection) -> None:
        """
        Raises:
            ValueError: a target or a tuned tensor is none of the model's; the nearest that is, is named.
        """
        known = known_targets(model)
        if self.kind == "dora" and model.tie_embeddings and "embedding" in self.targets:
            raise ValueError(
                "adapter.targets: dora has no embedding that is the head as well (its norms would be those of columns "
                "here and of rows there); leave it out, or take lora"
            )
        for name in [] if self.targets == "auto" else self.targets:
            if name in _TUNABLE:
                raise ValueError(f"adapter.targets: {name} is no matrix; name it in adapter.tune")
            _refuse_unknown("adapter.targets", name, known, model)
        for name in self.tune:
            if name in known:
                raise ValueError(f"adapter.tune: {name} is a matrix; name it in adapter.targets")
            _refuse_unknown("adapter.tune", name, _TUNABLE, model)


def known_targets(model: ModelSection) -> tuple[str, ...]:
    """Every matrix of a model that can have a low-rank partner."""
    return ("embedding", *_PROJECTIONS[model.block], *(() if model.tie_embeddings else ("lm_head",)))


def _refuse_unknown(place: str, name: str, known: tuple[str, ...], model: ModelSection) -> None:
    if name in known:
        return
    close = nearest(name, list(known))
    tied = " (its head is the embedding)" if name == "lm_head" else ""
    meant = f"; did you mean {close}?" if close else ""
    raise ValueError(f"{place}: {model.block} has no {name}{tied}, it has {', '.join(known)}{meant}")
