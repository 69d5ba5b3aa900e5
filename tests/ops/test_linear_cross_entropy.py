"""linear_cross_entropy against torch's cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from pyqlora import _C
from pyqlora.ops.linear_cross_entropy import chunk_rows, linear_cross_entropy

IGNORED = -100


def make(rows, k, vocabulary, dtype=torch.float32, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, k, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, k, generator=g) / k**0.5 * 3).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, rows, generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = IGNORED
    labels.view(-1)[-1] = vocabulary - 1
    return hidden, weight, bias, labels


def reference(hidden, weight, bias, labels, num_items=None):
    """The loss and the gradients of hidden, weight and bias in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]).flatten(0, -2)
    total = cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
    loss = total / (num_items or (labels != IGNORED).sum())
    loss.backward()
    return loss.item(), [t.grad for t in leaves]


def close(got, want, dtype, terms):
    """Up to one rounding to dtype, and float32 rounding of sums of that many terms of the tensor's size."""
    bound = torch.finfo(dtype).eps * want.abs() + 2.0**-23 * terms * want.abs().max()
    assert ((got.double() - want).abs() <= bound).all(), ((got.double() - want).abs() - bound).max()


@pytest.mark.parametrize(
    "rows, k, vocabulary", [((1,), 1, 1), ((7,), 5, 3), ((2, 9), 16, 101), ((3, 2, 4), 31, 257), ((5,), 4, 1024)]
)
@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_items", [None, 11])
def test_equals_float64(rows, k, vocabulary, chunk, dtype, num_items):
    hidden, weight, bias, labels = make(rows, k, vocabulary, dtype)
    want, grads = reference(hidden, weight, bias, labels, num_items)
    loss = linear_cross_entropy(hidden, weight, labels, bias, num_items=num_items, chunk=chunk)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    loss.backward()
    for tensor, grad in zip((hidden, weight, bias), grads, strict=True):
        assert tensor.grad.dtype == dtype
        close(tensor.grad, grad, dtype, k + vocabulary + labels.numel())


def test_a_frozen_head_gets_no_gradient_and_none_is_kept_for_it():
    hidden, weight, _, labels = make((40,), 8, 50)
    weight = weight.detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels).backward()
    assert max(shape.numel() for shape in kept) == (labels != IGNORED).sum() * 8 and hidden.grad is not None


def test_no_tensor_of_all_logits():
    """The largest tensor is a chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    hidden, weight, _, labels = make((64,), 4, 300, ignored=0.0)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight.detach(), labels, chunk=8).backward()
    assert largest.numel == 8 * 300


def test_the_loss_may_be_scaled_before_the_backward_pass():
    hidden, weight, _, labels = make((12,), 8, 20)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    (scaled,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) / 4, hidden)
    assert torch.equal(grad / 4, scaled)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, labels = make((5,), 8, 20)
    want, _ = reference(hidden * 1e4, weight, bias, labels)
    assert linear_cross_entropy(hidden * 1e4, weight, labels, bias).item() == pytest.approx(want, rel=1e-5)


def test_nothing_to_predict():
    hidden, weight, _, labels = make((4,), 8, 20)
    labels.fill_(IGNORED)
    assert linear_cross_entropy(hidden, weight, labels).isnan()  # as cross_entropy
    loss = linear_cross_entropy(hidden, weight, labels, num_items=3)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"hidden \[4, 8\], weight \[20, 8\], labels \[5\]"),
        ({"weight": torch.zeros(20, 7)}, r"weight \[20, 7\]"),
        ({"bias": torch.zeros(3)}, r"bias \[3\]"),
        ({"labels": torch.tensor([0, 1, 2, 20])}, r"classes in \[0, 20\) or ignore_index=-100, got 0 to 20"),
        ({"chunk": 0}, "chunk: expected at least 1 row, got 0"),
    ],
)
def test_errors(change, text):
    hidden, weight, bias, labels = make((4,), 8, 20, ignored=0.0)
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (7, 33, 130), (30, 64, 4099), (9, 300, 8200)])
@pytest.mark.parametrize("gap", [0, 3])
def test_the_output_layer_s_products(m, k, n, dtype, gap):
    """Vocabularies around the part of 4096 that the backward pass sums at a time."""
    g = torch.Generator().manual_seed(m)
    x, weight = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, k, generator=g).to(dtype)
    logits, dlogits = torch.empty(m, n), torch.randn(m, n, generator=g)
    if gap:
        logits, dlogits = (torch.cat((t, torch.full((m, gap), torch.nan)), 1)[:, :n] for t in (logits, dlogits))
    _C.cpu.logits(x, weight, logits, k, 2)
    bound = 2**-23 * (k + 2) * x.double().abs() @ weight.double().abs().T
    assert ((logits - x.double() @ weight.double().T).abs() <= bound).all()
    dx = torch.empty(m, k, dtype=dtype)
    _C.cpu.logits_backward(dlogits, weight, dx, k, 2)
    want = dlogits.double() @ weight.double()
    bound = 2**-23 * (n + 2) * dlogits.double().abs() @ weight.double().abs() + torch.finfo(dtype).eps * want.abs()
    assert ((dx.double() - want).abs() <= bound).all()


def test_errors_of_the_output_layer_s_products():
    x, weight, logits = torch.ones(2, 8), torch.ones(5, 8), torch.ones(2, 5)
    with pytest.raises(ValueError, match="logits: weight: expected rows of 8, got 35"):
        _C.cpu.logits(x, torch.ones(5, 7), logits, 8, 1)
    with pytest.raises(ValueError, match="logits: logits: expected 2 rows of 5, got 5 elements"):
        _C.cpu.logits(x, weight, logits[0], 8, 1)
    with pytest.raises(ValueError, match="logits: logits: expected 2 rows of 5, got 10 elements"):
        _C.cpu.logits(x, weight, torch.ones(5, 4)[:, :2], 8, 1)
    with pytest.raises(ValueError, match="logits: logits: expected a contiguous tensor, or rows of one as in buffer"):
        _C.cpu.logits(x, weight, torch.ones(5, 2).t(), 8, 1)
    with pytest.raises(ValueError, match="logits: k: expected a positive number, got 0"):
        _C.cpu.logits(x, weight, logits, 0, 1)
    with pytest.raises(ValueError, match="logits_backward: dlogits: expected float32, got float16"):
        _C.cpu.logits_backward(logits.half(), weight, x, 8, 1)


@pytest.mark.parametrize(
    ("rows", "columns", "chunk"),
    [(0, 49152, 1), (1, 49152, 1), (341, 49152, 341), (342, 49152, 171), (1024, 49152, 256), (3, 1 << 25, 1)],
)
def test_chunks_are_of_one_size(rows, columns, chunk):
    assert chunk_rows(rows, 4 * columns) == chunk
