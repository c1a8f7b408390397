"""One model seen by us and by lm-eval: what the tests of this folder compare. Without lm-eval they are skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.weights import Weights, build_model

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from mambatrain.evaluation.harness_model import HarnessModel

VOCABULARY = 300  # the embedding is padded to 304 rows
END = "<|endoftext|>"
MAX_LENGTH = 40  # short, so that requests exceed it
SENTENCES = [
    "The cat sat on the mat, and the dog lay by the door.",
    "Question: what is the colour of the sky? Answer: it is blue.",
    "Once upon a time there was a naïve café owner in 日本.",
    "It rained for days; nobody went out, and nothing was said.",
]


@pytest.fixture(scope="module", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """What the tokenizer was trained on."""
    return SENTENCES


def train_tokenizer(file: Path, opens_texts: bool) -> Path:
    """A byte-level BPE; one that `opens_texts` puts the end-of-document token in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    if opens_texts:
        end = tokenizer.token_to_id(END)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module", params=["mamba1", "mamba2", "mamba1 with opened texts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, HFLM]:
    """One random model, ours in process and theirs from the exported folder."""
    from lm_eval.models.huggingface import HFLM

    from mambatrain.evaluation.harness_model import HarnessModel

    block, _, opened = request.param.partition(" ")
    tokenizer_file = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", bool(opened))
    widths: dict[str, Any] = {"head_dim": 16, "d_state": 16} if block == "mamba2" else {}
    section = ModelSection(block=block, d_model=32, num_layers=2, vocab_size=VOCABULARY, tie_embeddings=False, **widths)
    backend = choose_backend("torch", torch.device("cpu"))
    random = LanguageModel(section, backend)
    initialise(random, section, seed=1)
    tensors = {name: parameter.detach().clone() for name, parameter in random.named_parameters()}
    # Likelihoods that differ, and padding rows that have a part of them but are never the likeliest.
    tensors["embedding.weight"].normal_(generator=torch.Generator().manual_seed(2))
    tensors["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(3))
    tensors["lm_head.weight"][VOCABULARY:] = 0.9 * tensors["lm_head.weight"][: -VOCABULARY % 8]
    for name, tensor in tensors.items():
        if name.endswith("out_proj.weight"):
            tensor.mul_(10)  # what was read before the last token counts
    weights = Weights(section, tensors, tokenizer_file, "a test", "0" * 64)
    folder = tmp_path_factory.mktemp("export") / "folder"
    export_weights(weights, folder, TRANSFORMERS)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True  # as the trainer's tokenizer is set
    end = tokenizer.token_to_id(END)
    ours = HarnessModel(
        build_model(weights, backend, "cpu"), tokenizer, end, VOCABULARY, max_length=MAX_LENGTH, batch_rows=4
    )
    logging.disable(logging.WARNING)  # remarks of lm-eval and transformers
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=3)
    logging.disable(logging.NOTSET)
    return ours, theirs
