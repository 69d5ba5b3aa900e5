"""Linear layers whose weight is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyqlora.nn.module4bit import Module4bit
from pyqlora.nn.params4bit import Params4bit
from pyqlora.ops.linear_4bit import linear_4bit
from pyqlora.ops.lora_linear_4bit import lora_linear_4bit, prepared, serves
from pyqlora.quant import packed_bytes


class Linear4bit(Module4bit, torch.nn.Linear):
    """`torch.nn.Linear` with a weight of 4 bits per element, quantized when the layer is moved to a device.

    Load float weights, then move: `layer.load_state_dict(float_state); layer.to("cpu")`. A state_dict with quantized
    weights, of this layer or of bitsandbytes, loads as it is. (QLoRA, https://arxiv.org/abs/2305.14314)

    Args:
        input_features: K, the columns of the weight.
        output_features: N, its rows.
        bias: add a bias.
        compute_dtype: inputs are cast to it and results back; None computes in the dtype of the input. Inputs in
            bfloat16 are computed in bfloat16 whatever it is, as in bitsandbytes: float32, the default of transformers'
            config, would leave a GPU's tensor cores unused.
        compress_statistics: quantize the block scales too (double quantization).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype whose memory holds the packed bytes.
        device: where the float weight is made; "meta" makes none.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype

    @property
    def quant_storage(self) -> torch.dtype:
        """The dtype whose memory holds the packed bytes."""
        weight = self._parameters["weight"]
        return getattr(weight, "quant_storage", weight.dtype)

    def _casts(self, dtype: torch.dtype) -> bool:
        """Whether inputs of this dtype are cast."""
        computed = self.compute_dtype
        return computed is not None and computed is not dtype and dtype is not torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias` for x [..., K], in x's dtype.

        Raises:
            ValueError: the weight is not quantized yet.
        """
        state = self._state()
        dtype = x.dtype
        if self._casts(dtype):
            x = x.to(self.compute_dtype)
        with torch._C.DisableTorchFunctionSubclass():  # Params4bit's would cost a microsecond for every attribute
            y = linear_4bit(
                x,
                packed_bytes(self._parameters["weight"]),
                *state.scales(),
                state.blocksize,
                state.quant_type,
                state.shape,
                self._parameters["bias"],
            )
        return y if y.dtype is dtype else y.to(dtype)  # a library's product under autocast has autocast's dtype

    def forward_with_update(self, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor | None:
        """`forward(x)` plus scaling · (drop(x)·Aᵀ)·Bᵀ in one function; None where there is none for x.

        See `pyqlora.ops.lora_linear_4bit`.
        """
        if self._casts(x.dtype) or not serves(x, a, b):
            return None
        state = self._state()
        with torch._C.DisableTorchFunctionSubclass():
            weight = packed_bytes(self._parameters["weight"]), *state.scales(), state.blocksize, state.quant_type
            return lora_linear_4bit(x, weight, state.shape, self._parameters["bias"], a, b, scaling, dropout)

    def prepared_with_update(
        self, x: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Callable[[Tensor], Tensor] | None:
        """`forward_with_update` for x like this one; None where it has to look at the parameters each time.

        See `pyqlora.ops.lora_linear_4bit.prepared`.
        """
        computed = not (isinstance(a, torch.nn.Parameter) and isinstance(b, torch.nn.Parameter))  # for this call
        if computed or torch.is_grad_enabled() or self._casts(x.dtype) or not (x.is_cpu and serves(x, a, b)):
            return None
        state = self._state()
        with torch._C.DisableTorchFunctionSubclass():
            weight = packed_bytes(self._parameters["weight"]), *state.scales(), state.blocksize, state.quant_type
            return prepared(x, a, b, self._parameters["bias"], weight, state.shape, scaling)


class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type "fp4"."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type "nf4", whose values are the quantiles of a normal distribution."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )
