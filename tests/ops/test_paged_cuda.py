"""Paging by a GPU, on an emulated one that queues its work and runs it late and in any order that streams allow."""

import ctypes
import weakref
from types import SimpleNamespace
from unittest import mock

import emulation
import pytest
import torch

import pyqlora.optim as optim
from pyqlora.ops import backend as dispatch
from pyqlora.ops import paged, paged_cuda
from pyqlora.quant_maps import create_dynamic_map

SHAPES = [(40, 30), (17,), (5000,), (256,), (4096,), (3, 7)]
STEPS = 3


class LazyDevice:
    """The emulated kernels as the only backend, on device memory, and a current stream."""

    def __init__(self, build, managed):
        self.module = emulation.device(build).module
        self.module.set_concurrent_managed_access(managed)
        self.stream = self.module.new_stream()
        self.keep = []
        self.garbage = self.tensor(torch.full((1 << 16,), 0xEE, dtype=torch.uint8))

    def __getattr__(self, name):
        return getattr(self.module.cuda, name)

    def allocate(self, bytes):
        buffer = (ctypes.c_uint8 * max(bytes, 1)).from_address(self.module.malloc(max(bytes, 1)))
        return torch.frombuffer(buffer, dtype=torch.uint8)[:bytes]

    def tensor(self, host):
        copy = self.allocate(host.nbytes).view(host.dtype).view(host.shape)
        copy.copy_(host)
        self.module.written_by_host(copy.data_ptr(), host.nbytes)
        self.keep.append(copy)
        return copy

    def copy(self, to, host):
        """Queue a copy, as a backward pass would write its gradients."""
        self.keep.append(host)
        self.module.copy(to.data_ptr(), host.data_ptr(), host.nbytes, self.stream)

    def empty(self, size, dtype=torch.uint8, device=None):
        """Like torch's allocator: what is freed has a new owner in the current stream at once."""
        tensor = self.allocate(size)
        weakref.finalize(tensor, self.module.copy, tensor.data_ptr(), self.garbage.data_ptr(), size, self.stream)
        return tensor


@pytest.fixture(params=[True, False], ids=["managed", "pinned"])
def device(request, monkeypatch):
    *_, backend = request.config.getoption("--backend") or ["emulated_checked"]
    build = backend.removeprefix("emulated_")
    device = LazyDevice(build if build in ("checked", "asan", "changed") else "fast", request.param)
    for module in ("paged_cuda", "optim_step"):
        monkeypatch.setattr(f"pyqlora.ops.{module}.torch", SimpleNamespace(**{**vars(torch), "empty": device.empty}))
    maps = {signed: device.tensor(create_dynamic_map(signed)) for signed in (True, False)}
    monkeypatch.setattr("pyqlora.optim.optimizer._dynamic_map", lambda signed, device: maps[signed])
    monkeypatch.setattr("pyqlora.optim.optimizer.GROUP_BYTES", 4000)
    paged_cuda._warn_of_copies.cache_clear()
    yield device
    device.module.set_lazy(0)
    device.module.reset()
    device.module.set_concurrent_managed_access(True)


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.01 for shape in SHAPES]


def train(name, params, set_gradients):
    options = {"momentum": 0.9} if "LARS" in name else {}
    optimizer = getattr(optim, name)(params, lr=1e-2, min_8bit_size=200, **options)
    for step in range(STEPS):
        set_gradients(gradients(step))
        optimizer.step()
    return optimizer


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def on_cpu(name):
    params = [torch.nn.Parameter(p) for p in parameters()]

    def set_gradients(values):
        for p, g in zip(params, values, strict=True):
            p.grad = g

    return params, train(name.removeprefix("Paged"), params, set_gradients)


def on_device(device, name, seed):
    """A run in which nothing waits before the end; (parameters, optimizer, counts)."""
    params = [torch.nn.Parameter(device.tensor(p)) for p in parameters()]
    for p in params:
        p.grad = device.tensor(torch.zeros_like(p))

    def set_gradients(values):
        for p, g in zip(params, values, strict=True):
            device.copy(p.grad, g)

    with dispatch.override(device, device.stream), mock.patch("warnings.warn"):
        device.module.set_lazy(seed)
        optimizer = train(name, params, set_gradients)
        device.module.synchronize(device.stream)
        optimizer.state_dict()  # waits for the moves
        counts = device.module.stream_counts()
        device.module.set_lazy(0)
    return params, optimizer, counts


def right(device, expected, got, check_states=True):
    (params, reference), (ours, optimizer, counts) = expected, got
    same = all(torch.equal(p, q) for p, q in zip(params, ours, strict=True))
    for p, q in zip(params, ours, strict=True):
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if key in reference.state[p]:
                same = same and torch.equal(reference.state[p][key], optimizer.state[q][key])
    return same and not counts["host_accesses"] and not counts["page_faults"]


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW32bit", "PagedAdEMAMix8bit", "PagedLARS"])
def test_any_legal_order_gives_the_cpus_numbers(device, name):
    expected = on_cpu(name)
    before = device.module.stream_counts()["allocations"]
    for seed in range(1, 26):
        got = on_device(device, name, seed)
        assert right(device, expected, got), (seed, got[2])
        groups = len(set(got[1]._pages.values()))
        counts = got[2]
        assert groups > 2
        moves = (counts["prefetches"], counts["page_outs"])  # unified memory stays on the GPU
        assert moves == ((groups * STEPS, 0) if device.module.cuda.PagedMemory(8, 0).managed else (0, 0))
    del got
    assert device.module.stream_counts()["allocations"] == before  # freed


