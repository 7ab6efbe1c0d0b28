"""Drawing tasks: rewards are exact on clean drawings and fall with every fault; splits; prompts and verifier."""

from __future__ import annotations

import random
import re
import shlex
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from opd.choice import choices_of
from opd.cli import main
from opd.drawings import SPLITS, Drawing, checked
from opd.drawings.cartoon import cartoon, objects
from opd.drawings.count import NUMBERS, Count
from opd.drawings.font import CHARACTERS
from opd.drawings.glyph import Glyph
from opd.drawings.palette import COLOURS, GRADIENTS, GREYS
from opd.drawings.quality import quality
from opd.drawings.scene import Scene
from opd.drawings.shapes import SHAPES, classify, shape_mask
from opd.errors import DataError, RecipeError
from opd.prompts import Prompt, load_prompts
from opd.recipe import parse_recipe
from opd.verifiers.drawing import DrawingReward

TASKS = choices_of(Drawing)
each_task = pytest.mark.parametrize("kind", list(TASKS))
both_sizes = pytest.mark.parametrize("pixels", [16, 32])


def real(image):
    return image.astype(np.float32) / 255


def count_row(number, colour, shape):
    prompt = f"{NUMBERS[number - 1]} {colour} {shape}{'s' if number > 1 else ''}"
    return {"prompt": prompt, "number": number, "colour": colour, "shape": shape}


def scene_row(colour, shape, background):
    prompt = f"{colour} {shape} on {background}"
    return {"prompt": prompt, "colour": colour, "shape": shape, "background": background}


def glyph_row(text):
    return {"prompt": f"text {text}", "text": text}


def every_row(kind, pixels):
    """Every problem of count and scene; of glyph texts with every character at every place."""
    if kind == "count":
        return [count_row(*each) for each in product((1, 2, 3, 4), COLOURS, SHAPES)]
    if kind == "scene":
        return [scene_row(*each) for each in product(COLOURS, SHAPES, GRADIENTS)]
    texts = [a + b for a, b in product(CHARACTERS, repeat=2)][:: 1 if pixels == 16 else 3]
    longer = [random.Random(c).choice(texts) + c for c in CHARACTERS] if pixels > 16 else []
    return [glyph_row(text) for text in texts + longer]


# ---- the rewards of clean drawings ----


@each_task
@both_sizes
def test_every_prompt_drawn_cleanly_has_full_reward(kind, pixels):
    task, rng = TASKS[kind](pixels=pixels), random.Random(1)
    for row in every_row(kind, pixels):
        for _ in range(1 if kind == "glyph" else 2):
            picture = real(task.paint(row, rng))
            assert picture.shape == (pixels, pixels, 3)
            assert task.score(row, picture, graded=False) == 1.0, row
            assert task.score(row, picture, graded=True) == pytest.approx(1.0, abs=1e-5), row
            assert quality(picture) > 0.99, row


@pytest.mark.parametrize("pixels", [48, 64])
def test_larger_pictures_work_too(pixels):
    for kind, task in TASKS.items():
        for row in task(pixels=pixels).rows(40, seed=3):
            assert task.score(row, real(row["image"]), graded=False) == 1.0, (kind, row["prompt"])


@each_task
@both_sizes
def test_a_drawing_of_another_prompt_is_not_right(kind, pixels):
    rows = TASKS[kind](pixels=pixels).rows(60, seed=2)
    for row, other in pairwise(rows):
        if other["prompt"] != row["prompt"]:
            assert TASKS[kind].score(other, real(row["image"]), graded=False) == 0.0
            assert TASKS[kind].score(other, real(row["image"]), graded=True) < 0.95


