"""PeftModel: exchange with PEFT, several adapters, rows, checkpointing, merging a quantized transformer."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
import torch.utils.checkpoint
from torch import nn

from pyqlora import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    cast_mixed_precision_params,
    dense,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], **kwargs})


def adapted(seed=1, **kwargs):
    model = get_peft_model(tiny.mlp(), config(**kwargs))
    tiny.randomize(model, seed)
    return model


def x():
    return torch.randn(3, 11, generator=torch.Generator().manual_seed(4))


# --- exchange with PEFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora_dropout": 0.3, "use_rslora": True},
        {"target_modules": "all-linear", "bias": "all"},
        {"target_modules": SEVEN, "bias": "lora_only", "use_dora": True},
        {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_move_between_peft_and_pyqlora(tmp_path, kwargs):
    peft = pytest.importorskip("peft")
    kwargs = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **kwargs}
    changes = {"attention_bias": kwargs.get("bias", "none") != "none"}
    models = []
    for get, kind in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        base = tiny.llama(**changes)
        torch.manual_seed(11)
        models.append(get(base, kind(**kwargs)).eval())
    theirs, ours = models
    assert type(ours) is PeftModelForCausalLM
    for (name, value), (other_name, other) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other_name and value.requires_grad == other.requires_grad
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    tiny.randomize(theirs)
    tiny.randomize(ours, seed=2)
    ids = torch.randint(1, 64, (2, 7))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    here = PeftModel.from_pretrained(tiny.llama(**changes), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(tiny.llama(**changes), tmp_path / "ours")
    torch.testing.assert_close(here(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in here.parameters() if p is not None)
    again = PeftModel.from_pretrained(tiny.llama(**changes), tmp_path / "ours", is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


def test_print_trainable_parameters_is_pefts_line(capsys):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(tiny.mlp(), peft.LoraConfig(r=4, target_modules=["up"])).print_trainable_parameters()
    want = capsys.readouterr().out
    get_peft_model(tiny.mlp(), LoraConfig(r=4, target_modules=["up"])).print_trainable_parameters()
    assert capsys.readouterr().out == want


def test_parameters_of_4_bit_layers_count_by_element():
    config = LoraConfig(r=4, target_modules=["up"])
    assert get_peft_model(tiny.mlp_4bit(), config).get_nb_trainable_parameters() == (
        get_peft_model(tiny.mlp(), config).get_nb_trainable_parameters()
    )


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_alone(quantized):
    base = tiny.mlp_4bit() if quantized else tiny.mlp()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config(lora_dropout=0.1)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = (model(x()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("reentrant", [False, True, None])
@pytest.mark.parametrize("order", ["prepare", "before", "after"])
def test_gradient_checkpointing_in_any_order(order, reentrant):
    pytest.importorskip("transformers")
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    base = tiny.llama()
    lora = LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM", init_lora_weights=False)
    if order == "prepare":
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
    elif order == "before":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model = get_peft_model(base, lora).train()
    if order == "after":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    ids = torch.randint(1, 64, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = get_peft_model(tiny.llama(), copy.deepcopy(lora)).train()
    plain.load_state_dict(model.state_dict())
    plain(input_ids=ids, labels=ids).loss.backward()
    for (name, ours), (_, want) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.requires_grad == (".lora_" in name)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, want.grad, rtol=1e-5, atol=1e-7)


def test_a_cut_off_gradient_is_said():
    class Checkpointed(type(tiny.mlp())):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

    model = get_peft_model(Checkpointed(), config()).train()
    with pytest.warns(UserWarning, match="No gradient will reach the adapters"):
        model(x())
    model = get_peft_model(Checkpointed(), config()).train()
    model(x().requires_grad_()).sum().backward()
    assert model.get_base_model().up.lora_B["default"].weight.grad is not None


def test_prepare_keeps_dtypes_and_freezes():
    model = prepare_model_for_kbit_training(tiny.mlp(torch.bfloat16), use_gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


# --- several adapters -------------------------------------------------------------------------------------------------


def two():
    model = adapted()
    model.add_adapter("other", config(r=3, target_modules=["up", "head"], lora_dropout=0.5))
    model.set_adapter("other")
    tiny.randomize(model, 9)
    return model.eval()


def trainable(model):
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_for_mixed_precision(dtype):
    model = get_peft_model(tiny.mlp_4bit(), LoraConfig(target_modules=["up"]), autocast_adapter_dtype=False).to(dtype)
    packed = model.base_model.model.up.base_layer.weight
    before = packed.clone()
    cast_mixed_precision_params(model, dtype)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    frozen = [p for p in model.parameters() if not p.requires_grad and getattr(p, "quant_state", None) is None]
    assert frozen and {parameter.dtype for parameter in frozen} == {dtype}
    assert packed.dtype == torch.uint8 and torch.equal(packed, before)


def test_adding_does_not_activate():
    model = adapted()
    want = model(x())
    model.add_adapter("other", config())
    assert model.active_adapter == "default" and trainable(model) == {"default"}
    assert torch.equal(model(x()), want)
    with pytest.raises(ValueError, match="Adapter with name 'other' already exists"):
        model.add_adapter("other", config())


def test_set_disable_delete():
    model = two()
    other = model(x())
    assert trainable(model) == {"other"}
    model.set_adapter("default")
    default = model(x())
    assert trainable(model) == {"default"} and not torch.allclose(other, default)
    model.base_model.set_adapter(["default", "other"])
    both = model(x())
    assert trainable(model) == {"default", "other"} and not torch.allclose(both, default)
    with model.disable_adapter():
        assert torch.equal(model(x()), tiny.mlp()(x())) and not trainable(model)
        with model.disable_adapter():
            pass
        assert torch.equal(model(x()), tiny.mlp()(x()))
    assert torch.equal(model(x()), both) and trainable(model) == {"default", "other"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and torch.equal(model(x()), other)
    assert not any("default" in name for name in model.state_dict())
    model.set_adapter("other", inference_mode=True)
    assert not trainable(model)
    with pytest.raises(ValueError, match="Adapter default not found"):
        model.set_adapter("default")
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")


def test_disabling_a_frozen_adapter_leaves_it_frozen():
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not trainable(model)


def test_deleting_a_merged_adapter_is_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    model.delete_adapter("default")
    torch.testing.assert_close(model(x()), tiny.mlp()(x()))


@pytest.mark.parametrize("name", ["double", "a.b"])
def test_adapter_names_that_torch_cannot_hold(name):
    with pytest.raises(ValueError, match=f"adapter name '{name}'"):
        adapted().add_adapter(name, config())


def test_a_name_like_the_prefix_is_warned_about():
    with pytest.warns(UserWarning, match="'lora' should not be contained in the prefix 'lora_'"):
        get_peft_model(tiny.mlp(), config(), adapter_name="lora")


def test_injection_by_state_dict():
    weights = get_peft_model_state_dict(adapted())
    keys = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    model = inject_adapter_in_model(config(), tiny.mlp(), state_dict=keys)
    assert set_peft_model_state_dict(model, weights).missing_keys == []
    assert torch.equal(model(x()), adapted()(x()))
    with pytest.warns(
        RuntimeWarning, match=r"additional target modules: \['head'\].*additional target modules: \['down'\]"
    ):
        inject_adapter_in_model(config(target_modules=["up", "head"]), tiny.mlp(), state_dict=keys)


def test_failed_addition_leaves_no_trace():
    model = adapted()
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("other", config(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        two_biases = adapted(bias="all")
        two_biases.add_adapter("other", config(bias="lora_only"))


def test_rows_with_their_own_adapters():
    model = two()
    rows = torch.randn(5, 11)
    names = ["other", "__base__", "default", "other", "default"]
    got = model(rows, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = model(rows[i : i + 1])
        else:
            model.set_adapter(name)
            want = model(rows[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-6)


def test_rows_errors():
    model = two()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        model(x(), adapter_names=["typo", "default", "other"])
    with pytest.raises(ValueError, match="but got 2 and 3"):
        model(x(), adapter_names=["default", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x(), adapter_names=["default"] * 3)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(x(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        adapted(use_dora=True).eval()(x(), adapter_names=["default"] * 3)


def test_threads_serve_different_adapters():
    model = two()
    rows = torch.randn(4, 11)
    want = {name: model(rows, adapter_names=[name] * 4) for name in ("default", "other", "__base__")}
    wrong = []

    def serve(name):
        for _ in range(50):
            if not torch.equal(model(rows, adapter_names=[name] * 4), want[name]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in want for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- modules trained whole --------------------------------------------------------------------------------------------


def test_modules_to_save():
    model = adapted(modules_to_save=["head"])
    assert torch.equal(model.get_base_model().head.original_module.weight, tiny.mlp().head.weight)
    assert not torch.equal(model.get_base_model().head.weight, tiny.mlp().head.weight)
    trained = model(x())
    model.add_adapter("other", config())
    model.set_adapter("other")
    torch.testing.assert_close(model(x()), tiny.mlp()(x()))
    model.set_adapter("default")
    assert torch.equal(model(x()), trained)
    with model.disable_adapter():
        assert torch.equal(model(x()), tiny.mlp()(x()))
    torch.testing.assert_close(model.merge_and_unload()(x()), trained)


def test_modules_to_save_refuses_what_cannot_be_trained():
    with pytest.raises(TypeError, match="quantized to 4 bits"):
        get_peft_model(tiny.mlp_4bit(), config(target_modules=["down"], modules_to_save=["up"]))


def test_rows_through_modules_to_save():
    model = adapted(modules_to_save=["head"]).eval()
    names = ["default", "__base__", "default"]
    got = model(x(), adapter_names=names)
    torch.testing.assert_close(got[0::2], model(x())[0::2])
    torch.testing.assert_close(got[1], tiny.mlp()(x())[1])


# --- transformers -----------------------------------------------------------------------------------------------------


def test_generate_and_config():
    pytest.importorskip("transformers")
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    ids = torch.randint(1, 64, (2, 4))
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(out, merged.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False))
    beams = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    rows = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **beams)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, **beams)
    assert torch.equal(rows[1], base[1])
    assert model.config is model.get_base_model().config and model.device.type == "cpu"
    assert model.accepts_loss_kwargs and model._hf_peft_config_loaded
    assert model.get_input_embeddings() is model.get_base_model().get_input_embeddings()


def test_merged_model_stands_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    ids = torch.randint(1, 64, (2, 7))
    want = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_merging_dequantizes_the_whole_model():
    model = get_peft_model(tiny.mlp_4bit(torch.bfloat16), config(target_modules=["up"], init_lora_weights=False))
    merged = model.merge_and_unload()
    assert type(merged.up) is type(merged.down) is nn.Linear and merged.down.weight.dtype == torch.bfloat16
    assert torch.equal(merged.down.weight, dense.read(tiny.mlp_4bit(torch.bfloat16).down).bfloat16())
    model = get_peft_model(tiny.mlp_4bit(), config(target_modules=["up"], init_lora_weights=False))
    merged = model.merge_and_unload(requantize=True, progressbar=True)
    assert dense.is_4bit(merged.up) and dense.is_4bit(merged.down)


def test_merging_a_tied_embedding_unties_it():
    pytest.importorskip("transformers")
    base = tiny.llama(tie_word_embeddings=True)
    base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")).eval()
    tiny.randomize(model)
    ids = torch.randint(1, 64, (2, 7))
    want = model(ids).logits
    with pytest.warns(UserWarning, match="are tied and only one of them is adapted"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_task_heads_are_trained_and_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }

    def bert(kind):
        torch.manual_seed(0)
        return kind(transformers.BertConfig(**sizes)).eval()

    ids = torch.randint(1, 9, (2, 5))
    for kind, task, head in (
        (transformers.BertForSequenceClassification, "SEQ_CLS", "classifier"),
        (transformers.BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (transformers.BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ):
        model = get_peft_model(bert(kind), LoraConfig(task_type=task, r=2)).eval()
        assert any(head in name for name, p in model.named_parameters() if p.requires_grad)
        tiny.randomize(model)
        model.save_pretrained(tmp_path / task)
        loaded = PeftModel.from_pretrained(bert(kind), tmp_path / task)
        assert type(loaded) is type(model)
        assert torch.equal(loaded(input_ids=ids)[0], model(input_ids=ids)[0])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_get_peft_model_errors_and_warnings():
    assert type(get_peft_model(tiny.mlp(), config(task_type="CAUSAL_LM"), mixed=True)) is PeftModel
    base = tiny.mlp()
    get_peft_model(base, config())
    with pytest.warns(UserWarning, match="for a second time"):
        get_peft_model(base, config())
    named = config(base_model_name_or_path="somewhere", revision="a")
    with pytest.warns(UserWarning, match="renamed from 'somewhere'|overwriting with revision b"):
        get_peft_model(tiny.mlp(), named, revision="b")
    assert named.revision == "b"
    with pytest.raises(TypeError, match=r"expected a LoraConfig, got dict: \{'r': 8\}"):
        get_peft_model(tiny.mlp(), {"r": 8})
    for r in (0, 8.0, "8"):
        with pytest.raises(ValueError, match=f"`r` should be a positive integer value but the value passed is {r}"):
            get_peft_model(tiny.mlp(), config(r=r))


def test_from_pretrained_wants_a_config(tmp_path):
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(tiny.mlp(), tmp_path, config={"r": 3})
    assert issubclass(LoraConfig, PeftConfig)


def test_low_cpu_mem_usage(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.mlp(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(model(x()), adapted()(x()))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_half_precision_adapters_are_widened_unless_told_not_to():
    for widened in (True, False):
        model = get_peft_model(tiny.mlp(torch.bfloat16), config(), autocast_adapter_dtype=widened)
        weight = model.get_base_model().up.lora_A["default"].weight
        assert weight.dtype == (torch.float32 if widened else torch.bfloat16)
        assert model(x().bfloat16()).dtype == torch.bfloat16
