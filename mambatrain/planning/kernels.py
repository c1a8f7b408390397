"""Which operators would run on each device, why, whether they are right, and how fast each backend is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from mambatrain.devices import keep_freed_memory
from mambatrain.errors import UserError
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import Backend, choose_backend
from mambatrain.ops.self_check import check_backend
from mambatrain.planning.findings import Finding, note, ok, problem
from mambatrain.recipe import ModelSection

BACKENDS = {"native": 3, "torch": 3, "reference": 1}
"""Name -> timed runs, of which the fastest counts; the reference takes a second."""
Block = Literal["mamba1", "mamba2"]
BLOCKS: tuple[Block, ...] = ("mamba1", "mamba2")
ROWS, ROW_TOKENS = 2, 256
SECTIONS = {block: ModelSection(block=block, d_model=128, num_layers=1, vocab_size=512) for block in BLOCKS}
BUILD = "apt-get install g++ && pip install --no-deps --force-reinstall -e .  # in the clone of mambatrain"


def look_at_kernels() -> Iterable[Finding]:
    """For each device: what `--kernels auto` takes and why; for each backend: its check and its speed."""
    for device in devices_here():
        chosen = choose_backend("auto", device)
        subject = f"kernels {device.type}"
        if chosen.name == "native":
            yield ok(subject, f"auto takes {chosen.name}: {chosen.reason}")
        else:  # nothing to build for a device that has no native kernels in this version
            mend = BUILD if device.type == "cpu" else None
            yield note(subject, f"auto takes {chosen.name}: {chosen.reason}", mend)
        yield from _speeds(device)


def devices_here() -> list[torch.device]:
    """The CPU, and CUDA where there is a device."""
    found = [torch.device("cpu")]
    return [*found, torch.device("cuda")] if torch.cuda.is_available() else found


def _speeds(device: torch.device) -> Iterator[Finding]:
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    for name, repeats in BACKENDS.items():
        subject = f"{name} {device.type}"
        try:
            backend = choose_backend(name, device)
        except UserError:
            continue  # the choice above has said why
        try:
            for block in BLOCKS:
                check_backend(backend, block, device)
            speeds = [f"{block} {tokens_per_second(backend, block, device, repeats):,.0f}" for block in BLOCKS]
        except UserError as error:
            yield problem(subject, error.message, "mambatrain pretrain RECIPE --kernels reference")
        else:
            yield ok(subject, f"right; tokens/s in training, one layer of 128: {', '.join(speeds)}")


def tokens_per_second(backend: Backend, block: Block, device: torch.device, repeats: int) -> float:
    """Forward and backward of a model of one small layer, the fastest of some runs: for comparing, no benchmark."""
    section = SECTIONS[block]
    with torch.device("meta"):
        model = LanguageModel(section, backend)
    model = model.to_empty(device=device)
    initialise(model, section, seed=0)
    tokens = torch.arange(ROWS * ROW_TOKENS, device=device).view(ROWS, ROW_TOKENS) % section.vocab_size
    boundaries = tokens % 100 == 0
    fastest = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        loss = model.summed_loss(tokens, boundaries, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        model.embedding.weight.grad.sum().item()  # type: ignore[union-attr]  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return ROWS * ROW_TOKENS / fastest
