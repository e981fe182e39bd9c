"""What lm_eval and we are both asked."""

MMLU = [f"mmlu_{subject}" for subject in ("anatomy", "high_school_us_history")]
JOBS = [  # name, tokenizer and model, tasks, shots
    ("mmlu-5", "bos", MMLU, 5),
    ("hellaswag-0", "bos", ["hellaswag"], 0),
    ("hellaswag-10", "bos", ["hellaswag"], 10),
    ("mmlu-5-nobos", "nobos", MMLU, 5),
    ("hellaswag-0-nobos", "nobos", ["hellaswag"], 0),
    ("mmlu-5-short", "short", MMLU, 5),
    ("hellaswag-10-short", "short", ["hellaswag"], 10),
    ("mmlu-5-bytes", "bytes", MMLU, 5),
    ("hellaswag-10-bytes", "bytes", ["hellaswag"], 10),
]
