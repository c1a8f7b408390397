"""What can be said of the CUDA kernels without a GPU: they compile for each, spill nothing, stay in their budget."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.ops.native.cuda import ahead, causal_conv, programs
from mambatrain.ops.native.cuda.programs import ELEMENTS, Cubin, Program, compile_program, load_code
from mambatrain.ops.native.cuda.selective_scan import PACK, Layout

ARCHITECTURES = (80, 90, 100, 120)
LARGEST_SHARED_BYTES = 99 * 1024
"""What a block may have on the smallest of these GPUs, sm_120."""
FULL = Layout.for_sizes(16, 1536, 8, 1)
"""Of a batch that fills a device: 16 states over 4 threads, 2 channels each."""
UPDATES = 4 * FULL.channels * FULL.states
"""(e, n, t) of one thread in an iteration of an inner loop, which takes 4 positions."""

missing = programs.why_unavailable()
needs_nvrtc = pytest.mark.skipif(missing is not None, reason=str(missing))


def find_disassembler() -> Path | None:
    """nvdisasm, of its own package, inside Triton's, or of an installed toolkit."""
    found = [Path(path) for path in [shutil.which("nvdisasm")] if path]
    for package, inside in (("nvidia", "cu13/bin/nvdisasm"), ("triton", "backends/nvidia/bin/nvdisasm")):
        spec = importlib.util.find_spec(package)
        found += [Path(folder, inside) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((path for path in found if path.is_file()), None)


@functools.cache
def compiled(program: Program, architecture: int = 90) -> Cubin:
    return compile_program(program, architecture)


@functools.cache
def disassemble(program: Program) -> dict[str, list[str]]:
    """Kernel -> its instructions and labels, for sm_90."""
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(program).code)
        file.flush()
        text = subprocess.run([disassembler, "-c", file.name], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if begin := re.match(r"\s*\.text\.(\w+):", line):
            lines = kernels.setdefault(begin[1], [])
        elif label := re.match(r"\s*(\.L_x_\d+):", line):
            lines.append(f"{label[1]}:")
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    return kernels


def find_loops(lines: list[str]) -> list[list[str]]:
    """The instructions of each loop: from a label to a jump back to it."""
    places = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for place, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if jump and places.get(jump[1], place) < place - 1:
            loops.append([inner for inner in lines[places[jump[1]] : place + 1] if not inner.endswith(":")])
    return loops


def count_operations(loop: list[str]) -> Counter[str]:
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in loop)


def scan_loops(program: Program, kernel: str) -> tuple[list[str], list[list[str]]]:
    """The loop over chunks, and inside it those over positions, shortest first: two for each purpose, the second for
    chunks in which documents start."""
    loops = [loop for loop in find_loops(disassemble(program)[kernel]) if count_operations(loop)["MUFU"]]
    inner = sorted((loop for loop in loops if count_operations(loop)["MUFU"] == UPDATES), key=len)
    return min((loop for loop in loops if len(loop) > sum(map(len, inner))), key=len), inner


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile_for_every_gpu_and_spill_nothing(architecture: int) -> None:
    listed = ahead.list_programs()
    if architecture == 90:
        listed += [
            Layout.for_sizes(states, 1536, 8, 1).program("backward", torch.bfloat16, 1) for states in (1, 64, 256)
        ]
    else:  # of the layouts that of large batches
        listed = [program for program in listed if dict(program.defines).get("CHANNELS") != 1]
        listed = [program for program in listed if dict(program.defines)["ELEMENT"] == "bf16"]
        listed.append(FULL.program("backward", torch.float32, PACK))
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda program: compiled(program, architecture), listed))
    for program, cubin in zip(listed, cubins, strict=True):
        assert cubin.code.startswith(b"\x7fELF")
        assert cubin.kernels
        for kernel in cubin.kernels:
            assert (kernel.spilled_bytes, kernel.stack_bytes) == (0, 0), (kernel, program)
            # 255 is the most there is; two blocks of 128 threads share a processor
            most = 255 if kernel.name == "selective_scan_backward" else 168
            assert 16 <= kernel.registers <= most, (kernel, program)


def test_shared_memory_fits_every_gpu() -> None:
    for states in range(1, 257):
        for processors in (1, 10_000):
            layout = Layout.for_sizes(states, 1536, 8, processors)
            for name in ("forward", "backward"):
                assert layout.program(name, torch.float32, PACK).shared_bytes <= LARGEST_SHARED_BYTES
            assert layout.states * layout.lanes >= states
            assert layout.channels <= layout.lanes <= 32


