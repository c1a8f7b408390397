"""A whole training step: ours, the matrix products in it alone, and transformers' Mamba with the mamba.py scan.

    python kernels/step_benchmark.py [--recipe demo] [--repeats 7] [--json FILE]
    python kernels/step_benchmark.py --recipe mamba1-130m --rows 4 --without-transformers

Same weights' shapes, same tokens, same loss, AdamW in both, both after a warm-up; the candidates take turns, so that
what else the machine does hits all of them, and medians are compared. Needs `pip install mambapy` for the baseline.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark import gemms, medians_of  # beside this script

from mambatrain.devices import keep_freed_memory, resolve_precision
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


def products_alone(recipe: Recipe, bf16: bool, tokens: int) -> Step:
    """Every matrix product of a step, head included, forward and both of backward: what no kernel can save."""
    shape = recipe.model
    with torch.device("meta"):
        model = LanguageModel(shape, choose_backend("reference", torch.device("cpu")))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    if shape.tie_embeddings:
        shapes.append((shape.padded_vocab_size, shape.d_model))
    return gemms(tokens, shapes, torch.bfloat16 if bf16 else torch.float32)


def candidates(recipe: Recipe, tokens: torch.Tensor, with_transformers: bool) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    precisions = {"fp32": False}
    if resolve_precision("auto", torch.device("cpu")) == "bf16":
        precisions["bf16"] = True
    if with_transformers:
        for name, bf16 in precisions.items():
            steps[f"transformers + mamba.py, {name}"] = their_step(recipe, bf16, tokens)
    for kernels in ("native", "torch"):
        try:
            for name, bf16 in precisions.items():
                steps[f"mambatrain {kernels}, {name}"] = our_step(recipe, kernels, bf16, tokens)
        except UserError as error:
            print(f"left out: {error.message}")
    for name, bf16 in precisions.items():
        steps[f"its matrix products alone, {name}"] = products_alone(recipe, bf16, tokens[:, 1:].numel())
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rows", type=int, help="rows of a step; default: the recipe's")
    parser.add_argument("--row-tokens", type=int, help="default: the recipe's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()  # as training does
    recipe = read_recipe(arguments.recipe)
    rows, length = arguments.rows or recipe.rows_per_step, arguments.row_tokens or recipe.data.row_tokens
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    medians = medians_of(candidates(recipe, tokens, not arguments.without_transformers), arguments.repeats)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {arguments.recipe}, {rows} rows of {length} tokens")
    print(f"{'':<34}{'ms a step':>12}{'tokens/s':>12}{'over its products':>20}")
    for name, seconds in medians.items():
        ratio = seconds / medians[f"its matrix products alone, {name.rpartition(', ')[2]}"]
        print(f"{name:<34}{seconds * 1e3:>12.0f}{rows * length / seconds:>12,.0f}{ratio:>20.2f}")
    for name, seconds in medians.items():
        if name.startswith("mambatrain") and not arguments.without_transformers:
            print(f"{name}: {medians['transformers + mamba.py, fp32'] / seconds:.1f} times transformers in fp32")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
