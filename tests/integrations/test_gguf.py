from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf
import tiny_model

from pyqlora.functional import dequantize_4bit
from pyqlora.integrations.gguf import GGUFFile, load_config, load_model
from pyqlora.integrations.gguf_names import BLOCK_NAMES, transformers_name
from pyqlora.integrations.gguf_tokenizer import load_tokenizer
from pyqlora.nn import Linear4bit
from pyqlora.nn.output_layer import OutputLayer

Q8 = gguf.GGMLQuantizationType.Q8_0
TO_GGUF = {v: k for k, v in BLOCK_NAMES.items()}


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows, as its converter writes them."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, architecture="llama", kind=Q8, change=None, skip=(), template=tiny_model.TEMPLATE):
    """The tiny model as a GGUF file; `change` edits the writer's metadata before it is written."""
    model = tiny_model.model()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(tiny_model.HIDDEN)
    writer.add_feed_forward_length(tiny_model.INTERMEDIATE)
    writer.add_block_count(tiny_model.LAYERS)
    writer.add_head_count(tiny_model.HEADS)
    writer.add_head_count_kv(tiny_model.KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    tokens = tiny_model.vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    if change is not None:
        change(writer)
    for name, value in model.state_dict().items():
        name = name.removesuffix(".weight")
        parts = name.split(".")
        if name == "lm_head":
            continue  # tied
        if name == "model.embed_tokens":
            target = "token_embd"
        elif name == "model.norm":
            target = "output_norm"
        else:
            target = f"blk.{parts[2]}.{TO_GGUF['.'.join(parts[3:])]}"
        if target in skip:
            continue
        value = value.numpy()
        if architecture == "llama" and target.endswith(("attn_q", "attn_k")):
            value = pairs_from_halves(value, tiny_model.HEADS if target.endswith("q") else tiny_model.KV_HEADS)
        if value.ndim == 2:
            writer.add_tensor(f"{target}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return GGUFFile(write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


def test_header_equals_the_gguf_packages(file):
    reader = gguf.GGUFReader(file.path)
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors} == {
        name: info.shape for name, info in file.tensors.items()
    }
    assert [info.start for info in file.tensors.values()] == [t.data_offset for t in reader.tensors]
    assert file.metadata["tokenizer.ggml.tokens"] == tiny_model.vocabulary()
    assert file.metadata["llama.attention.head_count"] == tiny_model.HEADS


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
def test_read_equals_the_gguf_packages(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    file = GGUFFile(write(tmp_path / "t.gguf", kind=kind))
    for tensor in gguf.GGUFReader(file.path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert np.array_equal(file.read(tensor.name).numpy(), expected.reshape(file.tensors[tensor.name].shape))


def test_model_is_the_original_up_to_quantization(file):
    """Every 4-bit weight is what Linear4bit makes of the Q8_0 values; everything else is within Q8_0's rounding."""
    original, loaded, decoded = tiny_model.model(), load_model(file), {}
    for name, module in loaded.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        source = original.get_submodule(name).weight
        rounded = gguf.quants.dequantize(gguf.quants.quantize(source.detach().numpy(), Q8), Q8)
        expected = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
        expected.load_state_dict({"weight": torch.from_numpy(rounded)})
        assert torch.equal(module.weight.data, expected.to("cpu").weight.data), name
        decoded[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert isinstance(loaded.model.layers[0].mlp.down_proj, Linear4bit)
    assert type(loaded.lm_head) is OutputLayer
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    scale = original.lm_head.weight.detach().abs().amax() / 127
    assert (loaded.lm_head.weight - original.lm_head.weight).abs().max() <= scale
    decoded["model.embed_tokens.weight"] = decoded["lm_head.weight"] = loaded.lm_head.weight
    original.load_state_dict(original.state_dict() | decoded)
    ids = torch.arange(5, 45).reshape(1, -1)
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


def test_config(file):
    config = load_config(file)
    assert (config.model_type, config.head_dim, config.rope_parameters["rope_theta"]) == ("llama", 16, 10000.0)
    assert config.tie_word_embeddings
    assert config.eos_token_id == 2


def test_tokenizer_equals_the_original(file):
    ours, theirs = load_tokenizer(file), tiny_model.tokenizer()
    text = "<s>in a çay, 123\n  in</s>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "</s>")


@pytest.mark.parametrize(("split", "pieces"), [("gpt-2", ["Ġ", "1", "2"]), ("smollm", ["Ġ", "1", "2"])])
def test_tokenizer_splits(tmp_path, split, pieces):
    file = GGUFFile(write(tmp_path / "t.gguf", change=lambda w: w.add_tokenizer_pre(split)))
    assert load_tokenizer(file).tokenize(" 12") == pieces


@pytest.mark.parametrize(("flag", "first"), [(True, 1), (False, None)])
def test_tokenizer_adds_bos_where_the_file_says_so(tmp_path, flag, first):
    file = GGUFFile(write(tmp_path / "t.gguf", change=lambda w: w.add_add_bos_token(flag)))
    assert load_tokenizer(file)("7")["input_ids"][0] == (first or tiny_model.vocabulary().index("7"))


def test_sentencepiece_tokenizer(tmp_path):
    def change(writer):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b", "▁ab"]
        for key in ("model", "pre", "tokens", "token_type", "merges"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
        writer.add_token_scores([0.0] * 259 + [-4.0, -5.0, -1.0, -6.0, -2.0])

    tokenizer = load_tokenizer(GGUFFile(write(tmp_path / "t.gguf", change=change)))
    ids = tokenizer("ab ab", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁ab", "▁ab"]
    assert tokenizer.decode(ids) == "ab ab"


def test_llama3_frequency_factors(tmp_path):
    factors = np.array([1, 2, 4, 8, 8, 8, 8, 8], np.float32)
    file = GGUFFile(write(tmp_path / "t.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors)))
    plain = tiny_model.model().model.rotary_emb.inv_freq
    torch.testing.assert_close(load_model(file).model.rotary_emb.inv_freq, plain / torch.from_numpy(factors))


@pytest.mark.parametrize("name", ["blk.0.unknown.weight", "per_layer.weight", "blk.1.attn_q"])
def test_unknown_tensors_are_named(name):
    with pytest.raises(ValueError, match=f"GGUF tensor {name} has no known place"):
        transformers_name(name)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "t.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match="is not a GGUF file: it does not start with the bytes 'GGUF'"):
        GGUFFile(tmp_path / "t.gguf")


def test_unknown_version(tmp_path):
    (tmp_path / "t.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ValueError, match="GGUF version 9 is not known, expected 2 or 3"):
        GGUFFile(tmp_path / "t.gguf")


@pytest.mark.parametrize("length", [4, 10, 30, 200, 2000])
def test_header_cut_short(tmp_path, file, length):
    (tmp_path / "t.gguf").write_bytes(file.path.read_bytes()[:length])
    with pytest.raises(ValueError, match="the GGUF header is cut short or damaged at byte"):
        GGUFFile(tmp_path / "t.gguf")


def test_data_cut_short(tmp_path, file):
    (tmp_path / "t.gguf").write_bytes(file.path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"the file ends inside tensor .*; it was not copied whole"):
        load_model(GGUFFile(tmp_path / "t.gguf"))


def test_unknown_architecture(tmp_path):
    with pytest.raises(ValueError, match="GGUF architecture 'mamba' is not supported, expected one of llama, qwen2"):
        load_config(GGUFFile(write(tmp_path / "t.gguf", architecture="mamba")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "mixture-of-experts GGUF files are not supported"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope scaling 'yarn' in a GGUF file is not"),
    ],
)
def test_unsupported_variants(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_config(GGUFFile(write(tmp_path / "t.gguf", change=change)))


def test_unknown_tensor_type(tmp_path, file):
    data = bytearray(file.path.read_bytes())
    name = b"blk.0.attn_k.weight"
    data[data.index(name) + len(name) + 4 + 2 * 8] = 250  # after the name: the number of dimensions, and those
    (tmp_path / "t.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor blk\.0\.attn_k\.weight has GGML type 250, which is not known"):
        load_model(GGUFFile(tmp_path / "t.gguf"))


def test_missing_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight \(1 missing in all\)"):
        load_model(GGUFFile(write(tmp_path / "t.gguf", skip=["blk.1.ffn_up"])))
