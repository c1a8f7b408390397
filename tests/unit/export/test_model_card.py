"""The model card tells what the run knows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from mambatrain.export.model_card import CardFacts, read_card_facts, write_model_card
from mambatrain.models.parameters import initial_value, parameter_rows
from mambatrain.recipe import ModelSection, parse_recipe, write_recipe
from mambatrain.runs.checkpoint import Progress, save_checkpoint
from mambatrain.runs.weights import Weights, read_weights

SECTION = ModelSection(d_model=8, num_layers=2, vocab_size=13, d_state=4)


def write_run(run: Path) -> Path:
    run.mkdir()
    content = {
        "model": SECTION.model_dump(),
        "data": {"shards": "demo/shards", "row_tokens": 8},
        "training": {"rows_per_step": 1, "total_steps": 200},
        "optimizer": {"learning_rate": 0.1},
    }
    (run / "recipe.yaml").write_text(write_recipe(parse_recipe(content, "test")))
    (run / "run.json").write_text(json.dumps({"data_digest": "abc123", "started_from": {"origin": "org/base"}}))
    held_out = [(0, 8.0), (100, 4.0), (200, 3.0)]
    lines = [
        {"event": "held_out", "step": step, "held_out_bits_per_byte": bits, "held_out_loss": bits / 2}
        for step, bits in held_out
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {name: initial_value(name, SECTION, 0) for name in parameter_rows(SECTION)}
    progress = Progress(step=150, tokens_seen=1_234_567)
    save_checkpoint(run / "checkpoints", progress, tensors, {"x.step": torch.zeros(1)})
    return run


def card_of(tmp_path: Path, facts: CardFacts, library: str | None = "transformers") -> str:
    write_model_card(
        tmp_path / "README.md",
        "my-model",
        SECTION,
        facts,
        library=library,
        how_to_load='load("{name}")',
        dtype="float32",
        end_of_document="<|endoftext|>",
    )
    return (tmp_path / "README.md").read_text()


def test_a_card_from_a_run_has_recipe_data_tokens_and_scores(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    card = card_of(tmp_path, read_card_facts(read_weights(str(run))))
    assert "| tokens seen | 1,234,567 |" in card
    assert "| steps | 150 of 200 |" in card
    assert "| started from | org/base |" in card
    assert "| held-out bits per byte | 4.0000 |" in card  # of the last evaluation that the checkpoint has behind it
    assert "- token shards: demo/shards" in card
    assert "abc123" in card
    assert (run / "recipe.yaml").read_text().rstrip() in card
    assert 'load("my-model")' in card
    assert "`<|endoftext|>`" in card
    assert "{{" not in card
    assert "{%" not in card


def test_a_card_of_other_weights_says_what_they_are(tmp_path: Path) -> None:
    tensors = {name: initial_value(name, SECTION, 0) for name in parameter_rows(SECTION)}
    facts = read_card_facts(Weights(SECTION, tensors, None, str(tmp_path / "a" / "b" / "c"), "d1g357"))
    card = card_of(tmp_path, facts)
    assert "SHA-256 d1g357" in card
    assert "## Recipe" not in card
    assert "## Scores" not in card


def test_the_front_matter_is_yaml_and_the_numbers_are_right(tmp_path: Path) -> None:
    for library in ("transformers", None):
        card = card_of(tmp_path, CardFacts(), library)
        _, front, body = card.split("---\n", 2)
        matter = yaml.safe_load(front)
        assert matter.get("library_name") == library
        assert matter["pipeline_tag"] == "text-generation"
        assert "mamba1" in matter["tags"]
        num_parameters = sum(initial_value(name, SECTION, 0).numel() for name in parameter_rows(SECTION))
        assert f"{num_parameters:,} parameters" in body
        assert "13 (padded to 16)" in body
