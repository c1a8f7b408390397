"""What holds of every native implementation whatever the lengths and boundaries, to the bit where nothing is added up
over time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from mambatrain.ops import native

Scan = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]

CHANNELS, STATES, TAPS, HEADS = 21, 9, 4, 4
SCANS: dict[str, Scan] = {
    "selective_scan": native.selective_scan,
    "ssd": native.ssd,
    "causal_conv": native.causal_conv,
}
CARRIED = {"selective_scan": "initial_state", "ssd": "initial_state", "causal_conv": "initial_window"}
ALONG_TIME = {
    "selective_scan": ("u", "dt", "B", "C", "z"),
    "ssd": ("x", "dt", "B", "C"),
    "causal_conv": ("x",),
}


def make_arguments(name: str, length: int, rows: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    if name == "causal_conv":
        return {
            "x": randn(rows, length, CHANNELS),
            "weight": randn(CHANNELS, TAPS),
            "bias": randn(CHANNELS),
            "initial_window": randn(rows, TAPS - 1, CHANNELS),
        }
    if name == "ssd":
        return {
            "x": randn(rows, length, HEADS, CHANNELS),
            "dt": randn(rows, length, HEADS),
            "B": randn(rows, length, 2, STATES),
            "C": randn(rows, length, 2, STATES),
            "A": -randn(HEADS).exp(),
            "D": randn(HEADS),
            "dt_bias": randn(HEADS),
            "initial_state": randn(rows, HEADS, CHANNELS, STATES),
        }
    sizes = {"u": CHANNELS, "dt": CHANNELS, "z": CHANNELS, "B": STATES, "C": STATES}
    return {
        **{key: randn(rows, length, size) for key, size in sizes.items()},
        "A": -randn(CHANNELS, STATES).exp(),
        "D": randn(CHANNELS),
        "dt_bias": randn(CHANNELS),
        "initial_state": randn(rows, CHANNELS, STATES),
    }


def cut_time(name: str, arguments: Tensors, span: slice) -> Tensors:
    return {key: tensor[:, span] if key in ALONG_TIME[name] else tensor for key, tensor in arguments.items()}


def mark(rows: int, length: int, starts: list[int]) -> Tensor:
    """(rows, length) bool; row r starts documents one position later than row r - 1."""
    boundaries = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        boundaries[row, [start + row for start in starts if start + row < length]] = True
    return boundaries


def gradients(outputs: list[Tensor], leaves: Tensors) -> Tensors:
    weights = [torch.cos(torch.arange(out.numel()) % 97).view(out.shape) for out in outputs]
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights), strict=True))


def check_cut_anywhere(name: str, data: st.DataObject, length: int) -> None:
    """scan(whole) == scan(head) then scan(tail, state): the same bits, and the same gradients through the state."""
    cut = data.draw(st.integers(0, length), label="cut")
    starts = data.draw(st.lists(st.integers(0, length - 1), max_size=4), label="starts")
    scan, boundaries = SCANS[name], mark(2, length, starts)
    leaves = {key: tensor.requires_grad_() for key, tensor in make_arguments(name, length).items()}

    whole = scan(**leaves, boundaries=boundaries)
    head, state = scan(**cut_time(name, leaves, slice(cut)), boundaries=boundaries[:, :cut])
    rest = cut_time(name, leaves, slice(cut, None)) | {CARRIED[name]: state}
    tail, last = scan(**rest, boundaries=boundaries[:, cut:])

    assert torch.equal(torch.cat([head, tail], dim=1), whole[0])
    assert torch.equal(last, whole[1])
    found, wanted = (gradients(outputs, leaves) for outputs in ([torch.cat([head, tail], 1), last], list(whole)))
    for key, grad in wanted.items():
        if key in ALONG_TIME[name] or key == CARRIED[name]:
            assert torch.equal(found[key], grad), key
        else:
            torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()), msg=key)


def check_packed_equals_separate(name: str, data: st.DataObject, lengths: list[int]) -> None:
    """Documents side by side in one row give the bits that each gives alone, and no gradient passes between them."""
    scan, length = SCANS[name], sum(lengths)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    arguments = make_arguments(name, length, rows=1)
    leaves = {key: arguments[key].requires_grad_() for key in (*ALONG_TIME[name], CARRIED[name])}
    packed, last = scan(**arguments, boundaries=mark(1, length, starts))

    documents = [slice(start, start + size) for start, size in zip(starts, lengths, strict=True)]
    for span in documents:
        own = {key: tensor for key, tensor in cut_time(name, arguments, span).items() if key != CARRIED[name]}
        alone, alone_last = scan(**own)
        assert torch.equal(packed[:, span], alone)
    assert torch.equal(last, alone_last)

    chosen = data.draw(st.integers(0, len(lengths) - 1), label="the document with a loss")
    outputs = [packed[:, documents[chosen]]] + ([last] if chosen == len(lengths) - 1 else [])
    grads = gradients(outputs, leaves)
    assert not grads.pop(CARRIED[name]).any(), "the state before the first boundary"
    for key, grad in grads.items():
        assert grad[:, documents[chosen]].any(), key
        grad[:, documents[chosen]] = 0
        assert not grad.any(), f"{key} of another document"


def check_an_inf_does_not_cross_a_boundary(name: str, bad: float, start: int) -> None:
    scan, length = SCANS[name], 70
    arguments = make_arguments(name, length)
    boundaries = torch.zeros(2, length, dtype=torch.bool)
    boundaries[:, start] = True
    clean, clean_last = scan(**arguments, boundaries=boundaries)
    for spoilt in (*ALONG_TIME[name], CARRIED[name]):
        inputs = {key: tensor.clone() for key, tensor in arguments.items()}
        inputs[spoilt][0, 0 if spoilt == CARRIED[name] else start - 1] = bad
        leaves = {key: inputs[key].requires_grad_() for key in ALONG_TIME[name]}
        found, last = scan(**inputs, boundaries=boundaries)
        assert torch.equal(found[:, start:], clean[:, start:])
        assert torch.equal(found[1], clean[1])
        assert torch.equal(last, clean_last)
        for key, grad in gradients([found[:, start:], last], leaves).items():
            assert grad[:, start:].isfinite().all(), key


def check_a_boundary_at_0_discards_the_state_before(name: str, value: float) -> None:
    scan, boundaries = SCANS[name], torch.zeros(2, 20, dtype=torch.bool)
    boundaries[:, 0] = True
    arguments = make_arguments(name, 20)
    state = torch.full_like(arguments.pop(CARRIED[name]), value).requires_grad_()
    out, last = scan(**arguments, boundaries=boundaries, **{CARRIED[name]: state})
    fresh, fresh_last = scan(**arguments, boundaries=boundaries)
    assert torch.equal(out, fresh)
    assert torch.equal(last, fresh_last)
    (grad,) = torch.autograd.grad(out.sum() + last.sum(), state)
    assert torch.equal(grad, torch.zeros_like(state))
