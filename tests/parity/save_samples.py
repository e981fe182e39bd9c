"""Saves what `lm_eval run --log_samples --output_path OUT` saves: `python save_samples.py OUT MODEL CHAT_MODEL`.

The first model by its arguments, as the command line does; the second as a Python object, of which less is told.
"""

import sys

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def save(out: str, model: str | HFLM, arguments: dict[str, str], manager: TaskManager, *, chat: bool) -> None:
    tracker = EvaluationTracker(output_path=out)
    results = simple_evaluate(
        model,
        model_args=arguments,
        device="cpu",
        batch_size=8,
        tasks=["mmlu_anatomy", "hellaswag"],
        num_fewshot=2,
        limit=10,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=manager,
        evaluation_tracker=tracker,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])


if __name__ == "__main__":
    tasks = TaskManager()
    save(f"{sys.argv[1]}/plain", "hf", {"pretrained": sys.argv[2], "dtype": "float32"}, tasks, chat=False)
    model = HFLM(pretrained=sys.argv[3], device="cpu", dtype="float32", batch_size=8)
    save(f"{sys.argv[1]}/chat", model, {}, tasks, chat=True)
