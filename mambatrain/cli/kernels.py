"""`kernels`: compile the CUDA kernels ahead, compare a backend with the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mambatrain.cli.plain_help import PlainCommand
from mambatrain.cli.train import Device, DeviceOption, Kernels, KernelsOption, SetOption

if TYPE_CHECKING:
    import torch

    from mambatrain.ops.self_check import Sizes
    from mambatrain.recipe import ModelSection

kernels_app = typer.Typer(no_args_is_help=True, help="Compile the CUDA kernels ahead, check the operators.")

ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="80,90,...",
        help="Architectures of GPUs, none of which need be here. [default: the GPUs of this machine]",
        show_default=False,
    ),
]


@kernels_app.command(cls=PlainCommand)
def build(
    arch: ArchOption = None,
    states: Annotated[
        int, typer.Option("--states", min=1, max=256, metavar="N", help="State size of the models, d_state.")
    ] = 16,
    taps: Annotated[
        int, typer.Option("--taps", min=1, max=4, metavar="W", help="Width of their convolution, d_conv.")
    ] = 4,
) -> None:
    """Compile the CUDA kernels into the user's cache; without this they are compiled when a run first meets them.

    Example: mambatrain kernels build --arch 80,90,100,120
    """
    from mambatrain.errors import UserError
    from mambatrain.ops.native.cuda.ahead import build, list_programs
    from mambatrain.ops.native.cuda.programs import cache_folder

    header = f"{'kernel':25} {'dtype':6} {'GPU':7} {'channels':>8} {'registers':>9} {'spilled':>7}    KB seconds"
    kept = True
    for built in build(list_programs(states, taps), _architectures(arch)):
        if header:
            print(header)
        header, kept = "", kept and built.kept
        defines = dict(built.program.defines)
        channels = defines.get("CHANNELS", defines["PACK"])  # of a thread
        for kernel in built.cubin.kernels:
            print(
                f"{kernel.name:25} {defines['ELEMENT']:6} sm_{built.architecture:<4} {channels:8} "
                f"{kernel.registers:9} {kernel.spilled_bytes:7} {len(built.cubin.code) / 1024:5.0f} "
                f"{built.cubin.seconds:7.2f}"
            )
    if not kept:
        raise UserError(
            f"the kernels compile, but {cache_folder()} cannot be written", "set XDG_CACHE_HOME to a folder that can be"
        )
    typer.echo(f"kept in {cache_folder()}", err=True)


@kernels_app.command(cls=PlainCommand)
def check(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe: its shapes are used.")
    ] = "demo",
    overrides: SetOption = None,
    kernels: KernelsOption = Kernels.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Compare the operators a recipe needs, and every gradient, with the reference in fp64, at its own shapes.

    Errors are relative to the largest value of a tensor. Allowed is twice what the reference itself loses in that
    dtype, and a few roundings. Ends with 1 when one is larger.

    Example: mambatrain kernels check demo --kernels native
    """
    from mambatrain.devices import choose_device
    from mambatrain.errors import UserError
    from mambatrain.ops.backends import choose_backend
    from mambatrain.ops.self_check import compare_backend
    from mambatrain.recipe import read_recipe

    read = read_recipe(recipe, overrides)
    place = choose_device(device.value)
    backend = choose_backend(kernels.value, place)
    sizes = _sizes_of(read.model, read.data.row_tokens)
    typer.echo(f"kernels  {backend.name} on {place}: {backend.reason}", err=True)
    typer.echo(f"sizes    {sizes.R} rows of {sizes.L} positions, {sizes.C} channels, {sizes.N} states", err=True)
    wrong, total = [], 0
    print(f"{'operator':15} {'dtype':9} {'tensor':30} {'error':>8} {'allowed':>8}")
    for dtype in _dtypes_of(place.type):
        for found in compare_backend(backend, read.model.block, sizes, place, dtype):
            name = str(dtype).removeprefix("torch.")
            said = "" if found.passed else "  WRONG"
            print(f"{found.operator:15} {name:9} {found.tensor:30} {found.error:8.1e} {found.allowed:8.1e}{said}")
            total += 1
            if not found.passed:
                wrong.append(f"{found.tensor} of {found.operator} in {name}")
    if wrong:
        raise UserError(
            f"the {backend.name} backend is wrong on {place}: {len(wrong)} of {total} tensors, the first {wrong[0]}",
            "--kernels reference is slow but right; report this with the versions of mambatrain and torch",
        )


def _architectures(asked: str | None) -> list[int]:
    """90 for compute capability 9.0.

    Raises:
        UserError: what was asked is no list of numbers, or nothing was and there is no GPU.
    """
    from mambatrain.errors import UserError

    if asked is not None:
        parts = [part.strip().removeprefix("sm_") for part in asked.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise UserError(f"--arch {asked} is no list of architectures", "for example --arch 80,90,100,120")
        return list(dict.fromkeys(map(int, parts)))
    import torch

    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device to compile for", "name architectures: --arch 80,90,100,120")
    from mambatrain.ops.native.cuda.launching import architecture_of

    return sorted({architecture_of(index) for index in range(torch.cuda.device_count())})


def _sizes_of(model: ModelSection, row_tokens: int) -> Sizes:
    from mambatrain.ops.self_check import Sizes

    channels = model.d_inner
    if model.block == "mamba2":  # the convolution goes over B and C too
        channels += 2 * model.num_groups * model.state_size
    heads = {"H": model.num_heads, "P": model.head_dim, "G": model.num_groups} if model.block == "mamba2" else {}
    return Sizes(L=row_tokens, C=channels, W=model.d_conv, N=model.state_size, K=model.padded_vocab_size, **heads)


def _dtypes_of(device: str) -> list[torch.dtype]:
    import torch

    return [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
