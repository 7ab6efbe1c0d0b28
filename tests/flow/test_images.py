"""Images that are there already: made by `opd rollout`, and learnt from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from opd.api import distill, execute
from opd.cli.main import main
from opd.context import Context
from opd.errors import DataError, IncompatibleError, RecipeError, RunError
from opd.flow.creation import create_flow_model
from opd.jobs.images import sample_images
from opd.jobs.sampling import sample
from opd.language.creation import symbol_tokenizer
from opd.loop import train
from opd.policies.flow_transformer import FlowTransformer
from opd.prompts import Prompt, count_repeats, load_prompts
from opd.recipe import load_recipe, parse_recipe
from opd.rollouts.noised import NoisedRollout
from tests.conftest import writing
from tests.flow.tiny import PROMPTS, WORDS, block_for, built, recipe_for, tiny_pipeline


def test_flow_matching_learns_images_and_the_prompt_table_where_asked(models, drawings, tmp_path):
    recipe = recipe_for(
        models,
        tmp_path / "run",
        steps=60,
        teacher=[],
        student={"train_prompts": True},
        prompts={"prompts": drawings},
        rollout={"kind": "noised", "drop_prompt": 0.1},
        objective="sft",
        batch={"prompts": 4, "group": 4, "micro": 16},
    )
    table = built(recipe).student.model.encoder.tokens.weight.detach().clone()
    result = execute(recipe, quiet=True)
    errors = [r["train/squared_error"] for r in result.history if "train/squared_error" in r]
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:3])
    assert not torch.equal(result.student.encoder.tokens.weight, table)


def test_images_may_be_arrays_of_the_right_size_or_lists_that_take_turns(models, drawings, tmp_path):
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    source = writing(NoisedRollout(), student)
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    turns = Prompt("p", {"prompt": "red circle", "image": [dark, light]})
    assert [float(source([turns], 1, 1, stream=s).actions.mean()) for s in (0, 1, 2)] == [-1, 1, -1]
    made = source([Prompt("q", {"prompt": "red circle", "image": light})], 2, 1, stream=0)
    assert torch.equal(made.contexts[0].outcome, torch.ones(3, 8, 8))
    assert not torch.allclose(made.contexts[0].start, made.contexts[1].start)
    assert 0 < made.contexts[0].times[0] < 1
    with pytest.raises(DataError, match=r"\[4, 8, 3\]; the student draws"):
        source([Prompt("r", {"prompt": "red circle", "image": dark[:4]}, where="row 3")], 1, 1, stream=0)
    rows = [{**drawings[0], "image": dark / 255}]
    with pytest.raises(
        RecipeError, match=r"prompts\[0\] holds .*a float64 array is .*path of its file, uint8 \[H, W, 3"
    ):
        recipe_for(models, tmp_path / "run", prompts={"prompts": rows})


def test_images_may_be_passed_from_python(models, drawings, tmp_path):
    """As arrays, of PIL, in a list, or in a dataset: the same images train the same student."""
    import datasets

    def learnt(prompts, name):
        block = block_for(models, tmp_path / name, rollout={"kind": "noised"}, objective="sft")
        settings = {k: v for k, v in block.items() if k not in ("student", "teacher", "prompts")}
        return distill(block["student"], [], prompts, quiet=True, **settings)

    def rows(make):
        return [{**row, "image": make(row["image"])} for row in drawings]

    paths = learnt(rows(str), "paths").history
    whole = [r["train/loss"] for r in paths if "train/loss" in r]
    of_pil = datasets.Dataset.from_list(rows(str)).cast_column("image", datasets.Image())
    for name, prompts in (
        ("arrays", rows(lambda path: np.asarray(Image.open(path)))),
        ("pil", rows(Image.open)),
        ("lists", rows(lambda path: [Image.open(path)])),
        ("dataset", of_pil),
    ):
        result = learnt(prompts, name)
        assert [r["train/loss"] for r in result.history if "train/loss" in r] == whole, name
    written = yaml.safe_load((tmp_path / "pil" / "recipe.yaml").read_text())["prompts"][0]["prompts"]
    assert len({row["image"] for row in written}) == len(drawings)
    assert all(row["image"].startswith("(passed from Python, sha256 ") for row in written)
    with pytest.raises(RecipeError, match=r"prompts\.prompts is \[3\]: item 0 is 3, and a prompt is "):
        learnt([3], "number")


IMAGES = [
    ("absent.png", "image 'absent.png' cannot be read: no such file; .*in the working directory$"),
    ("text.png", "image .*text.png' cannot be read .*cannot identify"),
    (["red square.png", "absent.png"], "image 'absent.png' cannot be read"),
    ({"url": "https://example.org/x.png"}, r"a mapping with \['url'\]; .*'bytes' or a 'path'.*give its path"),
    ({"bytes": None, "path": None}, r"a mapping with \['bytes', 'path'\]"),
    ({"bytes": b"no image", "path": "x.png"}, "image of 8 bytes cannot be read"),
    (np.zeros((8, 8, 3)), r"holds float64 \[8, 8, 3\]; the student draws uint8"),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)], r"holds uint8 \[4, 8, 3\]"),
    ([[0, 0], [0]], "column 'image' holds no image"),
    (3, r"holds int64 \[\]"),
    ([], r"holds float64 \[0\]"),
]


@pytest.mark.parametrize(("image", "message"), IMAGES, ids=[str(i) for i in range(len(IMAGES))])
def test_images_that_cannot_be_used_are_named_before_training(image, message, models, drawings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no image")
    shutil.copy(drawings[0]["image"], "red square.png")
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    source = NoisedRollout().build(student.context, student, [])
    with pytest.raises(DataError, match=f"row 3: .*{message}") as found:
        source.check_prompts([Prompt("p", {"prompt": "red square", "image": image}, where="row 3")])
    assert len(str(found.value).splitlines()) <= 2


def test_images_are_looked_for_beside_the_file_of_prompts(models, drawings, tmp_path, monkeypatch):
    """The recipe stands in one folder, the prompts with their pictures in another, the command runs in a third."""
    data, elsewhere = tmp_path / "recipe" / "data", tmp_path / "elsewhere"
    for folder in (data / "pictures", elsewhere):
        folder.mkdir(parents=True)
    rows = [{**row, "image": f"pictures/{row['id']}.png"} for row in drawings]
    for row, drawing in zip(rows, drawings, strict=True):
        shutil.copy(drawing["image"], data / row["image"])
    (data / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    changes = {"rollout": {"kind": "noised"}, "objective": "sft", "teacher": [], "steps": 1}
    block = block_for(models, tmp_path / "run", prompts={"kind": "file", "path": "data/rows.jsonl"}, **changes)
    (tmp_path / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(block))
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(str(tmp_path / "recipe" / "recipe.yaml"))
    run = built(recipe)
    train(run)
    prompt = next(prompt for prompt in run.course.prompts if prompt.id.startswith("red"))
    beside = run.rollout.image(prompt, 0)
    # As with the file of prompts itself, the working directory goes first.
    shutil.copytree(data / "pictures", "pictures")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(prompt.fields["image"])
    assert beside.max() > 0
    assert run.rollout.image(prompt, 0).max() == -1
    (data / prompt.fields["image"]).unlink()
    Path(prompt.fields["image"]).unlink()
    with pytest.raises(DataError, match=r"no such file; .* in the working directory and in .*recipe/data"):
        built(recipe)


def test_a_row_whose_image_is_missing_is_skipped_where_asked(models, drawings, tmp_path, capsys):
    rows = [*drawings, {"id": "gone", "prompt": "red circle", "image": str(tmp_path / "gone.png")}]
    changes = {"prompts": {"prompts": rows}, "rollout": {"kind": "noised"}, "objective": "sft", "teacher": []}
    changes |= {"evaluation": {"prompts": [{"kind": "inline", "prompts": PROMPTS[:2]}]}}
    with pytest.raises(DataError, match=r"prompts\[6\]: image '.*gone.png' cannot be read"):
        built(recipe_for(models, tmp_path / "run", **changes))
    train(built(recipe_for(models, tmp_path / "run", skip_bad_prompts=True, **changes)))
    assert "skipped a row: prompts[6]" in capsys.readouterr().err


@pytest.mark.parametrize("writer", [None, "experts"])
def test_images_are_sampled_once_and_learnt_from(writer, models, tmp_path, monkeypatch):
    """`opd rollout` of the student, or of two routed experts; a killed job goes on; `datasets` reads the folder."""
    prompts = [{"prompt": text, "id": text, "task": text.split()[1], "number": i} for i, text in enumerate(PROMPTS)]
    routes = {shape: {"kind": "flow", "model": models[i]} for i, shape in enumerate(("square", "circle"))}
    teacher = {"kind": "routed", "name": "experts", "by": "task", "routes": routes}
    folder, path = tmp_path / "images", tmp_path / "recipe.yaml"
    block = block_for(models, tmp_path / "run", teacher=[teacher], prompts={"prompts": prompts})
    path.write_text(yaml.safe_dump({**block, "rollout": {"kind": "sde", "steps": 4, "teacher": writer}}))

    def command(*more):
        words = ["rollout", str(path), "--out", str(folder), "--prompts-per-shard", "4", "--quiet", *more]
        monkeypatch.setattr("sys.argv", ["opd", *words])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    assert command() == 0
    first = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len([p for p in first if p.suffix == ".png"]) == 12
    (folder / ".opd" / "000001.jsonl").unlink()
    (folder / "images" / "000001" / "000003.png").write_bytes(b"half")
    assert command() == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == first
    assert command("--draws", "2") == 0
    assert all(p.read_bytes() == data for p, data in first.items() if p.suffix == ".png")
    recipe = recipe_for(
        models,
        tmp_path / "sft",
        steps=2,
        teacher=[],
        prompts={"kind": "dataset", "path": str(folder)},
        rollout={"kind": "noised", "author": "teacher"},
        objective="sft",
    )
    run = built(recipe)
    prompts = load_prompts(recipe.prompts)
    assert len(prompts) == 24
    assert {(p.id, p.fields["task"]) for p in prompts} >= {("red circle-1-0", "circle"), ("blue square-0-1", "square")}
    train(run)
    assert command("seed=1") == 2


@pytest.mark.parametrize("rollout", [{"kind": "sde", "steps": 4}, {"kind": "noised"}])
def test_a_prompt_that_a_step_draws_twice_gets_other_noise(rollout, models, drawings):
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    source = writing(parse_recipe(block_for(models, "run", rollout=rollout)).rollout, student)
    one, other = (Prompt(row["id"], row) for row in drawings[:2])
    made = source(count_repeats([one, other, one]), 2, 3, stream=0)
    starts = torch.stack([context.start for context in made.contexts])
    assert len(starts.unique(dim=0)) == 6
    before = source([one, other], 2, 3, stream=0)
    assert torch.equal(before.actions, made.rows(0, 4)[0].actions)


def test_images_of_other_settings_and_of_nobody_are_refused(models, tmp_path):
    folder = tmp_path / "images"
    recipe = recipe_for(models, tmp_path / "run", batch={"group": 1})
    assert sample_images(recipe, folder, quiet=True) == 6
    assert sample_images(recipe, folder, quiet=True) == 6
    with pytest.raises(RunError, match=r"made with another settings .*'seed': 0.* now .*--out"):
        sample_images(recipe.model_copy(update={"seed": 1}), folder, quiet=True)
    texts = [{"prompt": text, "id": name} for text, name in zip(PROMPTS[::-1], PROMPTS, strict=True)]
    swapped = recipe_for(models, tmp_path / "run", batch={"group": 1}, prompts={"prompts": texts})
    with pytest.raises(RunError, match="made with another prompts"):
        sample_images(swapped, folder, quiet=True)
    (folder / ".opd" / "settings.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        sample_images(recipe, folder, quiet=True)
    other = recipe_for(models, tmp_path / "run", rollout={"kind": "noised"}, objective="sft", teacher=[])
    with pytest.raises(RecipeError, match="takes images that exist already"):
        sample_images(other, tmp_path / "other", quiet=True)
    with pytest.raises(RunError, match="did not write"):
        sample_images(recipe, tmp_path, quiet=True)
    with pytest.raises(RecipeError, match="a store holds texts"):
        sample(recipe, tmp_path / "store")


def test_a_mistyped_writer_of_images_is_told_with_the_names_that_there_are(models, tmp_path):
    teacher = {"kind": "flow", "name": "expert", "model": models[1]}
    rollout = {"kind": "sde", "steps": 4, "teacher": "exprt"}
    recipe = recipe_for(models, tmp_path / "run", teacher=teacher, rollout=rollout)
    with pytest.raises(IncompatibleError, match=r"'exprt' \(did you mean 'expert'\?\); the recipe names \['expert'\]"):
        sample_images(recipe, tmp_path / "images", quiet=True)
    assert not (tmp_path / "images").exists()


def test_a_writer_that_does_not_fit_the_student_or_the_prompts_is_refused(models, tmp_path):
    """Another prompt table would draw other prompts' images, a smaller one end in a traceback."""
    options = {"size": 8, "layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4, "shift": 3.0}
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]

    def drawn(model, **changes):
        routes = {"square": {"kind": "flow", "model": models[1]}, "circle": {"kind": "flow", "model": str(model)}}
        teacher = {"kind": "routed", "name": "experts", "by": "task", "routes": routes, **changes}
        rollout = {"kind": "sde", "steps": 4, "teacher": "experts"}
        recipe = recipe_for(models, tmp_path / "run", teacher=teacher, rollout=rollout, prompts={"prompts": rows})
        sample_images(recipe, tmp_path / "images", quiet=True)

    for name, words in (("turned", WORDS[::-1]), ("small", WORDS[:2])):
        other = create_flow_model(tmp_path / name, symbol_tokenizer(words, words=True), **options)
        with pytest.raises(IncompatibleError, match="read prompts differently; use a teacher with the student's kind"):
            drawn(other)
    with pytest.raises(DataError, match=r"prompts\[0\]: prompt 'red square' has no column 'tsk'"):
        drawn(models[0], by="tsk")
    assert not (tmp_path / "images").exists()


