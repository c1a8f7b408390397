"""Time and memory of one generated token, from the tenth to the ten-thousandth: both should be flat.

python kernels/decode_benchmark.py [--recipe demo] [--kernels auto] [--tokens 10000]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from benchmark import resident_megabytes  # beside this script

from mambatrain.devices import keep_freed_memory
from mambatrain.generation.generate import generate
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import read_recipe

AROUND = 100  # tokens in a median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--tokens", type=int, default=10_000)
    options = parser.parse_args()
    keep_freed_memory()
    section = read_recipe(options.recipe).model
    backend = choose_backend(options.kernels, torch.device("cpu"))
    model = LanguageModel(section, backend)
    initialise(model, section, seed=0)
    model.eval()
    tokens = generate(
        model,
        [1, 2, 3],
        end_of_document=section.vocab_size - 1,  # beyond what is drawn: generation does not end
        vocab_size=section.vocab_size - 1,
        max_new_tokens=options.tokens,
        settings=SamplingSettings(),
    )
    seconds, megabytes, start = [], [], time.perf_counter()
    for _ in tokens:
        seconds.append(time.perf_counter() - start)
        megabytes.append(resident_megabytes("VmRSS") if len(seconds) % AROUND == 0 else 0.0)
        start = time.perf_counter()
    print(f"{options.recipe}, {backend.name}, {torch.get_num_threads()} threads")
    print(f"{'token':>8}{'ms':>10}{'MB':>10}")
    for position in sorted({10, *(10**k for k in range(2, 9) if 10**k < options.tokens), options.tokens}):
        around = seconds[max(position - AROUND, 5) : position + AROUND]
        settled = megabytes[max(position - position % AROUND, AROUND) - 1]
        print(f"{position:>8,}{statistics.median(around) * 1e3:>10.2f}{settled:>10.0f}")


if __name__ == "__main__":
    main()
