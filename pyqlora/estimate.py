"""The memory that fine-tuning needs, part by part, known before anything is loaded.

With P parameters in linear layers, R others (embeddings, norms, the output layer) and T trained ones:

    part                     full fine-tuning    LoRA         QLoRA
    weights                  2 (P + R)           2 (P + R)    P / 2 + b R     b bytes: 2, or 4 in float32; E below
    constants                –                   –            P / 64 · (1 + 4 / 256): a code per block, a scale per 256
    adapters and gradients   2 T, all gradients  8 T          8 T
    optimizer                12 T: a float32 copy and two moments; else by the optimizer, STATE_BYTES per parameter
    activations              with checkpointing every layer's input, and what one layer keeps; selective, the outputs of
                             linear layers and attention too; without, what all layers keep
    logits                   the gradient of their layer's input; a chunk of them, where a layer needs less later
    workspace                –                   –            on a GPU the largest weight, decoded; none on a CPU

On a CPU, a model that computes in 16 bits reads an embedding of its own, E of the R parameters, from its file, a row
for each token, so it takes no memory.

A layer keeps about twice the widths of its linear layers' outputs for each token: every product is an input of
something, and norms, activation functions and attention keep theirs too. Its backward pass has up to three tensors of
the widest one beside that. Attention's own matrix never exists (scaled_dot_product_attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pyqlora import dense
from pyqlora.ops.linear_cross_entropy import chunk_rows

METHODS = ("full fine-tuning", "LoRA", "QLoRA")
CHECKPOINTING = ("none", "selective", "full")  # see pyqlora.selective_checkpointing
PARTS = ("weights", "constants", "adapters and gradients", "optimizer", "activations", "logits", "workspace")
STATE_BYTES = {"paged_adamw_8bit": 2 + 8 / 256, "paged_adamw_32bit": 8, "adamw_torch": 8}
BLOCK, NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model that its memory follows from."""

    linears: tuple[tuple[int, int], ...]  # (outputs, inputs) of every linear layer but the output layer
    others: int  # parameters elsewhere, tied ones counted once
    vocabulary: int
    hidden: int
    layers: int
    embedding: int = 0  # parameters of the input embedding, 0 if they are the output layer's too

    @classmethod
    def of(cls, model: Any) -> Shape:
        """The sizes of a transformers model, loaded or on the meta device, with or without adapters."""
        head = model.get_output_embeddings()
        found = {name: layer for name, layer in model.named_modules() if _is_linear(layer) and layer is not head}
        found = {name: layer for name, layer in found.items() if "lora_" not in name}
        weights = {id(layer.weight) for layer in found.values()}
        others = {id(p): p.numel() for n, p in model.named_parameters() if id(p) not in weights and "lora_" not in n}
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        return cls(
            tuple(_features(layer) for layer in found.values()),
            sum(others.values()),
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            0 if head is None or embedding is head.weight else embedding.numel(),
        )

    @property
    def in_linears(self) -> int:
        """Parameters in linear layers."""
        return sum(n * k for n, k in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.in_linears + self.others

    def adapter(self, r: int) -> int:
        """Parameters of a LoRA adapter of rank r on every linear layer."""
        return sum(r * (n + k) for n, k in self.linears)


@dataclass(frozen=True)
class Run:
    """What is to be trained, and how.

    `trained`: parameters of the adapter. `itemsize`: bytes of a value in the dtype computed in. `checkpointing`: one of
    CHECKPOINTING. `labelled`: tokens of the batch that have a label, None for all.
    """

    batch: int
    length: int
    trained: int
    itemsize: int
    optim: str = "paged_adamw_8bit"
    checkpointing: str = "full"
    labelled: int | None = None
    on_cpu: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length


def parts(shape: Shape, method: str, run: Run) -> dict[str, int]:
    """Bytes of every one of PARTS for one of METHODS, at the highest moment of a training step."""
    base, others = shape.in_linears, shape.others
    full, quantized = method == "full fine-tuning", method == "QLoRA"
    trained = shape.parameters if full else run.trained
    if run.on_cpu and run.itemsize < 4 and not full:
        others -= shape.embedding
    decoded = quantized and not run.on_cpu
    sizes = (
        base / 2 + others * run.itemsize if quantized else 2 * (base + others),
        base / BLOCK * (1 + 4 / NESTED_BLOCK) if quantized else 0,
        2 * trained if full else 8 * trained,
        trained * (12 if full else STATE_BYTES[run.optim]),
        activations(shape, run),
        logits(shape, run),
        max((n * k for n, k in shape.linears), default=0) * run.itemsize if decoded else 0,
    )
    return dict(zip(PARTS, map(int, sizes), strict=True))


def activations(shape: Shape, run: Run) -> int:
    """Bytes kept for the backward pass, and what it adds in one layer."""
    kept, within = _of_a_layer(shape, run)
    if run.checkpointing == "none":
        return int(run.tokens * (shape.layers * kept + within))
    values = shape.layers * shape.hidden
    if run.checkpointing == "selective":  # attention's output in the place of the last layer's, which does not stay
        values += sum(n for n, _ in shape.linears)
    return int(run.tokens * (values * run.itemsize + kept + within))


def logits(shape: Shape, run: Run) -> int:
    """Bytes that the loss keeps, and of a chunk of logits beyond what a layer takes in their place afterwards."""
    kept, within = _of_a_layer(shape, run)
    rows = run.tokens if run.labelled is None else run.labelled
    chunk = 4 * shape.vocabulary * chunk_rows(rows, 4 * shape.vocabulary)
    later = run.tokens * (within if run.checkpointing == "none" else kept + within)
    return int(rows * shape.hidden * run.itemsize + max(0, chunk - later))


def _of_a_layer(shape: Shape, run: Run) -> tuple[float, float]:
    """Bytes for each token that a layer keeps for its backward pass, and that this adds."""
    widest = max((n for n, _ in shape.linears), default=0)
    kept = 2 * run.itemsize * sum(n for n, _ in shape.linears) / shape.layers
    if run.on_cpu:
        kept = max(0, kept - run.itemsize * (widest + 2 * shape.hidden))  # rms_norm and swiglu keep their inputs alone
    elif run.itemsize < 4:
        kept += 2 * 4 * shape.hidden  # both norms of a layer keep their input in float32
    return kept, 3 * 4 * widest


def total(shape: Shape, method: str, run: Run) -> int:
    """The sum of the parts."""
    return sum(parts(shape, method, run).values())


def largest_batch(shape: Shape, method: str, run: Run, capacity: float) -> int:
    """The largest batch of run.length tokens a row that fits into so many bytes; 0 if not even one row does."""
    return _largest(lambda batch: total(shape, method, replace(run, batch=batch)) <= capacity)


def longest(shape: Shape, method: str, run: Run, capacity: float) -> int:
    """The longest single row, in tokens, that fits into so many bytes."""
    return _largest(lambda length: total(shape, method, replace(run, batch=1, length=length)) <= capacity)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, found by doubling and halving; what fits is below 2⁴⁰."""
    found = 0
    for step in (1 << bit for bit in reversed(range(40))):
        if fits(found + step):
            found += step
    return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or dense.is_transposed(layer)


def _features(layer: nn.Module) -> tuple[int, int]:
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(reversed(layer.weight.shape))  # Conv1D: [in, out]
