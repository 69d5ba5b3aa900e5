"""Memory of large results: what is freed is reused, and all of it is never more than was in use at once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from threading import Thread

import pytest
import torch

from pyqlora import _C
from pyqlora.ops.output import LARGE_BYTES, empty_output

MIB = 1 << 20
LIKE = torch.zeros(0)


def output(mib: float) -> torch.Tensor:
    return empty_output(LIKE, (int(mib * MIB),), torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257])
def test_a_tensor_like_any_other(dtype, rows):
    """On both sides of what is large: 256 rows of 1024 bytes."""
    shape = rows, 2, 512 // dtype.itemsize
    x = empty_output(LIKE, shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x._is_view() and not x.requires_grad
    assert x.data_ptr() % 64 == 0
    assert torch.equal(x.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_the_dtype_is_that_of_the_other_tensor():
    for size in (1, LARGE_BYTES):
        assert empty_output(LIKE.half(), (size,)).dtype == torch.float16


def test_other_devices_have_their_own():
    assert empty_output(torch.empty(0, device="meta"), (LARGE_BYTES,)).device.type == "meta"


def test_a_result_may_be_written_to_under_autograd():
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return empty_output(x, x.shape).copy_(x)

        @staticmethod
        def backward(ctx, dy):
            return dy

    x = torch.ones(LARGE_BYTES, requires_grad=True)
    Copy.apply(x).mul_(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_what_is_freed_is_reused():
    x = output(5)
    where, view = x.data_ptr(), x[7:]
    del x
    assert output(5).data_ptr() != where
    del view
    assert output(5).data_ptr() == where


def test_the_last_one_freed_comes_first():
    a, b = output(3), output(3)
    first, second = a.data_ptr(), b.data_ptr()
    del a
    del b
    assert output(3).data_ptr() == second != first


@pytest.mark.parametrize("bytes", [1, 4095, 4096, 4097, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1])
def test_every_byte_is_there(bytes):
    memory = memoryview(_C.cpu.OutputMemory(bytes))
    assert memory.nbytes == bytes and not memory.readonly
    memory[:] = b"\x07" * bytes


def test_there_is_no_such_memory():
    with pytest.raises(RuntimeError, match=f"out of memory: {1 << 60} bytes"):
        _C.cpu.OutputMemory(1 << 60)
    assert len(output(1)) == MIB


def test_threads_do_not_share():
    def work(number: int, wrong: list[int]) -> None:
        for _ in range(50):
            x = output(1 + number % 2).fill_(number)
            if not bool((x == number).all()):
                wrong.append(number)

    wrong: list[int] = []
    threads = [Thread(target=work, args=(number, wrong)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(code: str, *arguments: object) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


RESIDENT = """
import sys, torch
from pyqlora.ops import output
def resident(key="VmRSS"):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) / 1024
"""

ALLOCATE = (
    RESIDENT
    + """
def allocate(mib):
    return output.empty_output(torch.zeros(0), (mib << 20,), torch.uint8).fill_(1)
"""
)

FITTING = (
    ALLOCATE
    + """
block = allocate(50)
where = block.data_ptr()
for mib in (50, 40, 50):
    del block
    block = allocate(mib)
    print(int(block.data_ptr() == where))
"""
)


def test_a_result_that_is_a_fifth_smaller_reuses_it():
    assert run(FITTING) == [1, 1, 1]


SIZES = (
    ALLOCATE
    + """
before = resident()
for mib in (40, 60, 20, 50, 30, 60):
    blocks = [allocate(mib // 10) for _ in range(10)]
    for block in blocks:
        del block
    blocks.clear()
print(resident() - before)
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_stays_than_was_in_use():
    """260 MiB if every size stayed. It is 60, and a few of Python."""
    (stayed,) = run(SIZES)
    assert 55 < stayed < 70


TRAINING = (
    RESIDENT
    + """
from transformers import LlamaConfig, LlamaForCausalLM
import pyqlora
from pyqlora.nn import Linear4bit

torch.set_num_threads(1)
if sys.argv[1] == "heap":
    output.LARGE_BYTES = 1 << 60
torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=16,
                     num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(config)
for name, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
        layer = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer.to("cpu"))
how = {"use_reentrant": False, "context_fn": pyqlora.selective_checkpointing}
model = pyqlora.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
model = pyqlora.get_peft_model(model, pyqlora.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

def step(ids):
    loss = pyqlora.causal_lm_loss(model, ids, input_ids=ids)
    loss.backward()
    model.zero_grad()
    return loss.item()

step(torch.zeros((1, 2), dtype=torch.long))  # libraries take their own memory once
ids = torch.randint(512, (8, 128))
before = resident()
open("/proc/self/clear_refs", "w").write("5")
losses = [step(ids) for _ in range(2)]
print(resident("VmHWM") - before, losses[0], losses[1])
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is what it is about")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has a heap of its own")
def test_training_grows_by_what_it_keeps():
    """16 layers keep 3,072 float32 numbers for each of 1,024 tokens, 192 MiB; gaps in a heap add a quarter of all."""
    pytest.importorskip("transformers")
    (grown, *losses), (in_heap, *same_losses) = (run(TRAINING, where) for where in ("outside", "heap"))
    print(f"grown by {grown:.0f} MiB, in the heap by {in_heap:.0f}")
    assert losses == same_losses
    assert grown < 0.9 * in_heap
