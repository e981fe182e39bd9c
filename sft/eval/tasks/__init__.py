"""Benchmarks as data: rows of the public files become items; no torch, no tokenizer."""
