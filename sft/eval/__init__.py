"""MMLU and HellaSwag as lm-evaluation-harness 0.4.13 scores them, and the comparison of two models."""
