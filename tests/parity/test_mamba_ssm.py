"""mamba-ssm's format against an independent reading of it.

mamba-ssm needs CUDA, so that its own code cannot run in these tests. What stands in for it is written from the papers
(arXiv 2312.00752 algorithm 2 and figure 3; arXiv 2405.21060 section 7) in numpy, position by position and in fp64, and
knows nothing but the tensors under mamba-ssm's names (`MambaLMHeadModel.state_dict()`, version 2.2) and config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mambatrain.export.exporting import export_weights
from mambatrain.export.mamba_ssm_folder import MAMBA_SSM
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.ops.backends import choose_backend
from mambatrain.runs.weights import load_model, read_weights

Array = NDArray[np.float64]
CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_model": 128, "n_layer": 4, "vocab_size": 90, "ssm_cfg": {}},
    "mamba1-variant": {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 64,
        "ssm_cfg": {"layer": "Mamba1", "d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True},
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "residual_in_fp32": False,
        "fused_add_norm": False,
        "rms_norm": True,
    },
    "mamba2": {
        "d_model": 128,
        "d_intermediate": 0,
        "n_layer": 4,
        "vocab_size": 90,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
    "mamba2-variant": {
        "d_model": 64,
        "n_layer": 2,
        "vocab_size": 64,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": 16,
            "headdim": 16,
            "ngroups": 4,
            "conv_bias": False,
            "chunk_size": 32,
        },
        "tie_embeddings": False,
    },
}


def names_and_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state dict of `MambaLMHeadModel`, written down from its modules; a tied head has its name in it too."""
    ssm = {"d_conv": 4, "expand": 2, "bias": False, "conv_bias": True, "headdim": 64, "ngroups": 1, **config["ssm_cfg"]}
    multiple = config.get("pad_vocab_size_multiple", 8)
    d, V = config["d_model"], -(-config["vocab_size"] // multiple) * multiple
    E, W = ssm["expand"] * d, ssm["d_conv"]
    mixer: dict[str, tuple[int, ...]]
    if ssm.get("layer", "Mamba1") == "Mamba1":
        N, R = ssm.get("d_state", 16), ssm.get("dt_rank", -(-d // 16))
        mixer = {"in_proj.weight": (2 * E, d), "x_proj.weight": (R + 2 * N, E), "dt_proj.weight": (E, R)}
        mixer |= {"dt_proj.bias": (E,), "A_log": (E, N), "D": (E,)}
        channels, inner = E, 2 * E
    else:
        N, G, H = ssm.get("d_state", 128), ssm["ngroups"], E // ssm["headdim"]
        channels, inner = E + 2 * G * N, 2 * E + 2 * G * N + H
        mixer = {"in_proj.weight": (inner, d), "dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (E,)}
    mixer |= {"conv1d.weight": (channels, 1, W), "out_proj.weight": (d, E)}
    mixer |= {"conv1d.bias": (channels,)} if ssm["conv_bias"] else {}
    mixer |= {"in_proj.bias": (inner,), "out_proj.bias": (d,)} if ssm["bias"] else {}
    names: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (V, d)}
    for layer in range(config["n_layer"]):
        names |= {f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
        names[f"backbone.layers.{layer}.norm.weight"] = (d,)
    return {**names, "backbone.norm_f.weight": (d,), "lm_head.weight": (V, d)}


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in names_and_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        one_like = name.endswith((".D", "norm.weight", "norm_f.weight"))
        tensors[name] = noise.abs() if name.endswith("A_log") else 1 + 0.3 * noise if one_like else 0.15 * noise
    if config.get("tie_embeddings", True):
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def convolve(x: Array, weight: Array, bias: Array | float) -> Array:
    """silu(bias + sum over taps), (L, channels) with weight (channels, 1, W)."""
    taps = weight[:, 0]
    padded = np.concatenate([np.zeros((taps.shape[1] - 1, x.shape[1])), x])
    p = np.stack([(padded[t : t + taps.shape[1]] * taps.T).sum(0) + bias for t in range(len(x))])
    return p * sigmoid(p)


def mamba1(p: dict[str, Array], u: Array) -> Array:
    E, N = p["A_log"].shape
    R = p["dt_proj.weight"].shape[1]
    xz = u @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)
    x, z = convolve(xz[:, :E], p["conv1d.weight"], p.get("conv1d.bias", 0.0)), xz[:, E:]
    projected = x @ p["x_proj.weight"].T
    dt = np.logaddexp(0, projected[:, :R] @ p["dt_proj.weight"].T + p["dt_proj.bias"])  # softplus
    B, C = projected[:, R : R + N], projected[:, R + N :]
    h, y = np.zeros((E, N)), np.zeros_like(x)
    for t in range(len(u)):
        h = np.exp(-dt[t][:, None] * np.exp(p["A_log"])) * h + np.outer(dt[t] * x[t], B[t])
        y[t] = h @ C[t] + p["D"] * x[t]
    return (y * z * sigmoid(z)) @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)


def mamba2(p: dict[str, Array], u: Array, groups: int) -> Array:
    E, H = p["norm.weight"].shape[0], p["A_log"].shape[0]
    N = (p["conv1d.weight"].shape[0] - E) // (2 * groups)
    projected = u @ p["in_proj.weight"].T
    z, dt = projected[:, :E], np.logaddexp(0, projected[:, -H:] + p["dt_bias"])
    xBC = convolve(projected[:, E:-H], p["conv1d.weight"], p.get("conv1d.bias", 0.0))
    x, BC = xBC[:, :E].reshape(len(u), H, -1), xBC[:, E:].reshape(len(u), 2, groups, N)
    y = np.zeros_like(x)
    for head in range(H):
        group = head * groups // H
        h = np.zeros((x.shape[2], N))
        for t in range(len(u)):
            decay = np.exp(-dt[t, head] * np.exp(p["A_log"][head]))
            h = decay * h + dt[t, head] * np.outer(x[t, head], BC[t, 0, group])
            y[t, head] = h @ BC[t, 1, group] + p["D"][head] * x[t, head]
    gated = (y.reshape(len(u), E) * z * sigmoid(z)).reshape(len(u), groups, -1)  # the gate before the norm, by group
    normed = rms_norm(gated, p["norm.weight"].reshape(groups, -1)).reshape(len(u), E)
    return normed @ p["out_proj.weight"].T


def expected_logits(config: dict[str, Any], tensors: dict[str, torch.Tensor], tokens: list[int]) -> Array:
    arrays: dict[str, Array] = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    residual = arrays["backbone.embedding.weight"][tokens]
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        p = {name.removeprefix(prefix + "mixer."): a for name, a in arrays.items() if name.startswith(prefix)}
        u = rms_norm(residual, arrays[prefix + "norm.weight"])
        ssm = config["ssm_cfg"]
        is_second = ssm.get("layer") == "Mamba2"
        residual = residual + (mamba2(p, u, ssm.get("ngroups", 1)) if is_second else mamba1(p, u))
    return rms_norm(residual, arrays["backbone.norm_f.weight"]) @ arrays["lm_head.weight"].T


def assert_logits(where: Path, expected: Array, tokens: list[int], dtype: torch.dtype, tolerance: float) -> None:
    model, _ = load_model(str(where), choose_backend("torch", CPU), CPU, dtype)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]))[0][0].double().numpy()
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CONFIGS)
def test_reading_a_mamba_ssm_folder_gives_the_papers_logits(case: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[case], random_tensors(CONFIGS[case])
    tokens = list(range(37, 0, -1))
    expected = expected_logits(config, tensors, tokens)
    folder = write_folder(tmp_path / "theirs", config, tensors)
    assert_logits(folder, expected, tokens, torch.float64, 1e-12)
    assert_logits(folder, expected, tokens, torch.float32, 1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_written_folder_is_one_that_mamba_ssm_loads_strictly(case: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[case], random_tensors(CONFIGS[case])
    weights = read_weights(str(write_folder(tmp_path / "theirs", config, tensors)))
    export_weights(weights, tmp_path / "ours", MAMBA_SSM)
    written = torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True)
    written_config = json.loads((tmp_path / "ours" / "config.json").read_text())
    # A strict load_state_dict wants these names, all of them and no other, in these shapes.
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == names_and_shapes(written_config)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    for key, value in config.items():
        if key == "ssm_cfg":
            assert {**written_config[key], "chunk_size": 32}.items() >= value.items()
        elif key not in {"residual_in_fp32", "fused_add_norm"}:  # how they compute, not what
            assert written_config[key] == value, key


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    config = CONFIGS["mamba1"]
    weights = read_weights(str(write_folder(tmp_path / "theirs", config, random_tensors(config))))
    export_weights(weights, tmp_path / "ours", MAMBA_SSM)
    num_parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    assert (tmp_path / "ours" / "pytorch_model.bin").stat().st_size < 4 * num_parameters + 50_000
    written = torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True)
    assert written["lm_head.weight"].data_ptr() == written["backbone.embedding.weight"].data_ptr()


@pytest.mark.parametrize("case", CONFIGS)
def test_from_mamba_ssm_through_transformers_and_back_nothing_changes(case: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[case], random_tensors(CONFIGS[case])
    first = read_weights(str(write_folder(tmp_path / "theirs", config, tensors)))
    done = export_weights(first, tmp_path / "transformers", TRANSFORMERS)
    assert done.reader.startswith("transformers 5.")
    assert done.largest_difference <= 1e-5
    second = read_weights(str(tmp_path / "transformers"))
    export_weights(second, tmp_path / "back", MAMBA_SSM)
    third = read_weights(str(tmp_path / "back"))
    for weights in (second, third):
        assert weights.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(weights.tensors[name], first.tensors[name]) for name in first.tensors)
    sizes = {"d_model", "num_layers", "padded_vocab_size", "state_size", "d_conv", "expand", "num_groups", "head_dim"}
    sizes |= {"tie_embeddings", "conv_bias", "proj_bias", "norm_eps", "block"}
    for name in sizes:
        assert getattr(third.section, name) == getattr(first.section, name), name
