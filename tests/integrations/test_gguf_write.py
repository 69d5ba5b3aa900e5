from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import gguf
import tiny
import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pyqlora import LoraConfig, get_peft_model, set_peft_model_state_dict
from pyqlora.cli.app import run
from pyqlora.integrations.gguf import GGUFFile, load_model
from pyqlora.integrations.gguf_adapter import read_adapter, write_adapter
from pyqlora.integrations.gguf_names import architecture_of, gguf_name, transformers_name
from pyqlora.integrations.gguf_tokenizer import load_tokenizer
from pyqlora.integrations.gguf_write import check, write_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"query_pre_attn_scalar": 256, "sliding_window": 32, "head_dim": 256}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# model type, settings, whether transformers reads the same from the file as we do
MODELS = {
    "llama": ("llama", {}, True),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, True),
    "llama, biases": ("llama", {"attention_bias": True}, False),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}, False),
    "mistral": ("mistral", {}, True),
    "qwen2": ("qwen2", {}, True),
    "qwen3": ("qwen3", {"head_dim": 128}, True),
    "gemma": ("gemma", {"head_dim": 32}, False),
    "gemma2": ("gemma2", GEMMA, True),
    "gemma3": ("gemma3_text", GEMMA, True),
    "gemma3, scaled": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA3_ROPE}, False),
}
IDS = torch.arange(1, 60).reshape(1, -1)


def build(name):
    """A random model with 1-D parameters that matter."""
    kind, settings, _ = MODELS[name]
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **settings})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.4, 0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@torch.no_grad()
def test_what_is_written_is_the_model_rounded(tmp_path, name, kind):
    """The file's logits are those of the model with every matrix rounded, and nothing else changed."""
    model = build(name)
    write_model(model, None, tmp_path / "m.gguf", kind)
    file = GGUFFile(tmp_path / "m.gguf")
    loaded = load_model(file, quant_type=None)
    encoding = gguf.GGMLQuantizationType[kind.upper()]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            value = parameter.numpy()
            rounded = gguf.quants.dequantize(gguf.quants.quantize(value, encoding), encoding)
            parameter.copy_(torch.from_numpy(rounded.astype(np.float32)))
    expected = model(IDS).logits
    # float32's rounding over three layers: rotary frequencies and 1 + w are rounded once more
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name, (_, _, same) in MODELS.items() if same])
@torch.no_grad()
def test_transformers_reads_the_same(tmp_path, name):
    write_model(build(name), None, tmp_path / "m.gguf", "q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = load_model(GGUFFile(tmp_path / "m.gguf"), quant_type=None)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tmp_path):
    model = tiny.llama(hidden_size=48, intermediate_size=72)
    write_model(model, None, tmp_path / "m.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(kinds.values()) == {"F16", "F32"}
    assert kinds["output_norm.weight"] == "F32"


def byte_level(steps, template="{{ messages }}"):
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "in"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("Ġ", "a"), ("i", "n")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def sentencepiece():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b")]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
TOKENIZERS = {
    "gpt-2": lambda: byte_level(GPT2),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True), *GPT2]),
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_round_trip(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny.llama(vocab_size=len(tokenizer) + 3)
    write_model(model, tokenizer, tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    loaded = load_tokenizer(file)
    # transformers gives sentencepiece's leading space to other pieces than the original: texts without such
    for text in ("ab in a 12", "aab é", *(["<s>a</s>", " a"] if kind != "sentencepiece" else [])):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    assert loaded.chat_template == tokenizer.chat_template
    assert file.metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]"


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@torch.no_grad()
def test_merge_writes_a_gguf_file(tmp_path, capsys, kind):
    """The whole road: an adapter merged on the command line; the file gives the merged model's logits and text."""
    tiny_model.save(tmp_path / "model")
    model = get_peft_model(tiny_model.model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    command = ["merge", tmp_path / "model", tmp_path / "adapter", "-o", tmp_path / "out", "--gguf", kind]
    assert run(list(map(str, command))) == 0
    assert f"out-{kind}.gguf" in capsys.readouterr().out
    file = GGUFFile(tmp_path / "out" / f"out-{kind}.gguf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected, got = merged(IDS).logits, load_model(file, quant_type=None)(IDS).logits
    # bfloat16 values are exact in float16; q8_0 keeps 8 bits of the largest in each block of 32
    assert (got - expected).abs().max() <= (1e-4 if kind == "f16" else 0.2) * expected.abs().max()
    assert (
        load_tokenizer(file)("in a")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "out")("in a").input_ids
    )
    assert run(["chat", str(file.path), "--prompt", "in a", "--max-new-tokens", "2"]) == 0


def adapter(path, name="llama", **config):
    model = build(name)
    config = {"target_modules": ["q_proj", "k_proj", "down_proj"], "init_lora_weights": False, "r": 4, **config}
    model = get_peft_model(model, LoraConfig(**config, task_type="CAUSAL_LM"))
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 6},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=str,
)
@torch.no_grad()
def test_adapter_round_trip(tmp_path, name, config):
    model = adapter(tmp_path / "adapter", name, **config)
    base = build(name)
    write_adapter(tmp_path / "adapter", base.config, tmp_path / "a.gguf")
    read, weights = read_adapter(tmp_path / "a.gguf", base.config)
    loaded = get_peft_model(base, read).eval()
    found = set_peft_model_state_dict(loaded, weights)
    assert not any(found)
    expected = model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_adapter_as_llama_cpp_reads_it(tmp_path):
    """Names, shapes and the update alpha / r · B·A of every tensor, in the base tensor's own row order."""
    model = adapter(tmp_path / "adapter", use_rslora=True, alpha_pattern={"k_proj": 3})
    base = build("llama")
    write_adapter(tmp_path / "adapter", base.config, tmp_path / "a.gguf")
    write_model(base, None, tmp_path / "base.gguf")
    write_model(model.merge_and_unload(), None, tmp_path / "merged.gguf")
    file, before, after = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("a", "base", "merged"))
    assert (file.metadata["general.type"], file.metadata["adapter.type"]) == ("adapter", "lora")
    names = {name.rpartition(".")[0] for name in file.tensors}
    assert names == {f"blk.{i}.{part}.weight" for i in range(3) for part in ("attn_q", "attn_k", "ffn_down")}
    for name in names:
        a, b = file.read(f"{name}.lora_a"), file.read(f"{name}.lora_b")
        assert a.shape[0] == b.shape[1] == 4
        update = file.metadata["adapter.lora.alpha"] / 4 * b @ a
        whole = after.read(name) - before.read(name)
        assert (update - whole).abs().max() < 2**-10 * after.read(name).abs().max()  # two roundings to float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "a mamba model cannot be written as GGUF here, expected one of llama, mistral, qwen"),
        ({"hidden_act": "relu"}, "GGUF's llama has the activation silu, the model has relu"),
        ({"use_sliding_window": True}, "use_sliding_window: GGUF's llama has no sliding window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' cannot be written to a GGUF file of a llama"),
    ],
)
def test_refused_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        check(SimpleNamespace(**{**AutoConfig.for_model("llama").to_dict(), **changes}))


