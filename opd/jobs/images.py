"""`opd rollout` for flow models: images of a recipe's prompts, in a folder that `datasets` reads as an image folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opd.assembly import build_models, compute_device, make_accelerator
from opd.errors import RecipeError, RunError
from opd.flow.evaluation import FlowEvaluation
from opd.flow.guidance import guidance_of
from opd.flow.model import FlowModel
from opd.jobs.work import work_through
from opd.policies.flow_transformer import FlowStudent
from opd.prompts import load_prompts
from opd.recipe import Recipe
from opd.rollouts import Request
from opd.rollouts.sde import SDERollout
from opd.store.shards import claim, digest, tidy, write_in_store, write_json
from opd.store.store import shortened
from opd.teachers.flow import LiveFlowTeacher
from opd.weights import fingerprint, weights_hash

NO_IDENTITY = {"draws"}
"""What may differ when a folder is continued."""


def sample_images(
    recipe: Recipe,
    path: Path,
    *,
    draws: int = 1,
    prompts_per_shard: int = 64,
    quiet: bool = False,
) -> int:
    """Draw images of every prompt of a recipe, those that it would hold out too, `batch.group` times a draw.

    They come from the deterministic sampler, `evaluation.steps` steps of the ODE, of whom `rollout.teacher` names, else
    of the student. `path` gets PNGs and, when all are there, `metadata.jsonl`: a row an image with `file_name`, `id`,
    the prompt and its other columns that hold a text, a number or a truth value. A killed job goes on where it stopped;
    several may work on one folder.

    Args:
        draws: of all prompts; a folder that has fewer gets the rest.
        prompts_per_shard: what a worker loses at most when it is killed.

    Returns:
        Number of images in the folder; 0 while another worker still writes some.

    Raises:
        OpdError: when the folder was begun with other settings or holds something else, or the recipe samples nothing.
    """
    if not isinstance(recipe.rollout, SDERollout):
        raise RecipeError("opd rollout draws images with rollout 'sde'; this recipe's takes images that exist already")
    recipe = recipe.at(0, recipe.steps)
    assert isinstance(recipe.rollout, SDERollout)
    # Before the other teachers are left out, so that a mistyped name is told with those that there are.
    recipe.rollout.check_teacher([teacher.name for teacher in recipe.teacher])
    prompts = load_prompts(recipe.prompts)
    writer, dtype = recipe.rollout.teacher, recipe.rollout.dtype
    asked = [teacher for teacher in recipe.teacher if writer is not None and teacher.name == writer]
    recipe = recipe.model_copy(update={"teacher": asked})
    student, teachers, context = build_models(recipe, compute_device(recipe, make_accelerator(recipe)))
    assert isinstance(student, FlowStudent)
    student.check_prompts(prompts, recipe.max_prompt_tokens)
    models: dict[str, FlowModel] = {}
    for teacher in teachers:
        for route, member in teacher.members().items():
            assert isinstance(member, LiveFlowTeacher)
            member.check_writer(student.model)
            models[route] = member.model
        teacher.check_prompts(prompts)
    assert isinstance(recipe.evaluation, FlowEvaluation)
    steps, size, group = recipe.evaluation.steps, min(prompts_per_shard, len(prompts)), recipe.batch.group
    settings = recipe.rollout.model_copy(update={"steps": steps, "noise": 0.0})
    source = settings.build(context, student, teachers)
    writers = models or {"": student.model}
    header = {
        "prompts": _hash([[prompt.id, prompt.view()] for prompt in prompts]),
        # What else metadata.jsonl holds of a prompt, and who draws it.
        "columns": _hash([_plain(prompt.fields) for prompt in prompts]),
        "routing": _hash([[teacher.route(prompt) for teacher in teachers] for prompt in prompts]),
        "writer": {route: weights_hash(model) for route, model in writers.items()},
        "times": {route: model.grid(steps).tolist() for route, model in writers.items()},
        "encoders": _encoders(student.model.pipeline),
        "dtype": dtype,
        "settings": {
            "seed": recipe.seed,
            "steps": steps,
            "guidance": guidance_of(context),
            "group": group,
            "resolution": student.model.resolution,
        },
        "prompts_per_shard": size,
        "draws": draws,
    }
    draws = _begin(path, header)
    per_draw = -(-len(prompts) // size)
    parts = [path / ".opd" / f"{shard:06d}.jsonl" for shard in range(draws * per_draw)]

    def write(shard: int) -> None:
        with claim(parts[shard], Path.is_file) as mine:
            if not mine:
                return
            draw, place = divmod(shard, per_draw)
            here = prompts[place * size : (place + 1) * size]
            made = student.outcomes(source(Request(here, group, 1, draw, settings, context)))
            rows = []
            (path / "images" / f"{shard:06d}").mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(made):
                prompt, member = here[i // group], i % group
                name = f"images/{shard:06d}/{i:06d}.png"
                Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8)).save(path / name)
                rows.append({**_plain(prompt.fields), "id": f"{prompt.id}-{draw}-{member}", "file_name": name})
            write_in_store(parts[shard], "".join(json.dumps(row) + "\n" for row in rows).encode())

    missing = [shard for shard, part in enumerate(parts) if not part.is_file()]
    work_through(missing, len(parts), write, "sampling", quiet)
    if not all(part.is_file() for part in parts):
        return 0
    tidy(path / ".opd", Path.is_file)
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    write_in_store(path / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return len(lines)


def _hash(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


def _encoders(pipeline: Any) -> str | None:
    """What a pipeline's VAE and text encoders are, of which all writers make use."""
    if pipeline is None:
        return None
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return fingerprint(
        (f"{name}.{key}", p.detach())
        for name, module in sorted(modules.items())
        if name != "transformer"
        for key, p in module.named_parameters()
    )


def _begin(path: Path, header: dict[str, Any]) -> int:
    """Make the folder, or go on with one that the same settings began; how many draws it is to have."""
    place = path / ".opd" / "settings.json"
    if not place.is_file():
        if path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
            raise RunError(f"{path} holds something that opd rollout did not write; choose another place with --out")
        write_json(place, header)
        return int(header["draws"])
    try:
        here = json.loads(place.read_text(encoding="utf-8"))
        drawn = int(here["draws"])
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{place} is damaged; remove {path} and begin again") from None
    for key in header:
        if key not in NO_IDENTITY and here.get(key) != header[key]:
            raise RunError(
                f"{path} was made with another {key} ({shortened(here.get(key))}, now {shortened(header[key])}); give "
                "this recipe a folder of its own with --out"
            )
    here["draws"] = max(drawn, int(header["draws"]))
    write_json(place, here)
    return int(here["draws"])


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns that a table of images can hold."""
    return {
        k: v for k, v in fields.items() if isinstance(v, str | int | float | bool) and k not in ("image", "file_name")
    }