@each_task
@both_sizes
def test_rewards_fall_with_noise_and_blur(kind, pixels):
    rows = TASKS[kind](pixels=pixels).rows(20, seed=4)
    rng = np.random.default_rng(0)

    def means(fault):
        pictures = [fault(real(row["image"])).clip(0, 1).astype(np.float32) for row in rows]
        graded = [TASKS[kind].score(row, p, graded=True) for row, p in zip(rows, pictures, strict=True)]
        exact = [TASKS[kind].score(row, p, graded=False) for row, p in zip(rows, pictures, strict=True)]
        return np.mean(graded), np.mean(exact), np.mean([quality(p) for p in pictures])

    noisy = [means(lambda p, s=s: p + s * rng.normal(size=p.shape)) for s in (0.0, 0.1, 0.2, 0.3, 0.5)]
    for better, worse in pairwise(noisy):
        assert better[0] > worse[0] + 0.02 or better[0] == 1.0
        assert better[1] >= worse[1]
        assert better[2] > worse[2]
    assert noisy[-1][0] < 0.6
    assert noisy[-1][1] == 0.0
    assert noisy[-1][2] < 0.02
    blurred = [means(lambda p, s=s: ndimage.gaussian_filter(p, (s, s, 0))) for s in (0.0, 1.0, 2.5)]
    assert blurred[0][0] > blurred[1][0] > blurred[2][0]
    assert blurred[0][1] > blurred[2][1]
    assert blurred[0][2] > blurred[1][2] + 0.05
    assert blurred[0][2] > blurred[2][2] + 0.05


def test_pure_noise_and_plain_pictures_earn_little():
    rng = np.random.default_rng(1)
    for kind, task in TASKS.items():
        row = task().rows(1)[0]
        for picture in (rng.random((32, 32, 3)), np.zeros((32, 32, 3)), np.full((32, 32, 3), 0.5)):
            given = picture.astype(np.float32)
            assert task.score(row, given, graded=False) == 0.0
            assert task.score(row, given, graded=True) < 0.4, kind
    # Half of a scene is its background.
    assert quality(rng.random((32, 32, 3)).astype(np.float32)) < 0.01


# ---- partial credit, by hand ----


@pytest.mark.parametrize(
    ("drawn", "graded"),
    [
        (count_row(3, "red", "circle"), 1.0),
        (count_row(2, "red", "circle"), 2 / 3),
        (count_row(4, "red", "circle"), 3 / 4),
        (count_row(3, "blue", "circle"), 1 / 2),
        (count_row(3, "red", "square"), 1 / 2),
        (count_row(1, "blue", "square"), 0.0),
    ],
)
def test_counting_gives_credit_by_the_object(drawn, graded):
    picture = real(Count().paint(drawn, random.Random(5)))
    wanted = count_row(3, "red", "circle")
    assert Count.score(wanted, picture, graded=True) == pytest.approx(graded)
    assert Count.score(wanted, picture, graded=False) == float(graded == 1)


def test_a_damaged_shape_counts_by_its_overlap():
    mask = shape_mask("square", 8, 8).copy()
    mask[0, :4] = False
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[4:12, 4:12][mask] = COLOURS["red"]
    assert [(f.colour, f.shape, f.fit) for f in objects(cartoon(real(picture)))] == [("red", "square", 60 / 64)]
    assert Count.score(count_row(1, "red", "square"), real(picture), graded=True) == 0.5 + 0.5 * 60 / 64
    assert Count.score(count_row(1, "red", "square"), real(picture), graded=False) == 1.0


