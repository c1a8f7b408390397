"""What reaches NVIDIA's driver through `cuda.bindings`: a library in its place says what it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambatrain.ops.native.cuda import launching, programs

STAND_IN = Path(__file__).resolve().parents[3] / "support" / "driver_stand_in.c"
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
# PyTorch's own side of a device, which the CPU build has not
PROGRAM = """
import types, torch
torch.cuda.init = lambda: None
torch.cuda.current_stream = lambda index: types.SimpleNamespace(cuda_stream=0xabc + index)
torch.cuda.get_device_capability = lambda index: (9, 0)
torch.cuda.get_device_name = lambda index: "the GPU"
from mambatrain.errors import UserError
from mambatrain.ops.native.cuda import causal_conv, launching
from mambatrain.ops.native.cuda.programs import cached_path
device = torch.device("cuda:0")
program = causal_conv.make_program("forward", torch.bfloat16, 4, 2)
def launch(entry, num_blocks, device=device):
    try:
        launching.launch(program, entry, num_blocks, causal_conv._Arguments(3, 5, 7), device)
    except UserError as error:
        print(error.message)
"""


def run_with_stand_in(body: str, folder: Path) -> list[str]:
    if COMPILER is None:
        pytest.skip("this machine has no C compiler")
    if (missing := programs.why_unavailable()) is not None:
        pytest.skip(missing)
    command = [COMPILER, "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(STAND_IN)]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-u", "-c", PROGRAM + body], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_code_is_loaded_once_for_each_device_and_launched_on_its_stream(tmp_path: Path) -> None:
    said = run_with_stand_in(
        """
launch("causal_conv_forward", 0)
launch("causal_conv_forward", 11)
launch("causal_conv_forward", 12)
launch("causal_conv_forward", 13, torch.device("cuda:1"))
""",
        tmp_path,
    )
    load = ["load", "function causal_conv_forward", "attribute 8 is 0"]

    def launched(blocks: int, stream: str) -> str:
        return f"launch {blocks} 1 1 of 128 1 1, shared 0, stream {stream}, arguments 3 5 7"

    assert said == [
        *("context of device 0", "push", *load, launched(11, "0xabc"), "pop"),
        *("push", launched(12, "0xabc"), "pop"),
        *("context of device 1", "push", *load, launched(13, "0xabd"), "pop"),
    ]


def test_what_the_driver_refuses_is_named(tmp_path: Path) -> None:
    said = run_with_stand_in('launch("causal_conv_forward", 7)\nlaunch("missing", 8)\n', tmp_path)
    assert "CUDA: causal_conv_forward cannot be started on cuda:0: CUDA_ERROR (wrong)" in said
    assert "CUDA: causal_conv_forward.cu has no missing: CUDA_ERROR_NOT_FOUND (not found)" in said
    assert said.count("push") == said.count("pop") == 2


def test_a_damaged_file_in_the_cache_is_made_again(tmp_path: Path) -> None:
    body = """
path = cached_path(program, 90)
path.parent.mkdir(parents=True)
path.write_bytes(b"damaged")
launch("causal_conv_forward", 1)
assert path.read_bytes().startswith(b"\\x7fELF")
"""
    said = run_with_stand_in(body, tmp_path)
    assert said[2:5] == ["load of no cubin", "load", "function causal_conv_forward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so() -> None:
    assert launching.why_unavailable(torch.device("cuda")) == "PyTorch sees no CUDA device"
