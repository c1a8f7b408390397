"""Our models against transformers' on the same random weights: logits, every gradient, both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.runs.formats import transformers as names
from mambatrain.runs.weights import load_model, read_weights

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 96}
# Each case changes settings that the other leaves alone, so that a setting that is read wrongly shows.
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba1": {"model_type": "mamba"},
    "mamba1-variant": {
        "model_type": "mamba",
        "state_size": 8,
        "conv_kernel": 3,
        "expand": 3,
        "time_step_rank": 5,
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
        "residual_in_fp32": False,
    },
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 4,
        "n_groups": 1,
        "tie_word_embeddings": True,
        "chunk_size": 16,
    },
    "mamba2-variant": {
        "model_type": "mamba2",
        "num_heads": 16,
        "head_dim": 16,
        "n_groups": 4,
        "state_size": 32,
        "use_bias": True,
        "use_conv_bias": False,
        "layer_norm_epsilon": 1e-3,
        "chunk_size": 16,
        "residual_in_fp32": False,
    },
}


def random_transformers_model(case: str) -> torch.nn.Module:
    """Their model with every parameter random: a D or norm left at 1 or a bias left at 0 would hide a mistake."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(CONFIGS[case])
    config = AutoConfig.for_model(settings.pop("model_type"), **COMMON, **settings)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.copy_(1 + 0.3 * noise if name.endswith((".D", "norm.weight", "norm_f.weight")) else 0.1 * noise)
            if name.endswith("A_log"):
                parameter.copy_(noise.abs())
    return model


def tokens_and_targets(vocab_size: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, vocab_size, (2, 41), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: torch.nn.Module, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(ours: LanguageModel, theirs: torch.nn.Module) -> None:
    tokens, targets = tokens_and_targets(COMMON["vocab_size"])
    our_logits, _ = ours(tokens)
    their_logits = theirs(tokens, use_cache=False).logits
    assert (our_logits - their_logits).abs().max() <= 1e-5 * their_logits.abs().max()
    our_gradients = gradients(ours, our_logits, targets)
    their_gradients = gradients(theirs, their_logits, targets)
    assert {names.NAMES.theirs(name) for name in our_gradients} == set(their_gradients)
    for name, gradient in our_gradients.items():
        expected = their_gradients[names.NAMES.theirs(name)]
        assert expected.norm() > 0, name
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CONFIGS)
def test_reading_their_folder_gives_their_logits_and_gradients(case: str, backend: str, tmp_path: Path) -> None:
    theirs = random_transformers_model(case)
    theirs.save_pretrained(tmp_path)
    ours, weights = load_model(str(tmp_path), choose_backend(backend, CPU), CPU)
    assert weights.section.block == case[:6]
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_we_write_gives_them_our_logits_and_gradients(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    random_transformers_model(case).save_pretrained(tmp_path / "theirs")
    ours, weights = load_model(str(tmp_path / "theirs"), choose_backend("torch", CPU), CPU)
    done = export_weights(weights, tmp_path / "ours", TRANSFORMERS)
    assert done.largest_difference <= 1e-5
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32))
    again = read_weights(str(tmp_path / "ours"))
    assert again.section == weights.section
    assert all(torch.equal(again.tensors[name], weights.tensors[name]) for name in weights.tensors)


def test_a_tied_head_is_not_stored_twice(tmp_path: Path) -> None:
    random_transformers_model("mamba1").save_pretrained(tmp_path / "theirs")
    weights = read_weights(str(tmp_path / "theirs"))
    export_weights(weights, tmp_path / "ours", TRANSFORMERS)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (no mapping)


def test_defaults_of_missing_settings_are_theirs() -> None:
    from transformers import AutoConfig

    for kind, defaults in names.DEFAULTS.items():
        config = AutoConfig.for_model(kind)
        for key, value in defaults.items():
            expected = getattr(config, key)
            assert expected == (-(-config.hidden_size // 16) if value == "auto" else value), (kind, key)


def test_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    theirs = random_transformers_model("mamba1")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = read_weights(str(tmp_path / "one")), read_weights(str(tmp_path / "many"))
    assert one.section == many.section
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.tensors[name], many.tensors[name]) for name in one.tensors)
