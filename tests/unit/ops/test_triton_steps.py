"""When a single position is taken for one, and by how large programs; `tests/parity/interpreted/steps.py` runs them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mambatrain.ops.triton import steps


def test_one_position_on_cuda_is_a_step() -> None:
    with FakeTensorMode():
        assert steps.is_step(torch.empty(3, 1, 8, device="cuda"))
        assert steps.is_step(torch.empty(0, 1, 8, 4, device="cuda"))
        assert not steps.is_step(torch.empty(1, 2, 8, device="cuda"))
        assert not steps.is_step(torch.empty(1, 0, 8, device="cuda"))
    assert not steps.is_step(torch.empty(3, 1, 8))
    assert not steps.is_step(torch.empty(3, 1, 8, device="meta"))


@pytest.mark.parametrize("states", [1, 7, 8, 16, 40, 64, 128, 200, 256])
@pytest.mark.parametrize("channels", [1, 5, 64, 1536])
def test_a_program_has_all_states_of_its_channels(channels: int, states: int) -> None:
    block_channels, block_states = steps._tile(channels, states)
    assert states <= block_states < 2 * states
    assert block_channels & (block_channels - 1) == block_states & (block_states - 1) == 0
    assert 1 <= block_channels < 2 * channels
    assert block_channels * block_states <= max(steps.STATES_PER_PROGRAM, block_states)
