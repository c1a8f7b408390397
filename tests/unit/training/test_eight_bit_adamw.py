"""Moments in 8 bits: torchao's update on plain tensors. It is compiled on GPUs alone; here its steps run one by one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mambatrain[8bit]'")

from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

from mambatrain.devices import end_processes
from mambatrain.errors import UserError
from mambatrain.models.flops import count_parameters
from mambatrain.planning.hardware import GPUS, native_on_gpus
from mambatrain.planning.memory import optimizer_bytes, plan_memory
from mambatrain.planning.plan import Place
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints
from mambatrain.runs.folder import read_log
from mambatrain.training.assemble import Where
from mambatrain.training.eight_bit_adamw import EightBitAdamW, import_torchao, refuse_eight_bit
from mambatrain.training.sharding import refuse_with_shards
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

SHAPES = ((64, 128), (15, 256), (4096,), (4097,))
IN_EIGHT_BITS = (True, False, True, False)  # at least 4096 numbers, and whole blocks of 256
EIGHT_BIT = {"optimizer__state_precision": "8bit"}
GPU = torch.device("cuda")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def updated(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], num_steps: int
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters of two groups behind some updates, the rate another at each."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make([{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}])
    for step in range(num_steps):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.01 * (step + 1))
            else:
                group["lr"] = 0.01 * (step + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def ours(groups: list[dict[str, Any]]) -> EightBitAdamW:
    return EightBitAdamW(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-6)


def test_it_is_torchao_s_adamw_to_the_bit(uncompiled: None) -> None:
    found, optimizer = updated(ours, 6)
    expected, torchao_s = updated(lambda groups: AdamW8bit(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-6), 6)
    for one, other, narrow in zip(found, expected, IN_EIGHT_BITS, strict=True):
        assert torch.equal(one, other)
        state, its = optimizer.state[one], torchao_s.state[other]
        for name in ("exp_avg", "exp_avg_sq"):
            if narrow:
                assert torch.equal(state[f"{name}_codes"], its[name].codes)
                assert torch.equal(state[f"{name}_scales"], its[name].scale)
            else:
                assert torch.equal(state[name], its[name])


def test_an_update_is_adamw_s_and_leaves_each_moment_at_the_nearest_of_its_values(uncompiled: None) -> None:
    """In fp64, from what the state of the step before says."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(32, 256, generator=generator))
    optimizer = EightBitAdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    tables = {"exp_avg": get_qmap_signed(), "exp_avg_sq": get_qmap_unsigned()}
    stored = {name: torch.zeros(32, 256, dtype=torch.float64) for name in tables}
    for step in range(1, 11):
        before, gradient = parameter.detach().double(), torch.randn(32, 256, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * stored["exp_avg"] + 0.1 * gradient.double()
        v = 0.95 * stored["exp_avg_sq"] + 0.05 * gradient.double() ** 2
        update = 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = before * (1 - 0.01 * 0.1) - update
        assert (parameter.detach() - expected).abs().max() < 2e-6  # fp32 of numbers up to 4
        for name, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            codes, scales = (optimizer.state[parameter][f"{name}_{part}"] for part in ("codes", "scales"))
            table = torch.tensor(tables[name], dtype=torch.float64)
            ratios = exact / exact.abs().amax(dim=1, keepdim=True)  # a row is a block
            nearest = (ratios[..., None] - table).abs().amin(dim=-1)
            assert ((table[codes.long()] - ratios).abs() <= nearest + 1e-6).all()
            stored[name] = table[codes.long()] * scales.double()[:, None]


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_hundred_updates_lead_where_those_of_adamw_do(beta2: float, uncompiled: None) -> None:
    """The way from the start differs by at most 2% (1.3% was the most of 4 seeds), and not by nothing."""
    generator = torch.Generator().manual_seed(0)
    target, start = (torch.randn(64, 128, generator=generator) for _ in range(2))
    examples = torch.randn(100, 32, 128, generator=generator)
    ways = []
    for kind in (torch.optim.AdamW, EightBitAdamW):
        parameter, way = nn.Parameter(start.clone()), []
        optimizer = kind([{"params": [parameter], "weight_decay": 0.1}], lr=0.01, betas=(0.9, beta2), eps=1e-8)
        for example in examples:
            parameter.grad = None
            (example @ (parameter - target).T).square().mean().backward()
            optimizer.step()
            way.append(parameter.detach() - start)
        ways.append(torch.stack(way).flatten(1))
    apart = (ways[0] - ways[1]).norm(dim=1) / ways[0].norm(dim=1)
    assert apart[0] < 1e-4  # the first update is of moments that were never rounded
    assert 0.002 < apart[1:].max() < 0.02


def test_each_shape_is_compiled_once_whatever_the_rate() -> None:
    eager = [tensor.detach() for tensor in _eagerly(4)]
    torch.compiler.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        compiled, _ = updated(ours, 4)
    assert counts["unique_graphs"] == len(SHAPES)
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)


