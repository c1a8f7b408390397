"""Costs against other countings: built models, transformers' models, and torch's own counter of matrix products."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mambatrain.models.flops import count_parameters, forward_flops_per_token, training_flops_per_token
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.formats.transformers import config_from_section

BACKEND = choose_backend("torch", torch.device("cpu"))


def paper_section(block: str, d_model: int, num_layers: int) -> ModelSection:
    multiple = 8 if block == "mamba1" else 16
    return ModelSection(
        block=block, d_model=d_model, num_layers=num_layers, vocab_size=50277, pad_vocab_multiple=multiple
    )


PAPER_SIZES = [(768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64)]
# Of the public weights state-spaces/mamba-130m and mamba-2.8b.
KNOWN = {("mamba1", 768): 129_135_360, ("mamba1", 2560): 2_768_345_600}


@pytest.mark.parametrize(("d_model", "num_layers"), PAPER_SIZES)
@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_parameters_are_those_of_the_built_model_and_of_transformers(block: str, d_model: int, num_layers: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    section = paper_section(block, d_model, num_layers)
    counts = count_parameters(section)
    config = config_from_section(section, "float32", 0)
    with torch.device("meta"):
        ours = LanguageModel(section, BACKEND)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert counts["total"] == sum(parameter.numel() for parameter in ours.parameters())
    assert counts["total"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert counts["total"] == KNOWN.get((block, d_model), counts["total"])
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
    assert counts["embedding"] == ours.embedding.weight.numel()
    assert counts["norms"] == (num_layers + 1) * d_model


def test_an_untied_head_is_counted_and_a_tied_one_is_not() -> None:
    section = paper_section("mamba1", 768, 24)
    untied = section.model_copy(update={"tie_embeddings": False})
    assert count_parameters(section)["head"] == 0
    assert count_parameters(untied)["head"] == count_parameters(section)["embedding"]
    assert training_flops_per_token(untied, 2048) == training_flops_per_token(section, 2048)


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_projections_and_head_are_what_torch_counts(block: str) -> None:
    variant = {"head_dim": 16, "num_groups": 2} if block == "mamba2" else {"dt_rank": 5}
    section = ModelSection.model_validate(
        {"block": block, "d_model": 32, "num_layers": 3, "vocab_size": 77, "expand": 3, "d_state": 8, **variant}
    )
    reference = choose_backend("reference", torch.device("cpu"))  # its scans have no matrix products
    model = LanguageModel(section, reference)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 10, dtype=torch.int64))
    terms = forward_flops_per_token(section, 10)
    assert counter.get_total_flops() == 20 * (terms["projections"] + terms["head"])


def test_the_ssd_scan_is_what_its_einsums_cost() -> None:
    """arXiv 2405.21060, listing 1, on one chunk, its products counted by torch; half of a square is needed."""
    H, P, N, G, Q = 4, 16, 32, 2, 64
    section = ModelSection(block="mamba2", d_model=32, num_layers=1, vocab_size=8, head_dim=P, d_state=N, num_groups=G)
    assert section.num_heads == H
    C, B, M = torch.ones(G, Q, N), torch.ones(G, Q, N), torch.ones(H, Q, Q)
    x, h = torch.ones(H, Q, P), torch.ones(H, N, P)
    with FlopCounterMode(display=False) as square:
        C @ B.mT  # scores
        M @ x  # from within the chunk
    heads_B = B.repeat_interleave(H // G, 0)
    with FlopCounterMode(display=False) as full:
        heads_B.mT @ x  # into the state
        heads_B @ h  # out of the state
    causal_half = square.get_total_flops() * (Q + 1) / (2 * Q)
    elementwise = Q * 3 * H * (Q + 1) / 2 + 2 * H * P * N + Q * 3 * P * H
    expected = (causal_half + full.get_total_flops() + elementwise) / Q
    assert forward_flops_per_token(section, 2048)["scan"] == pytest.approx(expected, abs=1)


def test_a_training_step_is_three_forwards_and_linear_in_length() -> None:
    for block in ("mamba1", "mamba2"):
        section = paper_section(block, 768, 24)
        forward = sum(forward_flops_per_token(section, 2048).values())
        assert training_flops_per_token(section, 2048) == 3 * forward
        assert training_flops_per_token(section, 1_000_000) == 3 * forward
        # Between 6 operations a parameter and a tenth more: the scan is a small part of the whole.
        assert 1 < 3 * forward / (6 * count_parameters(section)["total"]) < 1.1
    short = forward_flops_per_token(paper_section("mamba2", 768, 24), 16)["scan"]
    assert short < forward_flops_per_token(paper_section("mamba2", 768, 24), 2048)["scan"]


def test_the_scan_of_mamba1_counts_states_and_channels() -> None:
    section = ModelSection(block="mamba1", d_model=8, num_layers=2, vocab_size=8, d_state=4)
    E, N = 16, 4
    per_state = ["dt A", "exp", "decay h", "(dt u) B", "add", "C h", "add up"]
    per_channel = ["dt u", "D u", "add", "gate"]
    expected = 2 * (len(per_state) * E * N + len(per_channel) * E)
    assert forward_flops_per_token(section, 99)["scan"] == expected
    assert math.isclose(forward_flops_per_token(section, 99)["convolution"], 2 * 2 * 4 * E)
