"""QLoRA fine-tuning in 4 bits on native CUDA and CPU kernels, under the API of bitsandbytes and PEFT."""

from pyqlora.matmul import matmul_4bit

__all__ = ["matmul_4bit"]

__version__ = "0.1.0"
