"""How kernels are launched: on the device of their tensors, on the caller's stream, with nothing allocated or waited
for, so that a CUDA graph may hold them. Each operation is captured, replayed on other inputs, and run on a second GPU
while the first is current.
"""

from __future__ import annotations

from contextlib import contextmanager

import emulation
import pytest
import torch

from pyqlora.ops import backend as dispatch
from pyqlora.ops import linear_4bit_cuda, lora_linear_cuda, quantize
from pyqlora.ops.optim_step import RULES, optim_step
from pyqlora.optim.states import encode, state_specs
from pyqlora.quant_maps import create_dynamic_map

N, K = 8, 4160


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def weight():
    generator = torch.Generator().manual_seed(0)
    blocks = N * K // 64
    packed, absmax = (torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (N * K // 2, blocks))
    nested = torch.rand(-(-blocks // 256), generator=generator), torch.linspace(-1, 1, 256), torch.zeros(1)
    return packed, absmax, *nested


def quantize_4bit(x):
    return quantize.quantize_4bit(x, 64, "nf4")


def dequantize_4bit(*w):
    out = torch.empty((N, K), dtype=torch.bfloat16, device=w[0].device)
    return (quantize.dequantize_4bit_into(out, *w, 256, 64, "nf4", N * K),)


def dequantize_rows(*w):
    out = torch.empty((N, K), dtype=torch.bfloat16, device=w[0].device)
    out.fill_(0)
    quantize.dequantize_4bit_into(out[:, 1:], *w, 256, 64, "nf4", N * K, 3)
    return (out,)


def blockwise(x, code):
    q, absmax = quantize.quantize_blockwise(x, code, 256)
    return q, absmax, quantize.dequantize_blockwise(q, code, absmax, 256, torch.float32)


def simt(x, *w):
    return (linear_4bit_cuda.simt(x, (*w, 256, 64, "nf4"), [N, K], None),)


def mma(x, s, b, *w):
    """With the update, and a split sum."""
    assert dispatch.native(x)[0].linear_4bit_mma_splits(len(x), N, K, linear_4bit_cuda.gpu_of(x.device)[1]) > 1
    return (linear_4bit_cuda.mma(x, (*w, 256, 64, "nf4"), [N, K], None, (s, b)),)


def dropout(x, seed):
    module, context = dispatch.native(x)
    y = torch.empty_like(x)
    module.lora_dropout(x, y, seed, 0.25, x.shape[-1], context)
    return (y,)


def down(x, a, b, seed):
    """Two factors, split sums."""
    assert dispatch.native(x)[0].lora_down_splits(1, K, linear_4bit_cuda.gpu_of(x.device)[1]) > 1
    return lora_linear_cuda.down(x, [a, b], [0.5, 2.0], seed, 0.25)


def rows(x, y, tiles, a, b):
    s = lora_linear_cuda.down_rows(x, [a], [2.0], tiles)
    return s, lora_linear_cuda.up(s, [b], y, tiles=tiles)


def backward(dy, b, s):
    return lora_linear_cuda.backward(dy, b, s, 0.5)


def backward_a(x, a, ds, seed):
    return (lora_linear_cuda.backward_a(x, a, ds, seed, 0.25),)


def step(rule, bits):
    def run(param, grad, *state):
        names = list(state_specs(rule, param, bits))
        names += ["qmap1", "qmap2"] if bits == 8 else ["unorm_vec"]
        states = [dict(zip(names, state, strict=True)) | {"step": 3}]
        options = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8, "weight_decay": 0.1}
        optim_step(RULES[rule].name, [param], [grad], states, lr=1e-2, max_unorm=float(bits == 32), **options)
        return (param, *state)

    return run


def states(bits):
    first, second = normal(5000), normal(5000).square()
    if bits == 32:
        return first, second, torch.zeros(1)
    maps = create_dynamic_map(True), create_dynamic_map(False)
    (q1, absmax1), (q2, absmax2) = encode(first, maps[0]), encode(second, maps[1])
    return q1, q2, absmax1, absmax2, *maps


BF16 = torch.bfloat16
SEED, TILES = torch.tensor([5]), torch.tensor([[0, 20, 0], [20, 3, -1]], dtype=torch.int32)
PARAMETER = normal(5000), normal(5000) * 0.01
OPERATIONS = {  # name -> what runs, its inputs, of which the first is the one that changes
    "quantize_4bit": (quantize_4bit, (normal(N, K),)),
    "dequantize_4bit": (dequantize_4bit, weight()),
    "dequantize_4bit, rows": (dequantize_rows, weight()),
    "blockwise": (blockwise, (normal(N, K), torch.linspace(-1, 1, 256))),
    "linear_4bit": (simt, (normal(3, K, dtype=BF16), *weight())),
    "linear_4bit_mma": (mma, (normal(9, K, dtype=BF16), normal(9, 8, dtype=BF16), normal(N, 8), *weight())),
    "lora_dropout": (dropout, (normal(9, K), SEED)),
    "lora_down": (down, (normal(9, K, dtype=BF16), normal(8, K), normal(5, K), SEED)),
    "lora_rows": (rows, (normal(23, K, dtype=BF16), normal(23, N, dtype=BF16), TILES, normal(8, K), normal(N, 8))),
    "lora_backward": (backward, (normal(99, K, dtype=BF16), normal(K, 8), normal(99, 8, dtype=BF16))),
    "lora_backward_a": (backward_a, (normal(99, K, dtype=BF16), normal(8, K), normal(99, 8, dtype=BF16), SEED)),
    "optim_step, 32 bits": (step("lamb", 32), (*PARAMETER, *states(32))),
    "optim_step, 8 bits": (step("adam", 8), (*PARAMETER, *states(8))),
}


class Emulated:
    """Two emulated GPUs, and graphs of what a stream is given."""

    def __init__(self, module):
        self.module = module
        self.memory = [emulation.Resident(module, index) for index in range(2)]
        self.stream = module.new_stream()

    def put(self, tensor, index=0):
        return self.memory[index].put(tensor)

    @contextmanager
    def using(self, index=0, stream=0):
        with dispatch.override(self.module.cuda, stream), self.memory[index].allocating():
            yield

    def capture(self, run, inputs):
        with self.using(stream=self.stream):
            self.module.begin_capture(self.stream)
            try:
                return run(*inputs)
            finally:
                self.module.end_capture()

    def replay(self):
        assert self.module.replay()

    def current_device(self):
        return self.module.current_device()


class Gpu:
    """The same of real ones."""

    def put(self, tensor, index=0):
        return tensor.to(f"cuda:{index}")

    @contextmanager
    def using(self, index=0, stream=0):
        yield

    def capture(self, run, inputs):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            return run(*inputs)

    def replay(self):
        self.graph.replay()

    def current_device(self):
        return torch.cuda.current_device()


@pytest.fixture
def gpu(backend):
    if backend.name == "cpu":
        pytest.skip("kernels of the GPU")
    if backend.name == "cuda":
        yield Gpu()
        return
    dispatched = dispatch._override[0].module
    dispatched.set_device_count(2)
    yield Emulated(dispatched)
    dispatched.set_device_count(1)
    dispatched.reset()


def results(outputs):
    return [t.cpu().clone() for t in outputs]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_holds_it(gpu, name):
    """What was captured runs at each replay, on the inputs as they then are."""
    run, inputs = OPERATIONS[name]
    first, *rest = inputs
    second = first.flip(0).contiguous()
    with gpu.using():
        wanted = [results(run(*map(gpu.put, (x, *rest)))) for x in (first, second)]
    ours = [gpu.put(t) for t in inputs]
    outputs = gpu.capture(run, ours)
    for x, expected in zip((first, second, first), (*wanted, wanted[0]), strict=True):
        for tensor, value in zip(ours, (x, *rest), strict=True):
            tensor.copy_(value)
        gpu.replay()
        for got, want in zip(results(outputs), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_runs_on_its_tensors_device(gpu, name):
    if isinstance(gpu, Gpu) and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run, inputs = OPERATIONS[name]
    got = []
    for index in range(2):
        with gpu.using(index):
            got.append(results(run(*(gpu.put(t, index) for t in inputs))))
        assert gpu.current_device() == 0
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_tensors_of_two_devices_are_refused(gpu):
    if isinstance(gpu, Gpu) and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, *w = OPERATIONS["linear_4bit"][1]
    with gpu.using(), pytest.raises(ValueError, match="linear_4bit: packed: expected device index 0 like x, got 1"):
        simt(gpu.put(x), gpu.put(w[0], 1), *map(gpu.put, w[1:]))


def test_the_emulation_refuses_what_a_graph_cannot_hold(gpu):
    if isinstance(gpu, Gpu):
        pytest.skip("of the emulation")
    module = gpu.module
    memory = module.cuda.PagedMemory(8, 0)
    x, other = gpu.put(normal(64)), module.new_stream()
    refused = "CUDA error cudaErrorStreamCaptureUnsupported"

    def elsewhere():
        with gpu.using(stream=other):
            quantize_4bit(x)

    for misuse in (elsewhere, lambda: module.cuda.PagedMemory(8, 0), memory.synchronize):
        with pytest.raises(RuntimeError, match=refused):
            gpu.capture(misuse, ())
        module.reset()


def test_the_emulation_refuses_another_devices_memory_and_streams(gpu):
    if isinstance(gpu, Gpu):
        pytest.skip("of the emulation")
    foreign = gpu.stream  # of the first device
    with gpu.using(1, foreign), pytest.raises(RuntimeError, match="CUDA error cudaErrorInvalidResourceHandle"):
        quantize_4bit(gpu.put(normal(64), 1))
    gpu.module.reset()
    with gpu.using(0), pytest.raises(RuntimeError, match="points to host memory, or another device's"):
        gpu.module.probe("barrier", 0, *(gpu.put(torch.zeros(gpu.module.PROBE_INTS), 1).data_ptr() for _ in range(2)))
