"""What computing blocks again saves, measured on a process: its largest resident size."""

import json
import subprocess
import sys

import pytest

# Each mode in a fork of its own, which begins with what the imports take; torch's checkpoint imports its compiler when
# it is first used, more than these activations.
SCRIPT = """
import json, os, resource, sys, torch
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

torch.set_num_threads(1)
section = ModelSection(block=sys.argv[1], d_model=128, num_layers=6, vocab_size=256)
model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
initialise(model, section, seed=0)
tokens = torch.arange(2048)[None] % 256
model.recompute_every = 1
model.summed_loss(tokens[:, :8], None, tokens[:, :8]).backward()
for model.recompute_every in (0, 2, 1):
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.summed_loss(tokens, None, tokens).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("block", ["mamba1", "mamba2"])
def test_the_peak_falls_with_every_block_that_is_computed_again(block: str) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT, block]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    none, every_second, every = map(int, done.stdout.split())
    # What is measured varies by some percent from machine to machine: 0.83 and 0.69 here, 0.89 and 0.75 elsewhere.
    assert every_second < 0.95 * none, f"{json.dumps([none, every_second, every])} KiB"
    assert every < 0.85 * every_second, f"{json.dumps([none, every_second, every])} KiB"
