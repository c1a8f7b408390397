"""What a run that trained an adapter leaves besides its checkpoints, and the proof that nothing else moved."""

from __future__ import annotations

import torch

from mambatrain.adapters.adapter_folder import Base, write_adapter_folder
from mambatrain.adapters.attach import frozen_digest
from mambatrain.chats.template_files import own_template
from mambatrain.data.tokenizer import end_token_of_folder, load_tokenizer
from mambatrain.files import sha256_of
from mambatrain.models.state import TextState
from mambatrain.runs.state_file import facts_of, write_state_file
from mambatrain.runs.weights import Weights
from mambatrain.training.metrics import print_fact
from mambatrain.training.training_run import TrainingRun


def refuse_moved_base(run: TrainingRun) -> None:
    """
    Raises:
        RuntimeError: a tensor that was to stay as it is did not.
    """
    if run.frozen_sha256 is not None and frozen_digest(run.objective.model) != run.frozen_sha256:
        raise RuntimeError("weights that are no part of the adapter were changed by training: this is a bug")


def write_adapter(run: TrainingRun, weights: Weights) -> None:
    """The adapter as a folder in PEFT's format, or the trained state as a state file, in the run's folder."""
    adapter, folder, start = run.recipe.adapter, run.folder, run.objective.start
    assert adapter is not None
    if start is None:
        trained = {name: parameter.detach() for name, parameter in run.trained.parameters.items()}
        base = Base(weights.origin, weights.digest)
        chat_files = [file for file in folder.chat_files if file.is_file()]
        beside = [folder.tokenizer_file, *chat_files] if chat_files else []
        write_adapter_folder(folder.adapter, adapter, run.recipe.model, base, trained, beside)
        num_bytes = sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors"))
        print_fact("adapter", f"{folder.adapter}, {num_bytes / 1e6:.2f} MB")
        return
    with torch.no_grad():
        state = TextState(start.layers(), None, 0, frozenset())
    own = folder.tokenizer_file if folder.tokenizer_file.is_file() else None
    tokenizer = weights.tokenizer_file or own
    sha256 = "" if tokenizer is None else sha256_of(tokenizer)
    # Conversations are spelled later as they were in training, whatever template lies beside the weights.
    template = None if own is None else own_template(load_tokenizer(own, end_token_of_folder(folder.path)))
    facts = facts_of(weights, sha256, f"trained by {folder.path.name}", state, template=template)
    dtype = torch.bfloat16 if adapter.state_dtype == "bf16" else torch.float32
    write_state_file(folder.tuned_state, state, facts, dtype)
    print_fact("state", f"{folder.tuned_state}, {folder.tuned_state.stat().st_size / 1e6:.2f} MB")
