"""Commands. Heavy imports happen inside them, so that help and completion are quick."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# Must be set before torch starts its threads. Threads that wait spin for a moment and then sleep: spinning for long
# stalls whoever shares the cores, and sleeping at once costs a third of a decoding step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Bars of the libraries below fight with ours on a terminal, and fill a log file.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from opd.errors import OpdError

if TYPE_CHECKING:
    from opd.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="On-policy distillation: a student learns on states that it visits itself.",
)


def _version(asked: bool) -> None:
    if asked:
        from opd import __version__

        print(f"opd {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """On-policy distillation: a student learns on states that it visits itself."""


RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with opd.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, dotted, e.g. update.learning_rate=1e-4.", show_default=False),
]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the same directory.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the same directory.")] = False,
    force_changed: Annotated[
        bool, typer.Option("--force-changed", help="With --resume: also when the recipe changed since.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Distil a student as a recipe says."""
    given = list(overrides or [])
    if resume and not any(text.startswith("output=") for text in given) and (run := _run_of(recipe)) is not None:
        # It may have been started in another directory, and moved since.
        given.append(f"output={json.dumps(str(run))}")
    resolved = _load(recipe, given, quiet)
    from opd.api import execute
    from opd.cli.display import show_result

    _quiet_libraries()
    result = execute(resolved, overwrite=overwrite, resume=resume, force_changed=force_changed, quiet=quiet)
    show_result(result, resolved)
    _exit_as_stopped(result.stopped_by)


