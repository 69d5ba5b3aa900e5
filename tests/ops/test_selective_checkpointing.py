"""Selective checkpointing gives plain checkpointing's bits from half the products, and lets go of what it kept."""

from __future__ import annotations

import copy
import gc
import weakref
from threading import Thread

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pyqlora import (
    _C,
    BitsAndBytesConfig,
    LoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    selective_checkpointing,
)
from pyqlora.nn import Linear4bit
from pyqlora.ops import linear_4bit, lora_linear_4bit
from pyqlora.ops import selective_checkpointing as module
from pyqlora.ops.attention import attention


class Blocks(nn.Module):
    """Residual blocks, each under a checkpoint with the given context_fn, or under none."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.how = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.how)
        return x


def block(width: int = 64, inner: int = 96) -> nn.Module:
    layers = [Linear4bit(width, inner, quant_type="nf4"), nn.Tanh(), Linear4bit(inner, width, quant_type="nf4")]
    return nn.Sequential(nn.LayerNorm(width), *layers)


def adapted(device: torch.device, dropout: float = 0.25, adapters: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=r"blocks\.\d\.[13]", lora_dropout=dropout, init_lora_weights=False)
    model = get_peft_model(Blocks([block() for _ in range(3)]), config)
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", config)
    model.base_model.set_adapter(list(model.peft_config))
    return model.to(device).train()


def gradients(model: nn.Module, x: torch.Tensor, how: dict, backward_passes: int = 1) -> list[torch.Tensor]:
    (model.get_base_model() if hasattr(model, "get_base_model") else model).how = how
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    for left in reversed(range(backward_passes)):
        y.square().sum().backward(retain_graph=left > 0)
    return [y.detach(), x.grad] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def no_layer_known(monkeypatch):
    """What earlier tests taught of layers whose place in memory others take now."""
    monkeypatch.setattr(module, "_needed", set())


@pytest.fixture
def products(monkeypatch):
    """The number of times a 4-bit product is computed going forward."""
    calls = []
    watch(monkeypatch, lambda _: calls.append(1))
    return calls


def watch(monkeypatch, see):
    """`see(y)` for the result of every product with a 4-bit weight going forward."""
    for products in (linear_4bit, lora_linear_4bit):

        def seen(*args, forward=products.forward, **kwargs):
            result = forward(*args, **kwargs)
            see(result if isinstance(result, torch.Tensor) else result[0])
            return result

        monkeypatch.setattr(products, "forward", seen)


def identical(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize("rows", [1, 37])
def test_same_bits_from_half_the_products(backend, products, rows):
    if backend.name == "emulated_checked" and rows > 1:
        pytest.skip("one row tells it")
    model, x = adapted(backend.device), torch.randn(rows, 64).to(backend.device)
    plain = gradients(model, x, {})
    assert len(products) == 12
    # Where a layer's update follows in a second step, its output is needed, which the first time tells.
    for count in (6 if backend.name == "cpu" else 9, 6):
        del products[:]
        assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
        assert len(products) == count


def test_without_adapters(products):
    torch.manual_seed(0)
    model = Blocks([block() for _ in range(2)]).to("cpu")
    x = torch.randn(5, 64)
    plain = gradients(model, x, {})
    del products[:]
    assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
    assert len(products) == 4


def test_two_adapters_do_not_write_into_what_is_kept(products):
    model, x = adapted(torch.device("cpu"), adapters=2), torch.randn(9, 64)
    plain = gradients(model, x, {})
    for count in (9, 6):
        del products[:]
        assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
        assert len(products) == count


class Residual(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_last_output_does_not_stay(monkeypatch, early_stop):
    outputs = []
    watch(monkeypatch, lambda y: outputs.append(weakref.ref(y.untyped_storage())))
    torch.manual_seed(0)
    model = Blocks([Residual(block()) for _ in range(2)]).to("cpu")
    x = torch.randn(5, 64)
    plain = gradients(model, x, {})
    model.zero_grad()
    del outputs[:]
    model.how = {"context_fn": selective_checkpointing}
    with set_checkpoint_early_stop(early_stop):
        y = model(x.clone().requires_grad_())
        assert [ref() is not None for ref in outputs] == [True, False] * 2
        y.square().sum().backward()
        assert len(outputs) == (4 if early_stop else 6)
        assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))


def test_a_last_output_that_is_needed_is_computed_once_and_then_stays(products):
    torch.manual_seed(0)
    model = Blocks([Residual(nn.Sequential(block(), nn.Tanh())) for _ in range(2)]).to("cpu")
    x = torch.randn(5, 64)
    plain = gradients(model, x, {})
    for count in (6, 4, 4):
        del products[:]
        assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
        assert len(products) == count


def test_attention_is_kept_too(monkeypatch):
    calls = []
    native_attention = _C.cpu.attention
    monkeypatch.setattr(_C.cpu, "attention", lambda *args: calls.append(1) or native_attention(*args))

    class Attending(nn.Module):
        def forward(self, x):
            return x + attention(x, x, x, causal=True)

    model, x = Blocks([Attending(), Attending()]), torch.randn(1, 2, 7, 8)
    plain = gradients(model, x, {})
    assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
    assert len(calls) == 4 + 2


def test_an_overwritten_output_is_computed_again(products):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear4bit(32, 32, quant_type="nf4")

        def forward(self, x):
            return self.layer(x).mul_(2).tanh()

    torch.manual_seed(0)
    model, x = Blocks([Overwriting()]).to("cpu"), torch.randn(3, 32)
    plain = gradients(model, x, {})
    del products[:]
    assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
    assert len(products) == 2


def test_calls_that_differ_in_the_repeated_pass_are_computed(products):
    class Swapping(nn.Module):
        """Runs its layers in the other order the second time; the sum is the same."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Linear4bit(32, 32, quant_type="nf4") for _ in range(2))

        def forward(self, x):
            self.layers = self.layers[::-1]
            first, second = (layer(x) for layer in self.layers)
            return torch.tanh(first + second)

    torch.manual_seed(0)
    model, x = Blocks([Swapping()]).to("cpu"), torch.randn(3, 32)
    plain = gradients(copy.deepcopy(model), x, {})
    del products[:]
    assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}))
    assert len(products) == 4


