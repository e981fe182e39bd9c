"""Trains on a shard folder with TRL in a process of its own: `python trl_steps.py MODEL SHARDS OUT.json`.

The answer: the columns of the data set, and for each step the batch that the model was given and the loss that TRL
logged. The weights before the first step are those in MODEL.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from trl import SFTConfig, SFTTrainer


def main(model: str, shards: str, out: str) -> None:
    config = SFTConfig(
        output_dir=f"{out}.run",
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    dataset = load_from_disk(shards)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset)
    batches: list[dict[str, Any]] = []
    collate = trainer.data_collator

    def recorded(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        batches.append({name: values.tolist() for name, values in batch.items()})
        return batch

    trainer.data_collator = recorded
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    moved = float((trainer.model.get_input_embeddings().weight - before).abs().max())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answer = {
        "columns": dataset.column_names,
        "packs": len(dataset),
        "batches": batches,
        "losses": losses,
        "moved": moved,
    }
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
