import json

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyqlora import quant
from pyqlora.quant import QuantState

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(shape=(6, 64), dtype=torch.float32, nested=True, quant_type="nf4", blocksize=64):
    return quant.quantize_4bit(random(shape, dtype), blocksize, quant_type, nested)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(quant.BLOCK_SIZES),
    quant_type=st.sampled_from(quant.QUANT_TYPES),
    nested=st.booleans(),
    scale=st.sampled_from((1e-3, 1.0, 30.0)),
)
def test_state_equals_bitsandbytes(shape, dtype, blocksize, quant_type, nested, scale):
    """Packed bytes and every entry of the dictionary, JSON bytes and order of keys included."""
    peer = pytest.importorskip("bitsandbytes.functional")
    x = (scale * random(shape)).to(dtype)
    packed, state = quant.quantize_4bit(x, blocksize, quant_type, nested)
    expected, expected_state = peer.quantize_4bit(x, None, None, blocksize, nested, quant_type)
    ours, theirs = state.as_dict(packed=True), expected_state.as_dict(packed=True)
    assert torch.equal(packed, expected)
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert QuantState.from_dict(dict(theirs), "cpu") == state


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 61), (3, 5, 7), (300, 64)])
def test_dequantize_equals_reference(shape, dtype, nested):
    packed, state = quantized(shape, dtype, nested)
    absmax = reference.scales(*state.scales()) if nested else state.absmax
    expected = reference.dequantize_4bit(packed, absmax, 64, "nf4", shape, dtype)
    assert torch.equal(quant.dequantize_4bit(packed, state), expected)
    out = torch.empty(shape, dtype=torch.float32)
    expected = reference.dequantize_4bit(packed, absmax, 64, "nf4", shape, torch.float32)
    assert quant.dequantize_4bit(packed, state, out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
def test_storage_holds_the_same_bytes(storage):
    packed, state = quant.quantize_4bit(random((16, 64)), 64, "nf4", True, storage)
    plain, _ = quant.quantize_4bit(random((16, 64)), 64, "nf4", True)
    assert packed.shape == (512 // storage.itemsize, 1) and packed.dtype == storage
    assert torch.equal(packed.view(torch.uint8).view(-1), plain.view(-1))
    assert torch.equal(quant.dequantize_4bit(packed, state), quant.dequantize_4bit(plain, state))


def test_double_quantization_by_its_formula():
    x = random((1000, 64))
    _, plain = quant.quantize_4bit(x, 64, "nf4", False)
    _, state = quant.quantize_4bit(x, 64, "nf4", True)
    offset = plain.absmax.mean()
    codes, absmax = reference.quantize_blockwise(plain.absmax - offset, quant.dynamic_map("cpu"), 256)
    assert torch.equal(state.offset, offset)
    assert torch.equal(state.absmax, codes) and torch.equal(state.state2.absmax, absmax)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dictionary_round_trip(packed, nested):
    _, state = quantized(nested=nested)
    entries = state.as_dict(packed=packed)
    assert QuantState.from_dict(dict(entries), "cpu") == state
    assert QuantState.from_dict({f"model.weight.{key}": value for key, value in entries.items()}, "cpu") == state


def test_json_by_its_keys():
    _, state = quantized((6, 64), torch.bfloat16)
    fields = json.loads(bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]))
    assert list(fields) == [
        *("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
    ]
    assert fields["dtype"] == "bfloat16" and fields["shape"] == [6, 64]
    assert torch.tensor(fields["nested_offset"]) == state.offset


def test_dictionary_shares_no_code_table():
    """safetensors refuses tensors that share memory."""
    _, a = quantized()
    _, b = quantized()
    for key in ("quant_map", "nested_quant_map"):
        assert a.as_dict()[key].data_ptr() != b.as_dict()[key].data_ptr()


def test_fsdp_reaches_the_packed_entry_by_name():
    _, state = quantized()
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        _ = state.bitsandbytes__fp4


def test_equality():
    _, state = quantized()
    assert state == quantized()[1]
    assert state != quantized(nested=False)[1]
    assert state != quantized((6, 64), torch.float16)[1]
    assert state != quantized(blocksize=32)[1]
    assert state != quantized(quant_type="fp4")[1]
    assert state != "state"


def test_to_moves_every_tensor():
    _, state = quantized()
    state.to("meta")
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_meta_tensors_quantize_to_meta():
    packed, state = quant.quantize_4bit(torch.empty(6, 65, device="meta"), 64, "nf4", False)
    assert packed.shape == (195, 1) and state.absmax.shape == (7,) and packed.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.clear(), "expected one tensor named"),
        (lambda d: d.update({"quant_state.bitsandbytes__fp4": torch.zeros(2, dtype=torch.uint8)}), "expected one"),
        (lambda d: d.pop("absmax"), r"missing \['absmax'\]"),
        (lambda d: d.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda d: d.update({"quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}), "not hold JSON"),
    ],
)
def test_malformed_dictionaries(change, message):
    entries = quantized()[1].as_dict(packed=True)
    change(entries)
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(entries, "cpu")


def test_unknown_dtype_in_a_dictionary():
    entries = quantized()[1].as_dict() | {"dtype": "float3"}
    with pytest.raises(ValueError, match="'float3' is not a dtype"):
        QuantState.from_dict(entries, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 48, "nf4", False), "invalid blocksize 48"),
        ((torch.zeros(4), 64, "int4", False), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        ((torch.zeros(4, dtype=torch.float64), 64, "nf4", False), "got torch.float64"),
        ((torch.zeros(6), 64, "nf4", False, torch.float32), "3 packed bytes do not fill whole elements"),
    ],
)
def test_quantize_4bit_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        quant.quantize_4bit(*arguments)


def test_dequantize_errors():
    packed, state = quantized()
    with pytest.raises(ValueError, match=r"out must have shape \(6, 64\), got \(64, 6\)"):
        quant.dequantize_4bit(packed, state, torch.empty(64, 6))
    with pytest.raises(ValueError, match="packed"):
        quant.dequantize_4bit(packed[1:].contiguous(), state)
    with pytest.raises(ValueError, match="codes must be uint8"):
        quant.dequantize_blockwise(torch.zeros(4, dtype=torch.int8), state.state2)
    with pytest.raises(ValueError, match="16/32-bit floats"):
        quant.quantize_blockwise(torch.zeros(4, dtype=torch.int32), 256)
