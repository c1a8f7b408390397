"""The plan's memory against the peak of training itself, on this machine's CPU.

    python tests/long/plan_against_peak.py
    python tests/long/plan_against_peak.py --only mamba2-fp32

Each case trains two steps in a fresh process on tokens of the standard library. Measured is the process's highest
resident size less what was resident after the imports, those included that training makes on its way, and a first step
of a model of some kilobytes. The plan, without its line for the process itself, is right where it lies within 10%.
Cases peak between 1 and 4 GB and take a minute each on two cores. Ends with 1 where a plan is wrong; prints a JSON line
a case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOLERANCE = 0.10
DOCUMENT_CHARACTERS = 600

# Settings over the base; each has another part that dominates.
BASE: dict[str, Any] = {
    "model": {"block": "mamba1", "d_model": 768, "num_layers": 8, "vocab_size": 50277},
    "data": {"row_tokens": 512},
    "training": {"rows_per_step": 4, "total_steps": 2, "precision": "fp32", "micro_batch_rows": 4},
    "optimizer": {"learning_rate": 1e-4},
    "evaluation": {"every_steps": 100, "max_tokens": 2000},
    "checkpoint": {"every_steps": 100},
}
CASES: dict[str, dict[str, Any]] = {
    "mamba1-fp32": {},
    "mamba2-bf16": {"model.block": "mamba2", "training.precision": "bf16"},
    "mamba2-every-block": {
        "model.block": "mamba2",
        "model.d_model": 1024,
        "training.activation_checkpointing": "every_block",
    },
    "mamba1-every-third": {
        "model.num_layers": 6,
        "model.vocab_size": 8192,
        "training.activation_checkpointing": 3,
        "data.row_tokens": 1024,
    },
    "mamba1-accumulated": {
        "model.d_model": 1024,
        "model.tie_embeddings": False,
        "training.micro_batch_rows": 1,
        "training.rows_per_step": 2,
    },
    "mamba2-fp32": {"model.block": "mamba2", "model.vocab_size": 4096, "model.num_layers": 16},
}

MEASURE = """
import json, resource, sys
import accelerate, matplotlib.backends.backend_agg, matplotlib.figure, numpy, psutil, safetensors.torch
import tokenizers, torch, torch._dynamo, torch.fx.experimental.symbolic_shapes, torch.utils.checkpoint
import mambatrain.training.start
from mambatrain.recipe import read_recipe
from mambatrain.training.assemble import Where
from mambatrain.training.stop import StopRequest
from pathlib import Path
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
recipe, run = sys.argv[1:]
# The first products of matrices make the libraries read in code and take buffers: part of the process, as imports are.
for block in ("mamba1", "mamba2"):
    section = ModelSection(block=block, d_model=64, num_layers=1, vocab_size=256)
    model, tokens = LanguageModel(section, choose_backend("auto", torch.device("cpu"))), torch.zeros(1, 64).long()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.summed_loss(tokens, tokens > 0, tokens)
        loss.backward()
del model, loss
after_imports = psutil.Process().memory_info().rss
with StopRequest() as stop:
    mambatrain.training.start.run_training(read_recipe(recipe), Path(run), Where("cpu", quiet=True), "fresh", stop)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, after_imports]))
"""


def recipe_of(case: dict[str, Any], shards: Path) -> dict[str, Any]:
    """The recipe of a case."""
    recipe: dict[str, Any] = json.loads(json.dumps(BASE))
    recipe["data"]["shards"] = str(shards)
    for path, value in case.items():
        section, field = path.split(".")
        recipe[section][field] = value
    return recipe


def write_tokens(folder: Path) -> Path:
    """Short documents; the model's vocabulary is larger than theirs."""
    from mambatrain.data.manifest import TokenizeOptions, TokenizerSettings
    from mambatrain.data.tokenize_corpus import tokenize_corpus
    from mambatrain.data.train_tokenizer import train_tokenizer

    text = "".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    documents = [text[start : start + DOCUMENT_CHARACTERS] for start in range(0, len(text), DOCUMENT_CHARACTERS)]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    train_tokenizer([source], folder / "tokenizer.json", TokenizerSettings(vocab_size=1024, sample_bytes=1_000_000))
    tokenize_corpus([source], folder / "tokenizer.json", folder / "shards", TokenizeOptions(held_out=0.1))
    return folder / "shards"


def measure(recipe: Path, run: Path) -> tuple[int, int]:
    """Bytes of the peak, and after the imports."""
    command = [sys.executable, "-P", "-c", MEASURE, str(recipe), str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, after_imports = json.loads(done.stdout.splitlines()[-1])
    return peak, after_imports


def planned(recipe_file: Path) -> dict[str, int]:
    """The memory that `mambatrain plan` says, by part."""
    command = [Path(sys.executable).with_name("mambatrain"), "plan", recipe_file, "--gpu", "cpu", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    memory: dict[str, int] = json.loads(done.stdout)["memory"]
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="a case; repeatable")
    arguments = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_tokens(Path(scratch))
        for name in arguments.only or CASES:
            recipe = Path(scratch, f"{name}.yaml")
            recipe.write_text(json.dumps(recipe_of(CASES[name], shards)))  # JSON is YAML
            plan = planned(recipe)
            peak, after_imports = measure(recipe, Path(scratch, name))
            ratio = (plan["total"] - plan["process"]) / (peak - after_imports)
            line = {"case": name, "planned_over_measured": round(ratio, 4), "measured": peak - after_imports}
            print(json.dumps(line | {"after_imports": after_imports, "planned": plan}), flush=True)
            if abs(ratio - 1) > TOLERANCE:
                wrong.append(name)
    if wrong:
        sys.exit(f"the plan is more than {TOLERANCE:.0%} off: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
