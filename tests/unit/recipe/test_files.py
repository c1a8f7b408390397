"""Reading recipes: every mistake gets one line with its dotted path and value, and a hint where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import (
    ModelSection,
    annotate_recipe,
    differing_settings,
    read_recipe,
    shipped_recipes,
    write_recipe,
)

GENERAL = "`mambatrain recipes show demo --resolved` says what each setting means"


def problem_of(*overrides: str, name: str = "demo") -> tuple[list[str], str | None]:
    """The lines under `... is not a valid recipe:` and the hint."""
    with pytest.raises(UserError) as caught:
        read_recipe(name, list(overrides))
    first, *lines = caught.value.message.split("\n")
    assert first.endswith("demo.yaml is not a valid recipe:")
    return [line.removeprefix("  ") for line in lines], caught.value.hint


@pytest.mark.parametrize(
    ("override", "line", "hint"),
    [
        ("model.d_state=foo", "model.d_state: input should be a valid integer or 'auto', not 'foo'", GENERAL),
        ("model.dt_rank=0", "model.dt_rank: input should be greater than or equal to 1 or 'auto', not 0", GENERAL),
        ("model.block=mamba3", "model.block: input should be 'mamba1' or 'mamba2', not 'mamba3'", GENERAL),
        ("model.d_model=", "model.d_model: input should be a valid integer, not null", GENERAL),
        ("model.d_model=wide", "model.d_model: input should be a valid integer, not 'wide'", GENERAL),
        (
            "model.tie_embeddings=on",
            "model.tie_embeddings: input should be a valid boolean, not 'on'",
            "write true or false",
        ),
        ("model.conv_bias=1", "model.conv_bias: input should be a valid boolean, not 1", "write true or false"),
        ("optimizer.beta1=2", "optimizer.beta1: input should be less than 1, not 2", GENERAL),
        ("optimizer.eps=.inf", "optimizer.eps: input should be a valid number, not '.inf'", GENERAL),
        ("optimizer.eps=1e999", "optimizer.eps: input should be a finite number, not inf", GENERAL),
        ("evaluation.every_steps=true", "evaluation.every_steps: input should be a valid integer, not True", GENERAL),
        ("data.row_tokens=0", "data.row_tokens: input should be greater than or equal to 1, not 0", GENERAL),
        ("about=5", "about: input should be a valid string, not 5", GENERAL),
        ("model=5", "model: input should be a section of settings, not 5", GENERAL),
        ("model=", "model: input should be a section of settings, not null", GENERAL),
        (
            "model.d_model='256'",
            "model.d_model: input should be a valid integer, not '256'",
            "text in quotes is not a number: write 256 without them",
        ),
        (
            "training.total_tokens=1.2e6",
            "training.total_tokens: input should be a valid integer, not 1200000.0",
            "this is a whole number: write 1200000",
        ),
        ("model.bock=mamba2", "model.bock: no such setting", "did you mean `model.block`?"),
        ("optimizer.beta_1=0.9", "optimizer.beta_1: no such setting", "did you mean `optimizer.beta1`?"),
        (
            "training.learning_rate=1",
            "training.learning_rate: no such setting",
            "did you mean `optimizer.learning_rate`?",
        ),
        (
            "training.lerning_rate=1",
            "training.lerning_rate: no such setting",
            "did you mean `optimizer.learning_rate`?",
        ),
        ("modle.d_model=1", "modle: no such setting", "did you mean `model`?"),
        ("data.zzz=1", "data.zzz: no such setting", "`mambatrain recipes show demo --resolved` lists every setting"),
        ("training.total_steps=5", "training: give exactly one of total_steps and total_tokens; null unsets", GENERAL),
        ("schedule.warmup_steps=587", "schedule.warmup_steps 587 exceeds 586 steps", GENERAL),
        ("model.num_groups=2", "model: num_groups belongs to mamba2; remove it", GENERAL),
        ("model.dt_min=1", "model: dt_min 1.0 is above dt_max 0.1", GENERAL),
    ],
)
def test_one_mistake(override: str, line: str, hint: str | None) -> None:
    assert problem_of(override) == ([line], hint)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["training.rows_per_step=null", "training.tokens_per_step=1000"],
            "training.tokens_per_step 1000 is not a multiple of data.row_tokens 512",
        ),
        (["model.block=mamba2", "model.dt_rank=3"], "model: dt_rank belongs to mamba1; remove it"),
        (["model.block=mamba2", "model.num_groups=3"], "model: 8 heads do not divide into num_groups 3"),
        (
            ["model.block=mamba2", "model.head_dim=100"],
            "model: expand * d_model = 512 is not a multiple of head_dim 100; set model.head_dim to a divisor",
        ),
    ],
)
def test_settings_that_do_not_fit_together(overrides: list[str], line: str) -> None:
    assert problem_of(*overrides)[0] == [line]


def test_all_mistakes_are_said_at_once() -> None:
    lines, hint = problem_of("model.d_model=x", "data.row_tokens=-1", "optimizer.kind=sgd", "trainig.seed=1")
    assert [line.split(":")[0] for line in lines] == ["model.d_model", "data.row_tokens", "optimizer.kind", "trainig"]
    assert hint == "did you mean `training`?"


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    model, training = "{d_model: 8, num_layers: 1, vocab_size: 9}", "{rows_per_step: 1, total_steps: 1}"
    path.write_text(f"model: {model}\ndata: {{shards: x}}\ntraining: {training}\n")
    lines, _ = problem_of(name=str(path))
    assert lines == ["data.row_tokens: missing", "optimizer: missing"]


@pytest.mark.parametrize("override", ["rows", "=5", "a..b=1", ".a=1", "model.=1"])
def test_an_override_must_be_an_assignment(override: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form path\.to\.field=value"):
        read_recipe("demo", [override])


def test_an_override_reaches_into_sections_only_and_must_be_yaml() -> None:
    with pytest.raises(UserError, match="d_model is a value, not a section"):
        read_recipe("demo", ["model.d_model.x=1"])
    with pytest.raises(UserError, match=r"--set data.shards=\[1: the value is not readable YAML: line 1"):
        read_recipe("demo", ["data.shards=[1"])


def test_overrides_are_typed_and_the_last_one_wins() -> None:
    recipe = read_recipe("demo", ["optimizer.learning_rate=1e-3", "data.shards=on", "data.seed=1", "data.seed=2"])
    assert (recipe.optimizer.learning_rate, recipe.data.shards, recipe.data.seed) == (1e-3, "on", 2)
    assert read_recipe("demo", ["schedule.warmup_steps=7"]).warmup_steps == 7
    assert read_recipe("demo", ["model.d_state=8"]).model.state_size == 8


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("dem", "no recipe file or shipped recipe named dem", "did you mean the shipped recipe `demo`?"),
        ("recipes/demos.yaml", "named recipes/demos.yaml", "did you mean the shipped recipe `demo`?"),
        ("nothing-like-it", "named nothing-like-it", "`mambatrain recipes list` names the shipped ones"),
        (".", "is a folder, not a recipe", "name a .yaml file"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(name)
    assert message in caught.value.message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n\td_model: 1\n", "is not readable YAML: line 2, column 1: "),
        (b"about: \xff\xfe\n", "is not UTF-8 text: "),
        (b"", "holds no mapping of sections"),
        (b"- a\n", "holds no mapping of sections"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(str(path))
    assert str(path) in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.touch(mode=0o000)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read_recipe(str(path))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_comes_back_from_its_own_text(name: str, tmp_path: Path) -> None:
    has_model = "\nmodel:" in shipped_recipes()[name].read_text(encoding="utf-8")
    model = None if has_model else ModelSection(d_model=8, num_layers=1, vocab_size=16)
    odd = ["data.chats.files=['3e4']"] if name in ("chat", "dpo") else ["data.shards='3e4'"]
    recipe = read_recipe(name, odd, model)
    for text in (write_recipe(recipe), annotate_recipe(recipe)):
        path = tmp_path / "again.yaml"
        path.write_text(text, encoding="utf-8")
        assert read_recipe(str(path)) == recipe


def test_an_annotated_recipe_says_what_each_setting_means() -> None:
    recipe = read_recipe("demo")
    lines = annotate_recipe(recipe).splitlines()
    for name, section in recipe:
        if name == "about":
            continue
        line = f"{name}:" if section is not None else f"{name}: null"
        assert lines[lines.index(line) - 1].startswith("# ")
        if section is None:
            continue
        for field in type(section).model_fields:
            settings = [i for i, line in enumerate(lines) if line.startswith(f"  {field}: ")]
            assert settings, field
            assert all(lines[i - 1].startswith("  # ") for i in settings), field


def test_differing_settings_are_named_with_both_values() -> None:
    before = read_recipe("demo")
    after = read_recipe("demo", ["model.d_model=128", "schedule.warmup_steps=5"])
    assert differing_settings(before, before) == []
    assert differing_settings(before, read_recipe("demo", ["about=the same, said otherwise"])) == []
    assert differing_settings(before, after) == ["model.d_model: 256 -> 128", "schedule.warmup_steps: None -> 5"]


def test_a_recipe_without_a_model_needs_weights() -> None:
    with pytest.raises(UserError, match="model: missing") as caught:
        read_recipe("continue")
    assert (
        caught.value.hint == "a recipe without a model starts from weights: `mambatrain finetune RECIPE --from WEIGHTS`"
    )
    model = ModelSection(d_model=8, num_layers=1, vocab_size=9)
    assert read_recipe("continue", model=model).model == model


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.d_model=128", "d_model: 256 -> 128"),
        ("model.d_state=8", "d_state: 16 -> 8"),
        ("model.dt_rank=3", "dt_rank: 16 -> 3"),
        ("model.tie_embeddings=false", "tie_embeddings: True -> False"),
        ("model.vocab_size=4097", "padded vocabulary: 4096 -> 4104"),
    ],
)
@pytest.mark.parametrize("name", ["demo", "continue"])
def test_a_recipe_with_another_model_than_the_weights_is_refused(name: str, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(name, [override], model=read_recipe("demo").model)
    message, *lines = caught.value.message.split("\n")
    assert message.endswith("describes another model than that of the weights:")
    assert "  " + line in lines
    assert caught.value.hint == "leave the model section out: the weights say what the model is"


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_a_recipe_that_says_the_same_model_in_other_words_is_taken(block: str) -> None:
    """Weights of other tools come with auto and padding resolved."""
    overrides = [f"model.block={block}", "model.vocab_size=4093"]
    section = read_recipe("demo", overrides).model
    resolved = {"vocab_size": 4096, "pad_vocab_multiple": 1, "d_state": section.state_size, "dt_min": 0.01}
    resolved |= {"dt_rank": section.dt_rank_size} if block == "mamba1" else {}
    of_weights = section.model_copy(update=resolved)
    assert of_weights != section
    assert read_recipe("demo", overrides, model=of_weights).model == of_weights
