"""transformers' models training with pyqlora's norms and gated layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn

import pyqlora
from pyqlora import _C
from pyqlora.integrations.blocks import use_cpu_blocks
from pyqlora.ops import rms_norm, swiglu

transformers = pytest.importorskip("transformers")

# Norms and gated layers that are switched: two norms a block and the last one; Qwen3 has norms of queries and keys.
MODELS = {"Llama": (5, 2), "Mistral": (5, 2), "Qwen2": (5, 2), "Qwen3": (9, 2), "Gemma": (0, 0), "Olmo2": (0, 2)}


def build(name, dtype=torch.float32):
    model = tiny.causal_lm(name, head_dim=8)
    tiny.randomize(model)
    return model.to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """How often each operation was called."""
    calls = {"rms_norm": 0, "swiglu": 0}
    for module, function in ((rms_norm, rms_norm._RmsNorm), (swiglu, swiglu._Swiglu)):
        name = module.__name__.rpartition(".")[2]

        def counted(*args, name=name, apply=function.apply):
            calls[name] += args[0].dim() > 2  # else a trial of use_cpu_blocks
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    return calls


def ids():
    return torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def run(model, train=True):
    """(loss, gradients by name)."""
    model.train(train).zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_is_as_near_to_float64(name, dtype, calls):
    plain = build(name, dtype)
    changed, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert use_cpu_blocks(changed) == sum(MODELS[name])
    assert use_cpu_blocks(changed) == 0  # once is enough
    (got, grads), counted = run(changed), dict(calls)
    assert tuple(counted.values()) == MODELS[name]
    (before, before_grads), (want, want_grads) = run(plain), run(exact)
    assert calls == counted
    slack = 2.0 if dtype == torch.float32 else 1.5  # all else in the model is rounded as before
    unit = torch.finfo(dtype).eps
    assert (got - want).abs() <= (before - want).abs() * slack + unit * want
    assert grads.keys() == before_grads.keys()

    def distance(grads):
        return sum((grads[key].double() - want_grads[key]).square().sum() for key in grads).sqrt()

    assert distance(grads) <= distance(before_grads) * slack
    assert all(grads[key].dtype == dtype for key in grads)
    assert torch.equal(changed.eval()(ids()).logits, plain.eval()(ids()).logits)
    assert calls == counted


def test_what_is_not_the_formula_stays(calls):
    class ShiftedRMSNorm(nn.Module):
        def __init__(self, shift=0.0, after=True, narrow=True, bias=False):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))
            self.eps = 1e-5
            self.shift, self.after, self.narrow = shift, after, narrow
            if bias:
                self.bias = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            wide = x.float()
            eps = self.eps if self.after else 0
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) + self.shift
            return self.weight * (wide.to(x.dtype) if self.narrow else wide)

    class Gated(nn.Module):
        def __init__(self, limit=None, act_fn=None, dropout=False):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn = act_fn or nn.SiLU()
            self.limit, self.dropout = limit, dropout

        def forward(self, x):
            gate = self.gate_proj(x)
            gate = gate if self.limit is None else gate.clamp(max=self.limit)
            product = self.act_fn(gate) * self.up_proj(x)
            return self.down_proj(nn.functional.dropout(product, 0.5, self.training and self.dropout))

    class OtherNorm(ShiftedRMSNorm):
        pass

    assert (
        use_cpu_blocks(
            nn.ModuleList([ShiftedRMSNorm(), Gated(), Gated(act_fn=transformers.activations.ACT2FN["silu"])])
        )
        == 3
    )
    for arguments in ({"shift": 0.01}, {"after": False}, {"narrow": False}, {"bias": True}):
        assert use_cpu_blocks(ShiftedRMSNorm(**arguments)) == 0, arguments
    for arguments in ({"limit": 7.0}, {"act_fn": nn.GELU()}, {"act_fn": nn.ReLU()}, {"dropout": True}):
        assert use_cpu_blocks(Gated(**arguments).eval()) == 0, arguments
    deeper = Gated()
    deeper.norm = nn.LayerNorm(8)
    assert use_cpu_blocks(deeper) == 0
    watched = Gated()
    watched.act_fn.register_forward_hook(lambda *_: None)
    assert use_cpu_blocks(watched) == 0
    assert use_cpu_blocks(OtherNorm()) == 0
    assert use_cpu_blocks(nn.RMSNorm(8)) == 0
    wrapped = Gated()
    wrapped.forward = lambda x: x
    assert use_cpu_blocks(wrapped) == 0
    with torch.device("meta"):
        assert use_cpu_blocks(nn.ModuleList([ShiftedRMSNorm(), Gated()])) == 0


def test_probing_calls_no_hooks_and_changes_nothing():
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    called = []
    for module in model.modules():
        if type(module).__name__ != "SiLUActivation":  # which is tried as it is
            module.register_forward_hook(lambda module, *_: called.append(module))
    assert use_cpu_blocks(model) == 7 and not called
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_slow_cpu_keeps_its_modules():
    _C.cpu.set_isa("scalar")
    try:
        assert use_cpu_blocks(tiny.llama()) == 0
    finally:
        _C.cpu.set_isa("")


def test_hooks_are_called_and_watched_activations_run(calls):
    model = tiny.llama()
    use_cpu_blocks(model)
    block, seen = model.model.layers[0], []
    for module in (block.mlp, block.mlp.gate_proj, block.mlp.down_proj, block.input_layernorm):
        module.register_forward_hook(lambda module, _, output: seen.append(module))
    run(model)
    assert seen == [block.input_layernorm, block.mlp.gate_proj, block.mlp.down_proj, block.mlp]
    assert calls == {"rms_norm": 5, "swiglu": 2}
    outputs = []
    block.mlp.act_fn.register_forward_hook(lambda *args: outputs.append(args))
    model.model.layers[1].mlp.act_fn = nn.GELU()
    run(model)
    assert len(outputs) == 1 and calls["swiglu"] == 2


def test_copies_and_pickles_train_alike_and_own_forwards_go_first(calls):
    model = tiny.llama()
    use_cpu_blocks(model)
    norm = model.model.norm
    assert type(norm).__name__ == "LlamaRMSNorm" and isinstance(
        norm, transformers.models.llama.modeling_llama.LlamaRMSNorm
    )
    want, _ = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.update(rms_norm=0, swiglu=0)
        assert torch.equal(run(other)[0], want)
        assert calls == {"rms_norm": 5, "swiglu": 2}
        assert other.model.norm.weight is not norm.weight
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(norm, hooks.ModelHook())
    run(model)
    hooks.remove_hook_from_module(norm)
    calls.update(rms_norm=0)
    assert torch.equal(run(model)[0], want) and calls["rms_norm"] == 5
    assert model.state_dict().keys() == tiny.llama().state_dict().keys()


def test_other_dtypes_devices_and_modes_take_torchs_way(calls):
    model = tiny.llama()
    use_cpu_blocks(model)
    model.double()
    run(model)
    run(model.float(), train=False)
    model.to("meta").train()(input_ids=ids().to("meta"))
    assert calls == {"rms_norm": 0, "swiglu": 0}


@pytest.mark.parametrize("first", ["adapter", "blocks"])
def test_with_adapters_and_merged(first, calls, tmp_path):
    config = pyqlora.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.llama()
    if first == "blocks":
        assert use_cpu_blocks(model) == 7
    model = pyqlora.get_peft_model(model, config)
    if first == "adapter":
        assert use_cpu_blocks(model) == 7
    tiny.randomize(model)
    loss, grads = run(model)
    assert calls == {"rms_norm": 5, "swiglu": 2} and len(grads) == 28
    plain = pyqlora.get_peft_model(tiny.llama(), config)
    tiny.randomize(plain)
    want, want_grads = run(plain)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-6)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.norm) is transformers.models.llama.modeling_llama.LlamaRMSNorm
    torch.testing.assert_close(loaded.eval()(ids()).logits, merged.eval()(ids()).logits)
    assert "pyqlora" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}, "selective"], ids=str)
def test_prepared_models_checkpoint_alike(checkpointing, calls):
    if checkpointing == "selective":
        checkpointing = {"use_reentrant": False, "context_fn": pyqlora.selective_checkpointing}
    config = pyqlora.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)

    def prepared(**kwargs):
        model = pyqlora.get_peft_model(pyqlora.prepare_model_for_kbit_training(tiny.llama(), **kwargs), config)
        tiny.randomize(model)
        return run(model)

    loss, grads = prepared(gradient_checkpointing_kwargs=checkpointing)
    assert calls == {"rms_norm": 9, "swiglu": 4}
    want, want_grads = prepared(use_gradient_checkpointing=False)
    assert torch.equal(loss, want) and grads.keys() == want_grads.keys()
    assert all(torch.equal(grads[key], want_grads[key]) for key in grads)


def test_compiled_models_trace_the_formula(calls):
    model = tiny.llama()
    use_cpu_blocks(model)
    want, want_grads = run(copy.deepcopy(model))
    calls.update(rms_norm=0, swiglu=0)
    compiled = torch.compile(model.train(), backend="aot_eager")
    loss = compiled(input_ids=ids(), labels=ids()).loss
    loss.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(model.model.norm.weight.grad, want_grads["model.norm.weight"], rtol=1e-4, atol=1e-6)
    assert calls == {"rms_norm": 0, "swiglu": 0}


def test_trainer_trains_with_them(calls, tmp_path):
    model = pyqlora.prepare_model_for_kbit_training(tiny.llama())
    model = pyqlora.get_peft_model(model, pyqlora.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert calls == {"rms_norm": 18, "swiglu": 8}
