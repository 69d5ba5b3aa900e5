"""Fine-tuning from a model and a data file to an adapter: the library under `pyqlora finetune`."""