def no_join(device, monkeypatch):
    monkeypatch.setattr(paged_cuda.Pages, "join", lambda self: None)


def finish_on_another_stream(device, monkeypatch):
    other = device.module.new_stream()
    monkeypatch.setattr(paged_cuda.Pages, "finish", lambda self: self.memory.finish(self._slot, other))


def step_on_another_stream(device, monkeypatch):
    other = device.module.new_stream()
    original = device.module.cuda.optim_step
    device.optim_step = lambda *args: original(*args[:-1], other)


def finish_before_the_step(device, monkeypatch):
    fetch, join, finish = paged_cuda.Pages.fetch, paged_cuda.Pages.join, paged_cuda.Pages.finish
    fetched = set()

    def fetch_and_note(self, slot):
        fetched.add(self)
        fetch(self, slot)

    def join_and_finish(self):
        join(self)
        if self in fetched:
            fetched.remove(self)
            slot = self._slot
            finish(self)
            self._slot = slot

    monkeypatch.setattr(paged_cuda.Pages, "fetch", fetch_and_note)
    monkeypatch.setattr(paged_cuda.Pages, "join", join_and_finish)
    monkeypatch.setattr(paged_cuda.Pages, "finish", lambda self: None)


@pytest.mark.parametrize("plant", [no_join, finish_on_another_stream, step_on_another_stream, finish_before_the_step])
def test_a_missing_dependency_is_caught(device, monkeypatch, plant):
    """Not in every order, but soon."""
    if "finish" in plant.__name__ and device.module.cuda.PagedMemory(8, 0).managed:
        pytest.skip("only the host waits for it: see below")
    expected = on_cpu("PagedAdamW8bit")
    plant(device, monkeypatch)
    caught = []
    for seed in range(1, 11):
        try:
            caught.append(not right(device, expected, on_device(device, "PagedAdamW8bit", seed)))
        except RuntimeError:  # the checked build: a kernel read what nothing had written yet
            caught.append(True)
            device.module.set_lazy(0)
            device.module.reset()
    assert sum(caught) >= 3, caught


def test_the_host_must_wait_for_what_it_reads(device):
    ones, other = torch.ones(1000), device.module.new_stream()
    with dispatch.override(device, device.stream), mock.patch("warnings.warn"):
        pages = paged_cuda.Pages([((1000,), torch.float32)], torch.zeros(1))
        slot = None if pages.memory.managed else device.allocate(pages.bytes)

        def use(seed, value, finished):
            device.module.set_lazy(seed)
            pages.fetch(slot)
            pages.join()
            device.copy(pages.on_device(pages.tensors[0]), ones * value)
            pages.memory.finish(slot, finished)

        for seed in range(1, 30):
            use(seed, seed, device.stream)
            pages.synchronize()
            assert (pages.tensors[0] == seed).all() and not device.module.stream_counts()["host_accesses"]
        for finished, waits in (
            (device.stream, False),
            (other, True),
        ):  # without waiting; for what is on another stream
            caught = 0
            for seed in range(1, 30):
                use(seed, seed, finished)
                if waits:
                    pages.synchronize()
                caught += not (pages.tensors[0] == seed).all() or device.module.stream_counts()["host_accesses"] > 0
            assert caught > 3


def test_a_gpu_without_concurrent_access_is_said_once(device):
    with dispatch.override(device, device.stream):
        if device.module.cuda.PagedMemory(8, 0).managed:
            paged_cuda.Pages([((3,), torch.float32)], torch.zeros(1))
            return
        with pytest.warns(UserWarning, match="cpu cannot share memory with a running CPU") as record:
            for _ in range(2):
                paged_cuda.Pages([((3,), torch.float32)], torch.zeros(1))
        assert len(record) == 1


def test_slot_is_checked(device):
    if device.module.cuda.PagedMemory(8, 0).managed:
        pytest.skip("unified memory needs no slot")
    memory = device.module.cuda.PagedMemory(100, 0)
    with pytest.raises(ValueError, match="paged: slot: expected a tensor of 100 bytes, got 99"):
        memory.fetch(torch.zeros(99, dtype=torch.uint8), 0)


def test_paged_tensors(device):
    """functional.get_paged and prefetch_tensor on a GPU: numbers are the host's before and after."""
    gpu = torch.device("cpu")
    with dispatch.override(device, device.stream), mock.patch("warnings.warn"):
        x = paged_cuda.get_paged((3, 50), torch.float32, gpu)
        assert not x.any() and x.shape == (3, 50)
        x.fill_(2)
        device.module.set_lazy(1)
        paged.prefetch(x, to_cpu=False, device=gpu)
        paged.prefetch(x, to_cpu=True, device=gpu)
        device.module.synchronize(device.stream)
        counts = device.module.stream_counts()
    moves = int(device.module.cuda.PagedMemory(8, 0).managed)
    assert (counts["prefetches"], counts["page_outs"], counts["copies"]) == (moves, moves, 0)
    assert (x == 2).all()


def test_memory_that_is_not_unified_cannot_be_prefetched(device):
    if not device.module.cuda.PagedMemory(8, 0).managed:
        pytest.skip("only unified memory moves")
    with dispatch.override(device), pytest.raises(RuntimeError, match="prefetch: CUDA error cudaErrorInvalidValue"):
        paged.prefetch(torch.zeros(3), to_cpu=False, device=torch.device("cpu"))
