"""Image-text models: what the engine computes of prompts with pictures is what the model's own forward pass does."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from opd.api import distill, execute
from opd.context import Context
from opd.distributions import Categorical
from opd.errors import IncompatibleError, ModelError, RunError
from opd.language.agreement import common_vocabulary
from opd.language.engines.base import Drawing
from opd.language.engines.layouts import can_flatten
from opd.language.engines.scorer import CachedScorer
from opd.language.model import load_model
from opd.language.own_outputs import check_draws, check_logits
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLM
from opd.policies.image_text import ImageText
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.vision.engine import ImageTextModel, of_pictures
from opd.vision.processor import load_processor
from tests.conftest import character_tokenizer, tiny_model
from tests.vlm import FAMILIES, picture, save_vlm, tiny_vlm

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request):
    return ImageTextModel(*tiny_vlm(request.param))


def rows(engine, group=2):
    """Prompts with one picture, two, none, and the first one's text over another picture; contexts and completions."""
    prompts = [
        Prompt("a", {"prompt": "what is this?", "image": picture(0)}),
        Prompt("b", {"prompt": "and these two here?", "image": [picture(1, 48, 32), picture(2, 32, 64)]}),
        Prompt("c", {"prompt": "text alone", "image": None}),
        Prompt("d", {"prompt": "what is this?", "image": picture(3)}),
    ]
    contexts = [engine.encode(prompt) for prompt in prompts for _ in range(group)]
    generator = torch.Generator().manual_seed(5)
    completions = [torch.randint(3, 60, (2 + i % 5,), generator=generator) for i in range(len(contexts))]
    return prompts, contexts, completions


def agreed(engine):
    return Context(CPU, agreed=Tokens(common_vocabulary([engine]), (engine.tokenizer.eos_token_id,)))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["auto", "varlen", "right", "left"])
def test_rows_that_share_a_pass_get_the_models_own_logits(engine, layout):
    _, contexts, completions = rows(engine)
    own = torch.cat([engine.own_logits(c, y) for c, y in zip(contexts, completions, strict=True)])
    ours = engine.head(1.0).logits(engine(contexts, completions, layout))
    torch.testing.assert_close(ours, own, atol=2e-4, rtol=1e-4)
    assert own.abs().max() > 1
    if layout == "varlen" and engine.base.config.model_type in ("qwen2_5_vl", "qwen3_vl", "idefics3"):
        assert can_flatten(engine.base)


