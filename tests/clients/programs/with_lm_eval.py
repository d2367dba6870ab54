"""lm-eval: the accuracy on a local task. Arguments: kind of model, its arguments as JSON, folder of the task."""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

kind, arguments, tasks = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
found = lm_eval.simple_evaluate(
    kind, model_args=arguments, tasks=["reviews"], task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=4, bootstrap_iters=0,
)  # fmt: skip
result = found["results"]["reviews"]
print(json.dumps({"acc": result["acc,none"], "samples": found["n-samples"]["reviews"]["effective"]}))
