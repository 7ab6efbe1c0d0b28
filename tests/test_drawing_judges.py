"""Judges of drawings on sets whose answer is known, the vocabulary, and the text recogniser on clean drawings."""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest
import torch
from scipy import ndimage
from transformers import AutoTokenizer

from opd.choice import choices_of
from opd.drawings import Drawing
from opd.drawings.glyph import Glyph
from opd.drawings.palette import GRADIENTS, GREYS, gradient
from opd.drawings.vocabulary import drawing_tokenizer
from opd.errors import DataError, ModelError, RecipeError
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.verifiers import ocr
from opd.verifiers.ocr import Ocr, edit_distance
from reproductions.drawing_judges import (
    Classifier,
    background_entropy,
    edge_sharpness,
    frechet_distance,
    nearest_distance,
    train_classifier,
)

TASKS = choices_of(Drawing)
installed = importlib.util.find_spec("rapidocr_onnxruntime") is not None
needs_ocr = pytest.mark.skipif(not installed, reason="needs rapidocr-onnxruntime, which is not installed")


def pictures_of(rows):
    return np.stack([row["image"] for row in rows]).astype(np.float32) / 255


def blurred(pictures, sigma):
    return ndimage.gaussian_filter(pictures, (0, sigma, sigma, 0))


# ---- judges ----


def test_entropy_of_backgrounds():
    plain = [np.broadcast_to(np.float32(grey) / 255, (16, 16, 3)) for grey in GREYS.values()]
    smooth = [np.repeat(gradient(name, 16)[:, None] / np.float32(255), 16, axis=1) for name in GRADIENTS]
    assert background_entropy(np.stack([plain[0]] * 5)) == 0
    assert background_entropy(np.stack([plain[0], plain[1]] * 3)) == pytest.approx(np.log(2))
    assert background_entropy(np.stack(plain + smooth)) == pytest.approx(np.log(10))
    count = background_entropy(pictures_of(TASKS["count"](pixels=16).rows(200)))
    scene = background_entropy(pictures_of(TASKS["scene"](pixels=16).rows(200)))
    assert np.log(4) - 0.05 < count <= np.log(4)
    assert np.log(6) - 0.05 < scene <= np.log(6)


def test_sharpness_is_one_for_drawings_and_falls_with_blur():
    for kind, task in TASKS.items():
        drawn = pictures_of(task().rows(20))
        means = [float(np.nanmean(edge_sharpness(blurred(drawn, s) if s else drawn))) for s in (0, 0.5, 1.0, 2.0)]
        assert means[0] == pytest.approx(1, abs=2e-3), kind
        assert means[0] > means[1] > means[2] > means[3], kind
    assert np.isnan(edge_sharpness(np.zeros((1, 16, 16, 3), dtype=np.float32)))[0]


def test_a_copy_of_a_training_picture_is_at_distance_zero():
    rows = TASKS["count"](pixels=16).rows(1500)
    renders = pictures_of(rows)
    assert nearest_distance(renders[1400:1410], renders) == pytest.approx(np.zeros(10), abs=1e-6)
    moved = np.minimum(renders[:5] + 0.1, 1.1)
    alone = np.sqrt(((moved[:, None] - renders[None, :5]) ** 2).mean((2, 3, 4))).min(1)
    assert nearest_distance(moved, renders[:5]) == pytest.approx(alone, abs=1e-6)
    assert nearest_distance(moved, renders[:5]) == pytest.approx(np.full(5, 0.1), abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20000, 3))
    b = a * (1, 2, 3) + (1, 0, 0)
    # |m1 - m2|^2 = 1, and (1 - s)^2 for each standard deviation s.
    assert frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.05)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    with pytest.raises(DataError, match="needs 2 pictures of each set, not 1 and 20000"):
        frechet_distance(a[:1], a)


def test_the_classifier_learns_and_its_features_tell_faults():
    rows = [row for task in TASKS.values() for row in task(pixels=16).rows(400)]
    state, start = torch.random.get_rng_state(), time.process_time()
    model = train_classifier(rows, steps=300, seed=1)
    print(f"300 steps: {time.process_time() - start:.1f} CPU seconds")
    assert torch.equal(state, torch.random.get_rng_state())
    test = [row for task in TASKS.values() for row in task(pixels=16).rows(60, split="test")]
    likely = torch.sigmoid(model(torch.from_numpy(pictures_of(test))))
    for word in ("text", "on"):
        wanted = torch.tensor([word in row["prompt"].split() for row in test])
        assert ((likely[:, model.symbols.index(word)] > 0.5) == wanted).float().mean() > 0.85, word
    drawn = torch.tensor([row["task"] != "glyph" for row in test])  # ink of a text has a colour without its name
    for colour in ("red", "green", "blue", "yellow"):
        found = likely[:, model.symbols.index(colour)]
        wanted = torch.tensor([colour in row["prompt"].split() for row in test])
        assert found[wanted].mean() > found[drawn & ~wanted].mean() + 0.15, colour
    train, held_out = (model.features(pictures_of(part)) for part in (rows, test))
    assert held_out.shape == (180, 64)
    same = frechet_distance(held_out, train)
    assert frechet_distance(model.features(blurred(pictures_of(test), 1.0)), train) > 1.3 * same
    noise = np.random.default_rng(0).normal(size=(180, 16, 16, 3)) * 0.2
    assert frechet_distance(model.features((pictures_of(test) + noise).clip(0, 1)), train) > 1.3 * same
    kept = Classifier(model.symbols)
    kept.load_state_dict(model.state_dict())
    assert np.array_equal(kept.features(pictures_of(test[:4])), held_out[:4])


