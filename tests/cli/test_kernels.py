"""`kernels build` and `kernels check`: what a person sees, and that a kernel broken on purpose does not pass."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import needs_compiler, on_cpu
from torch import Tensor

from mambatrain.cli import kernels as cli_kernels
from mambatrain.cli.train import Device, Kernels
from mambatrain.errors import UserError
from mambatrain.ops import backends, native
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.cross_entropy import SoftmaxLoss
from mambatrain.ops.native.cuda import programs

Run = Callable[..., subprocess.CompletedProcess[str]]
SHAPES = ["model.d_model=20", "data.row_tokens=77", "model.d_state=16"]  # 40 channels

missing = programs.why_unavailable()
needs_nvrtc = pytest.mark.skipif(missing is not None, reason=str(missing))
needs_library = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


@needs_nvrtc
def test_build_compiles_into_the_cache(run_mambatrain: Run, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    built = run_mambatrain("kernels", "build", "--arch", "90", environment=environment)
    assert built.returncode == 0, built.stderr
    header, *rows = built.stdout.splitlines()
    assert header.split() == ["kernel", "dtype", "GPU", "channels", "registers", "spilled", "KB", "seconds"]
    assert {tuple(row.split()[:3]) for row in rows} >= {
        ("selective_scan_forward", "bf16", "sm_90"),
        ("selective_scan_backward", "fp32", "sm_90"),
        ("causal_conv_backward", "bf16", "sm_90"),
    }
    assert {row.split()[5] for row in rows} == {"0"}
    folder = tmp_path / "cache" / "mambatrain" / "kernels"
    assert built.stderr == f"kept in {folder}\n"
    assert len(list(folder.glob("*-sm_90-*.cubin"))) == 12


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--arch", "ninety"], "--arch ninety is no list of architectures", "--arch 80,90,100,120"),
        pytest.param(["--arch", "61"], "cannot be compiled for sm_61: NVRTC", "--kernels torch", marks=needs_nvrtc),
        pytest.param(
            [],
            "PyTorch sees no CUDA device to compile for",
            "name architectures",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_build_says_what_it_cannot_do(run_mambatrain: Run, arguments: list[str], error: str, hint: str) -> None:
    done = run_mambatrain("kernels", "build", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr
    assert hint in done.stderr


def test_build_without_nvrtc(run_mambatrain: Run, tmp_path: Path) -> None:
    """A package of the same name that holds nothing hides the real one."""
    (tmp_path / "hidden" / "cuda").mkdir(parents=True)
    (tmp_path / "hidden" / "cuda" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = run_mambatrain("kernels", "build", "--arch", "90", environment={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (1, "")
    assert "NVRTC cannot be loaded through cuda.bindings (No module named 'cuda.bindings')" in done.stderr
    assert "pip install" in done.stderr


@pytest.mark.parametrize(
    ("block", "kernels"), [pytest.param("mamba1", "native", marks=needs_library), ("mamba2", "torch")]
)
def test_check_passes_what_is_right(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], block: str, kernels: str
) -> None:
    recipe = write_tiny_recipe(model__block=block, **({"model__head_dim": 8} if block == "mamba2" else {}))
    done = run_mambatrain(
        "kernels", "check", recipe, "--set", "data.row_tokens=77", "--kernels", kernels, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert f"kernels  {kernels} on cpu" in done.stderr
    assert "2 rows of 77 positions" in done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["operator", "dtype", "tensor", "error", "allowed"]
    assert len(rows) == 2 * (6 + (11 if block == "mamba1" else 10) + 3)
    for row in rows:
        error, allowed = map(float, row.split()[-2:])
        assert error <= allowed
        assert re.match(r"(causal_conv|selective_scan|ssd|softmax_loss) +(float32|bfloat16) +the ", row)


def flip_gradient(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    losses, gradient = native.softmax_loss(logits, targets, wants_gradient)
    return losses, None if gradient is None else -gradient


def drop_tail(logits: Tensor, targets: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The last columns, fewer than fill a vector, are not looked at."""
    logits[:, logits.shape[1] // 8 * 8 :] = -1e30
    return native.softmax_loss(logits, targets, wants_gradient)


@needs_library
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (flip_gradient, ["the gradient of logits"]),
        (drop_tail, ["the losses", "the losses without gradients", "the gradient of logits"]),
    ],
)
def test_check_catches_a_broken_softmax_loss(
    wrong: SoftmaxLoss,
    expected: list[str],
    write_tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = choose_backend("native", torch.device("cpu"))
    monkeypatch.setattr(backends, "choose_backend", lambda name, device: replace(right, softmax_loss=wrong))
    recipe = write_tiny_recipe(model__pad_vocab_multiple=1, model__vocab_size=301)
    with pytest.raises(UserError, match=r"the native backend is wrong on cpu: \d+ of 40 tensors") as caught:
        cli_kernels.check(str(recipe), SHAPES, Kernels.native, Device.cpu)
    assert "of softmax_loss in float32" in caught.value.message
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert [line[26:56].strip() for line in marked if line[16:23] == "float32"] == expected
    assert all(line.startswith("softmax_loss") for line in marked)


def test_every_backend_can_be_typed() -> None:
    assert [kernels.value for kernels in Kernels] == list(backends.BACKENDS)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed here")
def test_mamba_ssm_that_is_not_installed_is_said(run_mambatrain: Run) -> None:
    done = run_mambatrain("kernels", "check", "demo", "--kernels", "mamba-ssm")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "error: mamba-ssm's kernels cannot run: mamba-ssm is not installed\n\nhint: pip install"
    )