def _eagerly(num_steps: int) -> list[nn.Parameter]:
    with torch.compiler.set_stance("force_eager"):
        return updated(ours, num_steps)[0]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> Iterator[Callable[[Recipe], Path]]:
    monkeypatch.setattr("mambatrain.training.assemble.refuse_eight_bit", lambda recipe, device: None)

    def once(recipe: Recipe, branch_from: Path | None = None) -> Path:
        where, run = Where(device="cpu", kernels="torch", quiet=True), tmp_path / ("branch" if branch_from else "run")
        assert run_training(recipe, run, where, "if-possible", StopRequest(), branch_from=branch_from) == 0
        return run

    yield once
    end_processes()


def test_a_run_learns_and_resumes_to_the_bit_from_plain_tensors_of_the_planned_size(
    write_tiny_recipe: Callable[..., Path], train: Callable[..., Path]
) -> None:
    recipe = read_recipe(
        str(write_tiny_recipe(checkpoint__keep_newest=9, model__d_model=64, training__total_steps=16, **EIGHT_BIT))
    )
    run = train(recipe)
    losses = [line["held_out_loss"] for line in read_log(run / "log.jsonl") if line["event"] == "held_out"]
    assert losses[-1] < losses[0] - 0.3
    checkpoints = list_checkpoints(run)
    files = {name: (checkpoints[-1] / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    tensors = load_file(checkpoints[-1] / "optimizer.safetensors")
    assert {"embedding.weight.exp_avg_codes", "embedding.weight.exp_avg_sq_scales"} <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8, torch.float32}
    assert sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim) == optimizer_bytes(recipe, "fp32")
    for checkpoint in checkpoints[1:]:
        shutil.rmtree(checkpoint)
    again = list_checkpoints(train(recipe))[-1]
    assert {name: (again / name).read_bytes() for name in files} == files


def test_a_state_of_one_precision_is_no_other_s(
    write_tiny_recipe: Callable[..., Path], train: Callable[..., Path]
) -> None:
    run = train(read_recipe(str(write_tiny_recipe(**EIGHT_BIT))))
    other = read_recipe(str(run / "recipe.yaml"), ["optimizer.state_precision=full", "training.total_steps=20"])
    with pytest.raises(UserError, match=r"optimizer\.state_precision: 8bit -> full"):
        train(other)
    with pytest.raises(UserError, match=r"optimizer\.state_precision: 8bit -> full"):
        train(other, branch_from=list_checkpoints(run)[-1])


def test_a_plan_counts_codes_and_scales(write_tiny_recipe: Callable[..., Path]) -> None:
    file, place = write_tiny_recipe(model__d_model=64), Place(GPUS["4090"], False, 1, 1, "bf16", native_on_gpus(), 0.3)
    plans = {}
    for precision in ("full", "8bit"):
        recipe = read_recipe(str(file), [f"optimizer.state_precision={precision}"])
        plans[precision] = plan_memory(recipe, place, 4, 2)
    narrow = 512 * 64 + 2 * (256 * 64 + 64 * 128)  # the embedding, and in_proj and out_proj of each layer
    others = count_parameters(recipe.model)["total"] - narrow
    # codes of 1 byte, and one scale of 4 for 256 of them
    assert plans["8bit"].optimizer == 2 * narrow + 2 * narrow // 256 * 4 + 8 * others
    assert plans["8bit"].total - plans["8bit"].optimizer == plans["full"].total - plans["full"].optimizer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__kind": "muon"}, "state_precision 8bit belongs to adamw, not to muon"),
        ({"optimizer__kind": "schedule_free", "schedule": {"kind": "constant"}}, "8bit belongs to adamw"),
        ({"training__precision": "fp64"}, "8bit updates in fp32; with training.precision fp64 take full"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    changes: dict[str, Any], said: str, write_tiny_recipe: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=said):
        read_recipe(str(write_tiny_recipe(**EIGHT_BIT, **changes)))


def test_a_cpu_a_division_and_a_missing_package_are_refused(
    write_tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(str(write_tiny_recipe(**EIGHT_BIT)))
    with pytest.raises(UserError, match="8bit is for GPUs") as on_cpu:
        run_training(recipe, tmp_path / "run", Where(device="cpu", quiet=True), "if-possible", StopRequest())
    assert on_cpu.value.hint is not None
    assert "optimizer.state_precision=bf16" in on_cpu.value.hint
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    end_processes()
    with pytest.raises(UserError, match=r"--shard full does not go with optimizer\.state_precision 8bit"):
        refuse_with_shards(recipe, "full")
    refuse_eight_bit(recipe, GPU)
    monkeypatch.setitem(sys.modules, "torchao.optim.adam", None)
    for refused in (lambda: refuse_eight_bit(recipe, GPU), import_torchao):
        with pytest.raises(UserError, match="needs torchao") as missing:
            refused()
        assert missing.value.hint == "pip install 'mambatrain[8bit]'"
