"""A GGUF file's tokenizer as a fast transformers tokenizer, and the other way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqlora.integrations.gguf import GGUFFile

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # how sentencepiece writes a space
UNMERGED = -1e6  # the score of a sentencepiece token that no merge makes

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


def write_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write a fast tokenizer's vocabulary, merges, special tokens and chat template.

    Args:
        writer: a gguf.GGUFWriter.
        tokenizer: byte-level with a known way of splitting (`SPLITS`), or sentencepiece's BPE.
        vocab_size: rows of the embedding; tokens are added up to it.

    Raises:
        ValueError: a tokenizer that llama.cpp would read differently, or with more tokens than the embedding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}
    if spec["model"]["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {spec['model']['type']} cannot be written as GGUF, expected BPE")
    tokens, kinds = _vocabulary(tokenizer, spec, vocab_size)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["model"]["merges"]]
    steps = _steps(spec["pre_tokenizer"])
    if any(step["type"] == "ByteLevel" for step in steps):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(steps))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    elif spec["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge), rank)
        writer.add_token_scores([-float(ranks[token]) if token in ranks else UNMERGED for token in tokens])
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE))
    else:
        raise ValueError("this tokenizer is neither byte-level nor sentencepiece's, so GGUF has no name for it")
    for key in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{key}_token_id")
        if index is not None:
            getattr(writer, f"add_{key}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(tokenizer: Any, spec: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids without a token become unused ones."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(names) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(names) + 1} tokens, but the model's embedding {vocab_size} rows")
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if spec["model"].get("byte_fallback") else set()

    def kind(index: int, token: str) -> int:
        if index not in names:
            return UNUSED
        if token == tokenizer.unk_token and byte_tokens:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index] else USER_DEFINED
        return BYTE if token in byte_tokens else NORMAL

    return tokens, [kind(index, token) for index, token in enumerate(tokens)]


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _split_name(steps: list[dict]) -> str:
    """The `tokenizer.ggml.pre` of a byte-level tokenizer's steps.

    Raises:
        ValueError: none of those known here.
    """
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    regexes = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    own = any(step["type"] == "ByteLevel" and step["use_regex"] for step in steps)
    known = {"Digits", "Split", "ByteLevel"} >= {step["type"] for step in steps} and len(regexes) < 2
    for name, split in SPLITS.items():
        if known and (regexes or [None])[0] == split and digits == (name in SINGLE_DIGITS) and own == (split is None):
            return name
    raise ValueError(
        "this tokenizer splits text in a way that GGUF has no name for here, expected one of " + ", ".join(SPLITS)
    )
