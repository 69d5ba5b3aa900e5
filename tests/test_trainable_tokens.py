"""Training single rows of an embedding."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyqlora import LoraConfig, PeftModel, get_peft_model

pytest.importorskip("transformers")


def config(kind=LoraConfig, **kwargs):
    return kind(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **{"trainable_token_indices": [3, 1, 60], **kwargs}
    )


def ids():
    return torch.tensor([[1, 2, 3, 60, 5], [7, 3, 3, 1, 9]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wanted", [[3, 1, 60], {"embed_tokens": [3, 1, 60]}])
def test_equals_peft_and_moves(tmp_path, tied, wanted):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        tiny.llama(tie_word_embeddings=tied), config(peft.LoraConfig, trainable_token_indices=wanted)
    )
    ours = get_peft_model(tiny.llama(tie_word_embeddings=tied), config(trainable_token_indices=wanted))
    trained = lambda m: {n: p for n, p in m.named_parameters() if p.requires_grad and "lora" not in n}  # noqa: E731
    assert trained(ours).keys() == trained(theirs).keys()
    for model in (theirs, ours):
        for p in trained(model).values():
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    base = tiny.llama(tie_word_embeddings=tied)
    loaded = PeftModel.from_pretrained(base, tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=tied), tmp_path / "ours")
    torch.testing.assert_close(loaded(ids()).logits, ours(ids()).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there(ids()).logits, ours(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_reaches_only_the_rows(tied):
    model = get_peft_model(tiny.llama(tie_word_embeddings=tied), config()).train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    (rows,) = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert rows.shape == (3, 32) and rows.grad.abs().sum() > 0
    with torch.no_grad():
        rows += 1
    changed = model(ids()).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids()).logits, tiny.llama(tie_word_embeddings=tied)(ids()).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, changed, rtol=1e-5, atol=1e-5)


def test_adapters_with_their_own_tokens():
    model = get_peft_model(tiny.llama(), config())
    model.add_adapter("other", config(trainable_token_indices=[5]))
    model.set_adapter("other")
    assert next(n for n, p in model.named_parameters() if p.requires_grad and "delta" in n).endswith("delta.other")
    model.base_model.set_adapter(["default", "other"])
    model.add_adapter("clash", config(trainable_token_indices=[5]))
    with pytest.raises(ValueError, match="Token indices of adapter clash are already defined"):
        model.base_model.set_adapter(["other", "clash"])
    model.delete_adapter("other")
    assert not any("other" in name for name in model.state_dict())


def test_errors():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(tiny.llama(), config(trainable_token_indices={"nothing": [1]}))
    with pytest.raises(ValueError, match="already marked to be trained fully"):
        get_peft_model(
            tiny.llama(), config(trainable_token_indices={"embed_tokens": [1]}, modules_to_save=["embed_tokens"])
        )
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        get_peft_model(tiny.llama(), config(trainable_token_indices={"layers.0.mlp": [1]}))


@pytest.mark.parametrize("tied", [False, True])
def test_merging_writes_the_rows_and_unmerging_restores_them(tied):
    base = tiny.llama(tie_word_embeddings=tied)
    before = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, config(trainable_token_indices=[3, 1])).eval()
    model.add_adapter("other", config(trainable_token_indices=[60]))
    with torch.no_grad():
        for name, rows in model.named_parameters():
            if "trainable_tokens_delta" in name:
                rows += 1
    adapted = model(ids()).logits
    model.merge_adapter(["default"])
    model.base_model.model.get_input_embeddings().set_adapter("other")  # what is merged counts, not what is active
    torch.testing.assert_close(model(ids()).logits, adapted, rtol=1e-5, atol=1e-5)
    model.merge_adapter(["other"])
    assert not torch.allclose(model(ids()).logits, adapted)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.get_input_embeddings().original_module.weight, before)


def test_merging_two_adapters_of_one_token_is_refused():
    model = get_peft_model(tiny.llama(), config(trainable_token_indices=[3, 1]))
    model.add_adapter("other", config(trainable_token_indices=[1, 60]))
    with pytest.raises(ValueError, match="of adapter other are already defined"):
        model.merge_and_unload(adapter_names=["default", "other"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="of adapter other are already defined"):
        model.merge_adapter(["other"])