def test_a_classifier_is_for_drawings():
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="'a cat' is of no drawing task"):
        train_classifier([{"prompt": "a cat", "image": image}], steps=1)


# ---- the vocabulary ----


def test_the_tokenizer_has_every_symbol_of_every_prompt(tmp_path):
    tokenizer = drawing_tokenizer()
    prompts = {row["prompt"] for task in TASKS.values() for row in task().rows(200)}
    prompts |= {row["prompt"] for kind in ("count", "scene") for row in TASKS[kind]().rows(50, split="unseen")}
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        assert min(ids) > 2
        assert len(ids) <= tokenizer.model_max_length
        assert tokenizer.decode(ids).replace(" ", "") == prompt.replace(" ", "")
    assert tokenizer.tokenize("text 4K7") == ["text", "4", "K", "7"]
    assert tokenizer.tokenize("text 4? Cats") == ["text", "4", "<unk>", "C", "<unk>"]
    batch = tokenizer(["text 4K7", "one red circle", ""], padding="max_length", return_tensors="pt")
    assert batch["input_ids"].shape == (3, 4)
    assert batch["attention_mask"].sum(1).tolist() == [4, 3, 0]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 4
    assert loaded("text 4K7")["input_ids"] == tokenizer("text 4K7")["input_ids"]


def test_a_tokenizer_of_some_tasks():
    assert drawing_tokenizer("count").model_max_length == 3
    assert drawing_tokenizer("glyph", "count").get_vocab() == drawing_tokenizer("count", "glyph").get_vocab()
    assert "dawn" not in drawing_tokenizer("count").get_vocab()
    with pytest.raises(ModelError, match="did you mean 'count'"):
        drawing_tokenizer("counts")


# ---- the text recogniser ----


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("4k7", "4k7", 0), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_reward_is_one_less_the_share_of_edits(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(Ocr, "read", lambda self, picture: "4 k. 8x")
    picture = np.zeros((32, 32, 3))
    assert Ocr().score(Prompt("x", {"text": "4K7"}), picture) == 0.5
    assert Ocr().score(Prompt("x", {"text": "4K8X"}), picture) == 1.0
    assert Ocr().score(Prompt("x", {"text": ""}), picture) is None
    assert Ocr().score(Prompt("x", {"prompt": "one red circle"}), picture) is None
    assert Ocr().score(Prompt("x", {"text": "4K7"}), np.full((32, 32, 3), np.nan)) == 0.0


def test_without_the_package_the_extra_is_named(monkeypatch):
    data = {"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": {"kind": "drawings", "task": "glyph"}}
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"verifier.*pip install 'opd\[ocr\]'"):
        parse_recipe(data | {"verifier": "ocr"})


@needs_ocr
@pytest.mark.parametrize("pixels", [16, 32, 64])
def test_clean_texts_are_read(pixels):
    """The recogniser is another one than the exact reward: it was trained on other fonts and on photographs."""
    rows, start = Glyph(pixels=pixels).rows(60, split="test"), time.process_time()
    scores = [
        Ocr().score(Prompt(row["id"], row), picture) for row, picture in zip(rows, pictures_of(rows), strict=True)
    ]
    exact, seconds = scores.count(1.0), time.process_time() - start
    print(f"{pixels} pixels: {exact} of 60 read right, mean {np.mean(scores):.3f}, {1000 * seconds / 60:.0f} ms each")
    assert exact >= 48
    assert np.mean(scores) > 0.9


@needs_ocr
def test_the_reward_falls_with_noise_blur_and_other_texts():
    rows = Glyph().rows(12, split="test")
    pictures = pictures_of(rows)
    prompts = [Prompt(row["id"], row) for row in rows]

    def mean(shown):
        return np.mean([Ocr().score(p, picture) for p, picture in zip(prompts, shown, strict=True)])

    clean = mean(pictures)
    assert mean(pictures + np.random.default_rng(0).normal(size=pictures.shape) * 0.5) < clean - 0.3
    assert mean(blurred(pictures, 6.0)) < clean - 0.3
    assert mean(np.roll(pictures, 1, axis=0)) < clean - 0.5
