"""Stores of image-text students: completions exact, pictures by content, read again where the prompts are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from opd.api import execute
from opd.assembly import build_models
from opd.cli.main import app
from opd.errors import DataError, IncompatibleError, RecipeError
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.language.engines.base import PromptInputs, same_prompt
from opd.prompts import Prompt, load_prompts
from opd.recipe import parse_recipe
from opd.store import Store, Targets
from opd.store.pictures import pictures_of
from opd.store.shards import Shard, write_shard
from opd.vision.engine import ImageTextModel
from opd.vision.identity import pixels_hash, processor_hash
from tests.conftest import character_tokenizer, said, tiny_model, writing
from tests.test_image_text import recipe as settings_of
from tests.vlm import picture, save_vlm, tiny_vlm

CPU = torch.device("cpu")


def settings(tmp_path, student, teacher, **more):
    """A recipe on ten prompts whose teacher sees the crop."""
    taught = {"kind": "image_text", "model": teacher, "sees": "crop"}
    made = settings_of(tmp_path, {"kind": "image_text", "model": student}, taught, steps=1, **more)
    made |= {"objective": "reverse_kl", "update": {"optimizer": "sgd", "learning_rate": 1.0}}
    return made | {"evaluation": {"held_out": 1, "samples": 1}, "checkpoint": {}, "batch": {"prompts": 3, "group": 2}}


def stored(data, store, **teacher):
    path = str(store.path)
    return {
        **data,
        "output": str(store.path.parent / "on-store"),
        "rollout": {"kind": "stored", "path": path},
        "teacher": {"kind": "stored", "path": path, **teacher},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scored store of a tiny Qwen2.5-VL; tests that change something take a copy."""
    folder = tmp_path_factory.mktemp("made")
    models = [save_vlm(folder / name, "qwen2_5_vl", seed) for seed, name in enumerate(("student", "teacher"))]
    data = settings(folder, *models)
    store = sample(parse_recipe(data), folder / "store", prompts_per_shard=4, quiet=True)
    score(parse_recipe(data), store.path, "exact", dtype="float32", quiet=True)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """`(folder, recipe, recipe on the store)`, anyone's to change."""
    shutil.copytree(made, tmp_path / "mine")
    folder = tmp_path / "mine"
    data = settings(folder, str(folder / "student"), str(folder / "teacher"))
    return folder, data, stored(data, type("At", (), {"path": folder / "store"}))


