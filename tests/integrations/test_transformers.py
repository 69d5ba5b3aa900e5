import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pyqlora import BitsAndBytesConfig, quant
from pyqlora.integrations import transformers as integration
from pyqlora.nn import Linear4bit, Params4bit
from pyqlora.nn.output_layer import OutputLayer
from pyqlora.nn.parametrize import replace_parameter_4bit

SETTINGS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
IDS = torch.arange(20)[None]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def llama(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **kwargs))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama().to(torch.bfloat16).save_pretrained(path)
    return path


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(**SETTINGS), **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


@pytest.fixture
def without_registration():
    """transformers as it is without pyqlora."""
    integration.unregister()
    yield
    integration.register()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, None], ids=str)
def test_loading_quantizes_every_linear_layer_but_the_head(base, device_map):
    model = load(base, device_map=device_map)
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds.pop("lm_head") is (OutputLayer if model.device.type == "cpu" else torch.nn.Linear)
    assert len(kinds) == 14 and set(kinds.values()) == {Linear4bit}
    source = transformers.AutoModelForCausalLM.from_pretrained(base).to(model.device)
    for name in kinds:
        packed, state = quant.quantize_4bit(source.get_submodule(name).weight.detach(), 64, "nf4", True)
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Params4bit) and torch.equal(weight.detach(), packed) and weight.quant_state == state
    assert model.dtype == torch.bfloat16 and model.is_quantized
    packed = sum(p.numel() for p in source.model.layers.parameters() if p.dim() == 2) / 2
    rest = 2 * (2 * 128 * 64 + 5 * 64) + sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == packed + rest


def test_skipping_modules(base):
    config = BitsAndBytesConfig(**SETTINGS, llm_int8_skip_modules=["lm_head", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is Linear4bit
    with pytest.raises(ValueError, match="no linear layer to quantize outside of"):
        config = BitsAndBytesConfig(**SETTINGS, llm_int8_skip_modules=["lm_head", "model"])
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading(tied, tmp_path):
    """Twice over: a loaded checkpoint can be saved again."""
    llama(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="auto")
    again.save_pretrained(tmp_path / "b")
    third = load(tmp_path / "b")  # the checkpoint's own configuration wins
    assert torch.equal(logits(again), logits(model)) and torch.equal(logits(third), logits(model))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    saved = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes" and saved["load_in_4bit"] is True


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_checkpoints_equal_bitsandbytes(base, tmp_path, without_registration, device):
    """Same files, byte for byte, quantized where theirs are; each loads the other's to the same dequantized weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    place = {"device_map": {"": device}}
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=transformers.BitsAndBytesConfig(**SETTINGS), **place
    )
    theirs.save_pretrained(tmp_path / "theirs")
    integration.register()
    load(base, **place).save_pretrained(tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", **place)
    integration.unregister()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **place)
    for name, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            ours_weight = ours.get_submodule(name).weight
            expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(quant.dequantize_4bit(ours_weight.detach(), ours_weight.quant_state), expected)
    exact = logits(ours).float()
    assert (logits(theirs).float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_registration_is_reversible(base):
    before = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    integration.unregister()
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is not before
    integration.register()
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is before is integration.Quantizer


def test_transposed_layers_of_gpt2(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, n_positions=32))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    layer = loaded.transformer.h[0].mlp.c_fc
    source = model.transformer.h[0].mlp.c_fc.weight.detach().t().contiguous().to(loaded.device)
    assert type(layer) is Linear4bit and (layer.in_features, layer.out_features) == (64, 256)
    assert torch.equal(layer.weight.detach(), quant.quantize_4bit(source, 64, "nf4", True)[0])
    assert layer.bias.dtype == torch.bfloat16
    exact = logits(model).float()
    assert (logits(loaded).float() - exact).abs().max() < 0.5 * exact.abs().max()


def test_dequantize(base):
    model = load(base)
    expected = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())
    assert not getattr(plain.config, "quantization_config", None)
    assert (logits(plain) - expected).abs().max() < 0.05 * expected.abs().max()


def test_missing_weights_are_said_aloud(base, tmp_path, caplog):
    weights = llama().to(torch.bfloat16).state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    llama().to(torch.bfloat16).save_pretrained(tmp_path, state_dict=weights)
    transformers.logging.get_logger("transformers").propagate = True
    try:
        load(tmp_path)
    finally:
        transformers.logging.get_logger("transformers").propagate = False
    assert "model.layers.1.mlp.up_proj.weight was not quantized" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, torch.float16], ids=str)
def test_slow_products_are_said_aloud(compute_dtype, dtype, device, caplog):
    """Of float16 on a GPU under the config's default; bfloat16 is computed in bfloat16 whatever it says."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype)
    with caplog.at_level("WARNING"):
        integration._report_slow_products(config, dtype, torch.device(device))
    slow = (compute_dtype, dtype, device) == (None, torch.float16, "cuda")
    assert ("Pass bnb_4bit_compute_dtype=torch.float16" in caplog.text) == slow


def test_stacked_experts_are_said_aloud_and_quantize_by_parametrization(tmp_path, caplog):
    """transformers 5 keeps a layer's experts in two tensors of three dimensions, which no linear layer replaces."""
    if not hasattr(transformers, "Qwen3MoeForCausalLM") or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("experts are linear layers before transformers 5")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads))
    base.save_pretrained(tmp_path)
    transformers.logging.get_logger("transformers").propagate = True
    try:
        model = load(tmp_path, dtype=torch.float32)
    finally:
        transformers.logging.get_logger("transformers").propagate = False
    assert "mlp.experts.gate_up_proj (4, 128, 64) was not quantized" in caplog.text
    assert "pyqlora.nn.parametrize.replace_parameter_4bit(module, name)" in caplog.text

    experts, whole = model.model.layers[0].mlp.experts, model.get_memory_footprint()
    wanted = {}
    for name in ("gate_up_proj", "down_proj"):
        packed, state = quant.quantize_4bit(getattr(experts, name).data, 64, "nf4", False)
        wanted[name] = quant.dequantize_4bit(packed, state)
        replace_parameter_4bit(experts, name)
    assert model.get_memory_footprint() < whole / 2
    got = logits(model)
    dense = load(tmp_path, dtype=torch.float32)
    for name, value in wanted.items():
        getattr(dense.model.layers[0].mlp.experts, name).data.copy_(value)
    torch.testing.assert_close(got, logits(dense))


