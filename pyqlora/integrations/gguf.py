"""GGUF files as transformers models: every linear weight goes from its GGUF block type straight into 4 bits.

One tensor at a time is decoded to float32, quantized and dropped, so loading peaks at the quantized model, the
embedding and one tensor. The header is parsed here: gguf.GGUFReader makes several numpy arrays per vocabulary entry,
which takes seconds; decoding the blocks is the gguf package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Value types of the metadata: struct codes by GGUF type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# GGUF's names for the tensors of a decoder block, and transformers'.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How each `tokenizer.ggml.pre` splits text before merging: a regular expression, or None for GPT-2's own.
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3_SPLIT,
    "qwen2": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
SINGLE_DIGITS = ("smollm",)


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
    if get("rope.scaling.type", "none") != "none":
        raise ValueError(f"{file.path}: rope scaling {get('rope.scaling.type')!r} in a GGUF file is not supported")
    heads = get("attention.head_count")
    return AutoConfig.for_model(
        architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", get("embedding_length") // heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def transformers_name(name: str) -> str | None:
    """Where the GGUF tensor `name` belongs in the transformers model; None if it has no counterpart."""
    if name == "rope_freqs.weight":
        return None
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OUTER_NAMES:
        return f"{OUTER_NAMES[parts[0]]}.{parts[1]}"
    raise ValueError(f"GGUF tensor {name} has no known place in a transformers model")


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary rows back from llama.cpp's order (x0 y0 x1 y1 ...) to transformers' (x0 x1 ... y0 y1 ...), per head."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


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

    from pyqlora.nn import Linear4bit, Params4bit

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
    rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in file.tensors:
        target = transformers_name(name)
        if target is None:
            continue
        value = file.read(name)
        block_part = name.split(".")[-2]
        if config.model_type == "llama" and block_part in rotated:
            value = _halves_from_pairs(value, rotated[block_part])
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
    return model.to(device).eval()


def load_tokenizer(file: GGUFFile) -> Any:
    """The fast transformers tokenizer that the metadata describes, with its chat template.

    Byte-level vocabularies with a known way of splitting are built from the header that is already read;
    the others are left to transformers, which reads the file once more.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    metadata = file.metadata
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split not in SPLITS:
        return AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    whole_words = split == "llama-bpe"  # a word that is in the vocabulary is not merged from pieces
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=whole_words))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split in SINGLE_DIGITS else []
    if SPLITS[split] is not None:
        steps.append(pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[split] is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=kind == CONTROL) for t, kind in marked])

    def special(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    bos = special("bos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        ids = [(bos, tokens.index(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding") or special("eos"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
