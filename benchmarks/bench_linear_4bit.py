"""linear_4bit on an NF4 weight, forward and forward+backward, beside bitsandbytes and the dense matrix in torch."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as peer
import torch

import pyqlora
import pyqlora.functional as ours
import pyqlora.nn
from benchmarks.harness import Case
from pyqlora import _C

FORWARD = [
    (1, 4096, 4096, "fp32"),
    (1, 4096, 4096, "bf16"),
    (8, 4096, 4096, "fp32"),
    (64, 4096, 4096, "fp32"),
    (512, 4096, 4096, "fp32"),
    (1, 576, 576, "fp32"),
    (1, 1536, 576, "fp32"),
    (64, 1536, 576, "fp32"),
    (512, 1536, 576, "fp32"),
]
FORWARD_BACKWARD = [
    (512, 4096, 4096, "fp32"),
    (64, 1536, 576, "fp32"),
    (512, 1536, 576, "fp32"),
    (64, 1536, 576, "bf16"),
    (512, 1536, 576, "bf16"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for m, n, k, label in FORWARD:
        yield _case(m, n, k, label, backward=False)
    for m, n, k, label in FORWARD_BACKWARD:
        yield _case(m, n, k, label, backward=True)
    yield _int16()
    yield from _calls()


def _int16() -> Case:
    case = _case(1, 4096, 4096, "fp32", backward=False)
    exact = case.runs["pyqlora"]

    def rounded():
        before = ours.set_activation_precision("int16")
        try:
            return exact()
        finally:
            ours.set_activation_precision(before)

    def check():
        case.check()
        y, z = exact(), rounded()
        assert 0 < (y - z).abs().max() < 2e-4 * y.abs().max()

    return Case("forward M=1 4096x4096 fp32, activations in int16", {**case.runs, "pyqlora": rounded}, check)


def _calls() -> Iterator[Case]:
    """1,000 calls of a layer that is too small to cost anything: milliseconds are then microseconds a call.

    And 1,000 calls of the native function under it: the difference is what the layer costs.
    """
    layers = {
        "pyqlora": pyqlora.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"),
        "bitsandbytes": peer.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"),
        "torch dense": torch.nn.Linear(64, 64, bias=False),
    }
    x = torch.randn(1, 64)

    def calls(layer):
        with torch.no_grad():
            for _ in range(1000):
                layer(x)

    runs = {name: lambda layer=layer: calls(layer) for name, layer in layers.items()}
    yield Case("1000 calls of Linear4bit M=1 64x64 fp32", runs, lambda: None)

    weight, state, y = layers["pyqlora"].weight.data, layers["pyqlora"].weight.quant_state, torch.empty(1, 64)
    arguments = (x, weight, *state.scales(), None, y, 64, 64, state.blocksize, "nf4", 1)

    def native_calls():
        for _ in range(1000):
            _C.cpu.linear_4bit(*arguments)

    yield Case("1000 native calls of linear_4bit M=1 64x64 fp32", {"pyqlora": native_calls}, lambda: None)


def _case(m: int, n: int, k: int, label: str, backward: bool) -> Case:
    dtype = DTYPES[label]
    w = (torch.randn(n, k) * 0.02).to(dtype)
    packed, state = ours.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    peer_packed, peer_state = peer.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    dense = ours.dequantize_4bit(packed, state)
    x = torch.randn(m, k).to(dtype)
    dy = torch.randn(m, n).to(dtype)
    forwards = {
        "pyqlora": lambda x: pyqlora.matmul_4bit(x, packed.t(), state),
        "bitsandbytes": lambda x: peer.matmul_4bit(x, peer_packed.t(), peer_state),
        "torch dense": lambda x: torch.nn.functional.linear(x, dense),
    }

    def run(forward):
        if not backward:
            with torch.no_grad():
                return forward(x)
        leaf = x.detach().requires_grad_()
        forward(leaf).backward(dy)
        return leaf.grad

    def check():
        exact = dy.double() @ dense.double() if backward else x.double() @ dense.double().T
        for name, forward in forwards.items():
            error = (run(forward).double() - exact).abs().max() / exact.abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2), (name, error)

    runs = {name: lambda forward=forward: run(forward) for name, forward in forwards.items()}
    return Case(f"{'forward+backward' if backward else 'forward'} M={m} {n}x{k} {label}", runs, check)
