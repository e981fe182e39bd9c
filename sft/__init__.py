"""Full-parameter supervised fine-tuning with DeepSpeed ZeRO-3: train, export, evaluate, report drift."""

__version__ = "0.1.0"
