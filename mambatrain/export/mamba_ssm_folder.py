"""A folder for mamba-ssm's `MambaLMHeadModel.from_pretrained`: config.json and pytorch_model.bin.

mamba-ssm runs on CUDA only, so the folder is read back by our own reader of that format, and the report says so; the
tests hold that reader to an independent reading of mamba-ssm's mathematics and names.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mambatrain.export.comparison import fixed_tokens
from mambatrain.export.exporting import Target
from mambatrain.export.tokenizer_files import ExportTokenizer
from mambatrain.files import write_json_whole
from mambatrain.ops.backends import choose_backend
from mambatrain.runs.formats import mamba_ssm as format_tables
from mambatrain.runs.weights import Weights, load_model

HOW_TO_LOAD = """\
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("{name}", device="cuda", dtype=torch.float32)"""


def write_folder(folder: Path, weights: Weights, tokenizer: ExportTokenizer | None) -> None:
    """config.json and pytorch_model.bin.

    mamba-ssm loads strictly: a tied head is in the file under its own name as well, as the same storage, held once.

    Raises:
        UserError: mamba-ssm has no setting for the model.
    """
    write_json_whole(folder / "config.json", format_tables.config_from_section(weights.section))
    tensors = {format_tables.NAMES.theirs(name): tensor for name, tensor in weights.tensors.items()}
    if weights.section.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")


@torch.inference_mode()
def read_logits(folder: Path, weights: Weights, tokenizer: ExportTokenizer | None) -> tuple[str, Tensor]:
    """Opens the folder with our own reader."""
    cpu = torch.device("cpu")
    model, _ = load_model(str(folder), choose_backend("torch", cpu), cpu)
    logits: Tensor = model(fixed_tokens(weights.section.vocab_size))[0]
    return "mambatrain's reader of mamba-ssm folders (mamba-ssm itself needs CUDA)", logits


MAMBA_SSM = Target("mamba-ssm", None, HOW_TO_LOAD, write_folder, read_logits)
