"""Foreign configurations: what is read, and what is refused by name and value."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mambatrain.errors import UserError
from mambatrain.recipe import ModelSection
from mambatrain.runs.formats import mamba_ssm, transformers

THEIRS: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100},
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "num_heads": 2,
        "n_groups": 1,
    },
}
SSM: dict[str, Any] = {"d_model": 64, "n_layer": 2, "vocab_size": 101}
SECTIONS = [
    ModelSection(d_model=64, num_layers=2, vocab_size=101, dt_rank=3, d_state=7, expand=3, d_conv=2),
    ModelSection(d_model=64, num_layers=2, vocab_size=101, tie_embeddings=False, proj_bias=True, conv_bias=False),
    ModelSection(
        block="mamba2", d_model=64, num_layers=3, vocab_size=96, head_dim=16, num_groups=4, pad_vocab_multiple=32
    ),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_comes_back_from_transformers_with_its_padding_in_the_vocabulary(section: ModelSection) -> None:
    config = json.loads(json.dumps(transformers.config_from_section(section, "float32", 3)))
    back = transformers.section_from_config(config, "config.json")
    assert back.vocab_size == back.padded_vocab_size == section.padded_vocab_size
    resolved = {"d_state": section.state_size, "vocab_size": back.vocab_size, "pad_vocab_multiple": 1}
    resolved |= {"dt_rank": section.dt_rank_size} if section.block == "mamba1" else {}
    assert back == section.model_copy(update=resolved)
    assert config["eos_token_id"] == config["bos_token_id"] == config["pad_token_id"] == 3


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_comes_back_from_mamba_ssm(section: ModelSection) -> None:
    config = json.loads(json.dumps(mamba_ssm.config_from_section(section)))
    resolved = {"d_state": section.state_size}
    resolved |= {"dt_rank": section.dt_rank_size} if section.block == "mamba1" else {}
    assert mamba_ssm.section_from_config(config, "config.json") == section.model_copy(update=resolved)


@pytest.mark.parametrize("section", SECTIONS)
def test_transformers_builds_the_model_that_we_describe(section: ModelSection) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**transformers.config_from_section(section, "float32", 3))
    for key, value in transformers.config_from_section(section, "float32", 3).items():
        assert str(getattr(config, key)).removeprefix("torch.") == str(value), key


def test_infinity_is_read_as_each_version_writes_it() -> None:
    for limit in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}]):
        section = transformers.section_from_config({**THEIRS["mamba2"], "time_step_limit": limit}, "config.json")
        assert section.num_heads == 2


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("mamba", "hidden_act", "gelu"),
        ("mamba", "conv_kernel", 8),
        ("mamba", "expand", 1.5),
        ("mamba", "num_hidden_layers", 0),
        ("mamba", "time_step_rank", -1),
        ("mamba", "quantization_config", {"bits": 4}),
        ("mamba2", "time_step_limit", [0.0, 0.1]),
        ("mamba2", "time_step_limit", [0.001, math.inf]),
        ("mamba2", "num_heads", 3),
    ],
)
def test_transformers_settings_that_we_do_not_have_are_refused(kind: str, key: str, value: Any) -> None:
    with pytest.raises(UserError) as refusal:
        transformers.section_from_config({**THEIRS[kind], key: value}, "config.json")
    assert refusal.value.message.startswith(f"config.json has {key} = {value!r}")


def test_transformers_settings_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="not a multiple of head_dim"):
        transformers.section_from_config({**THEIRS["mamba2"], "head_dim": 48}, "config.json")


def test_settings_that_change_nothing_are_read() -> None:
    plain = transformers.section_from_config(THEIRS["mamba"], "config.json")
    harmless = {"use_mambapy": True, "residual_in_fp32": False, "initializer_range": 0.5, "norm_before_gate": True}
    assert transformers.section_from_config({**THEIRS["mamba"], **harmless}, "config.json") == plain
    assert transformers.section_from_config({**THEIRS["mamba"], "expand": 2.0}, "config.json") == plain
    harmless = {"residual_in_fp32": False, "fused_add_norm": False, "ssm_cfg": {"use_fast_path": False}}
    ssm = mamba_ssm.section_from_config(SSM, "config.json")
    assert mamba_ssm.section_from_config({**SSM, **harmless}, "config.json") == ssm
    assert ssm.padded_vocab_size == 104


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm", False),
        ("d_intermediate", 128),
        ("attn_layer_idx", [1]),
        ("ssm_cfg.layer", "Mamba3"),
        ("ssm_cfg.D_has_hdim", True),
        ("ssm_cfg.rmsnorm", False),
        ("ssm_cfg.norm_before_gate", True),
        ("ssm_cfg.d_ssm", 64),
        ("ssm_cfg.dt_limit", [0.0, 0.1]),
        ("ssm_cfg.d_conv", 5),
        ("ssm_cfg.headdims", 4),
        ("rms_norms", True),
    ],
)
def test_mamba_ssm_settings_that_we_do_not_have_are_refused(key: str, value: Any) -> None:
    config = {**SSM, "ssm_cfg": {"layer": "Mamba2"}}
    if key.startswith("ssm_cfg."):
        config["ssm_cfg"] = {**config["ssm_cfg"], key.removeprefix("ssm_cfg."): value}
    else:
        config[key] = value
    with pytest.raises(UserError) as refusal:
        mamba_ssm.section_from_config(config, "config.json")
    assert f"{key.removeprefix('ssm_cfg.')} = {value!r}" in refusal.value.message
    assert "config.json" in refusal.value.message


def test_a_misspelled_setting_gets_the_nearest_name() -> None:
    with pytest.raises(UserError) as refusal:
        mamba_ssm.section_from_config({**SSM, "ssm_cfg": {"layer": "Mamba2", "headdims": 4}}, "config.json")
    assert refusal.value.hint == "did it mean headdim?"


def test_the_whole_width_may_be_spelled_out() -> None:
    config = {**SSM, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 128, "dt_limit": [0.0, math.inf]}}
    assert mamba_ssm.section_from_config(config, "config.json").num_heads == 2


def test_mamba_ssm_has_no_setting_for_another_epsilon() -> None:
    with pytest.raises(UserError, match=r"norm_eps = 0\.001"):
        mamba_ssm.config_from_section(SECTIONS[0].model_copy(update={"norm_eps": 1e-3}))


def test_each_config_has_one_reader() -> None:
    assert transformers.recognises(THEIRS["mamba"])
    assert not mamba_ssm.recognises({**THEIRS["mamba"], **SSM})  # conversions of mamba-ssm's keep its keys
    assert mamba_ssm.recognises(SSM)
    assert not transformers.recognises(SSM)
