"""linear_cross_entropy: the loss of an output layer, in chunks of rows that never hold all logits.

    hidden [M, K], weight [V, K], bias [V]; logits = hidden·weightᵀ + bias is [M, V]
    loss = Σ (logsumexp(logits) − logits[label]) / n

The gradient of a row's logits, (softmax − onehot) / n, needs nothing of other rows. So while a chunk's logits exist,
the forward pass turns them into their gradient in place, and this into the gradients of hidden, weight and bias: the
work of a plain backward pass without its memory. Kept for the backward pass are those gradients, to be multiplied by
that of the loss. Rows without a label are left out of the products. Logits are float32 (float64 for such inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops import lora_linear_cpu as on_cpu
from pyqlora.ops.backend import native
from pyqlora.ops.lora_linear import compute_dtype
from pyqlora.ops.output import empty_output

CHUNK_BYTES = 64 << 20  # of a chunk's logits, unless the caller says how many rows
_GAP = 16  # between rows of logits
_PIECE_BYTES = 8 << 20  # of the weight, where it is converted to the arithmetic's dtype piece by piece


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden · weightᵀ + bias` against `labels`, without ever holding all logits.

    Args:
        hidden: [..., K], the output layer's input; fp32, fp16 or bf16.
        weight: [V, K], of the output layer; trained or frozen.
        labels: [...] integers in [0, V): the class of each row, the next token for a language model.
        bias: [V], of the output layer.
        ignore_index: label of the rows that do not count.
        num_items: what the sum over rows is divided by, such as the trained tokens of all accumulated batches; by
            default the number of rows that count, of which 0 give NaN as in torch.
        chunk: rows whose logits exist at a time; by default as many as have 64 MiB of them, or a few less.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs), differentiable once in hidden, weight and bias.

    Raises:
        ValueError: shapes that do not fit together, a label that is no class, or a chunk below 1.
    """
    _check(hidden, weight, labels, bias, chunk)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    counted = (labels != ignore_index).nonzero().squeeze(1)
    if len(counted) < len(labels):
        rows, labels = rows[counted], labels[counted]
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(
            f"linear_cross_entropy: labels: expected classes in [0, {len(weight)}) or ignore_index={ignore_index}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    dtype = compute_dtype(hidden, weight)
    wide = torch.promote_types(dtype, torch.float32)
    num_items = len(labels) if num_items is None else num_items
    scale = 1 / torch.as_tensor(num_items, dtype=wide, device=hidden.device)
    chunk = chunk or chunk_rows(len(rows), len(weight) * wide.itemsize)
    return _LinearCrossEntropy.apply(rows, weight, bias, labels, scale, chunk, dtype, wide)


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of logits in a chunk, of rows of so many bytes: chunks are of one size, for each reads all of the weight."""
    chunks = math.ceil(rows / max(1, CHUNK_BYTES // row_bytes))
    return math.ceil(rows / chunks) if chunks else 1


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int | None) -> None:
    fits = weight.dim() == 2 and hidden.shape[-1:] == weight.shape[1:] and hidden.shape[:-1] == labels.shape
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"linear_cross_entropy: expected hidden [..., K], weight [V, K], labels [...] and bias [V], got hidden "
            f"{list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}, bias "
            f"{None if bias is None else list(bias.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk: expected at least 1 row, got {chunk}")


def _logits(x: Tensor, weight: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """out [M, V] = x·weightᵀ, multiplied in `dtype`."""
    if on_cpu.serves(x, weight) and out.dtype == torch.float32:
        module, context = native(x)
        return module.logits(x.contiguous(), weight.contiguous(), out, x.shape[1], context)
    for columns, piece in _pieces(weight, dtype):
        out[:, columns] = x.to(dtype) @ piece.t()


def _drows(dlogits: Tensor, weight: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """out [M, K] = dlogits·weight, multiplied in `dtype`."""
    if on_cpu.serves(dlogits, weight, out) and dlogits.dtype == torch.float32:
        module, context = native(out)
        return module.logits_backward(dlogits, weight.contiguous(), out, out.shape[1], context)
    dlogits = dlogits.to(dtype)
    out.copy_(sum(dlogits[:, columns] @ piece for columns, piece in _pieces(weight, dtype)))


def _pieces(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight's rows in `dtype`: whole if that is what they are, else converted a piece at a time."""
    count = len(weight) if weight.dtype == dtype else max(1, _PIECE_BYTES // (weight.shape[1] * dtype.itemsize))
    for first in range(0, len(weight), count):
        piece = slice(first, first + count)
        yield piece, weight[piece].to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, labels, scale, chunk, dtype, wide):
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        losses = torch.empty(len(rows), dtype=wide, device=rows.device)
        drows = torch.zeros_like(rows) if need_rows else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        # Rows a multiple of 4 KB apart would share a few sets of the caches.
        width = len(weight) + (_GAP if len(weight) % 1024 == 0 else 0)
        buffer = empty_output(rows, (min(chunk, len(rows)), width), wide)[:, : len(weight)]
        with torch.autocast(rows.device.type, enabled=False):
            for first in range(0, len(rows), chunk):
                part = slice(first, first + chunk)
                x, label = rows[part], labels[part, None]
                logits = buffer[: len(x)]
                _logits(x, weight, logits, dtype)
                if bias is not None:
                    logits += bias
                logits -= logits.amax(1, keepdim=True)
                of_label = logits.gather(1, label)
                total = logits.exp_().sum(1, keepdim=True)
                losses[part] = (total.log() - of_label).squeeze(1)
                if not (need_rows or need_weight or need_bias):
                    continue
                logits *= scale / total
                dlogits = logits.scatter_add_(1, label, -scale.expand_as(label).contiguous())
                if need_bias:
                    dbias += dlogits.sum(0)
                if need_weight:
                    dweight.addmm_(dlogits.t(), x.to(wide))
                if need_rows:
                    _drows(dlogits, weight, drows[part], dtype)
        ctx.save_for_backward(drows, dweight, dbias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        drows, dweight, dbias = ctx.saved_tensors
        if drows is not None:
            drows = drows * grad.to(drows.dtype)
        if dweight is not None:
            dweight = (dweight * grad).to(ctx.dtypes[0])
        if dbias is not None:
            dbias = (dbias * grad).to(ctx.dtypes[1])
        return drows, dweight, dbias, *(None,) * 5
