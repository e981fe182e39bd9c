"""The peer of benchmarks/train.py: TRL's SFTTrainer on the same packs. Started by it, with the facts as JSON."""

import json
import sys
import time

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_arguments: object, **_state: object) -> None:
        """Start of an optimizer step."""
        self._started = time.perf_counter()

    def on_step_end(self, *_arguments: object, **_state: object) -> None:
        """End of an optimizer step, on a device that may run behind."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)


def main() -> None:
    """Train for the given steps and write {step_time_s, peak_mem_gib}."""
    facts = json.loads(next(argument for argument in sys.argv[1:] if argument.startswith("{")))
    columns = ["input_ids", "labels", "seq_lens"]
    data = load_from_disk(facts["data"]).select_columns(columns).rename_column("seq_lens", "seq_lengths")
    with open(facts["strategy"], encoding="utf-8") as file:
        strategy = json.load(file)
    strategy["gradient_clipping"] = 1.0
    strategy["train_micro_batch_size_per_gpu"] = facts["micro_batch"]
    strategy["gradient_accumulation_steps"] = facts["accumulation"]
    strategy["bf16"] = {"enabled": facts["gpu"]}
    config = SFTConfig(
        output_dir=facts["out"] + ".trl", max_steps=facts["steps"], per_device_train_batch_size=facts["micro_batch"],
        gradient_accumulation_steps=facts["accumulation"], gradient_checkpointing=True, bf16=facts["gpu"],
        use_cpu=not facts["gpu"], padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        deepspeed=strategy, optim="adamw_torch_fused", learning_rate=2e-5, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    attention = "flash_attention_2" if facts["gpu"] and _has_flash() else "sdpa"
    dtype = torch.bfloat16 if facts["gpu"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(facts["model"], dtype=dtype, attn_implementation=attention)
    times = StepTimes()
    tokenizer = AutoTokenizer.from_pretrained(facts["model"])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[times])
    trainer.train()
    if trainer.is_world_process_zero():
        peak = torch.cuda.max_memory_allocated() / 2**30 if facts["gpu"] else None
        with open(facts["out"], "w", encoding="utf-8") as file:
            json.dump({"step_time_s": times.seconds, "peak_mem_gib": peak}, file)


def _has_flash() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


if __name__ == "__main__":
    main()
