"""Offline data preparation: Alpaca-style JSON to packed, tokenized Arrow shards. Never imports torch."""
