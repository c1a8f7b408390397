"""A whole training step: ours, the matrix products in it alone, and transformers' Mamba with the mamba.py scan.

    python kernels/step_benchmark.py [--recipe demo] [--repeats 7] [--json FILE]
    python kernels/step_benchmark.py --recipe mamba1-130m --rows 4 --candidates native,products

Same weights' shapes, same tokens, same loss, AdamW in both. Each candidate is a process of its own, as its users run
it, and after a warm-up they take turns, so that what else the machine does hits all of them; medians are compared.
`transformers-kept` is transformers with glibc told to keep freed memory, as mambatrain tells it. Needs
`pip install mambapy` for the baseline.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from benchmark import gemms  # beside this script

from mambatrain.adapters.trained import whole_model
from mambatrain.devices import keep_freed_memory, resolve_precision
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.training.objective import NextTokenLoss
from mambatrain.training.optimizer import build_optimizers

Step = Callable[[], None]


def our_step(recipe: Recipe, kernels: str, bf16: bool) -> Callable[[torch.Tensor], None]:
    """Forward, backward, clipping and update as the training loop does them, of tokens (rows, length + 1)."""
    model = LanguageModel(recipe.model, choose_backend(kernels, torch.device("cpu")))
    initialise(model, recipe.model, 0)
    objective, (optimizer,) = NextTokenLoss(model), build_optimizers(whole_model(model), recipe.optimizer)

    def step(tokens: torch.Tensor) -> None:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        boundaries = torch.zeros(inputs.shape, dtype=torch.bool)
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


CANDIDATES = ("transformers", "transformers-kept", "torch", "native", "products")
_steps: list[Step] = []  # of this process: the one it was started for


def prepare(candidate: str, recipe: Recipe, bf16: bool, rows: int, length: int) -> None:
    """Builds the step of one candidate in its own process."""
    if candidate != "transformers":
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1), generator=generator)
    if candidate.startswith("transformers"):
        _steps.append(their_step(recipe, bf16, tokens))
    elif candidate == "products":
        _steps.append(products_alone(recipe, bf16, rows * length))
    else:
        _steps.append(partial(our_step(recipe, candidate, bf16), tokens))


def time_one_step() -> float:
    start = time.perf_counter()
    _steps[0]()
    return time.perf_counter() - start


def take_turns(names: list[str], recipe: Recipe, rows: int, length: int, repeats: int) -> dict[str, float]:
    """Median seconds of `CANDIDATE, PRECISION`."""
    precisions = ["fp32"]
    if resolve_precision("auto", torch.device("cpu")) == "bf16":
        precisions.append("bf16")
    with ExitStack() as stack:
        processes: dict[str, ProcessPoolExecutor] = {}
        for name in names:
            for precision in precisions:
                arguments = (name, recipe, precision == "bf16", rows, length)
                pool = ProcessPoolExecutor(1, get_context("spawn"), prepare, arguments)
                processes[f"{name}, {precision}"] = stack.enter_context(pool)
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for repeat in range(repeats + 1):
            for name, process in processes.items():
                taken = process.submit(time_one_step).result()
                if repeat:  # the first round builds and warms up
                    seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rows", type=int, help="rows of a step; default: the recipe's")
    parser.add_argument("--row-tokens", type=int, help="default: the recipe's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    rows, length = arguments.rows or recipe.rows_per_step, arguments.row_tokens or recipe.data.row_tokens
    medians = take_turns(arguments.candidates.split(","), recipe, rows, length, arguments.repeats)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; {arguments.recipe}, {rows} rows of {length} tokens")
    print(f"{'':<26}{'ms a step':>12}{'tokens/s':>12}{'over its products':>20}{'transformers over it':>22}")
    for name, seconds in medians.items():
        products = medians.get(f"products, {name.rpartition(', ')[2]}")
        baseline = medians.get("transformers, fp32")
        ratios = (seconds / products if products else None, baseline / seconds if baseline else None)
        columns = "".join(f"{'' if ratio is None else f'{ratio:.2f}':>{21}}" for ratio in ratios)
        print(f"{name:<26}{seconds * 1e3:>12.0f}{rows * length / seconds:>12,.0f}{columns}")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