def test_images_of_another_writer_or_size_are_refused(models, tmp_path):
    """Each where nothing else has changed: routes, columns, dtype, a routed expert, its scheduler, the resolution."""
    shifted = Path(shutil.copytree(models[1], tmp_path / "shifted"))
    file = shifted / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 5.0}))
    rows = [
        {"prompt": text, "id": text, "task": text.split()[1], "kind": "square", "number": i}
        for i, text in enumerate(PROMPTS)
    ]

    def drawn(circle, rows=rows, dtype="own", **changes):
        routes = {"square": {"kind": "flow", "model": models[0]}, "circle": {"kind": "flow", "model": str(circle)}}
        teacher = {"kind": "routed", "name": "experts", "by": "task", "routes": routes, **changes}
        rollout = {"kind": "sde", "steps": 4, "teacher": "experts", "dtype": dtype}
        recipe = recipe_for(models, tmp_path / "run", teacher=teacher, rollout=rollout, prompts={"prompts": rows})
        return sample_images(recipe, tmp_path / "images", quiet=True)

    assert drawn(models[1]) == drawn(models[1], [dict(reversed(row.items())) for row in rows]) == 12
    with pytest.raises(RunError, match="made with another routing"):
        drawn(models[1], by="kind")
    with pytest.raises(RunError, match="made with another columns"):
        drawn(models[1], [{**row, "number": 7} for row in rows])
    with pytest.raises(RunError, match=r"made with another dtype \(own, now bfloat16\)"):
        drawn(models[1], dtype="bfloat16")
    with pytest.raises(RunError, match="made with another writer"):
        drawn(models[0])
    with pytest.raises(RunError, match="made with another times"):
        drawn(shifted)
    tokenizer = symbol_tokenizer(WORDS, words=True)
    wide = create_flow_model(tmp_path / "wide", tokenizer, size=16, layers=1, heads=2, head_width=8, places=4)
    small, whole = (recipe_for([str(wide), str(wide)], tmp_path / "r", student={"resolution": n}) for n in (8, 16))
    sample_images(small, tmp_path / "sized", quiet=True)
    with pytest.raises(RunError, match="made with another settings"):
        sample_images(whole, tmp_path / "sized", quiet=True)
    pipelines = [str(tmp_path / name) for name in ("one", "other")]
    for seed, place in enumerate(pipelines):
        tiny_pipeline(seed).save_pretrained(place)
    expert = {"kind": "flow", "name": "expert", "model": pipelines[0]}
    changes = {"teacher": expert, "rollout": {"kind": "sde", "steps": 4, "teacher": "expert"}}
    first, second = (recipe_for([place, ""], tmp_path / "r", **changes) for place in pipelines)
    sample_images(first, tmp_path / "decoded", quiet=True)
    with pytest.raises(RunError, match="made with another encoders"):
        sample_images(second, tmp_path / "decoded", quiet=True)
