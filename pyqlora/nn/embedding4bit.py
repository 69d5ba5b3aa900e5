"""Embeddings whose table is stored in 4 bits, and the embedding for 8-bit optimizers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pyqlora import quant
from pyqlora.nn.params4bit import Params4bit
from pyqlora.optim import GlobalOptimManager

logger = logging.getLogger(__name__)


class Embedding4bit(torch.nn.Embedding):
    """`torch.nn.Embedding` with a table of 4 bits per element, quantized when the layer is moved to a device.

    Only the rows looked up are decoded where `embedding_dim` is a multiple of the block size, else the whole table.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        dtype: of the table before quantization, and of the output.
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
        self.quant_state = None
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                "%s: embedding_dim %d is not a multiple of the block size %d, so that every lookup decodes the whole "
                "table: slow inference and training",
                type(self).__name__,
                embedding_dim,
                self.weight.blocksize,
            )

    def forward(self, input: Tensor) -> Tensor:
        """The rows `input` of the table, [*input.shape, embedding_dim].

        Raises:
            ValueError: the table is not quantized yet.
        """
        state = getattr(self.weight, "quant_state", None) or self.quant_state  # FSDP leaves a plain parameter
        if state is None:
            raise ValueError(
                f"{type(self).__name__} is not quantized yet: move it to a device first, e.g. layer.to('cpu')"
            )
        if self.embedding_dim % state.blocksize:
            table = quant.dequantize_4bit(self.weight, state)
            return torch.nn.functional.embedding(input, table).to(self.dtype)
        packed = quant.packed_bytes(self.weight).view(self.num_embeddings, -1)
        rows = quant.QuantState(
            state.absmax.view(self.num_embeddings, -1)[input].flatten(),
            torch.Size((*input.shape, self.embedding_dim)),
            state.code,
            state.blocksize,
            state.quant_type,
            state.dtype,
        )
        return quant.dequantize_4bit(packed[input], rows).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: a quantized table has no place in a state_dict; save the float table instead"
        )


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type "fp4"."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type "nf4"."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding(torch.nn.Embedding):
    """An embedding with Xavier initialisation and 32-bit states in 8-bit optimizers.

    Its gradients are sparse and of very different sizes, which 8-bit states hold badly
    (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861, section 2.3).
    Arguments are those of `torch.nn.Embedding`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any):
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier uniform; the padding row is zero."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` with a layer norm after it, which runs in torch's default dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any):
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = torch.nn.LayerNorm(embedding_dim, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows `input`, in the dtype of the table."""
        return self.norm(super().forward(input).to(torch.get_default_dtype())).to(self.weight.dtype)
