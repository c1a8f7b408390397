"""What holds of the C++ kernels whatever the lengths and boundaries, to the bit where nothing is added up over time."""

from __future__ import annotations

import math

import pytest
import scan_properties
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrain.ops import native

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
every_operator = pytest.mark.parametrize("name", scan_properties.SCANS)


@every_operator
@settings(max_examples=40)
@given(data=st.data(), length=st.integers(1, 150))
def test_cut_anywhere(name: str, data: st.DataObject, length: int) -> None:
    scan_properties.check_cut_anywhere(name, data, length)


@every_operator
@settings(max_examples=40)
@given(data=st.data(), lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4))
def test_packed_equals_separate(name: str, data: st.DataObject, lengths: list[int]) -> None:
    scan_properties.check_packed_equals_separate(name, data, lengths)


@every_operator
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("start", [1, 31, 32, 33, 65])
def test_an_inf_does_not_cross_a_boundary(name: str, bad: float, start: int) -> None:
    scan_properties.check_an_inf_does_not_cross_a_boundary(name, bad, start)


@every_operator
@pytest.mark.parametrize("value", [1.0, math.inf])
def test_a_boundary_at_0_discards_the_state_before(name: str, value: float) -> None:
    scan_properties.check_a_boundary_at_0_discards_the_state_before(name, value)
