"""Runs lm_eval in a process of its own: `python reference.py JOBS.json OUT.json`, in the folder that holds the hub.

Each job: name, model (folder), task names, shots. Each answer: the token requests of lm_eval's backend, keyed by task,
document and choice, its samples and its accuracies.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


class Recorder(HFLM):
    """HFLM that keeps the token requests it was given."""

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        self.token_requests = [(texts, ctx, cont) for texts, ctx, cont in requests]
        return super()._loglikelihood_tokens(requests, **options)


def run_job(job: dict[str, Any], tasks: TaskManager) -> dict[str, Any]:
    model = Recorder(pretrained=job["model"], device="cpu", dtype="float32", batch_size=4)
    results = simple_evaluate(
        model,
        tasks=job["tasks"],
        num_fewshot=job["shots"],
        limit=job.get("limit"),
        task_manager=tasks,
        log_samples=True,
    )
    ids = {tuple(texts): (ctx, cont) for texts, ctx, cont in model.token_requests}
    samples = {}
    for task, rows in results["samples"].items():
        for row in rows:
            arguments = [tuple(row["arguments"][number]) for number in range(4)]
            samples[f"{task}/{row['doc_id']}"] = {
                "requests": [ids[pair] for pair in arguments],
                "lls": [float(answer[0][0]) for answer in row["resps"]],
                "prompt_hash": row["prompt_hash"],
                "acc": row["acc"],
                "acc_norm": row.get("acc_norm"),
            }
    return {"samples": samples, "results": {task: dict(row) for task, row in results["results"].items()}}


if __name__ == "__main__":
    manager = TaskManager()
    answers = {job["name"]: run_job(job, manager) for job in json.loads(Path(sys.argv[1]).read_text())}
    Path(sys.argv[2]).write_text(json.dumps(answers, default=str))