def test_a_second_backward_pass_computes_what_the_first_took(products):
    model, x = adapted(torch.device("cpu")), torch.randn(4, 64)
    plain = gradients(model, x, {}, backward_passes=2)
    assert identical(plain, gradients(model, x, {"context_fn": selective_checkpointing}, backward_passes=2))


def test_checkpoints_within_checkpoints(products):
    how = {"context_fn": selective_checkpointing}
    model, x = adapted(torch.device("cpu")), torch.randn(4, 64)
    plain = gradients(model, x, {})
    outer = Blocks([model.get_base_model()])
    outer.train()
    model.get_base_model().how = how
    x = x.clone().requires_grad_()
    model.zero_grad()
    outer.how = how
    torch.manual_seed(3)
    outer(x).square().sum().backward()
    assert torch.equal(x.grad, plain[1])


def test_threads_keep_their_own():
    model = adapted(torch.device("cpu"), dropout=0.0)
    inputs = [torch.randn(rows, 64) for rows in (3, 8, 5)]
    model.get_base_model().how = {"context_fn": selective_checkpointing}

    def gradient(x: torch.Tensor, out: dict[int, torch.Tensor]) -> None:
        x = x.clone().requires_grad_()
        out[len(x)] = torch.autograd.grad(model(x).square().sum(), x)[0]

    alone, together = {}, {}
    for x in inputs:
        gradient(x, alone)
    for _ in range(5):
        threads = [Thread(target=gradient, args=(x, together)) for x in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(alone[rows], together[rows]) for rows in alone)


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_the_graph(monkeypatch, backward):
    kept = []
    watch(monkeypatch, lambda y: kept.append(weakref.ref(y.untyped_storage())))
    model = adapted(torch.device("cpu"))
    model.get_base_model().how = {"context_fn": selective_checkpointing}
    y = model(torch.randn(3, 64, requires_grad=True))
    assert len(kept) == 6 and all(ref() is not None for ref in kept[::2])
    if backward:
        y.sum().backward()
    del y
    gc.collect()
    assert not any(ref() for ref in kept)


def test_the_trainer_passes_it_on(tmp_path, products):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tiny.llama().save_pretrained(tmp_path / "model")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 64, (4, 12)).tolist()]

    def losses(kwargs: dict) -> list[float]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
        )
        torch.manual_seed(0)
        model = get_peft_model(prepare_model_for_kbit_training(model, True, kwargs), LoraConfig(lora_dropout=0.1))
        arguments = transformers.TrainingArguments(
            tmp_path / "out",
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, whole = losses({"use_reentrant": False}), len(products)
    chosen = losses({"use_reentrant": False, "context_fn": selective_checkpointing})
    assert plain == chosen and len(plain) == 2
    assert (whole, len(products) - whole) == (2 * 2 * 14, 2 * 14)
