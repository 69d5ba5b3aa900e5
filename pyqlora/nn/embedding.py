"""Embeddings: with a table of 4-bit blocks, and with 32-bit optimizer states for a table that is trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pyqlora.nn.module4bit import Module4bit
from pyqlora.nn.params4bit import Params4bit
from pyqlora.optim import GlobalOptimManager
from pyqlora.quant import QuantState, dequantize_4bit, dequantize_blockwise, packed_bytes

logger = logging.getLogger(__name__)


class Embedding4bit(Module4bit, torch.nn.Embedding):
    """`torch.nn.Embedding` with a table of 4 bits per element, quantized when the layer is moved to a device.

    Only the rows that are looked up are decoded, if blocks do not straddle rows (`embedding_dim` a multiple of 64).

    Args:
        num_embeddings: rows of the table.
        embedding_dim: their length.
        dtype: of the float table and of the result.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype whose memory holds the packed bytes.
        device: where the float table is made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                f"{type(self).__name__}: embedding_dim {embedding_dim} is not a multiple of the block size "
                f"{self.weight.blocksize}: every lookup will decode the whole table, which makes inference slow"
            )

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the table at `input` (any shape of indices): [..., embedding_dim] in the layer's dtype.

        Raises:
            ValueError: the table is not quantized yet.
        """
        state = self._state()
        packed = packed_bytes(self.weight.data)
        if self.embedding_dim % state.blocksize:
            return torch.nn.functional.embedding(input, dequantize_4bit(packed, state)).to(self.dtype)
        absmax = state.absmax
        if state.state2 is not None:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        rows = packed.view(self.num_embeddings, -1)[input]
        scales = absmax.view(self.num_embeddings, -1)[input]
        shape = torch.Size((*input.shape, self.embedding_dim))
        found = QuantState(scales.flatten(), shape, None, state.blocksize, state.quant_type, self.dtype)
        return dequantize_4bit(rows.view(-1), found)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding`, Xavier-initialized, whose optimizer states stay in 32 bits; arguments are torch's."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier-uniform values, zeros at padding_idx."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` followed by a layer norm (Dettmers et al., "8-bit Optimizers", https://arxiv.org/abs/2110.02861)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, device: Any = None, **kwargs: Any):
        super().__init__(num_embeddings, embedding_dim, *args, device=device, **kwargs)
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, normalized in torch's default dtype, in the table's dtype."""
        return self.norm(super().forward(input).to(torch.get_default_dtype())).to(self.weight.dtype)
