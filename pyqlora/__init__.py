"""QLoRA fine-tuning in 4 bits on native CUDA and CPU kernels, under the API of bitsandbytes and PEFT."""

__version__ = "0.1.0"
