"""What lm_eval and we are both asked."""

from dataclasses import dataclass
from typing import Any

MMLU = ("mmlu_anatomy", "mmlu_high_school_us_history")
HELLASWAG = ("hellaswag",)
INSTRUCTION = "Answer well."
"""Needs the delimiter before a description."""
INSTRUCTION_LINE = "Antworte kurz: \u00a0"
"""Ends in a blank, and so needs none."""


@dataclass(frozen=True)
class Job:
    """One run of lm_eval, and the options that make ours the same."""

    name: str
    model: str
    tasks: tuple[str, ...]
    shots: int
    limit: int | None = None
    """Items of each task (of each subject)."""
    chat: str = "none"
    system_instruction: str | None = None
    compat: str = "lm_eval>=0.4.9.2"
    dtype: str = "float32"
    hub: str = "hub"
    """Folder of the data, which is lm_eval's working directory."""
    world: int = 1
    """More than one: only the requests of lm_eval's ranks are built, nothing is scored."""

    @property
    def task(self) -> str:
        """Our name."""
        return self.tasks[0].split("_", maxsplit=1)[0]

    def options(self) -> dict[str, Any]:
        """Of `sft eval`, without data, out and engine."""
        return {
            "tasks": [self.task],
            "shots": {self.task: self.shots, "hellaswag_world": self.world},
            "limit": self.limit,
            "chat": self.chat,
            "system_instruction": self.system_instruction,
            "compat": self.compat,
        }


JOBS = (
    Job("mmlu-5", "bos", MMLU, 5),
    Job("hellaswag-0", "bos", HELLASWAG, 0),
    Job("hellaswag-10", "bos", HELLASWAG, 10),
    Job("mmlu-5-nobos", "nobos", MMLU, 5, 4),
    Job("hellaswag-0-nobos", "nobos", HELLASWAG, 0, 10),
    Job("mmlu-5-short", "short", MMLU, 5, 4),
    Job("hellaswag-10-short", "short", HELLASWAG, 10, 10),
    Job("mmlu-5-bytes", "bytes", MMLU, 5, 4),
    Job("hellaswag-10-bytes", "bytes", HELLASWAG, 10, 10),
    Job("hellaswag-10-world2", "bos", HELLASWAG, 10, world=2),
    Job("mmlu-1-system", "bos", MMLU, 1, 4, system_instruction=INSTRUCTION),
    Job("hellaswag-1-system", "bos", HELLASWAG, 1, 10, system_instruction=INSTRUCTION_LINE),
    Job("mmlu-2-turns", "chat", MMLU, 2, 4, chat="multi_turn"),
    Job("mmlu-2-turns-system", "chat", MMLU, 2, 4, chat="multi_turn", system_instruction=INSTRUCTION),
    Job("mmlu-2-turn", "chat", MMLU, 2, 4, chat="single_turn", system_instruction=INSTRUCTION_LINE),
    Job("mmlu-2-turns-refused", "chat-refuses", MMLU, 2, 4, chat="multi_turn", system_instruction=INSTRUCTION),
    Job("mmlu-2-turn-refused", "chat-refuses", MMLU, 2, 4, chat="single_turn"),
    Job("hellaswag-2-turns", "chat", HELLASWAG, 2, 10, chat="multi_turn", system_instruction=INSTRUCTION),
    Job("hellaswag-2-turn", "chat", HELLASWAG, 2, 10, chat="single_turn"),
    Job("mmlu-5-old", "bos", MMLU, 5, 4, compat="lm_eval<=0.4.9.1"),
    Job("hellaswag-0-old", "bos", HELLASWAG, 0, 10, compat="lm_eval<=0.4.9.1"),
    Job("mmlu-2-turns-old", "chat", MMLU, 2, 4, chat="multi_turn", compat="lm_eval<=0.4.9.1"),
    Job("mmlu-5-bf16", "bos", MMLU, 5, 12, dtype="bfloat16"),
    Job("hellaswag-0-bf16", "bos", HELLASWAG, 0, dtype="bfloat16"),
    Job("mmlu-5-all", "bos", ("mmlu",), 5, hub="hub57"),
)
BY_NAME = {job.name: job for job in JOBS}
