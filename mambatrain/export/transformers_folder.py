"""A folder that transformers opens with `AutoModelForCausalLM` and `AutoTokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mambatrain.errors import UserError
from mambatrain.export.comparison import REPORT, fixed_tokens
from mambatrain.export.exporting import Target
from mambatrain.export.tokenizer_files import PROBE_TEXT, ExportTokenizer
from mambatrain.files import write_json_whole
from mambatrain.runs.formats import transformers as format_tables
from mambatrain.runs.weights import Weights

MAX_SHARD_SIZE = "5GB"
"""Larger models are written in several files with an index: what hubs and loaders are used to."""

# transformers reads all parameters in one dtype: float32 keeps those that must be.
HOW_TO_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""


def write_folder(folder: Path, weights: Weights, tokenizer: ExportTokenizer | None) -> None:
    """config.json, generation_config.json and safetensors; a tied head is not stored again."""
    from huggingface_hub import save_torch_state_dict

    tensors = {format_tables.NAMES.theirs(name): tensor for name, tensor in weights.tensors.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE)
    dtype = str(weights.tensors["embedding.weight"].dtype).removeprefix("torch.")
    end_id = tokenizer.end_of_document_id if tokenizer else None
    write_json_whole(folder / "config.json", format_tables.config_from_section(weights.section, dtype, end_id))
    special: dict[str, int | list[int] | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_id)
    if tokenizer and len(tokenizer.stop_ids) > 1:
        special["eos_token_id"] = tokenizer.stop_ids
    write_json_whole(folder / "generation_config.json", special if tokenizer else {})
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody but the owner read


def read_logits(folder: Path, weights: Weights, tokenizer: ExportTokenizer | None) -> tuple[str, Tensor]:
    """Opens model and tokenizer; returns the version of transformers and its logits.

    Raises:
        UserError: the tokenizer encodes text otherwise than the file it was made from.
    """
    import transformers

    reader = f"transformers {transformers.__version__}"
    with _quiet_transformers(), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        logits: Tensor = model.eval()(fixed_tokens(weights.section.vocab_size), use_cache=False).logits
        if tokenizer:
            reread = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if reread(PROBE_TEXT, add_special_tokens=False)["input_ids"] != tokenizer.probe_ids:
                raise UserError(
                    f"the export was not kept: {reader} reads {tokenizer.file}, but encodes text otherwise", REPORT
                )
            if reread.eos_token_id != tokenizer.end_of_document_id:
                raise UserError(
                    f"the export was not kept: {reader} ends texts with token {reread.eos_token_id}", REPORT
                )
    return reader, logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its progress bars and its remarks on kernels that are missing say nothing about the export."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


TRANSFORMERS = Target("transformers", "transformers", HOW_TO_LOAD, write_folder, read_logits)
