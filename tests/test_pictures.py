"""Pictures in rows: what is read, what is refused with the row's name, and the views that a box makes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from opd.assembly import load_data, not_held_out
from opd.checkpoints.content import content_of
from opd.drawings.font import character
from opd.errors import DataError, IncompatibleError, ModelError, RecipeError, RunError
from opd.language.engines.base import PromptInputs
from opd.language.engines.transformers import LanguageModel
from opd.plan import make_plan
from opd.policies.image_text import ImageText
from opd.prompts import Prompt, load_prompts
from opd.prompts.boxed import BoxedPrompts
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.file import FilePrompts
from opd.prompts.inline import InlinePrompts
from opd.prompts.pictures import Limits, is_picture, opened
from opd.prompts.tiles import COLOURS, SYMBOLS, TilePrompts
from opd.recipe import parse_recipe
from opd.vision.creation import create_image_text_model
from opd.vision.engine import ImageTextModel, Pictures
from opd.vision.view import view_of
from tests.conftest import character_tokenizer, tiny_model
from tests.test_image_text import recipe, run
from tests.vlm import picture, save_vlm, tiny_vlm

LIMITS = Limits(bytes=10_000, pixels=4_000)


@pytest.fixture(scope="module")
def engine():
    return ImageTextModel(*tiny_vlm("qwen3_vl"))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(value, tmp_path=None, limits=LIMITS):
    return opened(value, Prompt("p", {}, where="rows.jsonl:3", folder=tmp_path), "image", limits)


def test_a_picture_is_the_same_whatever_it_comes_as(tmp_path):
    original = picture(0, 20, 10)
    original.save(tmp_path / "a.png")
    array = np.asarray(original)
    forms = [
        "a.png",
        str(tmp_path / "a.png"),
        original,
        array,
        encoded(original),
        {"bytes": encoded(original), "path": None},
        {"bytes": None, "path": "a.png"},
    ]
    for form in forms:
        assert is_picture(form)
        assert np.array_equal(np.asarray(read(form, tmp_path)), array)
    assert is_picture([original, "a.png"])
    for other in ("what is in a.png?", "a text", [{"role": "user", "content": "x"}], [], None, 3, {"task": "x"}):
        assert not is_picture(other)


def test_it_is_turned_and_flattened_as_people_see_it():
    picture_ = picture(0, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read(encoded(picture_, "PNG", exif=exif))
    assert turned.size == (10, 20)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture_), -1))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert read(clear).getpixel((0, 0)) == (255, 255, 255)
    assert np.asarray(read(np.full((3, 5), 7, np.uint8))).tolist() == np.full((3, 5, 3), 7).tolist()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://example.org/a.png", r"is an address .*nothing is fetched: download it"),
        ("data:image/png;base64,AAAA", r"is an address"),
        ("nowhere.png", r"no file 'nowhere.png'; a relative path is looked for in the working directory and in "),
        (b"no picture", r"cannot be read .*mend the file"),
        (encoded(picture(0, 20, 20))[:200], r"cannot be read"),
        (encoded(picture(0, 80, 80), "BMP"), r"has \d+ bytes, more than 10000; raise student\.largest_file"),
        (encoded(Image.new("RGB", (100, 50))), r"has 100 x 50 pixels, more than 4000 .*student\.largest_picture"),
        (np.zeros((4, 4, 3), np.float32), r"is a float32 array of shape \[4, 4, 3\]; give uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"no pixel|cannot be read"),
        (encoded(Image.new("I;16", (4, 4))), r"more than 8 bits a colour"),
        (3.5, r"is of type float; give a file's path"),
        ({"picture": picture(0, 20, 20), "crop": [30, 0, 40, 5]}, r"20 x 20 pixels large and has the box"),
        ({"picture": picture(0, 20, 20), "crop": [1, 2]}, r"a box is \[left, top, right, bottom\]"),
    ],
)
def test_what_is_no_picture_is_named_by_its_row(value, message, tmp_path):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:3: the picture in column 'image'.*{message}"):
        read(value, tmp_path)


def lazily(cut=None, closed=False):
    """A picture of PIL over a file that was cut off, or closed before anybody looked."""
    made = Image.open(io.BytesIO(encoded(picture(0, 40, 40))[:cut]))
    if closed:
        made.close()
    return made


@pytest.mark.parametrize("options", [{"cut": 300}, {"closed": True}])
def test_a_picture_of_pil_that_cannot_be_read_is_named_by_its_row_too(options, tmp_path):
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: the picture in column 'image' cannot be read"):
        read(lazily(**options), tmp_path)
    rows = InlinePrompts(prompts=[{"prompt": "which digit?", "image": lazily(**options)}])
    assert "cannot be read" in rows.model_dump(mode="json")["prompts"][0]["image"]
    of_rows = [content_of(load_prompts([rows]), lambda prompt: []) for _ in range(2)]
    assert of_rows[0] == of_rows[1]


def test_a_place_that_is_no_file_is_not_opened(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"'folder.png' is no file"):
        read("folder.png", tmp_path)


# Views.


def seen(engine, fields, column=None):
    return view_of(engine, Prompt("p", fields, where="row 1"), column)


def kinds(view):
    return [
        [part["type"] if part["type"] == "image" else part["text"] for part in message["content"]]
        for message in view.messages
    ]


def test_pictures_stand_where_the_prompt_says(engine):
    a, b = picture(0), picture(1)
    assert kinds(seen(engine, {"prompt": "what?", "image": a})) == [["image", "what?"]]
    assert kinds(seen(engine, {"prompt": "one <image> two <image>?", "image": [a, b]})) == [
        ["one ", "image", " two ", "image", "?"]
    ]
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": b}]},
    ]
    view = seen(engine, {"prompt": talk, "image": a})
    assert kinds(view) == [["image", "this?"], ["a cat"], ["and", "image"]]
    assert np.array_equal(np.asarray(view.pictures[1]), np.asarray(b))
    assert kinds(seen(engine, {"prompt": "text", "image": None})) == [["text"]]
    assert kinds(seen(engine, {"prompt": "no <image> here", "image": []})) == [["no <image> here"]]
    inline = [{"role": "user", "content": [{"type": "image", "image": a}, {"type": "text", "text": "?"}]}]
    assert kinds(seen(engine, {"prompt": inline})) == [["image", "?"]]
    # What a table makes of parts: every key in each of them.
    table = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]
    assert kinds(seen(engine, {"prompt": table, "image": a})) == [["image", "?"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "what?"}, r"no column 'image' with its pictures; name the right one with student\.images"),
        ({"prompt": "what?", "images": "a.png"}, r"no column 'image' .*did you mean 'images'"),
        ({"prompt": "one <image>?", "image": [picture(0), picture(1)]}, r"places for 1 pictures .*holds 2"),
        ({"prompt": "a <|image_pad|>?", "image": picture(0)}, r"the text holds '<\|image_pad\|>', which stands for"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "image": None}, r"places for 1 .*holds 0"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]},
            r"is an address",
        ),
    ],
)
def test_what_has_no_place_is_refused(engine, fields, message):
    with pytest.raises(DataError, match=rf"^row 1: .*{message}"):
        seen(engine, fields)


def test_a_view_is_another_picture_under_the_same_text_or_another_text(engine):
    fields = {"prompt": "what?", "image": picture(0), "crop": picture(1, 16, 16), "hinted": "what? a cat"}
    prompt = Prompt("p", fields, where="row 1")
    crop, hinted = seen(engine, fields, "crop"), seen(engine, fields, "hinted")
    assert kinds(crop) == [["image", "what?"]]
    assert crop.pictures[0].size == (16, 16)
    assert kinds(hinted) == [["image", "what? a cat"]]
    assert hinted.pictures[0].size == (32, 32)
    own, other = engine.encode(prompt), engine.encode(prompt, "crop")
    assert isinstance(own, PromptInputs)
    assert len(own) == len(other) + 4 - 1
    assert engine.encode(prompt) is own
    assert engine.length(prompt, "crop") == len(other)


def test_models_of_text_refuse_a_picture_in_messages():
    model = LanguageModel(tiny_model(), character_tokenizer(), "plain")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(DataError, match=r"row 1: the messages in column 'prompt' hold a picture, and .* text alone"):
        model.encode(Prompt("p", {"prompt": messages}, where="row 1"))


def test_pictures_of_a_dataset_stay_encoded(tmp_path, engine):
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": ["what?"], "image": [picture(0)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    (prompt,) = load_prompts([DatasetPrompts(path=str(tmp_path / "set"))])
    assert set(prompt.fields["image"]) == {"bytes", "path"}
    own = engine.encode(Prompt("p", {"prompt": "what?", "image": picture(0)}))
    assert torch.equal(engine.encode(prompt).inputs["pixel_values"], own.inputs["pixel_values"])
    features["image"] = datasets.List(datasets.Image())
    rows = {"prompt": ["what?"], "image": [[picture(0), picture(1)]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "lists")
    (several,) = load_prompts([DatasetPrompts(path=str(tmp_path / "lists"))])
    assert [set(each) for each in several.fields["image"]] == [{"bytes", "path"}] * 2
    assert len(engine.encode(several)) > len(engine.encode(prompt))


# Boxes.


def boxed(rows, **settings):
    source = BoxedPrompts(of=InlinePrompts(prompts=rows), largest=0.5, **settings)
    return load_prompts([source])


def test_a_box_makes_both_views(engine):
    grey = Image.new("RGB", (40, 20), (90, 90, 90))
    row = {"prompt": "which digit?", "image": grey, "box": [10, 4, 20, 12]}
    (prompt,) = boxed([row], line=1)
    assert prompt.view() == "Consider only what is inside the red box.\nwhich digit?"
    student, teacher = view_of(engine, prompt, None), view_of(engine, prompt, "crop")
    assert kinds(student) == kinds(teacher)
    red = (np.asarray(student.pictures[0]) == (255, 0, 0)).all(-1)
    expected = np.zeros((20, 40), bool)
    expected[3:13, 9:21] = True
    expected[4:12, 10:20] = False
    assert np.array_equal(red, expected)
    assert teacher.pictures[0].size == (20, 16)
    (clean,) = boxed([row], view="clean")
    assert clean.view() == "which digit?"
    assert np.array_equal(np.asarray(view_of(engine, clean, None).pictures[0]), np.asarray(grey))
    (crop,) = boxed([row], view="crop", scale=1.0, margin=0.5)
    assert view_of(engine, crop, None).pictures[0].size == (20, 16)
    (cut,) = boxed([{**row, "box": [36.5, -1, 41, 6]}], view="crop", scale=1.0)
    assert view_of(engine, cut, None).pictures[0].size == (4, 6)
    shares = {**row, "box": [0.25, 0.2, 0.5, 0.6]}
    assert boxed([shares], units="share", line=1)[0].fields["image"] == prompt.fields["image"]
    # The picture that the row came with is as it was.
    assert np.array_equal(np.asarray(grey), np.full((20, 40, 3), 90))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": None}, r"column 'box' is empty; a row of a boxed source has"),
        ({"box": [0.25, 0.2, 0.5, 0.6]}, r"less than a pixel; set units: share if it is in parts of the picture"),
        ({"box": [30, 10, 60, 20]}, r"of which most lies outside; is it in other units"),
        ({"box": [-9, -9, 10, 10]}, r"of which most lies outside"),
        ({"box": [0, 0, 40, 20]}, r"has 100\.0% of the picture, more than prompts\.largest=0\.5; raise it"),
        ({"box": [50, 0, 60, 5]}, r"40 x 20 pixels large and has the box"),
        ({"crop": "x"}, r"a column 'crop' of its own"),
        ({"image": [picture(0), picture(1)]}, r"holds 2 pictures; a box is in one"),
        ({"image": "gone.png"}, r"no file 'gone\.png'"),
    ],
)
def test_a_box_that_is_none_is_named(change, message):
    row = {"prompt": "which digit?", "image": Image.new("RGB", (40, 20)), "box": [10, 4, 20, 12], **change}
    with pytest.raises(DataError, match=rf"^prompts\[0\]: .*{message}"):
        boxed([row])


def test_what_belongs_to_the_boxed_source_is_not_said_within():
    with pytest.raises(ValueError, match=r"'limit' is said of the prompts that come out"):
        BoxedPrompts(of=FilePrompts(path="x.jsonl", limit=3))


# Runs.


def test_a_damaged_picture_ends_a_run_before_it_begins_or_is_skipped(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl", layers=2)
    settings = recipe(tmp_path, {"kind": "image_text", "model": folder}, steps=1)
    (tmp_path / "pictures" / "3-crop.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"rows\.jsonl:4: the picture in column 'crop' cannot be read"):
        run(settings)
    result = run({**settings, "skip_bad_prompts": True}, overwrite=True)
    assert result.summary["steps"] == 1


def test_a_changed_picture_is_another_run(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl", layers=2)
    settings = recipe(tmp_path, {"kind": "image_text", "model": folder}, steps=1)
    run(settings)
    picture(77, 40, 32).save(tmp_path / "pictures" / "2.png")
    with pytest.raises(RunError, match=r"prompts"):
        run({**settings, "steps": 2}, resume=True)


def test_the_same_question_over_another_picture_is_held_out(tmp_path):
    rows = [{"prompt": "what?", "image": picture(i), "id": str(i)} for i in range(6)]
    settings = recipe(
        tmp_path,
        {"kind": "image_text", "model": "tiny/model"},
        prompts={"kind": "inline", "prompts": rows[:4]},
        evaluation={"prompts": {"kind": "inline", "prompts": rows[4:]}},
    )
    made = parse_recipe(settings)
    assert not_held_out(made, *load_data(made)) == []
    training, held_out = load_data(made)
    again = [replace(held_out[0], fields={**held_out[0].fields, "image": picture(0)}), held_out[1]]
    assert "1 of 2 are training prompts too" in not_held_out(made, training, again)[0]


def test_a_teacher_of_text_alone_is_refused(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl", layers=2)
    text = tiny_model(vocabulary=90)
    text.save_pretrained(tmp_path / "text")
    ImageTextModel(*tiny_vlm("qwen3_vl")).tokenizer.save_pretrained(tmp_path / "text")
    settings = recipe(tmp_path, {"kind": "image_text", "model": folder}, {"model": str(tmp_path / "text")})
    with pytest.raises(IncompatibleError, match=r"the teacher reads text alone, and the student pictures too"):
        run(settings)


def test_another_model_teaches_with_pictures_of_its_own(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl", layers=2)
    other = save_vlm(tmp_path / "other", "qwen3_vl", seed=1)
    teacher = {"kind": "image_text", "model": other, "sees": "crop"}
    result = run(recipe(tmp_path, {"kind": "image_text", "model": folder}, teacher, steps=1))
    assert result.before["reverse_kl"] > 0.01
    settings = recipe(tmp_path, {"kind": "image_text", "model": folder, "drop_layers": [1]})
    with pytest.raises(RecipeError, match=r"no layers can be dropped of an image-text model"):
        parse_recipe(settings)


def test_a_column_is_named_by_the_student(tmp_path, engine):
    other = ImageTextModel(engine.model, engine.processor, pictures=Pictures("photo"))
    assert kinds(seen(other, {"prompt": "what?", "photo": picture(0), "image": "not this"})) == [["image", "what?"]]
    none = ImageTextModel(engine.model, engine.processor, pictures=Pictures(None))
    assert kinds(seen(none, {"prompt": "what?", "image": picture(0)})) == [["what?"]]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what?", "image": "a.png"}))
    picture(0).save(tmp_path / "a.png")
    (prompt,) = load_prompts([FilePrompts(path=str(tmp_path / "rows.jsonl"))])
    assert engine.encode(prompt).inputs["pixel_values"].shape[0] == 16


# Tiles.


def test_tiles_are_in_their_boxes_and_the_same_for_every_size():
    (first, *_), few = TilePrompts(size=3).rows(), TilePrompts(size=2).rows()
    assert first[1]["prompt"] == few[0][1]["prompt"]
    assert np.array_equal(first[1]["image"], few[0][1]["image"])
    for _, row in TilePrompts(size=20, seed=3).rows():
        left, top, right, bottom = row["box"]
        tile = row["image"][top:bottom, left:right]
        colour, sign = row["answer"].split()
        assert colour == row["prompt"].split()[3]
        ink = character(sign, 2)
        assert np.array_equal((tile[1:15, 3:13] == 255).all(-1), ink)
        assert (tile[0] == COLOURS[colour]).all()
        assert set(row["prompt"].split()) | set(row["answer"].split()) <= set(SYMBOLS)


def test_no_picture_of_tiles_is_in_two_splits():
    def keys(split):
        return {row["image"].tobytes() for _, row in TilePrompts(size=50, tiles=1, split=split).rows()}

    assert not keys("train") & keys("test")
    counts = [row["answer"] for _, row in TilePrompts(size=60, ask="count", tiles=4).rows()]
    assert set(counts) == {"one", "two", "three", "four"}


def test_a_new_model_reads_tiles_and_their_crops(tmp_path):
    folder = create_image_text_model(tmp_path / "new", SYMBOLS)
    with pytest.raises(ModelError, match=r"holds a model already"):
        create_image_text_model(folder, SYMBOLS)
    with pytest.raises(ModelError, match=r"width is 30 with 4 heads; give a multiple of 8"):
        create_image_text_model(tmp_path / "other", SYMBOLS, width=30)
    engine = ImageText(model=str(folder)).engine("cpu")
    source = BoxedPrompts(of=TilePrompts(size=2), margin=0.5, hint=None)
    (prompt, _) = load_prompts([source])
    whole, crop = engine.encode(prompt), engine.encode(prompt, "crop")
    assert (len(whole) - len(crop), len(crop)) == (36 - 16, 2 + 16 + 6)
    assert not bool((whole.ids == engine.tokenizer.unk_token_id).any())
    completion = torch.tensor([10, 20, engine.tokenizer.eos_token_id])
    ours = engine.head(1.0).logits(engine([whole, crop], [completion, completion]))
    own = torch.cat([engine.own_logits(whole, completion), engine.own_logits(crop, completion)])
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)
    assert engine.decode(completion) == f"{SYMBOLS[10 - 3]} {SYMBOLS[20 - 3]}"


def test_words_that_a_model_lacks_are_found_before_a_run(tmp_path):
    """The usual hint, for a model that knows the words of tiles alone."""
    folder = create_image_text_model(tmp_path / "model", SYMBOLS)
    settings = {
        "student": {"kind": "image_text", "model": str(folder)},
        "teacher": {"kind": "self", "sees": "crop"},
        "prompts": {"kind": "boxed", "of": {"kind": "tiles", "size": 4}},
        "evaluation": {"held_out": 1},
    }
    with pytest.raises(DataError, match=r"has no token for a part of 'Consider only"):
        make_plan(parse_recipe(settings, "the test"))
    settings["prompts"]["hint"] = "look inside the red frame"
    assert make_plan(parse_recipe(settings, "the test")).peak > 0
