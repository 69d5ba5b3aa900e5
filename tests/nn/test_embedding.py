import pytest
import torch

from pyqlora import nn, quant
from pyqlora.optim import GlobalOptimManager

IDS = torch.tensor([[0, 3, 3], [9, 1, 0]])


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 80])
@pytest.mark.parametrize("kind", [nn.EmbeddingNF4, nn.EmbeddingFP4])
def test_rows_of_the_dequantized_table(kind, dim, dtype, storage):
    layer = kind(10, dim, dtype=dtype, quant_storage=storage)
    table = layer.weight.detach().clone()
    layer.to("cpu")
    packed, state = quant.quantize_4bit(table, 64, "nf4" if kind is nn.EmbeddingNF4 else "fp4", False)
    y = layer(IDS)
    assert y.dtype == dtype and torch.equal(y, quant.dequantize_4bit(packed, state)[IDS])


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_round_trip(nested):
    layer = nn.Embedding4bit(10, 64, quant_type="nf4")
    layer.weight.compress_statistics = nested
    layer.to("cpu")
    other = nn.Embedding4bit(10, 64, device="meta")
    other.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(other(IDS), layer(IDS))


def test_forward_before_quantization():
    with pytest.raises(ValueError, match="Embedding4bit is not quantized yet"):
        nn.Embedding4bit(10, 64)(IDS)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.StableEmbedding])
def test_trained_tables_keep_32_bit_states(kind):
    layer = kind(10, 64, padding_idx=3)
    overrides = GlobalOptimManager.get_instance().module_weight_config_triple
    assert any(entry[0] is layer and entry[2] == {"optim_bits": 32} for entry in overrides)
    assert layer.weight.abs().max() <= (6 / 74) ** 0.5 and not layer.weight[3].any()


def test_stable_embedding_is_normalized():
    layer = nn.StableEmbedding(10, 64).to(torch.bfloat16)
    layer.norm.to(torch.float32)
    expected = torch.nn.functional.layer_norm(layer.weight[IDS].float(), (64,)).bfloat16()
    assert torch.equal(layer(IDS), expected)
