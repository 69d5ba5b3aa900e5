"""GGUF files as transformers models: every linear weight goes from its GGUF block type straight into 4 bits.

One tensor at a time is decoded to float32, quantized and dropped, so loading peaks at the quantized model, the
embedding and one tensor. The header is parsed here: gguf.GGUFReader makes several numpy arrays per vocabulary entry,
which takes seconds; decoding the blocks is the gguf package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqlora.integrations.gguf_names import ARCHITECTURES, Architecture, transformers_name

# Value types of the metadata: struct codes by GGUF type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: shape in torch's order, GGML type number, first byte."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int


class GGUFFile:
    """A GGUF file: `metadata` by key, `tensors` by name, blocks mapped from disk.

    Args:
        path: the file.

    Raises:
        ValueError: the file is no GGUF, is cut short, or has a version or type that is not known.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 4
        self.metadata: dict[str, Any] = {}
        try:
            self._read_header()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: the GGUF header is cut short or damaged at byte {self._position}") from error

    def _read_header(self) -> None:
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not known, expected 2 or 3")
        tensor_count, metadata_count = self._unpack("QQ")
        for _ in range(metadata_count):
            key = self._string()
            self.metadata[key] = self._value(*self._unpack("I"))
        entries = []
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._unpack("I")
            shape = tuple(reversed(self._unpack(f"{dimensions}Q")))  # GGML counts the fastest dimension first
            ggml_type, offset = self._unpack("IQ")
            entries.append((name, shape, ggml_type, offset))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        data = -(-self._position // alignment) * alignment
        self.tensors = {
            name: TensorInfo(name, shape, ggml_type, data + offset) for name, shape, ggml_type, offset in entries
        }

    def _unpack(self, format: str) -> tuple:
        values = struct.unpack_from("<" + format, self._map, self._position)
        self._position += struct.calcsize("<" + format)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self._position + length
        if end > len(self._map):
            raise IndexError
        text = self._map[self._position : end].decode("utf-8")
        self._position = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ValueError(f"{self.path}: metadata of type {kind} at byte {self._position} is not known")
        element, count = self._unpack("IQ")
        if element in SCALARS:
            return list(self._unpack(f"{count}{SCALARS[element]}"))
        return [self._value(element) for _ in range(count)]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, decoded to float32.

        Raises:
            ValueError: its GGML type is one the gguf package cannot decode, or the file ends inside it.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.ggml_type)
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.path}: tensor {name} has GGML type {info.ggml_type}, which is not known to the gguf package"
            ) from error
        nbytes = math.prod(info.shape) // block_elements * block_bytes
        if info.start + nbytes > len(self._map):
            raise ValueError(f"{self.path}: the file ends inside tensor {name}; it was not copied whole")
        blocks = np.frombuffer(self._map, np.uint8, nbytes, info.start)
        try:
            values = dequantize(blocks.reshape(-1, info.shape[-1] // block_elements * block_bytes), kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name} has GGML type {kind.name}, which is not supported") from error
        return torch.from_numpy(np.array(values, np.float32)).reshape(info.shape)


def load_config(file: GGUFFile) -> Any:
    """The transformers config that the metadata describes.

    Raises:
        ValueError: the architecture, or a variant of it, is not one of `ARCHITECTURES`.
    """
    from transformers import AutoConfig

    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported, expected one of "
            f"{', '.join(ARCHITECTURES)}; give the model's Hugging Face directory instead"
        )

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{architecture}.{key}", *default)
        if value is None:
            raise ValueError(f"{file.path}: the GGUF metadata lacks {architecture}.{key}")
        return value

    if get("expert_count", 0):
        raise ValueError(f"{file.path}: mixture-of-experts GGUF files are not supported")
    scaling = get("rope.scaling.type", "none")
    if scaling != "none" and (architecture, scaling) != ("gemma3", "linear"):
        raise ValueError(f"{file.path}: rope scaling {scaling!r} in a GGUF file is not supported")
    heads = get("attention.head_count")
    row = ARCHITECTURES[architecture]
    return AutoConfig.for_model(
        row.model_types[0],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", get("embedding_length") // heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(get, architecture),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        **(_gemma(get, row) if row.scalar_layers else {}),
    )


def _rope(get: Callable[..., Any], architecture: str) -> dict[str, Any]:
    """transformers' rope_parameters; Gemma 3 turns its sliding layers by a base of their own."""
    whole = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    if architecture != "gemma3":
        return whole
    if get("rope.scaling.type", "none") == "linear":
        whole |= {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    return {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}


def _gemma(get: Callable[..., Any], row: Architecture) -> dict[str, Any]:
    """What Gemma 2 and 3 have beside a llama's config."""
    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // heads)
    return {
        "query_pre_attn_scalar": row.query_scalar(get("block_count"), heads, hidden, head_dim),
        "sliding_window": get("attention.sliding_window"),
        "attn_logit_softcapping": get("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
    }


def load_model(
    file: GGUFFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quant_type: str | None = "nf4",
) -> Any:
    """A transformers causal language model whose linear layers are `pyqlora.nn.Linear4bit`, except the output layer.

    Args:
        file: the opened GGUF file.
        device: where the model goes.
        dtype: type of everything that is not quantized, and of the computation.
        quant_type: "nf4" or "fp4", double-quantized; None for plain layers.

    Raises:
        ValueError: an architecture or tensor type that is not supported, or tensors missing from the file.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from pyqlora.integrations.rotary import use_cpu_rotary
    from pyqlora.nn import Linear4bit, Params4bit
    from pyqlora.nn.output_layer import use_output_layer

    config = load_config(file)
    config.dtype = dtype
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if quant_type and type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            quantized = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type=quant_type,
                device="meta",
            )
            model.set_submodule(name, quantized)
    architecture = file.metadata["general.architecture"]
    for name in file.tensors:
        target = transformers_name(name, architecture)
        if target is None:
            continue
        value = ARCHITECTURES[architecture].from_gguf(name, file.read(name), config)
        owner, leaf = target.rsplit(".", 1)
        module = model.get_submodule(owner)
        if isinstance(module, Linear4bit) and leaf == "weight":
            module.weight = Params4bit(
                value.to(dtype), requires_grad=False, compress_statistics=True, quant_type=quant_type, module=module
            ).to(device)
        else:
            setattr(module, leaf, torch.nn.Parameter(value.to(device, dtype), requires_grad=False))
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{file.path}: the file has no tensor for {missing[0]} ({len(missing)} missing in all)")
    if "rope_freqs.weight" in file.tensors:  # Llama 3's frequency factors
        model.model.rotary_emb.inv_freq.div_(file.read("rope_freqs.weight"))
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.name_or_path = str(file.path)
    model.to(device).eval()
    if quant_type:
        use_output_layer(model)
        use_cpu_rotary(model)
    return model
