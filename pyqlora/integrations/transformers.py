"""Quantized loading and saving through transformers' own `from_pretrained` and `save_pretrained`.

Importing this module (`from pyqlora import BitsAndBytesConfig` does) calls `register()`: from then on in this process
transformers hands every 4-bit bitsandbytes model to pyqlora: those quantized while they load, and checkpoints that
were saved quantized, whoever wrote them. `unregister()` takes it back. bitsandbytes need not be installed.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from pyqlora.integrations.rotary import use_cpu_rotary
from pyqlora.nn import Linear4bit, Params4bit
from pyqlora.nn.output_layer import use_output_layer
from pyqlora.quant import PACKED_KEY, QUANT_TYPES, dequantize_4bit

logger = transformers.logging.get_logger(__name__)

PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))  # of Linux' pagemap
METHOD = "bitsandbytes_4bit"
STATE_KEYS = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *(PACKED_KEY + quant_type for quant_type in QUANT_TYPES),
)


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """How to quantize a model while it loads: transformers' class of this name, its 4-bit arguments.

    Args (the others are `transformers.BitsAndBytesConfig`'s):
        load_in_4bit: quantize to 4 bits.
        bnb_4bit_quant_type: "fp4" or "nf4".
        bnb_4bit_use_double_quant: quantize the block scales too.
        bnb_4bit_compute_dtype: dtype of the matrix products.
        bnb_4bit_quant_storage: dtype whose memory holds the packed bytes.
        llm_int8_skip_modules: modules to leave as they are, by name or pattern; by default the output embedding, and
            whatever is tied to it.

    Raises:
        ValueError: load_in_8bit, or an unknown quantization type.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.load_in_8bit:
            raise ValueError("BitsAndBytesConfig: load_in_8bit (LLM.int8) is not supported, use load_in_4bit=True")
        if self.bnb_4bit_quant_type not in QUANT_TYPES:
            raise ValueError(
                f"BitsAndBytesConfig: bnb_4bit_quant_type must be nf4 or fp4, got {self.bnb_4bit_quant_type!r}"
            )


class Quantizer(HfQuantizer):
    """Puts `Linear4bit` in the place of linear layers, and their weights in 4 bits as they arrive from the files."""

    requires_calibration = False
    quantized_element_size = 0.5
    serialized_names = {"weight": ["weight", *(f"weight.{key}" for key in STATE_KEYS)]}  # noqa: RUF012

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map that leaves some modules on a CPU or a disk beside a GPU, unless the config allows it."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        offload = self.quantization_config.llm_int8_enable_fp32_cpu_offload
        if "disk" in places or (len(places) > 1 and "cpu" in places and not offload):
            raise ValueError(
                f"device_map puts modules on {sorted(places)}: a 4-bit model needs one kind of device; use a smaller "
                "model, or llm_int8_enable_fp32_cpu_offload=True with a device_map whose CPU modules stay unquantized"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """No device map means the current GPU, or the CPU where there is none."""
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave a tenth of each device for the tensor that is being quantized."""
        return {device: 0.9 * size for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is the weight of a `Linear4bit`."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        if config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
            skip += [name for name, place in device_map.items() if place == "cpu"]
        _replace_linear(model, skip, config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # state_dict writes what Deserialize reads by itself: nothing to revert when the model is saved again
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, Deserialize) for op in getattr(conversion, "operations", ()))
        ]
        use_output_layer(model)
        use_cpu_rotary(model)
        _report_unquantized(model)
        _report_slow_products(self.quantization_config, model.dtype, model.device)
        _trim_heap()
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes one weight on its way from the file to the model."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type]:
        """What builds one weight from the entries of a quantized checkpoint."""
        return {"deserialize": Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Which entries of a quantized checkpoint make up one weight."""
        if not self.pre_quantized:
            return []
        return [WeightConverter(self.serialized_names["weight"], "weight", [Deserialize(self)])]

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                state = module.weight.quant_state
                weight = dequantize_4bit(module.weight.data, state).to(dtype or state.dtype)
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight, linear.bias = nn.Parameter(weight), module.bias
                model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        """Quantized models are saved in bitsandbytes' layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on a quantized model can be trained."""
        return True


class Quantize(ConversionOps):
    """One float weight to `Params4bit`, on the device it was loaded to."""

    def __init__(self, hf_quantizer: Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, Params4bit]:
        """Quantize each tensor of `input_dict`, which is keyed by the parameter's full name."""
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            if module.source_cls is Conv1D:  # [in, out]
                value = value.T.contiguous()
            result[name] = module.weight._like(value).to(value.device)
            module._is_hf_initialized = True
            _drop_pages(value)
        return result


class Deserialize(ConversionOps):
    """The entries of one weight in a quantized checkpoint to `Params4bit`."""

    def __init__(self, hf_quantizer: Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Build the parameter; a weight that is alone in the checkpoint was not quantized and stays as it is."""
        entries = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        weight = entries.pop("weight")
        module, _ = get_module_from_name(model, full_layer_name)
        if not entries:
            return {"weight": weight}
        module._is_hf_initialized = True
        return {"weight": Params4bit.from_prequantized(weight, entries, device=weight.device, module=module)}


def _replace_linear(model: nn.Module, skip: list[str], config: transformers.BitsAndBytesConfig) -> None:
    """Replace every nn.Linear and Conv1D outside `skip` by a `Linear4bit` without data."""
    replaced = False
    for name, module in list(model.named_modules()):
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)) or not should_convert_module(name, skip):
            continue
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        layer = Linear4bit(
            columns,
            rows,
            bias=False,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            device="meta",
        )
        layer.bias = module.bias
        layer.source_cls = type(module)
        model.set_submodule(name, layer.requires_grad_(False))
        replaced = True
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize outside of {sorted(skip)}: load it without "
            "quantization_config, or change llm_int8_skip_modules"
        )


def _drop_pages(weight: Tensor) -> None:
    """Let go of the pages of a weight that is read no more, if it is a view of a file.

    Weights on a CPU are views of memory-mapped files, whose pages count as resident until the file is closed, which is
    after the last weight: without this the peak is the whole unquantized model. The pages stay in the system's cache.
    Memory of any other kind, and pages that were written to, would lose their contents: they are left alone.
    """
    if sys.platform != "linux" or weight.device.type != "cpu":
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE)
    count = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE - first
    if count < 1:
        return
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # 64 bits a page
        pagemap.seek(8 * first)
        pages = np.frombuffer(pagemap.read(8 * count), np.uint64)
    if np.isin(pages & (PRESENT | SWAPPED | OF_FILE), (0, PRESENT | OF_FILE)).all():
        start, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)


def _trim_heap() -> None:
    """Have glibc return what it keeps between the tensors that stay: a tenth of what 8 billion parameters take."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _report_unquantized(model: nn.Module) -> None:
    """Warn about weights that stayed in floating point though they are neither skipped layers nor torch's own."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and not getattr(module.weight, "bnb_quantized", False):
            logger.warning(f"{name}.weight was not quantized: the checkpoint has no weights for it")
        if type(module).__module__.startswith("torch."):
            continue
        for key, param in module.named_parameters(recurse=False):
            if param.dim() > 2 and param.is_floating_point():
                size = param.numel() * param.element_size() / 2**20
                logger.warning(
                    f"{name}.{key} {tuple(param.shape)} was not quantized: {size:.0f} MiB in {param.dtype}; "
                    "pyqlora.nn.parametrize.replace_parameter_4bit(module, name) quantizes a parameter of any shape"
                )


def _report_slow_products(config: transformers.BitsAndBytesConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Warn where the config's default widens what a GPU would multiply many times faster."""
    if device.type == "cuda" and dtype == torch.float16 and config.bnb_4bit_compute_dtype == torch.float32:
        logger.warning(
            "The model is in float16, and bnb_4bit_compute_dtype is float32, its default: products in float32 leave "
            "the GPU's tensor cores unused, which is slow. Pass bnb_4bit_compute_dtype=torch.float16"
        )


def register() -> None:
    """Hand transformers' 4-bit bitsandbytes models to pyqlora, in this process."""
    _before.setdefault(METHOD, AUTO_QUANTIZER_MAPPING[METHOD])
    AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer


def unregister() -> None:
    """Undo `register()`."""
    AUTO_QUANTIZER_MAPPING.update(_before)


_before: dict[str, type] = {}
register()
