"""ensure_weight_tying: one adapter, or one trained copy, for layers that share the input embedding's weight."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.auxiliary import ModulesToSaveWrapper


class Config:
    def __init__(self, tied):
        self.tie_word_embeddings = tied

    def to_dict(self):
        return vars(self)


class Model(nn.Module):
    _tied_weights_keys = ["lm_head.weight", "second.weight"]  # noqa: RUF012

    def __init__(self, tied=True):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 6)
        self.second = nn.Embedding(13, 6)
        self.linear = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 13, bias=False)
        self.second.weight = self.lm_head.weight = self.embed_tokens.weight
        self.config = Config(tied)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        return self.lm_head(self.linear(self.embed_tokens(tokens) + self.second(tokens + 1)))


def model(tied=True):
    torch.manual_seed(0)
    return Model(tied)


def tokens():
    return torch.arange(10).view(2, 5)


def config(targets, **changes):
    return LoraConfig(
        **{"r": 2, "target_modules": targets, "init_lora_weights": False, "ensure_weight_tying": True, **changes}
    )


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "linear"], ".*(lm_head|embed_tokens)$"])
def test_one_adapter_serves_all_tied_layers(tmp_path, targets):
    adapted = get_peft_model(model(), config(targets))
    root = adapted.base_model.model
    a, b = root.embed_tokens.lora_embedding_A["default"], root.embed_tokens.lora_embedding_B["default"]
    assert torch.equal(root.lm_head.lora_A["default"].weight, b.t())
    assert root.second.lora_embedding_A["default"] is a
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sum("embed_tokens" in name for name in names) == 2 and not any("lm_head" in name for name in names)

    delta = root.embed_tokens.scaled_update("default")
    torch.testing.assert_close(root.lm_head.scaled_update("default"), delta)
    plain = model()
    plain.embed_tokens.weight.data += delta
    if "linear" in targets:
        plain.linear.weight.data += root.linear.scaled_update("default")
    want = plain(tokens())
    torch.testing.assert_close(adapted(tokens()), want, rtol=1e-4, atol=1e-4)

    adapted(tokens()).square().sum().backward()
    plain(tokens()).square().sum().backward()
    whole = root.embed_tokens.scaling["default"] * plain.embed_tokens.weight.grad  # the gradient of delta.t() = B·A
    torch.testing.assert_close(b.grad, whole.t() @ a.t(), rtol=1e-4, atol=1e-4)

    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found (missing|unexpected)")
        loaded = PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(loaded(tokens()), want, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert merged.lm_head.weight is merged.embed_tokens.weight is merged.second.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(tokens()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_one_copy_serves_all_tied_modules(tmp_path, saved):
    adapted = get_peft_model(model(), config(["linear"], modules_to_save=saved))
    root = adapted.base_model.model
    wrappers = [root.embed_tokens, root.second, root.lm_head]
    assert all(isinstance(wrapper, ModulesToSaveWrapper) for wrapper in wrappers)
    assert len({id(wrapper.modules_to_save["default"].weight) for wrapper in wrappers}) == 1
    root.embed_tokens.modules_to_save["default"].weight.data += 1
    want = adapted(tokens())
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(model(), tmp_path)(tokens()), want)


def test_peft_reads_a_tied_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = get_peft_model(model(), config(["embed_tokens"]))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(loaded(tokens()), adapted(tokens()))


@pytest.mark.parametrize(
    ("tied", "targets", "ensure", "text"),
    [
        (True, ["linear"], True, "no tied modules are added"),
        (False, ["lm_head"], True, "no tied modules were found in the model"),
        (True, ["lm_head"], False, "`ensure_weight_tying` is not set to True"),
    ],
)
def test_what_is_said(tied, targets, ensure, text):
    with pytest.warns(UserWarning, match=text):
        adapted = get_peft_model(model(tied), config(targets, ensure_weight_tying=ensure))
    assert isinstance(adapted.base_model.model.embed_tokens, nn.Embedding)


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_trained_tokens_of_encoder_and_decoder(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**small)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    before = base(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[1, 7]])).logits
    model = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", trainable_token_indices=[5, 7])).eval()
    with torch.no_grad():
        for name, rows in model.named_parameters():
            if "trainable_tokens_delta" in name:
                rows += 1
    inputs = [
        {"input_ids": torch.tensor([[source, 6]]), "decoder_input_ids": torch.tensor([[1, target]])}
        for source, target in [(5, 8), (9, 7)]
    ]
    adapted = [model(**given).logits for given in inputs]
    merged = model.merge_and_unload()
    for given, logits in zip(inputs, adapted, strict=True):
        torch.testing.assert_close(merged(**given).logits, logits, rtol=1e-4, atol=1e-4)
    after = merged(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[1, 7]])).logits
    assert not torch.allclose(after, before)


def test_another_target_may_come_before_the_embedding():
    class Reversed(Model):
        def __init__(self):
            super().__init__()
            self.embed_tokens = self._modules.pop("embed_tokens")  # now the last of the modules

    torch.manual_seed(0)
    adapted = get_peft_model(Reversed(), config(["linear", "embed_tokens"])).base_model.model
    embedding = adapted.embed_tokens
    assert torch.equal(adapted.lm_head.lora_B["default"].weight, embedding.lora_embedding_A["default"].t())
    assert torch.equal(adapted.second.lora_embedding_A["default"], embedding.lora_embedding_A["default"])
    assert "default" in adapted.linear.lora_A