def test_configuration_errors():
    with pytest.raises(ValueError, match=r"load_in_8bit .* is not supported, use load_in_4bit=True"):
        BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="must be nf4 or fp4, got 'nf3'"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf3")


@pytest.mark.parametrize("places", [("cpu", "disk"), (0, "cpu")])
def test_mixed_device_maps_are_refused(base, places):
    device_map = {"model": places[0], "lm_head": places[1]}
    with pytest.raises(ValueError, match="a 4-bit model needs one kind of device"):
        load(base, device_map=device_map)


MEASURE = """
import sys
sys.modules["bitsandbytes"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM
from pyqlora import BitsAndBytesConfig
from pyqlora.nn import Linear4bit

def mib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
place = {"device_map": {"": "cpu"}, "quantization_config": config}
AutoModelForCausalLM.from_pretrained(sys.argv[1], **place)  # everything is imported now
before = mib("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], **place)
states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes + s.state2.code.nbytes for s in states)
print(mib("VmHWM") - before, mib("VmRSS") - before, (model.get_memory_footprint() + scales) / 2**20)
"""


def rss(tensor):
    """KiB that the process has of the mapping in which a tensor begins."""
    with open("/proc/self/smaps") as file:
        maps = re.split(r"^(\w+)-(\w+) .*$", file.read(), flags=re.MULTILINE)[1:]
    held = zip(maps[::3], maps[1::3], maps[2::3], strict=True)
    found = next(text for start, end, text in held if int(start, 16) <= tensor.data_ptr() < int(end, 16))
    return int(found.split("Rss:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_a_file_are_dropped_and_others_kept(tmp_path):
    whole = torch.arange(1 << 18, dtype=torch.int32)
    whole.numpy().tofile(tmp_path / "whole")

    def mapped(shared=False):
        return torch.from_file(str(tmp_path / "whole"), shared=shared, size=len(whole), dtype=torch.int32)

    for weight in (mapped(), mapped(shared=True)):
        assert weight.sum() == whole.sum() and rss(weight) >= 1 << 10
        integration._drop_pages(weight[:2])  # no whole page
        assert rss(weight) >= 1 << 10
        integration._drop_pages(weight)
        assert rss(weight) <= 4 and torch.equal(weight, whole)
    written = mapped()
    written[100_000] = -1
    for weight in (whole.clone(), written):
        expected = weight.tolist()
        integration._drop_pages(weight)
        assert rss(weight) >= 4 and weight.tolist() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_quantized_stays_in_its_file(base):
    """An embedding takes memory for the rows that are used, and none is a copy."""
    embedding = load(base, dtype=torch.bfloat16, device_map={"": "cpu"}).get_input_embeddings().weight
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if line.endswith(".safetensors\n")]
    bounds = [[int(number, 16) for number in fields[0].split("-")] for fields in ranges]
    assert any(start <= embedding.data_ptr() < end for start, end in bounds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_while_loading(base, tmp_path):
    """Resident memory, mapped files included: the quantized model, one tensor, and 16 MiB for all else."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, vocab_size=1000)
    config.num_attention_heads = config.num_key_value_heads = 8
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for param in model.parameters():
        param.data.fill_(0.02)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    size = sum(param.nbytes for param in model.parameters()) / 2**20
    del model
    script = [sys.executable, "-c", MEASURE, str(base), str(tmp_path)]
    peak, after, quantized = map(
        float, subprocess.run(script, check=True, capture_output=True, text=True).stdout.split()
    )
    largest = 1024 * 4096 * 2 / 2**20
    print(f"bfloat16 {size:.0f} MiB, quantized {quantized:.0f} MiB, peak {peak:.0f} MiB, afterwards {after:.0f} MiB")
    assert size > 250 and quantized < 0.3 * size
    assert peak < quantized + largest + 16
    assert after < quantized + 4
