"""mamba-ssm's folders (version 2.2): names and configuration, both ways.

mamba-ssm hands every key of `ssm_cfg` to the block's constructor and fails at one that it does not know; so do we, by
name. `fused_add_norm`, `chunk_size` and the like choose kernels, `A_init_range` and the like a first initialisation:
they make no difference to weights that are already there. `residual_in_fp32: false` is read: our residual is fp32 in
any case, and with fp32 weights so is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mambatrain.errors import UserError, nearest
from mambatrain.recipe import ModelSection
from mambatrain.runs.formats.tables import (
    NameTable,
    refuse_other_values,
    section_from_settings,
    settings_from_section,
)

NAMES = NameTable(
    (
        ("backbone.embedding.", "embedding."),
        ("backbone.layers.", "layers."),
        ("backbone.norm_f.", "norm_f."),
        ("lm_head.", "lm_head."),
    )
)

BLOCKS = {"Mamba1": "mamba1", "Mamba2": "mamba2"}

_FIELDS = {
    "d_model": "d_model",
    "n_layer": "num_layers",
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_multiple",
    "tie_embeddings": "tie_embeddings",
}
_BLOCK_FIELDS = {
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "conv_bias": "conv_bias",
    "bias": "proj_bias",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
}
BLOCK_FIELDS = {
    "Mamba1": {**_BLOCK_FIELDS, "dt_rank": "dt_rank"},
    "Mamba2": {**_BLOCK_FIELDS, "headdim": "head_dim", "ngroups": "num_groups"},
}
"""Keys of `ssm_cfg` -> our fields."""

# Where these two are missing, mamba-ssm's defaults are ours: all of them but the vocabulary.
_DEFAULTS: dict[str, Any] = {"vocab_size": 50277, "pad_vocab_size_multiple": 8, "tie_embeddings": True}

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "d_intermediate": (0,),
    "attn_layer_idx": ([], None),
    "rms_norm": (True,),
}
_BLOCK_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "D_has_hdim": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "d_ssm": (None,),
    "dt_limit": ([0.0, math.inf],),
    "process_group": (None,),
}
_IRRELEVANT = {"ssm_cfg", "attn_cfg", "residual_in_fp32", "fused_add_norm"}
_BLOCK_IRRELEVANT = {
    "Mamba1": {"layer", "dt_init", "dt_scale", "use_fast_path"},
    "Mamba2": {"layer", "conv_init", "A_init_range", "chunk_size", "use_mem_eff_path", "sequence_parallel"},
}
NORM_EPS = 1e-5  # mamba-ssm has no setting for it


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of ours to read."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def section_from_config(config: Mapping[str, Any], origin: str) -> ModelSection:
    """The model that a config.json describes.

    Raises:
        UserError: naming the setting and the value that our model cannot represent.
    """
    block_config = dict(config.get("ssm_cfg") or {})
    layer = block_config.get("layer", "Mamba1")
    if layer not in BLOCKS:
        raise UserError(
            f"{origin} has ssm_cfg.layer = {layer!r}, which mambatrain does not have", f"it has {', '.join(BLOCKS)}"
        )
    _refuse_unknown(config, {*_FIELDS, *_ACCEPTED, *_IRRELEVANT}, origin)
    accepted = _BLOCK_ACCEPTED if layer == "Mamba2" else {}
    _refuse_unknown(block_config, {*BLOCK_FIELDS[layer], *accepted, *_BLOCK_IRRELEVANT[layer]}, f"ssm_cfg of {origin}")
    refuse_other_values(config, _ACCEPTED, origin)
    if "dt_limit" in block_config:
        block_config["dt_limit"] = list(block_config["dt_limit"])
    if block_config.get("d_ssm") == block_config.get("expand", 2) * config["d_model"]:
        block_config["d_ssm"] = None  # the whole width, which is what None means
    refuse_other_values(block_config, accepted, f"ssm_cfg of {origin}")
    settings = {**_DEFAULTS, **config, **block_config, "norm_eps": NORM_EPS}
    fields = {**_FIELDS, **BLOCK_FIELDS[layer], "norm_eps": "norm_eps"}
    return section_from_settings(BLOCKS[layer], settings, fields, origin)


def config_from_section(section: ModelSection) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        UserError: mamba-ssm has no setting for what the model has.
    """
    if section.norm_eps != NORM_EPS:
        raise UserError(
            f"mamba-ssm has no setting for model.norm_eps = {section.norm_eps}: it always computes with {NORM_EPS}",
            "export with --format transformers",
        )
    layer = next(layer for layer, block in BLOCKS.items() if block == section.block)
    return {
        **settings_from_section(section, _FIELDS),
        "d_intermediate": 0,
        "ssm_cfg": {"layer": layer, **settings_from_section(section, BLOCK_FIELDS[layer])},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


def _refuse_unknown(config: Mapping[str, Any], known: set[str], origin: str) -> None:
    for key in config:
        if key not in known:
            close = nearest(key, sorted(known))
            raise UserError(
                f"{origin} has a setting that mambatrain does not know: {key} = {config[key]!r}",
                f"did it mean {close}?" if close else None,
            )