@app.command()
def quickstart(
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """A first distillation, on the CPU in a few minutes: the recipe `quickstart`, in place of an earlier run of it."""
    given = overrides or []
    elsewhere = any(text.startswith(("name=", "output=")) for text in given)
    train("quickstart", given, overwrite=not elsewhere, resume=False, force_changed=False, quiet=quiet)


@app.command()
def chain(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPES... [key=value]...",
            help="Recipes in order, each starts from the student before; then overrides, which hold for all of them.",
        ),
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace earlier runs in the same directories.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the chain where it stopped.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Run recipes one after the other, e.g. fine-tuning, then distillation, then reinforcement learning."""
    from opd.errors import RecipeError
    from opd.files.recipes import read_recipe

    overrides = [text for text in recipes if "=" in text and not Path(text).is_file()]
    links = [text for text in recipes if text not in overrides]
    if not links:
        raise RecipeError("opd chain needs recipes, and then overrides: opd chain first.yaml second.yaml steps=10")
    for link in links:
        read_recipe(link, overrides)
    resolved = [_load(link, overrides, quiet) for link in links]
    from opd.api import chain as run_chain
    from opd.cli.display import show_result

    _quiet_libraries()
    results = run_chain(resolved, overwrite=overwrite, resume=resume, quiet=quiet)
    for result, recipe in zip(results, resolved, strict=False):
        show_result(result, recipe)
        _exit_as_stopped(result.stopped_by)


@app.command()
def rollout(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder; default stores/NAME, of images images/NAME, of episodes demonstrations/NAME.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Of all prompts; a folder that has fewer gets the rest.")] = 1,
    prompts_per_shard: Annotated[int, typer.Option(min=1, help="What a worker loses at most when killed.")] = 64,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Sample a recipe's trajectories into a store, or its images into a folder, to train on later; goes on where it
    stopped, several may work. Episodes of a simulator become a data set of demonstrations, in one go."""
    resolved = _load(recipe, overrides, quiet)
    from opd.cli.display import show_images, show_store
    from opd.jobs.sampling import sample

    _quiet_libraries()
    if resolved.student.modality == "flow":
        from opd.jobs.images import sample_images

        path = out or Path("images") / resolved.name
        show_images(path, sample_images(resolved, path, draws=draws, prompts_per_shard=prompts_per_shard, quiet=quiet))
        return
    if resolved.student.modality == "action":
        from opd.cli.display import show_demonstrations
        from opd.jobs.demonstrations import sample_demonstrations

        path = out or Path("demonstrations") / resolved.name
        found = sample_demonstrations(resolved, path, draws=draws, prompts_per_shard=prompts_per_shard, quiet=quiet)
        show_demonstrations(path, *found)
        return
    path = out or Path("stores") / resolved.name
    show_store(sample(resolved, path, draws=draws, prompts_per_shard=prompts_per_shard, quiet=quiet))


@app.command()
def score(
    store: Annotated[Path, typer.Argument(help="A store that opd rollout made.")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Names the teacher, the student's tokenizer and the prompts.")] = "",
    kind: Annotated[str, typer.Option(help="sampled, top_k or exact.")] = "sampled",
    top_k: Annotated[
        int | None, typer.Option(min=1, help="K, with --kind top_k; default 64.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, with --kind exact.")] = "bfloat16",
    name: Annotated[
        str | None, typer.Option(help="Of these targets; default kind and teacher.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Which of the recipe's teachers, by name.", show_default=False)
    ] = None,
    ray: Annotated[
        int | None, typer.Option(min=1, help="Score as a Ray Data job of this many workers.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Write what a recipe's teacher says about a store's trajectories; goes on where it stopped, several may work."""
    from opd.errors import RecipeError

    if not recipe:
        raise RecipeError("opd score needs --recipe RECIPE, which names the teacher")
    resolved = _load(recipe, overrides, quiet)
    from opd.cli.display import show_store
    from opd.jobs.scoring import score as run
    from opd.store.targets import KINDS

    for option, value, accepted in (("--kind", kind, KINDS), ("--dtype", dtype, ("bfloat16", "float32"))):
        if value not in accepted:
            raise RecipeError(f"{option} is {value!r}; accepted: {', '.join(accepted)}")
    _quiet_libraries()
    options = {"top_k": top_k, "dtype": dtype, "name": name, "teacher": teacher}
    if ray is None:
        targets = run(resolved, store, kind, quiet=quiet, **options)  # type: ignore[arg-type]  # checked above
    else:
        from opd.jobs.ray_job import score_with_ray

        targets = score_with_ray(resolved, store, kind, ray, **options)  # type: ignore[arg-type]
    show_store(targets.store)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Hub name or folder, also of an adapter, as student.model takes it.")],
    host: Annotated[str, typer.Option(help="Address; any but a loopback one needs --token-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that clients send.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="By which clients ask for it; default MODEL.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where it is, when not beside the model.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 16,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text; default what the model was made for.")
    ] = None,
    max_logprobs: Annotated[int, typer.Option(min=1, help="Ids that a request may ask for at each position.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 64,
    follow: Annotated[
        bool, typer.Option("--follow", help="Take up weights from folders that clients name, as a rollout's engine.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Score and write token ids for others with a model of transformers: a teacher or a rollout's engine of kind
    served."""
    from dataclasses import replace

    import torch

    from opd.errors import RecipeError
    from opd.hardware import check_device
    from opd.language.model import ModelSettings
    from opd.server import ServedModel
    from opd.server import serve as run_server

    _quiet_libraries()
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype is {dtype!r}; auto, float32, bfloat16 and float16 are accepted")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(device, "--device")
    settings = ModelSettings(
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )

    def load() -> ServedModel:
        served = ServedModel.load(settings, torch.device(device), name, batch=batch, follows=follow)
        served.limits = replace(
            served.limits,
            length=max_model_len or served.limits.length,
            logprobs=max_logprobs,
            body=max_body * 1_000_000,
        )
        return served

    run_server(load, host, port, token_env)


@app.command("store")
def show(store: Annotated[Path, typer.Argument(help="A store's folder.")]) -> None:
    """Show what a store holds, and check every byte of it."""
    from opd.cli.display import show_store
    from opd.store import Store

    show_store(Store.open(store), verify=True)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Refuse what a run would refuse at its start, and print the plan: does it fit, how long does it take, what is
    unusual, what lies in the run's directory. No weights are read and nothing is written."""
    found = _load(recipe, overrides, quiet=json_output)
    from opd.cli.display import show_plan
    from opd.plan import make_plan
    from opd.plan.estimate import estimate
    from opd.plan.place import found_at, lacking
    from opd.plan.unusual import unusual

    _quiet_libraries()
    there = found_at(found)
    plan = make_plan(found)
    show_plan(plan, estimate(found, plan), unusual(found, plan), [*there, *lacking(found)], json_output)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from opd.recipe import json_schema

    print(json_schema())


@app.command()
def choices(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[AXIS[.KIND]|BLOCK]",
            help="One axis; one choice with its settings; or a block that has no choices: batch, hardware, ..., and "
            "recipe for the keys that lie in none.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List what recipes can name: each axis and its choices, those of other packages too; or the settings of one choice
    or block."""
    from opd.catalogue import axes, blocks, find
    from opd.cli.display import show_choice, show_choices, show_settings

    if name is None:
        show_choices([kind for kinds in axes().values() for kind in kinds])
    elif name in (found := blocks()):
        show_settings(found[name])
    elif "." in name:
        show_choice(*find(name))
    else:
        show_choices(find(name))


@app.command()
def objectives() -> None:
    """What each divergence descends: its expected gradient against the exact one, by enumeration."""
    from opd.cli.display import show_objectives
    from opd.truth_table import load_table

    show_objectives(load_table())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one.", show_default=False)] = None,
) -> None:
    """List the recipes that come with opd, or show one."""
    from opd.cli.display import show_recipes
    from opd.files.recipes import find_recipe, read_text, shipped_recipes

    if name is not None:
        print(read_text(find_recipe(name)), end="")
        return
    show_recipes(shipped_recipes())


@app.command("eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="A run directory, or a recipe.")],
    overrides: Overrides = None,
    student: Annotated[str | None, typer.Option(help="A saved student to measure instead.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASK,TASK", help="Tasks of lm-eval instead of the held-out prompts.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task; with --lm-eval.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own; with --lm-eval.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Measure a student on held-out prompts (both KLs to the teacher, agreement, accuracy, ...) or on benchmarks."""
    from opd.errors import RecipeError

    if lm_eval is None and (limit is not None or include_path is not None):
        raise RecipeError("--limit and --include-path belong to --lm-eval TASK,TASK; name its tasks")

    from opd.files.recipes import find_recipe

    changes = list(overrides or [])
    run = Path(source) if (Path(source) / "recipe.yaml").is_file() else None
    if run is not None:
        source = str(run / "recipe.yaml")
        # It may have been moved since.
        changes.append(f"output={json.dumps(str(run))}")
        student = student or str(run / "student")
    else:
        try:
            find_recipe(source)
        except RecipeError as error:
            raise RecipeError(f"{error}; or the directory of a run, in which its recipe.yaml lies") from None
    trained = None
    if student is not None:
        trained = _load(source, changes, quiet=json_output)
        known = type(trained.student).model_fields
        own = {"drop_layers": "[]", "lora": "null", "freeze": "[]", "adapter": "null", "revision": "null"}
        changes += [
            f"student.model={json.dumps(student)}",
            *(f"student.{key}={v}" for key, v in own.items() if key in known),
        ]
    resolved = _load(source, changes, quiet=json_output or trained is not None)
    from opd.api import measure
    from opd.cli.display import show_metrics

    _quiet_libraries()
    if lm_eval is None:
        found = measure(resolved, trained=trained, run=run)
        counted = {"held_out_prompts": found.prompts} if json_output else {}
        show_metrics(f"{found.prompts} held-out prompts", counted | found.metrics, json_output)
        return
    from opd.jobs.harness import run_harness

    results = run_harness(resolved, lm_eval.split(","), limit=limit, include_path=include_path)
    shown = {f"{task} {name}": value for task, row in results.items() for name, value in row["metrics"].items()}
    show_metrics("lm-eval", shown, json_output)


@app.command()
def procedural(
    task: Annotated[str, typer.Argument(help="running_sum, arithmetic, list_program, register_machine, ...")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the task's settings, e.g. terms=6.", show_default=False)
    ] = None,
    size: Annotated[int, typer.Option(help="Rows to draw.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the draw and of the reference completions.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
) -> None:
    """Print rows of a procedural task as JSON lines: problem, reference completion, answer."""
    from opd.cli.display import show_rows
    from opd.recipe import apply_override, parse_recipe

    block = {"kind": "procedural", "task": {"kind": task}, "size": size, "seed": seed, "split": split}
    for override in overrides or []:
        apply_override(block, f"task.{override}")
    # Checked inside a recipe, so that a mistake is told with the key that a recipe has to mend.
    recipe = parse_recipe({"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": block}, "opd procedural")
    show_rows([prompt.fields for source in recipe.prompts for prompt in source.load()])


@app.command()
def drawings(
    task: Annotated[str, typer.Argument(help="count, glyph, scene, ...")],
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the task's settings, e.g. pixels=16.", show_default=False)
    ] = None,
    size: Annotated[int, typer.Option(help="Pictures to draw.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation, test or unseen.")] = "train",
    columns: Annotated[int, typer.Option(min=1, help="Pictures side by side.")] = 8,
    scale: Annotated[int, typer.Option(min=1, help="Pixels of the file for each of a picture.")] = 3,
) -> None:
    """Write pictures of a drawing task as one PNG, and print their prompts in the same order."""
    from opd.cli.display import show_drawings
    from opd.recipe import apply_override, parse_recipe

    block = {"kind": "drawings", "task": {"kind": task}, "size": size, "seed": seed, "split": split}
    for override in overrides or []:
        apply_override(block, f"task.{override}")
    recipe = parse_recipe({"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": block}, "opd drawings")
    show_drawings([prompt.fields for source in recipe.prompts for prompt in source.load()], out, columns, scale)


@app.command()
def create_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="task:NAME[,NAME...], or a model whose tokenizer to take.")],
    family: Annotated[str, typer.Option(help="llama or qwen3.")] = "llama",
    width: Annotated[int, typer.Option(help="Hidden width.")] = 64,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    feed_forward: Annotated[
        int | None, typer.Option(help="Inner width; default 4 x width.", show_default=False)
    ] = None,
    positions: Annotated[int, typer.Option(help="Longest prompt and completion together.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Write a randomly initialised model and its tokenizer, to train from scratch."""
    from opd.language.creation import create_model, named_tokenizer

    _quiet_libraries()
    made = named_tokenizer(tokenizer)
    path = create_model(
        folder,
        made,
        family=family,  # type: ignore[arg-type]  # checked there
        width=width,
        layers=layers,
        heads=heads,
        feed_forward=feed_forward,
        positions=positions,
        seed=seed,
        overwrite=overwrite,
    )
    print(path)
    if not made.chat_template:
        print(
            f"its tokenizer has no chat template: as student and as teacher name it {{model: {path}, template: plain}}",
            file=sys.stderr,
        )


@app.command()
def create_flow_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="drawings, drawings:TASK[,TASK...], or a model whose tokenizer to take.")
    ] = "drawings",
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 32,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 4,
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 3,
    head_width: Annotated[int, typer.Option(help="Width of a head.")] = 24,
    places: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Write a randomly initialised flow transformer on pixels and its prompt table, to train from scratch."""
    from opd.flow.creation import create_flow_model, named_tokenizer

    _quiet_libraries()
    sizes = {"size": size, "patch": patch, "layers": layers, "heads": heads, "head_width": head_width}
    print(create_flow_model(folder, named_tokenizer(tokenizer), **sizes, places=places, seed=seed, overwrite=overwrite))


@app.command()
def create_policy(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Whose prompts name the environment that it is made for.")],
    reads: Annotated[str, typer.Option(help="image, proprio and state, the last of a privileged teacher.")] = (
        "image,proprio"
    ),
    chunk: Annotated[int, typer.Option(help="Actions of a decision.")] = 4,
    bins: Annotated[int, typer.Option(help="Tokens of each number of an action.")] = 64,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 8,
    width: Annotated[int, typer.Option(help="Hidden width.")] = 128,
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    zeros: Annotated[
        bool, typer.Option(help="Placeholders of zeros, as OpenVLA-OFT's, in place of learnt ones.")
    ] = False,
    demonstrations: Annotated[
        Path | None,
        typer.Option(help="A data set in whose range proprio and state lie; else they are read as they are."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Write a randomly initialised policy over action tokens, made for a recipe's environment, to train it."""
    from opd.jobs.new_policy import new_policy

    _quiet_libraries()
    sizes = {"chunk": chunk, "bins": bins, "patch": patch, "width": width, "layers": layers, "heads": heads}
    made = new_policy(
        folder, recipe, reads.split(","), not zeros, demonstrations, overwrite=overwrite, **sizes, seed=seed
    )
    print(made)


@app.command()
def create_image_text_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    width: Annotated[int, typer.Option(help="Hidden width of the text's layers.")] = 96,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    vision_width: Annotated[int, typer.Option(help="Hidden width of what reads pictures.")] = 64,
    vision_layers: Annotated[int, typer.Option(help="Its layers.")] = 1,
    clips: Annotated[bool, typer.Option("--clips", help="Of videos: for prompts of kind clips.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Write a randomly initialised image-text model and its processor, for prompts of kind tiles, or clips."""
    from opd.prompts.clips import VOCABULARY
    from opd.prompts.tiles import SYMBOLS
    from opd.vision.creation import create_clip_model, create_image_text_model

    _quiet_libraries()
    sizes = {"width": width, "layers": layers, "heads": heads}
    sizes |= {"vision_width": vision_width, "vision_layers": vision_layers}
    if clips:
        characters, words, times, pixels = VOCABULARY
        print(create_clip_model(folder, characters, words, times, pixels, seed=seed, overwrite=overwrite, **sizes))
        return
    print(create_image_text_model(folder, SYMBOLS, **sizes, seed=seed, overwrite=overwrite))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory; of a drafter also one without checkpoints.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="Of this step; default the newest.", show_default=False)] = None,
    form: Annotated[
        str | None,
        typer.Option("--as", help="Of a drafter: native, speculators or transformers.", show_default="native"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Write the student of a checkpoint as a folder that its library loads, or of a drafter in another format."""
    from opd.api import export as write_student
    from opd.recipe import load_recipe

    _quiet_libraries()
    print(write_student(run, out, step, form=form, overwrite=overwrite))
    source = run / "recipe.yaml"
    if source.is_file() and (told := load_recipe(str(source), recorded=True).student.readers(form)):
        print(f"opd: {told}", file=sys.stderr)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run directory, or the folder of a saved student.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME; a new one is private.")],
) -> None:
    """Upload a run's student to the hub, with its model card."""
    from opd.api import upload
    from opd.files.ours import named

    _quiet_libraries()
    besides = upload(run, repository)
    print(f"uploaded to {repository}")
    if besides:
        print(f"opd: left out {named(besides)}, which opd did not write", file=sys.stderr)


@app.command()
def merge(
    experts: Annotated[list[str], typer.Argument(help="Folders of runs, of models, or of LoRA adapters.")],
    into: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="Of the experts; default equal.", show_default=False)
    ] = None,
    average: Annotated[str, typer.Option(help="weights, or LoRA's A and B apart: factors.")] = "weights",
    form: Annotated[
        str | None, typer.Option("--as", help="dense or adapter; default what the experts are.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder of the adapters' model; default what they say.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that opd wrote there.")] = False,
) -> None:
    """Average several experts of one architecture into one model, to start a student from."""
    from opd.errors import RecipeError
    from opd.merging import merge as write_merged

    try:
        shares = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {weights!r}; give a number for each expert, e.g. 0.5,0.25,0.25") from None
    _quiet_libraries()
    options = {"weights": shares, "average": average, "form": form, "base": base}
    print(write_merged(experts, into, **options, overwrite=overwrite))  # type: ignore[arg-type]  # checked there


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are laid over each other.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, recipe, and rollouts token by token."""
    from opd.report import write_report

    print(write_report(runs, out or runs[0] / "report.html"))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The directory of a run, also one that is just starting.")],
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines reach loopback only by a tunnel.")] = (
        "127.0.0.1"
    ),
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    seconds: Annotated[float | None, typer.Option(help="End after so long.", show_default=False)] = None,
) -> None:
    """Serve the report of a run while it trains; Ctrl-C ends it."""
    from opd.report import watch as serve

    serve(run, host, port, open_browser=open_browser, seconds=seconds)


@app.command()
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A shipped reproduction or a file; none lists them.", show_default=False)
    ] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps of what the headline claims need, in two minutes.")] = False,
    arm: Annotated[str | None, typer.Option(help="Run only this arm and what it needs.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side, of one thread each.")] = 2,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Judge committed results again, and write their page.")
    ] = False,
) -> None:
    """Run a system's experiment with its control arms over seeds, and compute the verdicts on its claims."""
    from opd.cli.display import show_reproductions, show_results
    from opd.reproductions.catalogue import find, shipped
    from opd.reproductions.reproduce import renew_page
    from opd.reproductions.reproduce import reproduce as run

    if name is None:
        show_reproductions(shipped())
        return
    entry = find(name)
    if page_only:
        renew_page(entry)
        print(entry.page)
        return
    done = run(entry, smoke=smoke, arm=arm, workers=jobs)
    if done.results is not None:
        show_results(done.results)
        print(f"results: {entry.smoke_results if smoke else entry.results}")
    if done.missing:
        rest = len(done.missing) - 6
        names = ", ".join(done.missing[:6]) + (f" and {rest} more" if rest > 0 else "")
        print(f"no results yet, missing: {names}", file=sys.stderr)
    if done.problems:
        raise typer.Exit(1)


def _load(reference: str, overrides: Sequence[str] | None, quiet: bool) -> Recipe:
    """A recipe. A mistyped name, a broken file or override is told before the libraries load, which takes seconds."""
    from opd.files.recipes import read_recipe

    path, _ = read_recipe(reference, overrides or [])
    if not quiet and sys.stderr.isatty():
        print(f"opd: {path}", file=sys.stderr)
    from opd.recipe import load_recipe

    return load_recipe(reference, overrides or [])


def _run_of(recipe: str) -> Path | None:
    """The run directory that a recipe is the record of."""
    path = Path(recipe)
    recorded = path.name == "recipe.yaml" and path.is_file() and (path.parent / "environment.json").is_file()
    return path.parent if recorded else None


def _exit_as_stopped(number: int | None) -> None:
    """SIGTERM is a scheduler's request, and it was met; an interrupt is a person's, and shells expect to hear of it."""
    if number == signal.SIGINT:
        raise typer.Exit(130)


def _quiet_libraries() -> None:
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def main() -> None:
    """Entry point: user errors are one or two lines on stderr and exit code 2, never a traceback."""
    try:
        app()
    except OpdError as error:
        print(f"opd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        print("\n".join(["opd: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        sys.exit(130)
