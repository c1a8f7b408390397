"""README.md of exported weights: what they are, what they were made from, how good they are, how to open them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mambatrain import __version__
from mambatrain.models.flops import count_parameters
from mambatrain.recipe import ModelSection, read_recipe
from mambatrain.runs.checkpoint import PROGRESS_FILE, read_progress
from mambatrain.runs.folder import RunFolder, read_log
from mambatrain.runs.weights import Weights

TEMPLATE = """\
---
{%- if library %}
library_name: {{ library }}
{%- endif %}
pipeline_tag: text-generation
tags:
- {{ section.block }}
- state-space-model
- mambatrain
---

# {{ title }}

A {{ kind }} language model of {{ "{:,}".format(parameters.total) }} parameters, trained with mambatrain {{ version }}.

## How to load it

```python
{{ how_to_load }}
```
{% if end_of_document %}
Every text begins and ends with `{{ end_of_document }}`: put it before a prompt.
{% endif %}
{%- if talks %}
It was trained on conversations; `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` makes a prompt of
messages.
{% endif %}
## What it is

| | |
|---|---|
| block | {{ kind }} |
| d_model, layers | {{ section.d_model }}, {{ section.num_layers }} |
| state per channel | {{ section.state_size }} |
| vocabulary | {{ "{:,}".format(section.vocab_size) }} (padded to {{ "{:,}".format(section.padded_vocab_size) }}) |
| parameters | {% for part, count in parameters.items() if count -%}
{{ part }} {{ "{:,}".format(count) }}{{ ", " if not loop.last }}
{%- endfor %} |
| stored as | {{ dtype }} |
{%- for name, value in facts.training.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{% if facts.data %}
## Data
{% for name, value in facts.data.items() %}
- {{ name }}: {{ value }}
{%- endfor %}
{% endif %}
{%- if facts.scores %}
## Scores

| | |
|---|---|
{%- for name, value in facts.scores.items() %}
| {{ name }} | {{ "%.4f" % value }} |
{%- endfor %}
{% endif %}
{%- if facts.recipe %}
## Recipe

```yaml
{{ facts.recipe }}
```
{% endif %}"""

_KINDS = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}


@dataclass(frozen=True)
class CardFacts:
    """What the weights alone do not tell."""

    training: Mapping[str, str] = field(default_factory=dict)
    """Lines of the table: tokens seen, steps, where the weights came from."""
    data: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    recipe: str | None = None
    """As YAML."""


def read_card_facts(weights: Weights) -> CardFacts:
    """What the run tells that the weights came from; of other weights, their origin."""
    checkpoint = Path(weights.origin)
    run = RunFolder(checkpoint.parent.parent)
    if not (run.exists() and (checkpoint / PROGRESS_FILE).is_file()):
        return CardFacts(training={"made from": f"weights with SHA-256 {weights.digest}"})
    progress = read_progress(checkpoint)
    recipe = read_recipe(str(run.recipe_file))
    facts = json.loads(run.facts_file.read_text(encoding="utf-8")) if run.facts_file.is_file() else {}
    training = {"tokens seen": f"{progress.tokens_seen:,}", "steps": f"{progress.step:,} of {recipe.total_steps:,}"}
    if started := facts.get("started_from"):
        training["started from"] = str(started["origin"])
    chats = recipe.data.chats
    origin = ", ".join(recipe.data.all_shards if chats is None else chats.files)
    data = {"conversations" if chats else "token shards": origin, "tokens per row": f"{recipe.data.row_tokens:,}"}
    if "data_digest" in facts:
        data["SHA-256 of the training tokens"] = str(facts["data_digest"])
    lines = [line for line in read_log(run.log_file) if line.get("event") == "held_out"]
    measured = [line for line in lines if line["step"] <= progress.step]
    scores: dict[str, float] = {}
    if measured:
        each = "token" if recipe.preferences is None else "preference pair"
        named = {
            "held-out bits per byte": measured[-1]["held_out_bits_per_byte"],
            f"held-out loss, nats per {each}": measured[-1]["held_out_loss"],
            "held-out reward margin": measured[-1].get("held_out_reward_margin"),
            "held-out share of pairs with a margin above 0": measured[-1].get("held_out_reward_accuracy"),
        }
        scores = {name: score for name, score in named.items() if score is not None}
    return CardFacts(training, data, scores, run.recipe_file.read_text(encoding="utf-8").rstrip())


def write_model_card(
    file: Path,
    name: str,
    section: ModelSection,
    facts: CardFacts,
    *,
    library: str | None,
    how_to_load: str,
    dtype: str,
    end_of_document: str | None,
    talks: bool = False,
) -> None:
    """Writes a model card with front matter as model hubs read it; `how_to_load` has {name} where the name goes.

    `talks`: a chat template lies beside it.
    """
    import jinja2

    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE)
    text = template.render(
        title=name,
        section=section,
        kind=_KINDS[section.block],
        parameters=count_parameters(section),
        version=__version__,
        facts=facts,
        library=library,
        how_to_load=how_to_load.format(name=name),
        dtype=dtype,
        end_of_document=end_of_document,
        talks=talks,
    )
    file.write_text(text.rstrip() + "\n", encoding="utf-8")
