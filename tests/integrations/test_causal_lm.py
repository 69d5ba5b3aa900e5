from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
import transformers

import pyqlora
from pyqlora.integrations import causal_lm, trainer
from pyqlora.integrations.causal_lm import causal_lm_loss, output_layer


def batch():
    ids = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    return ids, labels


def lora(model):
    config = pyqlora.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = pyqlora.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, loss, expected):
    """Loss and gradients, up to float32 rounding of a few hundred terms."""
    model.zero_grad()
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients(model).keys() == wanted.keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item())


class Wrapper(torch.nn.Module):
    """As those of torch.nn.parallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("wrap", [lambda model: model, lora, lambda model: Wrapper(lora(model))])
def test_equals_the_models_own_loss(num_items, wrap):
    model = wrap(tiny_model.model())
    ids, labels = batch()
    expected = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
    same(model, causal_lm_loss(model, labels, num_items, input_ids=ids, chunk=3), expected)


def test_the_output_layer_does_not_run_and_is_left_as_it_was():
    model = tiny_model.model()
    calls = []
    ids, labels = batch()
    model.lm_head.forward = calls.append
    causal_lm_loss(model, labels, input_ids=ids).backward()
    assert calls == [] and model.lm_head.forward == calls.append
    del model.lm_head.forward
    causal_lm_loss(model, labels, input_ids=ids).backward()
    assert "forward" not in model.lm_head.__dict__


def test_a_model_that_changes_its_logits_gets_its_own_loss():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    model = transformers.Gemma2ForCausalLM(config)
    ids = torch.randint(64, (2, 9))
    for _ in range(2):
        same(model, causal_lm_loss(model, ids, input_ids=ids), model(input_ids=ids, labels=ids).loss)


def test_where_the_output_layer_is_not_taken():
    model = tiny_model.model()
    assert output_layer(model) is model.lm_head
    assert output_layer(torch.nn.Linear(2, 2)) is None
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert output_layer(model) is None
    handle.remove()
    adapted = copy.deepcopy(model)
    config = pyqlora.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    assert output_layer(pyqlora.get_peft_model(adapted, config)) is None
    model.loss_function = lambda *args, **kwargs: None
    assert output_layer(model) is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_computes_the_same_losses_in_chunks(tmp_path, accumulation, monkeypatch):
    calls = []
    chunked = causal_lm.linear_cross_entropy
    monkeypatch.setattr(causal_lm, "linear_cross_entropy", lambda *a, **k: calls.append(1) or chunked(*a, **k))
    rows = [{"input_ids": torch.randint(3, 200, (12,)), "labels": torch.arange(12) % 5 - 100} for _ in range(8)]
    for row in rows:
        row["labels"] = torch.where(row["labels"] == -100, row["labels"], row["input_ids"])

    def losses(register):
        model = lora(tiny_model.model())  # this registers
        if not register:
            trainer.unregister()
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        loop = transformers.Trainer(model, arguments, train_dataset=rows)
        loop.train()
        return [entry["loss"] for entry in loop.state.log_history if "loss" in entry]

    try:
        plain, before = losses(register=False), len(calls)
        assert losses(register=True) == pytest.approx(plain, abs=2e-4)  # logged to four places
        assert before == 0 and len(calls) == 3 * accumulation
    finally:
        trainer.unregister()
