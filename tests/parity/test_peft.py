"""Adapters in PEFT: it opens what it can of a folder and computes the same logits; what it cannot, it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapted, base_model, section_of, some_rows
from torch import Tensor

from mambatrain.adapters.adapter_folder import Base, write_adapter_folder
from mambatrain.adapters.attach import merge_adapter
from mambatrain.adapters.open_weights import open_weights
from mambatrain.export.transformers_folder import write_folder
from mambatrain.recipe import AdapterSection, ModelSection
from mambatrain.runs.weights import Weights, build_model, read_weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Of the base and of the adapter."""
    return tmp_path / "base", tmp_path / "adapter"


def write_both(folders: tuple[Path, Path], section: ModelSection, adapter: AdapterSection) -> Tensor:
    """Writes base and adapter; gives our logits of the two together."""
    base, folder = folders
    model = base_model(section)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    base.mkdir()
    write_folder(base, Weights(section, tensors, None, "here", "0"), None)
    trained, _ = adapted(model, adapter)
    values = {name: parameter.detach() for name, parameter in trained.parameters.items()}
    write_adapter_folder(folder, adapter, section, Base(str(base), read_weights(str(base)).digest), values)
    merged = merge_adapter(tensors, adapter, section, values)
    opened = open_weights(str(folder))
    for name, tensor in merged.items():
        assert torch.equal(opened.tensors[name], tensor), name
    with torch.no_grad():
        logits: Tensor = model(some_rows()[0])[0]
    return logits


def read_in_peft(folders: tuple[Path, Path]) -> Tensor:
    from transformers import AutoModelForCausalLM

    base, folder = folders
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    opened: Any = peft.PeftModel.from_pretrained(theirs, folder)
    with torch.no_grad():
        logits: Tensor = opened(some_rows()[0]).logits
    return logits


@pytest.mark.parametrize(
    ("block", "tied", "settings"),
    [
        ("mamba1", True, {"targets": ["in_proj", "x_proj", "embedding"]}),
        ("mamba1", True, {"targets": ["in_proj", "x_proj"], "kind": "dora"}),
        ("mamba1", False, {"targets": ["in_proj", "embedding", "lm_head"], "kind": "dora"}),
        ("mamba1", False, {"targets": ["x_proj", "embedding"], "rank_stabilised": True}),
        ("mamba2", True, {"targets": ["in_proj", "embedding"]}),
        ("mamba2", False, {"targets": ["in_proj", "lm_head"], "rank_stabilised": True, "kind": "dora"}),
    ],
)
def test_peft_computes_the_same(folders: tuple[Path, Path], block: str, tied: bool, settings: dict[str, Any]) -> None:
    section = section_of(block, tie_embeddings=tied)
    adapter = AdapterSection.model_validate({"rank": 3, "alpha": 7.0, **settings})
    ours, theirs = write_both(folders, section, adapter), read_in_peft(folders)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    with torch.no_grad():
        plain = build_model(read_weights(str(folders[0])), base_model(section).backend, "cpu")(some_rows()[0])[0]
    assert (plain - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_what_peft_has_not_is_its_own_to_refuse(folders: tuple[Path, Path]) -> None:
    """out_proj it refuses; the second file it does not know. Both are what `export --merge` is for."""
    write_both(folders, section_of("mamba1"), AdapterSection(targets=["out_proj"], tune=["D"]))
    assert (folders[1] / "tuned_tensors.safetensors").is_file()
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        read_in_peft(folders)


def test_the_configuration_is_peft_s_own(folders: tuple[Path, Path]) -> None:
    write_both(folders, section_of("mamba1"), AdapterSection(kind="dora", rank_stabilised=True, rank=5))
    known = peft.LoraConfig().to_dict()
    written = json.loads((folders[1] / "adapter_config.json").read_text())
    assert written.keys() <= known.keys()
    assert (written["r"], written["use_dora"], written["use_rslora"]) == (5, True, True)
