"""The peer of benchmarks/prep.py: TRL's own path from JSONL to packs. Started by it, with the facts as JSON.

`datasets.map` of the Alpaca template and the tokenizer, as SFTTrainer tokenises prompt and completion, then
`trl.pack_dataset(strategy="bfd")`, then `save_to_disk`.
"""

import json
import sys
import time

STARTED_S = time.perf_counter()

from datasets import load_dataset  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import pack_dataset  # noqa: E402

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def main() -> None:
    """Prepare one file, and write how long each stage took."""
    facts = json.loads(sys.argv[1])
    laps_s = {"imports": time.perf_counter() - STARTED_S}
    last_s = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last_s
        now_s = time.perf_counter()
        laps_s[name], last_s = now_s - last_s, now_s

    tokenizer = AutoTokenizer.from_pretrained(facts["tokenizer"], local_files_only=True)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        template = WITH_INPUT if row["input"] else WITHOUT_INPUT
        prompt = template.format(instruction=row["instruction"], input=row["input"])
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(prompt + row["output"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": ids, "completion_mask": [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))}

    rows = load_dataset("json", data_files=facts["rows"], split="train", cache_dir=facts["cache"])
    lap("load")
    encoded = rows.map(encode, num_proc=facts["workers"], remove_columns=rows.column_names)
    lap("map")
    fits = encoded.filter(lambda row: len(row["input_ids"]) <= facts["seq_len"], num_proc=facts["workers"])
    packs = pack_dataset(fits.with_format("arrow"), facts["seq_len"], strategy="bfd")
    lap("pack")
    packs.save_to_disk(facts["out"])
    lap("save")
    tokens = sum(len(ids) for ids in packs.with_format("numpy")["input_ids"])
    with open(facts["result"], "w", encoding="utf-8") as file:
        json.dump({"laps_s": laps_s, "packs": len(packs), "fill": tokens / len(packs) / facts["seq_len"]}, file)


if __name__ == "__main__":
    main()
