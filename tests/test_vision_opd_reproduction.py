"""The reproduction of Vision-OPD: its start, its premise by class, its control, and what its jobs measure."""

from __future__ import annotations

import numpy as np
from PIL import Image

from opd.prompts import Prompt, load_prompts
from opd.prompts.pictures import Limits, opened
from opd.recipe import parse_recipe
from reproductions.vision_opd import ARMS, EMA, FROZEN, OTHERS, RATE_OF, SFT, STEPS, distilled, others, reproduction
from reproductions.vision_opd_models import ALPHABET, blank, first_at, recipe, tiles, viewed
from reproductions.vision_opd_premise import by_sign, measured, verdict


def test_the_start_is_the_first_checkpoint_that_reaches_the_goal():
    curve = [{"step": s, "accuracy": a} for s, a in ((0, 0.9), (10, 0.1), (20, 0.5), (30, 0.4), (40, 0.8))]
    assert first_at(curve, 0.42) == (20, True)
    assert first_at(curve, 0.6) == (40, True)
    assert first_at(curve, 0.95) == (40, False)


def prompts_of(block):
    own = {**recipe("none", 1, 0.0), "prompts": [block], "rollout": {"kind": "data"}, "objective": ["sft"]}
    return load_prompts(parse_recipe(own).prompts)


def seen(prompt: Prompt, column: str) -> np.ndarray:
    return np.asarray(opened(prompt.fields[column], prompt, column, Limits()))


def test_the_control_swaps_crops_and_nothing_else():
    own, swapped = prompts_of(viewed(5, "train", "clean", 4)), prompts_of(others(5))
    for i, (one, other) in enumerate(zip(own, swapped, strict=True)):
        assert one.view() == other.view()
        assert (seen(one, "image") == seen(other, "image")).all()
        assert (seen(other, "crop") == seen(own[(i + 1) % 5], "crop")).all()
        assert not (seen(other, "crop") == seen(one, "crop")).all()


def test_the_crop_shows_the_tile_that_is_asked_for_and_what_is_round_it():
    for prompt in prompts_of(viewed(6, "train", "clean", 4)):
        left, top, right, bottom = prompt.fields["box"]
        part = Image.fromarray(seen(prompt, "image")).crop((left - 8, top - 8, right + 8, bottom + 8))
        assert (np.asarray(part.resize((64, 64), Image.Resampling.BICUBIC)) == seen(prompt, "crop")).all()
        assert "frame" not in prompt.view()


def test_the_premise_holds_its_worst_class_to_the_limits():
    signs = {**dict.fromkeys(ALPHABET, 0.5), "H": 0.0}
    figures = {"crop": 0.98, "full": 0.5, "held_out": 0.8, "full_by_sign": signs}
    figures["crop_by_sign"] = {**dict.fromkeys(ALPHABET, 1.0), "7": 0.85}
    assert verdict(figures)[0]
    for name, worse in (
        ("crop", 0.94),
        ("crop_by_sign", {**figures["crop_by_sign"], "7": 0.7}),
        ("full", 0.2),
        ("full", 0.7),
        ("held_out", 0.6),
    ):
        holds, lines = verdict({**figures, name: worse})
        assert not holds
        assert sum(line.endswith("NO") for line in lines) == 1
    assert by_sign({"a K": 1.0, "b K": 0.0, "c 7": 1.0}) == {"7": 1.0, "K": 0.5}


def test_arms_change_what_they_say_and_nothing_else():
    assert abs(EMA - (1 - 0.95 ** (65 / STEPS))) < 1e-4
    plain = distilled({})
    assert plain["teacher"] == {"kind": "self", "mode": "ema", "rate": EMA, "sees": "crop"}
    for changes in ARMS.values():
        block = distilled(changes)
        changed = {key for key in block if block[key] != plain[key]}
        assert changed == {key for key in changes if changes[key] != plain[key]}
    assert distilled(ARMS[SFT])["teacher"] == FROZEN["teacher"]
    assert distilled(ARMS[OTHERS])["prompts"] == [{"kind": "other_crops", "of": plain["prompts"], "answer": "answer"}]
    assert set(RATE_OF) | set(RATE_OF.values()) <= set(ARMS)
    assert "start" in reproduction.arms


def test_a_measurement_asks_three_questions_and_keeps_every_answer(tmp_path):
    blank(tmp_path, {}, seed=0)
    found = measured(tmp_path / "measured", tmp_path / "model", size=4, split="validation", seed=0)
    assert {name: len(values) for name, values in found.items()} == {"full": 4, "crop": 4, "held_out": 2}
    asked = prompts_of(tiles(4, "validation", answer="answer"))
    assert list(found["full"]) == [f"{p.id} {p.fields['answer'].split()[-1]}" for p in asked]
    assert {value for values in found.values() for value in values.values()} <= {0.0, 1.0}
