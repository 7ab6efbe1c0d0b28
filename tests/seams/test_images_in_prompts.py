"""An engine from outside for an image-text model: a prompt has an image, and the teacher sees another one."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from PIL import Image
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil

from opd.assembly import assemble
from opd.context import Context
from opd.distributions import Categorical
from opd.divergences import ReverseKL, Target
from opd.errors import DataError
from opd.language.engines.base import PromptInputs, ids_of
from opd.language.engines.in_process import InProcess
from opd.language.engines.padding import pad
from opd.language.engines.scorer import WholeScorer
from opd.loop import train
from opd.monitor import Monitor
from opd.policies.causal_lm import CausalLMStudent
from opd.recipe import parse_recipe
from opd.teachers.local import LanguageTeacher, LocalTeacher
from tests.conftest import character_tokenizer, rolled_out, said

IMAGE = 2
"""The id of which an image takes four in a prompt."""
CPU = torch.device("cpu")


def tiny_image_text(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 47, "num_key_value_heads": 2, "initializer_range": 0.3}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
    config = Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=2,
        vision_config=vision,
        text_config={"model_type": "llama", **text, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0},
        initializer_range=0.3,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config).eval()


class ImageTextModel(InProcess):
    """A view of a prompt is a column with the path of an image, before the text in the column `prompt`."""

    placeholders: ClassVar[tuple[int, ...]] = (IMAGE,)

    def __init__(self, model):
        super().__init__(model, character_tokenizer(), "plain")
        small = {"longest_edge": 32}
        self.processor = Idefics3ImageProcessorPil(size=small, max_image_size=small, do_image_splitting=False)

    def encode(self, prompt, column=None):
        path = prompt.fields.get(column or "image")
        if path is None:
            raise DataError(f"{prompt.where}: no image in column {column or 'image'!r}")
        inputs = self.processor([[Image.open(path)]], return_tensors="pt")
        text = self.tokenizer(prompt.view())["input_ids"]
        ids = torch.tensor([IMAGE] * self.base.model.image_seq_len + text)
        return PromptInputs(ids, {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")})

    def forward(self, contexts, completions, layout="auto"):
        rows = [torch.cat([ids_of(c), y[:-1].cpu()]) for c, y in zip(contexts, completions, strict=True)]
        ids, mask = pad(rows, "right")
        images = {name: torch.cat([c.inputs[name] for c in contexts]) for name in contexts[0].inputs}
        hidden = self.base.model(input_ids=ids, attention_mask=mask, use_cache=False, **images).last_hidden_state
        spans = zip(hidden, contexts, rows, strict=True)
        return torch.cat([states[len(c) - 1 : len(row)] for states, c, row in spans])

    @torch.no_grad()
    def own_logits(self, context, completion):
        ids = torch.cat([ids_of(context), completion[:-1]])[None]
        return self.base(input_ids=ids, **context.inputs).logits[0, -len(completion) :].float()


@pytest.fixture
def prompts(tmp_path):
    """Rows with two images each: a picture and another one of its middle."""
    rows = []
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "yellow")):
        picture = Image.new("RGB", (32, 32), "grey")
        picture.paste(colour, (12, 12, 20, 20))
        picture.save(tmp_path / f"{i}.png")
        picture.crop((12, 12, 20, 20)).save(tmp_path / f"{i}-crop.png")
        text = "which colour?"[: 8 + i]
        rows.append({"prompt": text, "image": str(tmp_path / f"{i}.png"), "crop": str(tmp_path / f"{i}-crop.png")})
    return rows


def built(prompts, tmp_path, sees, same_weights=False):
    recipe = parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "steps": 2,
            "student": {"model": "tiny", "template": "plain"},
            "teacher": {"model": "tiny", "template": "plain", "sees": sees},
            "prompts": {"kind": "inline", "prompts": prompts},
            "rollout": {"max_new_tokens": 6},
            "batch": {"prompts": 4, "group": 2, "micro": 3},
            "update": {"learning_rate": 1e-2},
            "evaluation": {"held_out": 2, "samples": 1},
            "tracking": {"trackers": []},
            "checkpoint": {"every": 0},
            "hardware": {"device": "cpu", "threads": 1},
        }
    )
    model = tiny_image_text(0)
    other = copy.deepcopy(model) if same_weights else tiny_image_text(1)
    student = CausalLMStudent(ImageTextModel(model), None, Context(CPU))
    settings = LocalTeacher(model="tiny", template="plain", sees=sees)
    teacher = LanguageTeacher(ImageTextModel(other).requires_grad_(False), settings, CPU)
    (tmp_path / "run").mkdir(exist_ok=True)
    return assemble(recipe, Monitor(tmp_path / "run", quiet=True), student=student, teachers=[teacher])


def pixels_seen(language, call):
    """What a model's vision tower is given while `call` runs, and what that gives."""
    seen = []
    tower = language.base.model.vision_model
    handle = tower.register_forward_hook(lambda m, a, k, o: seen.append(k["pixel_values"]), with_kwargs=True)
    found = call()
    handle.remove()
    return torch.cat(seen), found