def run(data):
    return execute(parse_recipe(data), quiet=True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_a_step_on_a_store_is_the_live_step(family, tmp_path):
    models = [save_vlm(tmp_path / name, family, seed) for seed, name in enumerate(("student", "teacher"))]
    data = settings(tmp_path, *models)
    store = sample(parse_recipe(data), tmp_path / "store", prompts_per_shard=4, quiet=True)
    score(parse_recipe(data), store.path, "exact", dtype="float32", quiet=True)
    live, offline = run(data), run(stored(data, store))
    logged = [next(row for row in each.history if "train/gradient_norm" in row) for each in (live, offline)]
    for name in ("train/loss", "train/gradient_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-6)
        assert logged[0][name] > 1e-3
    before = dict(tiny_vlm(family)[0].named_parameters())
    moved = {name: (p - before[name]).norm() for name, p in live.student.named_parameters()}
    assert sum(bool(size > 0) for name, size in moved.items() if "vis" in name) > 2
    for (name, one), (_, other) in zip(
        live.student.named_parameters(), offline.student.named_parameters(), strict=True
    ):
        torch.testing.assert_close(other - before[name], one - before[name], atol=1e-6, rtol=1e-6, msg=name)


def test_rows_are_what_the_student_writes_about_the_pictures(made):
    data = settings(made, str(made / "student"), str(made / "teacher"))
    recipe = parse_recipe(data)
    student, (teacher,), context = build_models(recipe, CPU)
    prompts = load_prompts(recipe.prompts)
    store = Store.open(made / "store")
    live = writing(recipe.rollout, student, context=context)(prompts, 2, 5, stream=0)
    members = [p for p in prompts for _ in range(2)]
    found = store.trajectories(range(20), members, CPU, reader=student.language)
    assert torch.equal(found.actions, live.actions)
    assert torch.equal(found.behaviour_log_probs, live.behaviour_log_probs)
    assert all(same_prompt(a, b) for a, b in zip(found.contexts, live.contexts, strict=True))
    assert isinstance(found.contexts[0], PromptInputs)
    shown = pixels_hash(Image.open(made / "pictures/3.png"))
    assert store.row(store.rows_of(prompts[3].id)[1]).pictures == (shown,)
    targets = Targets.open(store, None)
    assert targets.header.sees == "crop"
    crop = pixels_hash(Image.open(made / "pictures/3-crop.png"))
    assert targets.pictures(store.rows_of(prompts[3].id)[1]) == (crop,)
    answer = targets.answer(range(20), found.lengths.tolist())
    torch.testing.assert_close(answer.hidden, said(teacher, live, context).hidden, atol=1e-6, rtol=1e-6)
    with pytest.raises(DataError, match="read with the student's processor"):
        store.trajectories([0], members[:1], CPU)


def test_another_picture_under_the_same_row_is_refused_with_both_hashes(copied, made):
    folder, data, on_store = copied
    there = pixels_hash(Image.open(folder / "pictures/4.png"))[:19]
    picture(77, 40, 32).save(folder / "pictures/4.png")
    now = pixels_hash(picture(77, 40, 32))[:19]
    told = r"rows.jsonl:5: the picture of prompt .* is another than in .*store, row 8: its pixels are "
    told += f"{now}, and there {there}"
    with pytest.raises(DataError, match=told):
        run(on_store)
    with pytest.raises(DataError, match=told):
        score(parse_recipe(data), folder / "store", "sampled", quiet=True)
    # A store knows its student by the place that it came from.
    first = {**data, "student": {"kind": "image_text", "model": str(made / "student")}}
    with pytest.raises(DataError, match=told):
        sample(parse_recipe(first), folder / "store", draws=2, prompts_per_shard=4, quiet=True)
    kept = run({**on_store, "skip_bad_prompts": True})
    assert kept.history


def test_the_same_pixels_in_another_file_are_the_same_picture(copied):
    folder, _, on_store = copied
    Image.open(folder / "pictures/4.png").save(folder / "pictures/4.bmp")
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("pictures/4.png", "pictures/4.bmp"))
    assert run(on_store).history


def test_another_crop_than_the_teacher_saw_is_refused(copied):
    folder, _, on_store = copied
    picture(78, 16, 16).save(folder / "pictures/4-crop.png")
    with pytest.raises(
        DataError, match=r"rows.jsonl:5: the teacher's picture of prompt .* is another than in .*targets/"
    ):
        run(on_store)


def test_where_the_crops_are_not_nobody_compares_them_and_that_is_said(copied, capsys):
    folder, _, on_store = copied
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        del row["crop"]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    execute(parse_recipe(on_store))
    told = capsys.readouterr()
    assert "10 prompts lack the pictures that the teacher" in told.err + told.out


def test_another_processor_is_refused(copied):
    folder, data, on_store = copied
    place = folder / "student" / "processor_config.json"
    config = json.loads(place.read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    place.write_text(json.dumps(config))
    told = "made with another processor of pictures"
    with pytest.raises(IncompatibleError, match=told):
        run(on_store)
    with pytest.raises(IncompatibleError, match=told):
        score(parse_recipe(data), folder / "store", "sampled", quiet=True)


def test_a_damaged_hash_is_a_damaged_row(copied):
    folder, _, on_store = copied
    path = Store.open(folder / "store").shard_path(1)
    shard = Shard(path)
    names = (
        "actions",
        "behaviour_log_probs",
        "authors",
        "lengths",
        "contexts",
        "context_lengths",
        "finished",
        "checks",
    )
    tensors = {name: shard.tensor(name) for name in (*names, "pictures", "picture_counts")}
    tensors["pictures"][0, 0] ^= 1
    write_shard(path, tensors)
    with pytest.raises(DataError, match=r"row 8 .* is damaged"):
        run(on_store)


def test_lightning_wants_the_teacher_of_the_fine_tuning_of_an_image_text_student_too(copied):
    folder, data, on_store = copied
    score(parse_recipe(data), folder / "store", "sampled", name="said", quiet=True)
    offline = {**on_store, "objective": {"kind": "lightning"}}
    offline["teacher"] = {**on_store["teacher"], "targets": "said"}
    with pytest.raises(IncompatibleError, match="the student does not say which teacher that was"):
        run(offline)
    mine = Targets.open(Store.open(folder / "store"), "said").header.teacher["weights"]
    (folder / "student" / "opd.json").write_text(json.dumps({"teachers": ["sha256:other"]}))
    with pytest.raises(IncompatibleError, match=r"was scored by .* and the student was fine-tuned by sha256:other"):
        run(offline)
    (folder / "student" / "opd.json").write_text(json.dumps({"teachers": [mine]}))
    assert run(offline).history


def test_stores_of_text_and_of_pictures_do_not_mix(copied, tmp_path):
    folder, data, _ = copied
    tiny_model().save_pretrained(tmp_path / "text")
    character_tokenizer().save_pretrained(tmp_path / "text")
    text = {**data, "student": {"model": str(tmp_path / "text"), "template": "plain"}, "teacher": []}
    plain = sample(parse_recipe({**text, "objective": "sft"}), tmp_path / "plain", quiet=True)
    assert plain.header.processor is None
    with pytest.raises(IncompatibleError, match="made with a student of text"):
        score(parse_recipe(data), plain.path, quiet=True)
    with pytest.raises(IncompatibleError, match="made with a student that reads pictures"):
        score(parse_recipe({**text, "teacher": data["teacher"]}), folder / "store", quiet=True)
    blind = {**data, "teacher": {"model": str(tmp_path / "text"), "template": "plain"}}
    with pytest.raises(IncompatibleError, match="the teacher reads text alone, and the student pictures too"):
        score(parse_recipe(blind), folder / "store", quiet=True)
    with pytest.raises(RecipeError, match="opd score takes kinds local, image_text and served"):
        score(parse_recipe({**data, "teacher": {"kind": "self", "sees": "crop"}}), folder / "store", quiet=True)


def test_what_no_hash_names_is_not_stored():
    ids, frames = torch.tensor([1, 2]), {"pixel_values_videos": torch.zeros(1)}
    for context in (PromptInputs(ids, frames, ("sha256:00",)), PromptInputs(ids, {"sound": torch.zeros(1)})):
        with pytest.raises(DataError, match="row 3: prompt 'a' holds more than text and pictures"):
            pictures_of(Prompt("a", {}, where="row 3"), context)


def test_what_no_hash_names_is_refused_before_anything_is_written(copied, monkeypatch):
    folder, data, _ = copied
    encode = ImageTextModel.encode

    def with_frames(self, prompt, column=None):
        found = encode(self, prompt, column)
        frames = column == wanted and prompt.id == "rows-3"
        return replace(found, inputs={**found.inputs, "video_grid_thw": torch.ones(1, 3)}) if frames else found

    monkeypatch.setattr(ImageTextModel, "encode", with_frames)
    told = "rows.jsonl:3: prompt 'rows-3' holds more than text and pictures"
    wanted = None
    with pytest.raises(DataError, match=told):
        sample(parse_recipe(data), folder / "new", quiet=True)
    wanted = "crop"
    with pytest.raises(DataError, match=told):
        score(parse_recipe(data), folder / "store", name="new", quiet=True)
    assert not (folder / "new").exists()
    assert not (folder / "store/targets/new").exists()


def test_a_processor_is_known_by_what_it_does_to_pictures(tmp_path):
    _, first = tiny_vlm("qwen2_5_vl")
    _, again = tiny_vlm("qwen2_5_vl", seed=1)
    known = processor_hash(first)
    assert known == processor_hash(again)
    again.chat_template = "another"
    assert known == processor_hash(again)
    again.image_processor.patch_size = 14
    assert known != processor_hash(again)
    assert known != processor_hash(tiny_vlm("idefics3")[1])
    grey = Image.new("L", (8, 4), 7)
    assert pixels_hash(grey) == pixels_hash(grey.convert("RGB")) != pixels_hash(grey.resize((4, 8)))


def test_a_store_says_how_many_pictures_it_knows(made, capsys):
    app(["store", str(made / "store")], standalone_mode=False)
    told = capsys.readouterr().out
    assert "20 pictures, kept as hashes; processor sha256:" in told
    assert "every written file matches its checksum" in told


def test_an_interrupted_job_ends_in_the_same_store(made, tmp_path):
    data = parse_recipe(settings(made, str(made / "student"), str(made / "teacher")))
    again = sample(data, tmp_path / "again", prompts_per_shard=4, quiet=True)
    whole = Store.open(made / "store")
    assert again.content() == whole.content()
    for path in (again.shard_path(1), Path(f"{again.shard_path(1)}.sha256")):
        path.unlink()
    assert sample(data, again.path, prompts_per_shard=4, quiet=True).content() == whole.content()