@needs_nvrtc
@pytest.mark.parametrize("dtype", ELEMENTS, ids=ELEMENTS.values())
def test_the_budget_of_instructions(dtype: torch.dtype) -> None:
    """For each channel, state and position, in machine code for sm_90: at most 8 forward, 28 backward."""
    assert (FULL.states, FULL.lanes, FULL.channels) == (4, 4, 2)
    chunk, (forward, forward_with_starts) = scan_loops(FULL.program("forward", dtype, PACK), "selective_scan_forward")
    # 16 positions take 4 iterations; with all else that is done for them, softplus, gates and memory
    whole = len(chunk) - len(forward_with_starts) + 3 * len(forward)
    print(f"forward: {len(forward) / UPDATES:.1f}, with everything {whole / UPDATES / 4:.1f}")
    assert len(forward) <= 8 * UPDATES
    assert whole <= 12 * 4 * UPDATES

    loops = scan_loops(FULL.program("backward", dtype, PACK), "selective_scan_backward")
    chunk, (recompute, recompute_with_starts, go_back, go_back_with_starts) = loops
    assert count_operations(go_back)["FFMA"] == 5 * UPDATES
    backward = len(recompute) + len(go_back)
    whole = len(chunk) - len(recompute_with_starts) - len(go_back_with_starts) + 3 * backward
    print(f"backward: {backward / UPDATES:.1f}, with everything {whole / UPDATES / 4:.1f}")
    assert backward <= 28 * UPDATES
    assert whole <= 30 * 4 * UPDATES


@needs_nvrtc
def test_no_atomics() -> None:
    names = ("forward", "backward")
    listed = [FULL.program(name, torch.bfloat16, PACK) for name in names]
    listed += [causal_conv.make_program(name, torch.bfloat16, 4, causal_conv.PACK) for name in names]
    for program in listed:
        for kernel, lines in disassemble(program).items():
            found = count_operations([line for line in lines if not line.endswith(":")])
            assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(found), kernel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mambatrain" / "kernels"


SMALL = causal_conv.make_program("forward", torch.float32, 2, 1)


@needs_nvrtc
def test_what_was_compiled_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = load_code(SMALL, 90)
    (file,) = cache.iterdir()
    assert file == programs.cached_path(SMALL, 90)
    assert file.read_bytes() == code

    def refuse(*arguments: object) -> None:
        raise AssertionError("it was in the cache")

    monkeypatch.setattr(programs, "compile_program", refuse)
    assert load_code(SMALL, 90) == code
    paths = {programs.cached_path(SMALL, architecture) for architecture in (80, 90)}
    paths.add(programs.cached_path(causal_conv.make_program("forward", torch.float32, 3, 1), 90))
    changed = {name: text + " " for name, text in programs.read_sources().items()}
    monkeypatch.setattr(programs, "read_sources", lambda: changed)
    paths.add(programs.cached_path(SMALL, 90))
    assert len(paths) == 4


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_code(SMALL, 90).startswith(b"\x7fELF")
    assert not programs.keep(b"", tmp_path / "file" / "x")


@needs_nvrtc
def test_an_error_in_a_source_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = programs.read_sources() | {"causal_conv_forward.cu": "int broken("}
    monkeypatch.setattr(programs, "read_sources", lambda: sources)
    with pytest.raises(UserError, match=r"causal_conv_forward\.cu does not compile for sm_90: .*error"):
        compile_program(SMALL, 90)


@needs_nvrtc
def test_sizes_that_the_source_does_not_agree_with_are_an_error() -> None:
    program = FULL.program("forward", torch.float32, 1)
    for name in ("SHARED_BYTES", "ARGUMENTS_BYTES"):
        wrong = Program(program.source, tuple((dict(program.defines) | {name: 4}).items()), 4)
        with pytest.raises(UserError, match="differ"):
            compile_program(wrong, 90)


@needs_nvrtc
@pytest.mark.parametrize("architecture", [75, 91])
def test_gpus_they_are_not_for_are_refused(architecture: int) -> None:
    with pytest.raises(UserError, match=f"sm_{architecture}: NVRTC .* they know 80, .*90"):
        compile_program(SMALL, architecture)


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> tuple[int, int]:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(programs, "_nvrtc_version", version)
    with pytest.raises(
        UserError, match=r"cannot be compiled: NVRTC cannot be loaded .*No module named 'cuda'"
    ) as caught:
        compile_program(SMALL, 90)
    assert "nvidia-cuda-nvrtc" in str(caught.value.hint)