@pytest.mark.parametrize("side", range(4, 17))
def test_shapes_fill_their_box_and_are_told_apart(side):
    for shape in SHAPES:
        mask = shape_mask(shape, side, side)
        assert all(side.any() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
        assert np.array_equal(mask, mask[:, ::-1])
        assert classify(mask) == (shape, 1.0)


def test_specks_are_no_objects_and_cost_quality():
    picture = Count().paint(count_row(1, "red", "circle"), random.Random(0))
    clean = real(picture)
    behind = np.argwhere((picture == picture[0, 0]).all(-1))
    y, x = behind[(behind[:, 0] > 1) & (behind[:, 1] > 1)][-1]
    picture[y - 1 : y + 1, x - 1 : x + 1] = COLOURS["blue"]
    assert Count.score(count_row(1, "red", "circle"), real(picture), graded=False) == 1.0
    assert quality(real(picture)) < quality(clean) - 0.02


def test_a_scene_is_half_object_and_half_background():
    row, rng = scene_row("red", "circle", "sea"), random.Random(0)
    for other, least, most in (
        (scene_row("red", "square", "sea"), 0.75, 0.75),
        (scene_row("blue", "square", "sea"), 0.5, 0.5),
        (scene_row("red", "circle", "night"), 0.5, 0.6),
    ):
        score = Scene.score(row, real(Scene().paint(other, rng)), graded=True)
        assert least - 1e-6 <= score <= most + 1e-6
    covered = np.empty((32, 32, 3), dtype=np.float32)
    covered[:] = np.array(COLOURS["red"]) / 255
    assert Scene.score(row, covered, graded=True) == 0.0


def test_a_wrong_or_missing_character_and_extra_ink_cost_their_share():
    row, rng = glyph_row("4K7"), random.Random(0)
    one_wrong = Glyph.score(row, real(Glyph().paint(glyph_row("4K8"), rng)), graded=True)
    two_wrong = Glyph.score(row, real(Glyph().paint(glyph_row("4XC"), rng)), graded=True)
    assert two_wrong + 0.1 < one_wrong < 0.9
    picture = Glyph().paint(row, rng)
    before = Glyph.score(row, real(picture), graded=True)
    picture[0:3] = next(colour for colour in picture.reshape(-1, 3) if not np.array_equal(colour, picture[0, 0]))
    assert Glyph.score(row, real(picture), graded=True) < before - 0.1
    assert Glyph.score(row, real(picture), graded=False) == 0.0
    assert Glyph.score(glyph_row("4K"), real(Glyph().paint(row, rng)), graded=False) == 0.0


def test_paper_and_ink_are_legible():
    for row in Glyph().rows(100):
        image = row["image"].reshape(-1, 3)
        paper = np.median(image, axis=0)
        ink = image[np.abs(image - paper).sum(1).argmax()]
        assert abs(float((ink - paper) @ (0.299, 0.587, 0.114))) > 0.3 * 255 - 1


# ---- rows and splits ----


@each_task
def test_rows_are_deterministic_and_a_small_size_is_the_start_of_a_large_one(kind):
    task = TASKS[kind]()
    few, many, other = task.rows(20, seed=5), task.rows(40, seed=5), task.rows(40, seed=6)
    assert all(a["id"] == b["id"] and np.array_equal(a["image"], b["image"]) for a, b in zip(few, many, strict=False))
    assert [row["prompt"] for row in many] != [row["prompt"] for row in other]
    assert len({row["id"] for row in many + other}) == 80
    assert {row["image"].dtype for row in many} == {np.dtype(np.uint8)}
    assert {row["task"] for row in many} == {kind}


def test_rows_are_the_same_on_every_machine():
    """Written down, so that no release of Python or of this library changes the rows of an experiment unseen."""
    rows = [(task(pixels=16).rows(1, seed=7)[0], kind) for kind, task in TASKS.items()]
    assert [(row["prompt"], int(row["image"].sum())) for row, _ in rows] == [
        ("one red circle", 140976),
        ("text VY", 177120),
        ("blue circle on dawn", 138506),
    ]


@each_task
@both_sizes
def test_splits_share_no_drawing(kind, pixels):
    seen = {}
    for split in SPLITS if kind != "glyph" else SPLITS[:3]:
        key = "text" if kind == "glyph" else None
        rows = [row for seed in range(2) for row in TASKS[kind](pixels=pixels).rows(150, seed, split)]
        seen[split] = {row[key] if key else (row["prompt"], row["image"].tobytes()) for row in rows}
    for split, found in seen.items():
        assert not any(found & other for name, other in seen.items() if name != split)
        assert len(found) > 50


@pytest.mark.parametrize("kind", ["count", "scene"])
def test_unseen_prompts_are_of_words_that_training_has(kind):
    trained = {row["prompt"] for row in TASKS[kind](pixels=16).rows(1000)}
    unseen = {row["prompt"] for row in TASKS[kind](pixels=16).rows(200, split="unseen")}
    assert len(unseen) == 12
    assert len(trained) == {"count": 36, "scene": 60}[kind]
    assert not unseen & trained
    words = {word.removesuffix("s") for prompt in trained for word in prompt.split()}
    assert {word.removesuffix("s") for prompt in unseen for word in prompt.split()} == words
    assert {row["prompt"] for row in TASKS[kind](pixels=16).rows(500, split="test")} == trained


def test_a_split_without_drawings_is_refused():
    with pytest.raises(DataError, match="task 'glyph' has no drawings in the split 'unseen'"):
        Glyph().rows(1, split="unseen")


def test_texts_keep_to_an_alphabet():
    rows = [row for split in SPLITS[:3] for row in Glyph(alphabet="47AC").rows(40, split=split)]
    assert {character for row in rows for character in row["text"]} == set("47AC")


def test_texts_that_are_not_moved_stand_in_the_middle():
    rows = Glyph(pixels=16, alphabet="HM", moved=False).rows(20)
    inked = [np.argwhere((row["image"] != row["image"][0, 0]).any(-1)) for row in rows]
    assert {(*place.min(0), *place.max(0)) for place in inked} == {(4, 2, 10, 12)}


def test_shapes_that_are_not_moved_fill_the_middle_of_a_quarter():
    rows = [row for row in Count(pixels=16, moved=False).rows(60) if row["shape"] == "square"]
    places = {
        tuple(sorted(set(np.argwhere((row["image"] != row["image"][0, 0]).any(-1))[:, axis].tolist())))
        for row in rows
        for axis in (0, 1)
    }
    once, twice = tuple(range(1, 7)), tuple(range(9, 15))
    assert places == {once, twice, once + twice}


def test_twenty_thousand_drawings_load_quickly():
    start = time.process_time()
    rows = sum(len(task().rows(7000)) for task in TASKS.values())
    seconds = time.process_time() - start
    print(f"{rows:,} drawings of 32 x 32 in {seconds:.2f} CPU seconds")
    assert seconds < 10


def test_rewards_take_few_milliseconds():
    for kind, task in TASKS.items():
        rows = [(row, real(row["image"])) for row in task().rows(100)]
        start = time.process_time()
        for row, picture in rows:
            task.score(row, picture, graded=True)
        middle = time.process_time()
        for _, picture in rows:
            quality(picture)
        seconds, clean = middle - start, time.process_time() - middle
        print(f"{kind}: {10 * seconds:.2f} ms a picture, quality {10 * clean:.2f} ms")
        assert seconds + clean < 1.0


# ---- prompts and verifier ----


def prompts_of(*sources):
    data = {"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": list(sources)}
    return load_prompts(parse_recipe(data).prompts)


def test_prompts_of_several_tasks():
    prompts = prompts_of(*({"kind": "drawings", "task": kind, "size": 10, "split": "test"} for kind in TASKS))
    assert len(prompts) == 30
    verifier = DrawingReward()
    for prompt in prompts:
        assert isinstance(prompt.view(), str)
        assert verifier.score(prompt, real(prompt.fields["image"])) == pytest.approx(1.0, abs=1e-5)
    other = prompts_of({"kind": "drawings", "task": {"kind": "glyph", "pixels": 16}, "column": "caption"})[0]
    assert other.view() == other.fields["prompt"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"task": "counts"}, "did you mean 'count'"),
        ({"task": {"kind": "count", "pixels": 20}}, "prompts.0.task.pixels.*multiple of 16"),
        ({"task": {"kind": "glyph", "pixels": 16, "characters": [3]}}, "three characters do not fit into 16 pixels"),
        ({"task": {"kind": "glyph", "characters": [5]}}, "prompts.0.task.characters"),
        ({"task": {"kind": "glyph", "alphabet": "47O"}}, "not in the font: 'O'; take different characters of 2345"),
        ({"task": {"kind": "glyph", "alphabet": "474"}}, "a character stands there twice"),
        ({"task": "count", "split": "held"}, "prompts.0.split"),
    ],
)
def test_prompt_settings_that_make_no_drawing_are_named(source, message):
    with pytest.raises(RecipeError, match=message) as error:
        prompts_of({"kind": "drawings", **source})
    assert len(str(error.value).splitlines()) <= 2