def test_student_and_teacher_read_the_image_of_their_own_view(prompts, tmp_path):
    run = built(prompts, tmp_path, "crop")
    trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 2, 6)
    assert not bool((trajectories.actions == IMAGE).any())
    mine, student = pixels_seen(run.student.language, lambda: run.student(trajectories))
    theirs, (target,) = pixels_seen(run.teachers[0].language, lambda: run.ask(trajectories, run.at(0)))
    for seen, column in ((mine, None), (theirs, "crop")):
        views = [run.student.language.encode(p, column).inputs["pixel_values"][0, 0] for p in trajectories.prompts]
        assert torch.equal(seen, torch.stack(views))
    assert not torch.equal(mine, theirs)
    # Draws come from the same distribution that is trained, by passes from the beginning of each row.
    own = student.log_probs().gather(1, trajectories.actions[:, None])[:, 0]
    torch.testing.assert_close(own, trajectories.behaviour_log_probs, atol=1e-4, rtol=1e-4)
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    loss = ReverseKL()(student, [target], weights, trajectories)
    loss.total.backward()
    tower = run.student.language.base.model.vision_model.embeddings.patch_embedding.weight
    assert loss.values.mean() > 0.01
    assert tower.grad.abs().max() > 0
    assert all(p.grad is None for p in run.teachers[0].language.parameters())


@pytest.mark.parametrize("sees", [None, "crop"])
def test_a_copy_that_sees_the_same_says_the_same(sees, prompts, tmp_path):
    run = built(prompts, tmp_path, "crop", same_weights=True)
    run.teachers[0].settings = run.teachers[0].settings.model_copy(update={"sees": sees})
    trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 1, 6)
    student, answer = run.student(trajectories).detach(), said(run.teachers[0], trajectories, run.context)
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    value = float(ReverseKL()(student, [Target(answer)], weights, trajectories).values.abs().max())
    assert value < 1e-5 if sees is None else value > 1e-3


def test_two_steps_train_the_student(prompts, tmp_path):
    run = built(prompts, tmp_path, "crop")
    before = {name: p.detach().clone() for name, p in run.student.module.named_parameters()}
    train(run)
    moved = [name for name, p in run.student.module.named_parameters() if not torch.equal(p, before[name])]
    assert any("vision_model" in name for name in moved)
    assert any("lm_head" in name for name in moved)
    assert run.step == 2
    gaps = [row["train/rollout_gap"] for row in run.monitor.history if "train/rollout_gap" in row]
    assert len(gaps) == 2
    assert max(gaps) < 1e-3


def test_growing_completions_are_scored_with_the_image(prompts, tmp_path):
    run = built(prompts, tmp_path, "crop")
    language = run.student.language
    contexts = [language.encode(prompt) for prompt in run.held_out]
    completions = [torch.arange(5, 12), torch.arange(9, 13)]
    scorer = language.scorer(contexts, run.context)
    assert isinstance(scorer, WholeScorer)
    first = scorer.extend({i: y[:3] for i, y in enumerate(completions)}).hidden
    rest = scorer.extend({i: y[3:] for i, y in enumerate(completions)}).hidden
    whole = language.score(contexts, completions, run.context)
    assert isinstance(whole, Categorical)
    parts = [torch.cat([first[:3], rest[:4]]), torch.cat([first[3:], rest[4:]])]
    torch.testing.assert_close(torch.cat(parts), whole.hidden, atol=1e-5, rtol=1e-5)


def test_a_prompt_without_the_teachers_image_is_named(prompts, tmp_path):
    del prompts[1]["crop"]
    with pytest.raises(DataError, match=r"no image in column 'crop'"):
        built(prompts, tmp_path, "crop")
