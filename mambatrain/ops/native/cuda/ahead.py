"""Kernels compiled before they are met: in an image that is built without a GPU, before a run on many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mambatrain.ops.native.cuda import causal_conv, selective_scan
from mambatrain.ops.native.cuda.programs import Cubin, Program, cached_path, compile_program, keep
from mambatrain.ops.native.cuda.selective_scan import Layout

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Built:
    """One program for one architecture."""

    program: Program
    architecture: int
    cubin: Cubin
    kept: bool
    """Is it in the cache now?"""


def list_programs(num_states: int = 16, taps: int = 4) -> list[Program]:
    """What models of a size need in the dtypes they are trained in, whatever the batch; aligned as their memory is."""
    # the layouts of a batch that fills a device and of one that does not
    layouts = {Layout.for_sizes(num_states, 1, 1, processors) for processors in (1, 1_000)}
    return [
        *(
            layout.program(name, dtype, selective_scan.PACK)
            for dtype in DTYPES
            for layout in sorted(layouts, key=lambda layout: -layout.channels)
            for name in ("forward", "backward")
        ),
        *(
            causal_conv.make_program(name, dtype, taps, causal_conv.PACK)
            for dtype in DTYPES
            for name in ("forward", "backward")
        ),
    ]


def build(programs: Sequence[Program], architectures: Sequence[int]) -> Iterator[Built]:
    """Compiles all of them and puts them into the cache; yields each when it is done, in their order.

    Raises:
        UserError: NVRTC is missing or does not know an architecture.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(_build_one, *zip(*((one, at) for at in architectures for one in programs), strict=True))


def _build_one(program: Program, architecture: int) -> Built:
    cubin = compile_program(program, architecture)
    return Built(program, architecture, cubin, keep(cubin.code, cached_path(program, architecture)))
