"""Preflight: what would fail on this cluster, told before a GPU hour is spent."""