def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="query_pre_attn_scalar 24: GGUF's gemma2 of this size has 256"):
        check(AutoConfig.for_model("gemma2", query_pre_attn_scalar=24))
    with pytest.raises(ValueError, match="kind 'q4' is not known, expected f16 or q8_0"):
        write_model(tiny.llama(), None, tmp_path / "m.gguf", "q4")
    with pytest.raises(ValueError, match=r"model\.rotary: the GGUF architecture llama has no tensor for this"):
        gguf_name("model.rotary", "llama")


def test_refused_tokenizers():
    config = tiny.llama(vocab_size=300).config
    odd = byte_level([pre_tokenizers.Whitespace(), *GPT2])
    with pytest.raises(ValueError, match="splits text in a way that GGUF has no name for here, expected one of gpt-2"):
        check(config, odd)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="a tokenizer of type WordLevel cannot be written as GGUF, expected BPE"):
        check(config, words)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="neither byte-level nor sentencepiece's"):
        check(config, plain)
    with pytest.raises(ValueError, match="the tokenizer has 261 tokens, but the model's embedding 64 rows"):
        check(tiny.llama().config, byte_level(GPT2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: GGUF adapters are plain LoRA; merge it into its model instead"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight has no place in a GGUF adapter"),
        ({"target_modules": ["embed_tokens"]}, r"(embed|lm_head).* has no place in a GGUF adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_adapters(tmp_path, config, message):
    adapter(tmp_path / "adapter", **config)
    with pytest.raises(ValueError, match=message):
        write_adapter(tmp_path / "adapter", build("llama").config, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_reading_what_is_no_adapter_of_this_model(tmp_path):
    write_model(build("llama"), None, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="expected a LoRA adapter, got a GGUF file of type None, adapter None"):
        read_adapter(tmp_path / "m.gguf", build("llama").config)
    adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", build("llama").config, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="this adapter is for a llama model, and the base model is a qwen2"):
        read_adapter(tmp_path / "a.gguf", build("qwen2").config)


@pytest.mark.parametrize("name", MODELS)
def test_names_go_both_ways(name):
    model = build(name)
    architecture = architecture_of(model.config)
    for key in model.state_dict():
        assert transformers_name(gguf_name(key, architecture), architecture) == key
