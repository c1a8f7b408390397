"""A whole training step of the demo's model, ours against transformers' Mamba with the mamba.py scan.

    python kernels/step_benchmark.py [--recipe demo] [--repeats 7] [--json FILE]

Same weights' shapes, same tokens, same loss, AdamW in both, both after a warm-up; the candidates take turns, so that
what else the machine does hits all of them, and medians are compared. Needs `pip install mambapy` for the baseline.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mambatrain.devices import resolve_precision
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.optimizer import build_optimizer

Step = Callable[[], None]


def our_step(recipe: Recipe, kernels: str, bf16: bool, tokens: torch.Tensor) -> Step:
    """Forward, backward, clipping and update as the training loop does them."""
    model = LanguageModel(recipe.model, choose_backend(kernels, torch.device("cpu")))
    initialise(model, recipe.model, 0)
    objective, optimizer = NextTokenLoss(model), build_optimizer(model, recipe.optimizer)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    boundaries = torch.zeros(inputs.shape, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(inputs, boundaries, targets)
        (loss / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def their_step(recipe: Recipe, bf16: bool, tokens: torch.Tensor) -> Step:
    """The same with transformers' MambaForCausalLM and its mamba.py scan."""
    from transformers import MambaConfig, MambaForCausalLM

    shape = recipe.model
    config = MambaConfig(
        vocab_size=shape.padded_vocab_size,
        hidden_size=shape.d_model,
        state_size=shape.state_size,
        num_hidden_layers=shape.num_layers,
        expand=shape.expand,
        use_mambapy=True,
    )
    model = MambaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def candidates(recipe: Recipe, tokens: torch.Tensor) -> dict[str, Step]:
    has_bf16 = resolve_precision("auto", torch.device("cpu")) == "bf16"
    steps = {"transformers + mamba.py, fp32": their_step(recipe, False, tokens)}
    if has_bf16:
        steps["transformers + mamba.py, bf16"] = their_step(recipe, True, tokens)
    for kernels in ("native", "torch"):
        try:
            steps[f"mambatrain {kernels}, fp32"] = our_step(recipe, kernels, False, tokens)
            if has_bf16:
                steps[f"mambatrain {kernels}, bf16"] = our_step(recipe, kernels, True, tokens)
        except UserError as error:
            print(f"left out: {error.message}")
    return steps


def median_seconds(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.rows_per_step, recipe.data.row_tokens + 1)
    tokens = torch.randint(0, recipe.model.vocab_size, shape, generator=generator)
    medians = median_seconds(candidates(recipe, tokens), arguments.repeats)
    baseline = medians["transformers + mamba.py, fp32"]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {recipe.tokens_per_step:,} tokens a step")
    print(f"{'':<32}{'ms a step':>12}{'tokens/s':>12}{'times':>8}")
    for name, seconds in medians.items():
        print(f"{name:<32}{seconds * 1e3:>12.0f}{recipe.tokens_per_step / seconds:>12,.0f}{baseline / seconds:>8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
