"""Public benchmarks by EleutherAI's lm-evaluation-harness, in this process and through its own interface."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd.assembly import make_accelerator
from opd.errors import RecipeError, RunError, nearest
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.recipe import Recipe

FILE = "lm_eval.json"


def run_harness(
    recipe: Recipe, tasks: Sequence[str], *, limit: int | None = None, include_path: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a recipe's student on tasks of the harness.

    Loading, device, precision, `batch.micro` and the chat template are the recipe's; few-shot examples, generation and
    metrics are the task's. Tasks that run code which a model wrote are refused.

    Args:
        recipe: its `student` is measured; nothing else is built.
        tasks: names of tasks or groups.
        limit: examples of each task; default all.
        include_path: folder with tasks of your own, in YAML. They can name Python functions beside them.

    Returns:
        By task: `metrics` (`name,filter` as the harness writes it), `limit`, `examples`, `student` and `lm_eval`, the
        version. The same is added to `lm_eval.json` in the run's directory, where a task's newest entry stands.

    Raises:
        OpdError: without the package, for an unknown task, and when a task cannot be loaded, for instance because its
            data set cannot be reached.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError(f"--lm-eval needs the package lm-eval ({error}): pip install 'opd[lm-eval]'") from None
    if include_path is not None and not include_path.is_dir():
        raise RecipeError(f"--include-path: no folder {str(include_path)!r}; give one that holds the YAML of tasks")
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise RecipeError(f"--lm-eval: the harness has no task {task!r}{nearest(task, manager.all_tasks)}")
    accelerator = make_accelerator(recipe)
    device = accelerator.device if recipe.hardware.device == "auto" else torch.device(recipe.hardware.device)
    assert isinstance(recipe.student, ModelSettings)
    language = LanguageModel.load(recipe.student, device)
    model = HFLM(
        pretrained=language.model,
        tokenizer=language.tokenizer,
        batch_size=recipe.batch.micro,
        mixed_precision_dtype="bfloat16" if accelerator.mixed_precision == "bf16" else None,
        chat_template_args=dict(recipe.student.template_options),
    )
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=recipe.student.template == "chat",
            log_samples=False,
        )
    # Data sets, templates and metrics of thousands of tasks fail in their own ways.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise RunError(f"lm-eval on {', '.join(tasks)}: {type(error).__name__}: {reason[:200]}") from error
    results = {
        task: {
            # Beside its metrics (`name,filter`) a row has texts, counts, and errors that could not be estimated.
            "metrics": {n: v for n, v in row.items() if "," in n and isinstance(v, float | int) and math.isfinite(v)},
            "limit": limit,
            "examples": found["n-samples"].get(task, {}).get("effective"),
            "student": recipe.student.model,
            "lm_eval": lm_eval.__version__,
        }
        for task, row in found["results"].items()
    }
    _add(recipe.directory / FILE, results)
    return results


def _add(path: Path, results: dict[str, dict[str, Any]]) -> None:
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(earlier | results, indent=2) + "\n", encoding="utf-8")