BREAKS = {
    "a flipped sign": (
        ("selective_scan_backward.cuh", "fma(k, at.delta, dA.of[j][n])", "fma(-k, at.delta, dA.of[j][n])"),
        ["the gradient of A of selective_scan"],
    ),
    "a dropped tail": (
        ("selective_scan_forward.cu", "count, starts, rate, h);", "count & ~(UNROLL - 1), starts, rate, h);"),
        ["the output of selective_scan", "the final state of selective_scan"],
    ),
    "a missing boundary in conv only": (
        ("causal_conv.cuh", "return ballot(args.boundaries &&", "return ballot(false && args.boundaries &&"),
        ["the output of causal_conv", "the gradient of x of causal_conv", "the gradient of weight of causal_conv"],
    ),
    "a missing boundary in the scan only": (
        ("selective_scan.cuh", "return ballot(args.boundaries &&", "return ballot(false && args.boundaries &&"),
        ["the output of selective_scan", "the gradient of u of selective_scan"],
    ),
    "a lost term": (
        ("selective_scan_backward.cu", "fma(D[k], kept.gy[i][k], q1 * at.delta)", "q1 * at.delta"),
        ["the gradient of u of selective_scan"],
    ),
}


def check_on_cpu(recipe: Path) -> None:
    with on_cpu():
        cli_kernels.check(str(recipe), SHAPES, Kernels.native, Device.cpu)


@needs_compiler
@needs_library
def test_check_passes_the_cuda_kernels_on_a_cpu(
    write_tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    check_on_cpu(write_tiny_recipe())
    shown = capsys.readouterr().out
    assert "WRONG" not in shown
    assert len(shown.splitlines()) == 1 + 2 * 20


@needs_compiler
@needs_library
@pytest.mark.parametrize("what", BREAKS)
def test_check_catches_a_broken_kernel(
    what: str,
    write_tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (name, right, wrong), expected = BREAKS[what]
    sources = programs.read_sources()
    assert right in sources[name]
    monkeypatch.setattr(programs, "read_sources", lambda: sources | {name: sources[name].replace(right, wrong)})
    monkeypatch.setattr(cli_kernels, "_dtypes_of", lambda device: [torch.float32])  # half as much to compile
    with pytest.raises(UserError, match=r"the native backend is wrong on cpu: \d+ of 20 tensors"):
        check_on_cpu(write_tiny_recipe())
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    for tensor in expected:
        named, operator = tensor.rsplit(" of ", 1)
        assert any(line.startswith(operator) and f" {named} " in line for line in marked), tensor
    touched = "causal_conv" if name.startswith("causal_conv") else "selective_scan"
    assert all(line.startswith(touched) for line in marked)
