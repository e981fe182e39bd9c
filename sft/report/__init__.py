"""A run as one page to look at: what its own files say, and nothing else."""
