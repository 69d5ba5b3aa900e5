"""Several threads on one model: every answer is its own adapter's, and a thousand swaps leave nothing behind."""

from __future__ import annotations

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.hotswap import hotswap_adapter

NAMES = ("red", "green", "blue")
SWAPS = 1000
TARGETS = {"mlp": ["up", "down", "head"], "4-bit": ["up", "down"]}
MODELS = {"mlp": tiny.mlp, "4-bit": tiny.mlp_4bit}
X = torch.linspace(-2, 2, 4 * 11).view(4, 11)


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(kind of model, directories of four adapters of different ranks)."""
    kind, paths = request.param, {}
    for seed, name in enumerate((*NAMES, "new")):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=TARGETS[kind], init_lora_weights=False, r=2 + seed, lora_alpha=5)
        paths[name] = tmp_path_factory.mktemp(name)
        get_peft_model(MODELS[kind](), config).save_pretrained(paths[name])
    return kind, paths


def loaded(saved, names=NAMES):
    kind, paths = saved
    model = PeftModel.from_pretrained(MODELS[kind](), paths[names[0]], names[0])
    for name in names[1:]:
        model.load_adapter(paths[name], name)
    return model


def rows(name):
    """Adapters of a batch's rows: all of one, or of each."""
    return [*NAMES, "__base__"] if name == "all" else [name] * len(X)


def resident() -> int:
    """Bytes that the process holds, without pages of files, which come and go, and what malloc could return."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def tensors() -> int:
    """Tensors that the process holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@torch.no_grad()
def test_no_cross_talk_while_adapters_come_and_go(saved):
    """Servers ask for their own adapter; meanwhile another thread loads and deletes one a thousand times."""
    model = loaded(saved).eval()
    expected = {name: model(X, adapter_names=rows(name)) for name in (*NAMES, "all")}
    assert len({float(value.sum()) for value in expected.values()}) == 4
    done, calls = threading.Event(), []

    def serve(name):
        with torch.no_grad():  # a setting of each thread
            while not done.is_set():
                assert torch.equal(model(X, adapter_names=rows(name)), expected[name]), name
                calls.append(name)
                done.wait(0.05)  # the swaps are what is waited for

    def swap():
        with torch.no_grad():
            before = None
            for i in range(SWAPS):
                model.load_adapter(saved[1]["new"], "new")
                model.delete_adapter("new")
                if i == SWAPS // 10:
                    before = tensors(), resident()
        return before

    with ThreadPoolExecutor(len(expected) + 1) as pool:
        servers = [pool.submit(serve, name) for name in expected]
        swapper = pool.submit(swap)
        try:
            before = swapper.result()
        finally:
            done.set()
        for server in servers:
            server.result()
    assert set(calls) == set(expected)
    assert abs(tensors() - before[0]) < 50  # the servers' own, at that moment
    assert resident() - before[1] < 8 << 20


@torch.no_grad()
def test_memory_is_flat_over_a_thousand_hot_swaps(saved):
    """Ranks go up and down, and the model ends as it began."""
    model = loaded(saved, ("red",)).eval()
    expected = model(X)
    for i in range(SWAPS):
        hotswap_adapter(model, saved[1]["green" if i % 2 == 0 else "red"], "red")
        if i == SWAPS // 10:
            before = tensors(), resident()
    assert tensors() == before[0]
    assert resident() - before[1] < 8 << 20
    torch.testing.assert_close(model(X), expected)


@torch.no_grad()
def test_set_adapter_a_thousand_times(saved):
    model = loaded(saved).eval()
    expected = {}
    for name in NAMES:
        model.set_adapter(name)
        expected[name] = model(X)
    before = tensors()
    for i in range(SWAPS):
        model.set_adapter(name := NAMES[i % 3], inference_mode=True)
        if i % 50 == 0:
            assert torch.equal(model(X), expected[name])
    assert tensors() == before


@torch.no_grad()
def test_several_threads_load_at_once(saved):
    """Adapters loaded side by side by threads are all whole."""
    model = loaded(saved, ("red",)).eval()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: model.load_adapter(saved[1]["green"], f"green{i}"), range(12)))
    expected = loaded(saved, ("green",)).eval()(X)
    for i in range(12):
        torch.testing.assert_close(model(X, adapter_names=[f"green{i}"] * len(X)), expected)


def test_generation_from_threads():
    """transformers' generate, every thread with its own adapter on a model with 4-bit layers."""
    pytest.importorskip("transformers")
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False), "red")
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4))
    tiny.randomize(model)
    model.eval()
    ids = torch.arange(1, 9).reshape(1, -1)

    def answer(name):
        return model.generate(
            input_ids=ids, adapter_names=[name], max_new_tokens=12, do_sample=False, eos_token_id=None
        ).tolist()

    expected = {name: answer(name) for name in NAMES}
    assert len({str(text) for text in expected.values()}) == 3
    with ThreadPoolExecutor(3) as pool:
        for name, text in pool.map(lambda name: (name, answer(name)), NAMES * 5):
            assert text == expected[name]