def prompt_of(kind, **task):
    row = TASKS[kind](**task).rows(1)[0]
    return Prompt(row["id"], row)


def test_mixtures_weigh_what_a_row_has():
    count, glyph, plain = prompt_of("count"), prompt_of("glyph"), Prompt("x", {"prompt": "a cat"})
    rng = np.random.default_rng(0)
    picture = (real(count.fields["image"]) + 0.05 * rng.normal(size=(32, 32, 3))).clip(0, 1).astype(np.float32)
    task, clean = (DrawingReward(reward=name).score(count, picture) for name in ("task", "quality"))
    assert clean < 0.8 < task
    assert DrawingReward(reward={"task": 0.8, "quality": 0.2}).score(count, picture) == pytest.approx(
        0.8 * task + 0.2 * clean
    )
    assert DrawingReward(reward="count").score(count, picture) == task
    assert DrawingReward(reward="glyph").score(count, picture) is None
    assert DrawingReward(reward={"glyph": 1, "quality": 3}).score(count, picture) == pytest.approx(clean)
    assert DrawingReward(reward={"glyph": 1, "quality": 3}).score(glyph, real(glyph.fields["image"])) == pytest.approx(
        1, abs=0.01
    )
    assert DrawingReward().score(plain, picture) is None
    assert DrawingReward(reward="quality").score(plain, picture) == pytest.approx(clean)


