"""A language model's output layer, which is not quantized: its products for single tokens by linear_dense."""

from __future__ import annotations

from torch import Tensor, nn

from pyqlora.ops.backend import is_fast
from pyqlora.ops.linear_dense import linear_dense, serves


class OutputLayer(nn.Linear):
    """`torch.nn.Linear`, whose products of few rows are `linear_dense` where that serves: on a CPU, without gradients.

    They are sums in float32 as torch's, in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias` for x [..., K], in x's dtype."""
        if serves(x, self.weight):
            return linear_dense(x, self.weight, self.bias)
        return super().forward(x)


def use_output_layer(model: nn.Module) -> bool:
    """Make the output layer of a transformers model an `OutputLayer`, if it is a plain nn.Linear on a CPU.

    Its parameters, hooks and name stay as they are.

    Returns:
        Whether it was changed.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or not layer.weight.is_cpu or not is_fast():
        return False
    layer.__class__ = OutputLayer
    return True
