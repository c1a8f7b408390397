"""transformers' `mamba` and `mamba2` folders (version 5.23): names and configuration, both ways.

We read what transformers computes: a key that its model does not look at (`ssm_cfg`, `norm_before_gate`) is not looked
at here either, and the defaults of missing keys are its own. Keys that matter to a first initialisation alone
(`initializer_range`, `time_step_scale`, `rescale_prenorm_residual`) or to speed alone (`use_mambapy`, `chunk_size`)
make no difference to weights that are already there. `residual_in_fp32: false` is read: our residual is fp32 in any
case, and with fp32 weights so is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mambatrain.errors import UserError
from mambatrain.recipe import ModelSection
from mambatrain.runs.formats.tables import (
    NameTable,
    refuse_other_values,
    section_from_settings,
    settings_from_section,
)

NAMES = NameTable(
    (
        ("backbone.embeddings.", "embedding."),
        ("backbone.embedding.", "embedding."),  # read as transformers itself reads it; never written
        ("backbone.layers.", "layers."),
        ("backbone.norm_f.", "norm_f."),
        ("lm_head.", "lm_head."),
    )
)

BLOCKS = {"mamba": "mamba1", "mamba2": "mamba2"}
ARCHITECTURES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}

_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_conv_bias": "conv_bias",
    "use_bias": "proj_bias",
    "tie_word_embeddings": "tie_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
FIELDS = {
    "mamba": {**_FIELDS, "time_step_rank": "dt_rank"},
    "mamba2": {**_FIELDS, "head_dim": "head_dim", "n_groups": "num_groups"},
}
"""Their key -> our field."""

_DEFAULTS: dict[str, Any] = {
    "conv_kernel": 4,
    "expand": 2,
    "use_conv_bias": True,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "hidden_act": "silu",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {
        **_DEFAULTS,
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "time_step_rank": "auto",
        "tie_word_embeddings": True,
    },
    "mamba2": {
        **_DEFAULTS,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "tie_word_embeddings": False,
    },
}
"""What transformers takes for a key that is not in config.json."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "time_step_limit": ([0.0, math.inf],),
    "quantization_config": (None,),
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of ours to read."""
    return config.get("model_type") in BLOCKS


def section_from_config(config: Mapping[str, Any], origin: str) -> ModelSection:
    """The model that a config.json describes; its vocabulary counts the embedding's rows, padding included.

    Raises:
        UserError: naming the setting and the value that our model cannot represent.
    """
    kind = str(config["model_type"])
    config = {**DEFAULTS[kind], **config}
    if "time_step_limit" in config:
        config["time_step_limit"] = [_as_float(value) for value in config["time_step_limit"]]
    refuse_other_values(config, _ACCEPTED, origin)
    section = section_from_settings(
        BLOCKS[kind], {**config, "pad": 1}, {**FIELDS[kind], "pad": "pad_vocab_multiple"}, origin
    )
    if kind == "mamba2" and section.num_heads != config["num_heads"]:
        raise UserError(
            f"{origin} has num_heads = {config['num_heads']!r}, "
            f"but expand * hidden_size / head_dim is {section.num_heads}",
            "the configuration contradicts itself: fetch or write the folder again",
        )
    return section


def config_from_section(section: ModelSection, dtype: str, end_token: int | None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        section: the model.
        dtype: what the file holds, "float32" or "bfloat16".
        end_token: id of the end-of-document token, which begins, ends and pads; None where it is not known.
    """
    kind = next(kind for kind, block in BLOCKS.items() if block == section.block)
    config = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "dtype": dtype,
        **settings_from_section(section, FIELDS[kind]),
        "vocab_size": section.padded_vocab_size,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        # With true, transformers 5.23 divides the loaded out_proj by sqrt(num_layers) as if it were a first value.
        "rescale_prenorm_residual": False,
        "use_cache": True,
        "bos_token_id": end_token,
        "eos_token_id": end_token,
        "pad_token_id": end_token,
    }
    if kind == "mamba":
        return {**config, "intermediate_size": section.d_inner}
    return {**config, "num_heads": section.num_heads, "chunk_size": 256}


def _as_float(value: Any) -> Any:
    """transformers 5 writes an infinite number as {"__float__": "Infinity"}; older versions as Infinity."""
    return float(value["__float__"]) if isinstance(value, Mapping) and "__float__" in value else value