def test_exact_and_graded_differ():
    two = real(Count().paint(count_row(2, "red", "circle"), random.Random(0)))
    row = Prompt("x", {"task": "count", **count_row(3, "red", "circle")})
    assert DrawingReward().score(row, two) == pytest.approx(2 / 3)
    assert DrawingReward(graded=False).score(row, two) == 0.0


def test_pictures_out_of_range_are_clipped_and_broken_ones_earn_nothing():
    prompt = prompt_of("count")
    picture = real(prompt.fields["image"])
    beyond = np.where(picture > 0.9, 7.0, picture).astype(np.float32)
    assert DrawingReward().score(prompt, beyond) == DrawingReward().score(prompt, beyond.clip(0, 1))
    broken = picture.copy()
    broken[3, 4, 1] = np.nan
    assert DrawingReward(reward={"task": 1, "quality": 1}).score(prompt, broken) == 0.0
    assert checked(np.full((16, 16, 3), np.inf)).max() == 1.0


@pytest.mark.parametrize(
    ("fields", "completion", "message"),
    [
        ({}, "a text", "score pictures; this policy answers with text"),
        ({}, np.zeros((3, 32, 32)), r"shape \[height, width, 3\]; this one has \[3, 32, 32\]"),
        ({"task": "count"}, np.zeros((32, 32, 3)), "x: its columns are none of a count drawing .KeyError: 'number'"),
        ({"task": "count", **count_row(2, "red", "circle"), "number": "2"}, np.zeros((32, 32, 3)), "TypeError"),
        ({"task": "scene", **scene_row("red", "circle", "sea"), "background": "moon"}, np.zeros((32, 32, 3)), "moon"),
        ({"task": "glyph", "text": "Oh"}, real(Glyph().rows(1)[0]["image"]), "none of a glyph drawing"),
    ],
)
def test_what_cannot_be_scored_is_named(fields, completion, message):
    with pytest.raises(DataError, match=message):
        DrawingReward().score(Prompt("x", fields), completion)


def test_unknown_rewards_are_named():
    data = {"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": {"kind": "file", "path": "x"}}
    for reward, message in (({"qualty": 1}, "did you mean 'quality'"), ({"task": 0}, "greater than 0"), ({}, "reward")):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(data | {"verifier": {"kind": "drawing", "reward": reward}})


# ---- the command and the page ----

PAGE = Path(__file__).parent.parent / "docs" / "images.md"


def run_cli(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@each_task
def test_the_page_shows_what_its_commands_draw(kind, tmp_path, monkeypatch, capsys):
    command, shown = re.search(
        rf"\$ (opd drawings {kind} .*)\n((?:.+\n)*?)```", PAGE.read_text(encoding="utf-8")
    ).groups()
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, capsys, shlex.split(command)) == (0, shown, "")
    drawn, there = (np.asarray(Image.open(folder / f"{kind}.png")) for folder in (tmp_path, PAGE.parent / "images"))
    assert np.array_equal(drawn, there)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["counts", "x.png"], "did you mean 'count'"),
        (["count", "x.png", "pixels=7"], "prompts.task.pixels is 7: input should be a multiple of 16"),
        (["glyph", "x.png", "--split", "unseen"], "no drawings in the split 'unseen'"),
        (["count", "folder"], "cannot write the pictures to folder (Is a directory)"),
    ],
)
def test_the_command_tells_mistakes_in_a_line_or_two(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    code, out, err = run_cli(monkeypatch, capsys, ["opd", "drawings", *words])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_greys_and_colours_are_far_apart():
    colours = np.array([*COLOURS.values(), *GREYS.values()]) / 255
    apart = np.sqrt(((colours[:, None] - colours[None]) ** 2).sum(-1)) + 9 * np.eye(len(colours))
    assert apart.min() > 0.2