@torch.no_grad()
def test_own_logits_are_those_of_processor_and_model_alone(engine):
    prompt = Prompt("a", {"prompt": "these?", "image": [picture(1, 48, 32), picture(2, 32, 64)]})
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "these?"}]
    text = engine.processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    given = engine.processor(text=text, images=[[picture(1, 48, 32), picture(2, 32, 64)]], return_tensors="pt")
    context = engine.encode(prompt)
    assert torch.equal(context.ids, given["input_ids"][0])
    ours = engine.own_logits(context, torch.tensor([5]))
    torch.testing.assert_close(ours[0], engine.base(**given).logits[0, -1])
    hidden = engine([context], [torch.tensor([5])])
    torch.testing.assert_close(engine.head(1.0).logits(hidden), ours, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_pictures_matter_where_they_stand(engine):
    last = torch.tensor([5])
    one = engine.encode(Prompt("a", {"prompt": "this?", "image": picture(0)}))
    other = engine.encode(Prompt("b", {"prompt": "this?", "image": picture(1)}))
    assert torch.equal(one.ids, other.ids)
    assert (engine.own_logits(one, last) - engine.own_logits(other, last)).abs().max() > 1e-2
    apart = [{"role": "user", "content": "one <image>\nand two <image>?"}]
    first = engine.encode(Prompt("c", {"prompt": apart, "image": [picture(0), picture(1)]}))
    second = engine.encode(Prompt("d", {"prompt": apart, "image": [picture(1), picture(0)]}))
    assert torch.equal(first.ids, second.ids)
    ours = engine.head(1.0).logits(engine([first, second], [last, last]))
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    own = torch.cat([engine.own_logits(first, last), engine.own_logits(second, last)])
    torch.testing.assert_close(ours, own, atol=2e-4, rtol=1e-4)


def test_gradients_reach_what_reads_pictures_and_do_not_depend_on_the_layout(engine):
    _, contexts, completions = rows(engine)
    found = {}
    for layout in ("auto", "right"):
        engine.zero_grad()
        engine.head(1.0).logits(engine(contexts, completions, layout)).log_softmax(-1)[:, 7].sum().backward()
        found[layout] = {name: p.grad.clone() for name, p in engine.base.named_parameters() if p.grad is not None}
    engine.zero_grad()
    assert {name for name, _ in of_pictures(engine.base)} & found["auto"].keys()
    scale = max(float(g.abs().max()) for g in found["right"].values())
    for name, gradient in found["right"].items():
        torch.testing.assert_close(found["auto"][name], gradient, atol=1e-4 * scale, rtol=1e-3)


@torch.no_grad()
def test_it_draws_from_what_it_computes(engine):
    prompts, _, _ = rows(engine)
    context = agreed(engine)
    contexts = [engine.encode(prompt) for prompt in prompts]
    drawn = engine.sample(contexts, 2, 6, range(8), Drawing(context))
    for i, row in enumerate(drawn):
        assert not set(row.actions.tolist()) & set(engine.placeholders)
        scored = engine.score([contexts[i // 2]], [row.actions], context)
        assert isinstance(scored, Categorical)
        own = scored.log_probs().gather(1, row.actions[:, None])[:, 0]
        torch.testing.assert_close(own, row.log_probs, atol=2e-3, rtol=1e-3)
    alone = engine.sample(contexts[1:2], 2, 6, [2, 3], Drawing(context))
    assert [row.actions.tolist() for row in alone] == [row.actions.tolist() for row in drawn[2:4]]
    check_draws(engine.sampler(Drawing(context)), contexts, engine, "the student", 2e-3)
    check_logits(engine, contexts, [row.actions for row in drawn[::2]], "the student")


@torch.no_grad()
def test_greedy_drawing_is_what_the_model_generates(engine):
    """Positions behind pictures go on where those of transformers' own generation do."""
    prompt = Prompt("a", {"prompt": "these?", "image": [picture(1, 48, 32), picture(2, 32, 64)]})
    context = engine.encode(prompt)
    drawn = engine.sample([context], 1, 8, [0], Drawing(agreed(engine), top_k=1))[0]
    others = dict(context.inputs)
    ids = engine.base.generate(
        input_ids=context.ids[None],
        attention_mask=torch.ones_like(context.ids)[None],
        **others,
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=list(engine.placeholders),
    )
    assert drawn.actions.tolist() == ids[0, len(context) :].tolist()[: len(drawn.actions)]


@torch.no_grad()
def test_growing_completions_are_scored_as_whole_ones(engine):
    _, contexts, completions = rows(engine)
    completions = [torch.cat([y, y, y])[:6] for y in completions]
    context = agreed(engine)
    scorer = engine.scorer(contexts, context)
    first = scorer.extend({i: y[: 2 + i % 2] for i, y in enumerate(completions)})
    rest = scorer.extend({i: y[2 + i % 2 :] for i, y in enumerate(completions)})
    whole = engine.score(contexts, completions, context).log_probs()
    early = torch.split(first.log_probs(), [2 + i % 2 for i in range(len(completions))])
    late = torch.split(rest.log_probs(), [4 - i % 2 for i in range(len(completions))])
    parts = torch.cat([torch.cat(pair) for pair in zip(early, late, strict=True)])
    torch.testing.assert_close(parts, whole, atol=2e-3, rtol=1e-3)
    assert CachedScorer.fits(engine) == (engine.base.config.model_type != "qwen3_5")


def test_equal_prompts_are_packed_once_and_equal_texts_over_other_pictures_are_not(engine):
    _, contexts, _ = rows(engine)
    ids = engine.read(contexts).ids
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0] < 0, ids[6] < 0)
    assert not bool((ids[0][ids[0] < 0] == ids[6][ids[6] < 0]).any())


@torch.no_grad()
def test_a_picture_is_read_once_where_its_reader_stays_as_it_is():
    engine = ImageTextModel(*tiny_vlm("qwen3_vl"))
    for _, parameter in of_pictures(engine.base):
        parameter.requires_grad_(False)
    engine.settle()
    _, contexts, completions = rows(engine)
    calls = []
    engine.base.model.visual.register_forward_hook(lambda *args: calls.append(1))
    before = engine(contexts, completions)
    once = len(calls)
    engine.sample(contexts[:2], 2, 3, range(4), Drawing(agreed(engine)))
    torch.testing.assert_close(engine(contexts, completions), before)
    assert once == len(calls) == 1
    assert copy.deepcopy(engine).looked.held == 0


# Runs.


def recipe(tmp_path, student, teacher=None, **settings):
    images = tmp_path / "pictures"
    images.mkdir(exist_ok=True)
    rows = []
    for i in range(10):
        picture(i, 40, 32).save(images / f"{i}.png")
        picture(i, 40, 32).crop((8, 8, 24, 24)).save(images / f"{i}-crop.png")
        rows.append({"prompt": f"what is {i}?", "image": f"pictures/{i}.png", "crop": f"pictures/{i}-crop.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "output": str(tmp_path / "run"),
        "steps": 2,
        "student": student,
        "teacher": teacher or {"kind": "self", "sees": "crop"},
        "prompts": {"kind": "file", "path": str(tmp_path / "rows.jsonl")},
        "objective": {"kind": "jensen_shannon", "top_k": 10, "support_from": "student"},
        "rollout": {"max_new_tokens": 5},
        "batch": {"prompts": 4, "group": 2, "micro": 3},
        "update": {"learning_rate": 1e-3},
        "evaluation": {"held_out": 2, "samples": 1},
        "tracking": {"trackers": []},
        "checkpoint": {"every": 1},
        "hardware": {"device": "cpu", "threads": 1},
        **settings,
    }


def run(settings, **options):
    return execute(parse_recipe(settings), quiet=True, **options)


@torch.no_grad()
def own_answer(folder):
    """Logits of a saved student in plain transformers, of one prompt with a picture."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    language = ImageTextModel(model, load_processor(opd_settings(folder)))
    context = language.encode(Prompt("a", {"prompt": "what?", "image": picture(9)}))
    return model(input_ids=context.ids[None], **context.inputs).logits


def opd_settings(folder):
    return ImageText(model=str(folder))


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "gemma3"])
def test_a_run_trains_saves_and_goes_on(family, tmp_path):
    folder = save_vlm(tmp_path / "model", family)
    settings = recipe(tmp_path, {"kind": "image_text", "model": folder})
    result = run(settings)
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "student").state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert any("vision" in name or "visual" in name for name in moved)
    assert any("layers.0" in name for name in moved)
    live = result.student.eval()
    saved = own_answer(tmp_path / "run" / "student")
    probe = ImageTextModel(live, load_processor(opd_settings(folder)))
    context = probe.encode(Prompt("a", {"prompt": "what?", "image": picture(9)}))
    with torch.no_grad():
        torch.testing.assert_close(live(input_ids=context.ids[None], **context.inputs).logits, saved)
    gaps = [row["train/rollout_gap"] for row in result.history if "train/rollout_gap" in row]
    assert max(gaps) < 1e-3
    row = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert row["images"][0].startswith("data:image/png;base64,")
    again = run({**settings, "steps": 4}, resume=True, force_changed=True)
    straight = run({**settings, "steps": 4, "output": str(tmp_path / "straight")})
    for (name, one), (_, two) in zip(
        again.student.named_parameters(), straight.student.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_adapters_train_beside_pictures_that_are_read_as_they_were(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl")
    student = {"kind": "image_text", "model": folder, "lora": {"rank": 2}, "vision": "frozen"}
    result = run(recipe(tmp_path, student))
    names = [name for name, p in result.student.named_parameters() if "lora_" in name]
    assert names
    assert not any("visual" in name for name in names)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(place).state_dict() for place in (folder, tmp_path / "run/student")
    )
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert moved
    assert not any("visual" in name for name in moved)
    own_answer(tmp_path / "run" / "student")


def test_a_live_model_comes_with_its_processor(tmp_path):
    model, processor = tiny_vlm("idefics3", layers=2)
    rows = [{"prompt": f"what is {i}?", "image": picture(i), "crop": np.asarray(picture(i + 20))} for i in range(6)]
    settings = recipe(tmp_path, {}, steps=1)
    for key in ("student", "teacher", "prompts"):
        del settings[key]
    given = {"quiet": True, "overwrite": True, **settings}
    result = distill(model, {"kind": "self", "sees": "crop"}, rows, tokenizer=processor, **given)
    assert result.student is model
    assert "(passed from Python" in (tmp_path / "run" / "recipe.yaml").read_text()
    other, _ = tiny_vlm("idefics3", seed=1, layers=2)
    taught = distill({"model": model, "vision": "frozen"}, other, rows, tokenizer=processor, **given)
    assert taught.before["reverse_kl"] > 0.01
    with pytest.raises(RunError, match=r"without its processor; pass tokenizer=processor"):
        distill(model, {"kind": "self"}, rows, tokenizer=processor.tokenizer, **given)


def test_a_server_does_not_write_for_a_model_that_reads_pictures(tmp_path):
    folder = save_vlm(tmp_path / "model", "qwen3_vl", layers=2)
    rollout = {"max_new_tokens": 5, "engine": {"kind": "served", "url": "http://127.0.0.1:9", "model": "x"}}
    with pytest.raises(IncompatibleError, match=r"rollout\.engine: a server is sent the ids of prompts"):
        run(recipe(tmp_path, {"kind": "image_text", "model": folder}, rollout=rollout))


def test_a_model_of_text_has_no_processor(tmp_path):
    tiny_model().save_pretrained(tmp_path / "text")
    character_tokenizer().save_pretrained(tmp_path / "text")
    with pytest.raises(ModelError, match=r"cannot be loaded|has no processor that reads pictures"):
        run(recipe(tmp_path, {"kind": "image_text", "model": str(tmp_path / "text")}))


def test_a_model_of_the_other_kind_is_named_with_its_kind(tmp_path):
    tiny_model().save_pretrained(tmp_path / "text")
    folder = save_vlm(tmp_path / "pictures", "qwen2_5_vl")
    pairs = {
        (CausalLM, folder): r"the family 'qwen2_5_vl', which reads pictures too; set kind: image_text beside the model",
        (ImageText, str(tmp_path / "text")): r"reads text alone; set kind: causal_lm \(a teacher: local\)",
    }
    for (kind, model), message in pairs.items():
        settings = kind(model=model)
        for load in (
            lambda settings=settings: load_model(settings, "cpu"),
            lambda settings=settings: settings.shape([]),
        ):
            with pytest.raises(ModelError, match=message):
                load()


def test_what_a_family_hands_its_decoder_must_be_known(monkeypatch):
    engine = ImageTextModel(*tiny_vlm("qwen3_vl", layers=2))
    handed = ImageTextModel._handed
    monkeypatch.setattr(ImageTextModel, "_handed", lambda self, given: {**handed(self, given), "strange": given})
    _, contexts, completions = rows(engine)
    with pytest.raises(ModelError, match=r"the family 'qwen3_vl' hands its decoder strange besides embeddings"):
        engine(contexts, completions)


def test_known_models_are_planned_without_a_network(tmp_path):
    for name, billions in (("Qwen/Qwen3.5-4B", 4.5), ("Qwen/Qwen3.5-9B", 9.4), ("Qwen/Qwen3-VL-8B-Instruct", 8.8)):
        notes = []
        shape = ImageText(model=name, lora={"rank": 8}, vision="frozen").shape(notes)
        assert abs(shape.parameters / 1e9 - billions) < 0.15
        assert 0 < shape.trainable < 1e8
        assert any("comes with opd" in note for note in notes)
