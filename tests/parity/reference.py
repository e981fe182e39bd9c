"""Runs lm_eval in a process of its own: `python reference.py JOBS.json OUT.json`, in the folder that holds the hubs.

Each job: the fields of jobs.Job; `model` is a folder. Each answer: the token requests of lm_eval's backend, keyed by
task, document and choice, its samples and its accuracies.
"""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string


class Recorder(HFLM):
    """HFLM that keeps the token requests it was given."""

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        self.token_requests = [(texts, ctx, cont) for texts, ctx, cont in requests]
        return super()._loglikelihood_tokens(requests, **options)


@cache
def load(model: str, dtype: str, compat: str) -> Recorder:
    """add_bos_token=False was the default until 0.4.9.1, and still means the same."""
    bos = {} if compat == "lm_eval>=0.4.9.2" else {"add_bos_token": False}
    return Recorder(pretrained=model, device="cpu", dtype=dtype, batch_size=4, **bos)


def run_job(job: dict[str, Any], tasks: TaskManager) -> dict[str, Any]:
    os.chdir(job["hub"])
    model = load(job["model"], job["dtype"], job["compat"])
    if job["world"] > 1:
        return {"samples": build_ranks(job, model, tasks)}
    results = simple_evaluate(
        model,
        tasks=list(job["tasks"]),
        num_fewshot=job["shots"],
        limit=job["limit"],
        task_manager=tasks,
        log_samples=True,
        system_instruction=job["system_instruction"],
        apply_chat_template=job["chat"] != "none",
        fewshot_as_multiturn=job["chat"] == "multi_turn",
    )
    ids = {tuple(texts): (ctx, cont) for texts, ctx, cont in model.token_requests}
    samples = {}
    for task, rows in results["samples"].items():
        for row in rows:
            arguments = [tuple(row["arguments"][number]) for number in range(4)]
            samples[f"{task}/{row['doc_id']}"] = {
                "requests": [ids[pair] for pair in arguments],
                "lls": [float(answer[0][0]) for answer in row["resps"]],
                "greedy": [bool(answer[0][1]) for answer in row["resps"]],
                "prompt_hash": row["prompt_hash"],
                "acc": row["acc"],
                "acc_norm": row.get("acc_norm"),
            }
    return {"samples": samples, "results": {task: dict(row) for task, row in results["results"].items()}}


def build_ranks(job: dict[str, Any], model: Recorder, tasks: TaskManager) -> dict[str, Any]:
    """What each rank of a distributed run builds, by lm_eval's own functions: ranks exchange scores only."""
    samples = {}
    for rank in range(job["world"]):
        for name, task in tasks.load(list(job["tasks"]))["tasks"].items():
            task.set_config(key="num_fewshot", value=job["shots"])
            task.set_fewshot_seed(seed=1234)
            task.build_all_requests(limit=job["limit"], rank=rank, world_size=job["world"])
            for instance in task.instances:
                sample = samples.setdefault(f"{name}/{instance.doc_id}", {"requests": []})
                sample["requests"].append(model._encode_pair(*instance.args))
                sample["prompt_hash"] = hash_string(instance.args[0])
    return samples


def find_tasks() -> TaskManager:
    """The stock tasks that are asked; reading the definitions of all takes ten seconds."""
    stock = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[stock / "mmlu" / "default", stock / "hellaswag"])


if __name__ == "__main__":
    manager = find_tasks()
    answers = {job["name"]: run_job(job, manager) for job in json.loads(Path(sys.argv[1]).read_text())}
    Path(sys.argv[2]).write_text(json.dumps(answers, default=str))
