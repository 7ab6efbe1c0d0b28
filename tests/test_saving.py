"""What is saved is what was trained, and nothing is lost at the save."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from opd.api import execute, export, measure, upload
from opd.checkpoints.resume import NO_DIFFERENCE
from opd.cli.main import app
from opd.errors import ModelError, RecipeError, RunError
from opd.language import saving
from opd.language.saving import merged
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import tiny_model
from tests.tiny import saved, short_run, turn_tokenizer

IDS = torch.tensor([[20, 21, 22, 23, 40, 60]])
QUICK = {"self_test": False}


@pytest.fixture
def tokenizer():
    return turn_tokenizer()


@pytest.fixture
def folders(tokenizer, tmp_path):
    """`name -> settings` of a student and a teacher, and a student with tied embeddings."""

    def at(name, seed, **options):
        model = tiny_model(vocabulary=len(tokenizer), seed=seed, eos_token_id=1, **options)
        return {"model": saved(tmp_path / name, model, tokenizer), "template": "plain"}

    return {"s": at("s", 0), "t": at("t", 1), "tied": at("tied", 0, tie_word_embeddings=True)}


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("lora", "untied"),
    [
        ({"targets": ["q_proj", "lm_head"]}, True),
        ({"targets": ["q_proj", "embed_tokens"]}, True),
        ({"targets": ["q_proj", "lm_head", "embed_tokens"]}, True),
        ({"targets": "all-linear"}, False),
        ({"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    ],
)
def test_tied_embeddings_of_which_one_is_trained_are_saved_apart(folders, tmp_path, lora, untied):
    """peft#2018, transformers#45127."""
    student = {**folders["tied"], "lora": {"rank": 4, **lora}}
    before = logits(loaded(folders["tied"]["model"]))
    result = short_run(tmp_path / "run", student, folders["t"], steps=4, update={"learning_rate": 3e-2})
    live, folder = logits(result.student), result.directory / "student"
    assert (live - before).abs().max() > 0.05
    torch.testing.assert_close(logits(loaded(folder)), live, atol=1e-3, rtol=1e-3)
    assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False) is not untied
    base = loaded(folders["tied"]["model"])
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder / "adapter")), live, atol=1e-3, rtol=1e-3)


def test_modules_to_save_are_trained_whole(folders, tmp_path):
    student = {**folders["s"], "lora": {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"]}}
    result = short_run(tmp_path / "run", student, folders["t"], checkpoint={"every": 1})
    own, new = loaded(folders["s"]["model"]), loaded(result.directory / "student")
    change = new.lm_head.weight - own.lm_head.weight
    assert torch.linalg.matrix_rank(change.detach(), atol=1e-6) > 2
    assert torch.equal(new.model.embed_tokens.weight, own.model.embed_tokens.weight)
    torch.testing.assert_close(logits(new), logits(result.student), atol=1e-4, rtol=1e-4)
    out = loaded(export(result.directory, tmp_path / "out"))
    torch.testing.assert_close(logits(out), logits(result.student), atol=1e-4, rtol=1e-4)
    card = (result.directory / "student" / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert str(tmp_path) not in card
    assert folders["s"]["model"] not in card
    wrong = {**student, "lora": {"rank": 2, "modules_to_save": ["lm_hed"]}}
    with pytest.raises(ModelError, match=r"modules_to_save: no module is named 'lm_hed'"):
        short_run(tmp_path / "wrong", wrong, folders["t"])


def test_a_saved_student_that_is_another_model_is_told_and_kept(folders, tmp_path, monkeypatch):
    def wrong(model, in_place=False):
        made = merged(model, in_place)
        made.lm_head.weight.data.mul_(1.5)
        return made

    monkeypatch.setattr("opd.policies.causal_lm.merged", wrong)
    with pytest.raises(RunError, match=r"student holds another model than was trained: its logits differ by"):
        short_run(tmp_path / "run", {**folders["s"], "lora": {"rank": 2}}, folders["t"])
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "student" / "adapter" / "adapter_model.safetensors").is_file()
    assert "another model" in json.loads((tmp_path / "run" / "summary.json").read_text())["lacking"][0]


@pytest.mark.parametrize("free", [0.0, 1e18])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_compared_also_where_there_is_no_room_for_two(tokenizer, tmp_path, monkeypatch, free, tied):
    monkeypatch.setattr(saving, "free_memory", lambda: free)
    model = tiny_model(vocabulary=len(tokenizer), tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    before = sorted(os.listdir(tmp_path / "m"))
    assert saving.difference(tmp_path / "m", model) is None
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    assert "logits differ by" in saving.difference(tmp_path / "m", model)
    assert sorted(os.listdir(tmp_path / "m")) == before
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "cannot be loaded again" in saving.difference(tmp_path / "m", model)


@pytest.mark.parametrize("where", ["folder", "live", "lora"])
def test_a_generation_config_that_cannot_be_saved_is_mended_and_told(folders, tokenizer, tmp_path, capsys, where):
    """transformers#29988."""
    values = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (tmp_path / "s" / "generation_config.json").write_text(json.dumps(values))
    student, teacher, options = folders["s"], folders["t"], {}
    if where == "live":
        student, teacher, options = loaded(tmp_path / "s"), loaded(tmp_path / "t"), {"tokenizer": tokenizer}
        student.generation_config.do_sample, student.generation_config.temperature = False, 0.6
    if where == "lora":
        student = {**student, "lora": {"rank": 2}}
    result = short_run(tmp_path / "run", student, teacher, **options)
    told = capsys.readouterr()
    assert "generation config is not valid (temperature" in told.out + told.err
    kept = json.loads((result.directory / "student" / "generation_config.json").read_text())
    assert "temperature" not in kept
    assert kept["eos_token_id"] == 1
    torch.testing.assert_close(logits(loaded(result.directory / "student")), logits(result.student))
    if where == "live":
        assert result.student.generation_config.temperature == 0.6


def test_a_config_that_cannot_be_written_is_refused_before_training(folders, tokenizer, tmp_path):
    student = loaded(tmp_path / "s")
    student.config.note = object()
    with pytest.raises(ModelError, match="config cannot be saved"):
        short_run(tmp_path / "run", student, loaded(tmp_path / "t"), tokenizer=tokenizer)


def test_weights_are_saved_whatever_else_fails(folders, tokenizer, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise TypeError("odd value")

    student, teacher = loaded(tmp_path / "s"), loaded(tmp_path / "t")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fails)
    monkeypatch.setattr("opd.saving.model_card", lambda *_: "\ud800")
    monkeypatch.setattr("opd.policies.causal_lm.check_savable", lambda model: [])
    result = short_run(tmp_path / "run", student, teacher, tokenizer=tokenizer)
    told = capsys.readouterr().err
    assert "the tokenizer could not be written (TypeError: odd value)" in told
    assert "the model card could not be written" in told
    assert result.summary
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["lacking"]) == 2
    torch.testing.assert_close(logits(loaded(tmp_path / "run" / "student")), logits(student))


def test_weights_that_transformers_cannot_save_are_saved_by_their_names(folders, tokenizer, tmp_path):
    student = loaded(tmp_path / "s")
    student.config.note = object()
    problems = saving.write_weights(tmp_path / "out", student)
    assert "transformers cannot save this model (TypeError" in problems[0]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in student.state_dict().items())


def test_a_full_disk_without_checkpoints_leaves_the_student_elsewhere(folders, tmp_path, monkeypatch):
    from opd.policies.causal_lm import CausalLMStudent

    save = CausalLMStudent.save

    def full(self, folder, card):
        if (tmp_path / "run") in folder.parents:
            raise OSError(28, "No space left on device")
        return save(self, folder, card)

    monkeypatch.setattr(CausalLMStudent, "save", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RunError, match=r"No space left.*it is in .*opd-student-") as refused:
        short_run(tmp_path / "run", folders["s"], folders["t"])
    place = str(refused.value).split("it is in ")[1].split(" instead")[0]
    assert loaded(place).config.vocab_size
    with pytest.raises(RunError, match=r"go on with --resume"):
        short_run(tmp_path / "run", folders["s"], folders["t"], checkpoint={"every": 1})


def test_an_adapter_is_a_model(folders, tmp_path):
    """lerobot#3459: going on from a saved adapter."""
    student = {**folders["s"], "lora": {"rank": 4}}
    first = short_run(tmp_path / "a", student, folders["t"], steps=6, update={"learning_rate": 1e-2})
    adapter = str(first.directory / "student" / "adapter")
    after = first.after["reverse_kl"]
    same = {"update": {"learning_rate": 1e-3}}
    files = [path for path in (first.directory / "student").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1
    onward = short_run(tmp_path / "b", {**student, "model": adapter}, folders["t"], **same)
    assert onward.before["reverse_kl"] == pytest.approx(after, rel=1e-3)
    # What is saved changes the first model and not one that is nowhere.
    base = loaded(folders["s"]["model"])
    again = PeftModel.from_pretrained(base, onward.directory / "student" / "adapter")
    torch.testing.assert_close(logits(again), logits(onward.student), atol=1e-4, rtol=1e-4)
    whole = short_run(tmp_path / "c", {**folders["s"], "model": adapter}, folders["t"])
    assert whole.before["reverse_kl"] == pytest.approx(after, rel=1e-3)
    assert not hasattr(whole.student, "peft_config")
    as_teacher = short_run(tmp_path / "d", folders["s"], {**folders["t"], "model": adapter})
    merged_teacher = {**folders["t"], "model": str(first.directory / "student")}
    expected = short_run(tmp_path / "e", folders["s"], merged_teacher).before["reverse_kl"]
    assert as_teacher.before["reverse_kl"] == pytest.approx(expected, rel=1e-3)
    for key, value in (("rank", 8), ("alpha", 7), ("targets", ["q_proj"]), ("modules_to_save", ["lm_head"])):
        other = {**student, "model": adapter, "lora": {"rank": 4, key: value}}
        with pytest.raises(ModelError, match=f"student.lora.{key} is .* goes on with"):
            short_run(tmp_path / "f", other, folders["t"])


def test_an_adapter_finds_its_base_from_any_directory(folders, tmp_path, monkeypatch):
    """The recipe names the base by a path from where it was started."""
    monkeypatch.chdir(tmp_path)
    student = {**folders["s"], "model": Path(folders["s"]["model"]).name, "lora": {"rank": 2}}
    result = short_run(tmp_path / "run", student, folders["t"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapter = result.directory / "student" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folders["s"]["model"]
    again = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(again), logits(result.student), atol=1e-4, rtol=1e-4)
    # Whose machine that is, is nobody else's: what a hub shows names no folder of it.
    told = "".join(path.read_text() for path in (result.directory / "student").rglob("README.md"))
    assert str(tmp_path) not in told
    assert "on the machine that" in told


def test_an_adapter_without_its_model_names_both(folders, tmp_path):
    (tmp_path / "lone").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone"), "r": 2}
    (tmp_path / "lone" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gone"):
        short_run(tmp_path / "run", {**folders["s"], "model": str(tmp_path / "lone")}, folders["t"])
    for change, message in (
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"base_model_name_or_path": None}, "of which model"),
    ):
        (tmp_path / "lone" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            short_run(tmp_path / "run", {**folders["s"], "model": str(tmp_path / "lone")}, folders["t"])


def test_a_live_peft_student(folders, tokenizer, tmp_path):
    def live(**options):
        return get_peft_model(loaded(tmp_path / "s"), LoraConfig(r=2, target_modules=["q_proj"], **options))

    result = short_run(tmp_path / "run", live(), loaded(tmp_path / "t"), tokenizer=tokenizer)
    torch.testing.assert_close(
        logits(loaded(result.directory / "student")), logits(result.student), atol=1e-4, rtol=1e-4
    )
    frozen = live()
    frozen.requires_grad_(False)
    with pytest.raises(ModelError, match="is_trainable=True"):
        short_run(tmp_path / "run", frozen, loaded(tmp_path / "t"), tokenizer=tokenizer)
    with pytest.raises(ModelError, match="has its adapter already"):
        short_run(tmp_path / "run", {"model": live(), "lora": {}}, loaded(tmp_path / "t"), tokenizer=tokenizer)
    within = loaded(tmp_path / "s")
    within._hf_peft_config_loaded = True
    with pytest.raises(ModelError, match=r"PeftModel\.from_pretrained"):
        short_run(tmp_path / "run", within, loaded(tmp_path / "t"), tokenizer=tokenizer)


class Quantised:
    """What transformers' quantised models say of themselves; the weights of the test are plain."""

    quant_method = "some_method"

    def to_dict(self):
        return {"quant_method": self.quant_method}


@pytest.fixture
def quantised(monkeypatch, folders):
    """The student's folder passes for one of quantised weights."""
    method = ["some_method"]
    base = folders["s"]["model"]
    monkeypatch.setattr(
        "opd.policies.causal_lm.quantised_by", lambda model: method[0] if model.config.name_or_path == base else None
    )
    monkeypatch.setattr("opd.language.model.quantised_by", lambda model: method[0])
    return method


def test_of_a_quantised_student_the_adapter_is_saved(folders, tmp_path, quantised, capsys):
    """trl#6720."""
    student = {**folders["s"], "lora": {"rank": 2}}
    result = short_run(tmp_path / "run", student, folders["t"])
    folder = result.directory / "student"
    assert "its adapter alone is saved, in student/adapter" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors"))
    assert not (folder / "config.json").exists()
    card = (folder / "README.md").read_text()
    assert folders["s"]["model"] in card
    assert "PeftModel" in card
    plain = PeftModel.from_pretrained(loaded(folders["s"]["model"]), folder / "adapter")
    torch.testing.assert_close(logits(plain), logits(result.student), atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(folder)
    # The folder of the student is a model for the next run too.
    onward = short_run(tmp_path / "next", {**student, "model": str(folder)}, folders["t"])
    assert onward.before["reverse_kl"] == pytest.approx(result.after["reverse_kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "lora", "message"),
    [
        ("some_method", None, r"cannot be trained; set student\.lora"),
        ("bitsandbytes (8 bits)", {"rank": 2}, r"8 bits.*what else is in the batch"),
    ],
)
def test_a_quantised_student_that_cannot_be_trained_is_refused(folders, tmp_path, quantised, method, lora, message):
    quantised[0] = method
    with pytest.raises(ModelError, match=message):
        short_run(tmp_path / "run", {**folders["s"], "lora": lora}, folders["t"])


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 4}}])
@pytest.mark.parametrize("mode", ["frozen", "ema"])
def test_eval_measures_against_the_teacher_that_the_run_had(folders, tmp_path, mode, student):
    teacher = {"kind": "self", "mode": mode, **({"rate": 0.3} if mode == "ema" else {})}
    rows = [{"prompt": p, "hint": f"{p} so"} for p in ("ab", "cd", "ef", "g")]
    recipe = parse_recipe(
        {
            "student": {**folders["s"], **student},
            "teacher": {**teacher, "sees": "hint"},
            "prompts": {"kind": "inline", "prompts": rows},
            "steps": 6,
            "batch": {"prompts": 3},
            "rollout": {"max_new_tokens": 8},
            "evaluation": {"held_out": 1, "temperature": 1e-3},
            "update": {"learning_rate": 3e-2},
            "checkpoint": {"every": 6},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
            "output": str(tmp_path / "run"),
        }
    )
    result = execute(recipe, quiet=True)
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--json"], catch_exceptions=False)
    metrics = json.loads(done.stdout)
    for name in ("forward_kl", "reverse_kl"):
        assert metrics[name] == pytest.approx(result.after[name], rel=1e-2)
        assert abs(result.after[name] - result.before[name]) > 0.02 * result.before[name]


def test_a_self_teacher_that_is_nowhere_is_not_replaced_by_another(folders, tmp_path):
    options = {"checkpoint": {"every": 0}}
    result = short_run(tmp_path / "run", folders["s"], {"kind": "self", "mode": "ema"}, **options)
    recipe = load_recipe(str(result.directory / "recipe.yaml"))
    with pytest.raises(RunError, match="no checkpoint of the end of training holds it"):
        measure(recipe, trained=recipe, run=result.directory)
    live = short_run(
        tmp_path / "live", loaded(tmp_path / "s"), {"kind": "self", "mode": "frozen"}, tokenizer=turn_tokenizer()
    )
    recipe = load_recipe(str(live.directory / "recipe.yaml"))
    with pytest.raises(RunError, match="passed from Python"):
        measure(recipe, trained=recipe, run=live.directory)


def test_a_self_teacher_made_of_a_model_that_has_changed_is_told(folders, tokenizer, tmp_path):
    frozen = {"kind": "self", "mode": "frozen"}
    result = short_run(tmp_path / "run", folders["s"], frozen, checkpoint={"every": 2})
    saved(tmp_path / "s", tiny_model(vocabulary=len(tokenizer), seed=9), tokenizer)
    recipe = load_recipe(str(result.directory / "recipe.yaml"))
    with pytest.raises(RunError, match="holds other weights now"):
        measure(recipe, trained=recipe, run=result.directory)


def test_what_a_recipe_says_of_itself_is_not_said_of_another():
    whole = load_recipe("quickstart", ["hardware.threads=1"])
    assert whole.description
    assert whole.try_next
    renamed = load_recipe("quickstart", ["name=other"])
    assert renamed.description == whole.description
    assert renamed.try_next is None
    other = load_recipe("quickstart", ["objective=jensen_shannon", "name=quickstart-jsd"])
    assert other.description == ""
    assert other.try_next is None
    said = load_recipe("quickstart", ["objective=jensen_shannon", "description=mine", "try_next=this"])
    assert (said.description, said.try_next) == ("mine", "this")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: what was asked of it."""
    asked = []
    monkeypatch.setattr("opd.hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *a, **k: asked.append(("create", a, k)))
    monkeypatch.setattr(
        "huggingface_hub.upload_folder", lambda **k: asked.append(("upload", k, sorted(os.listdir(k["folder_path"]))))
    )
    return asked


def test_the_student_is_pushed_once_when_it_is_saved(folders, tmp_path, hub):
    short_run(tmp_path / "run", folders["s"], folders["t"], push_to="me/mine")
    assert [call[0] for call in hub] == ["create", "upload"]
    assert hub[0][1:] == (("me/mine",), {"private": True, "exist_ok": True})
    assert hub[1][1]["repo_id"] == "me/mine"
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(hub[1][2])
    assert "push_to" in NO_DIFFERENCE
    student = tmp_path / "run" / "student"
    (student / "secrets.env").write_text("mine")
    assert upload(tmp_path / "run", "me/mine") == [str(student / "secrets.env")]
    taken = set(filter_repo_objects(os.listdir(student), allow_patterns=hub[3][1]["allow_patterns"]))
    assert taken == set(os.listdir(student)) - {"secrets.env"}


def test_of_several_processes_the_main_one_pushes(folders, tmp_path, hub, monkeypatch):
    result = short_run(tmp_path / "run", folders["s"], folders["t"])
    monkeypatch.setenv("RANK", "1")
    result.push_to_hub("me/mine")
    assert not hub
    monkeypatch.setenv("RANK", "0")
    result.push_to_hub("me/mine")
    assert [call[0] for call in hub] == ["create", "upload"]


def test_a_push_that_fails_is_a_warning_with_the_way_by_hand(folders, tmp_path, hub, monkeypatch, capsys):
    def fails(**_):
        raise ConnectionError("no route with hf_secret")

    monkeypatch.setattr("huggingface_hub.upload_folder", fails)
    result = short_run(tmp_path / "run", folders["s"], folders["t"], push_to="me/mine")
    told = capsys.readouterr().err
    assert f"hf upload me/mine {result.directory / 'student'}" in told
    assert "no route" in told
    assert "hf_secret" not in told
    assert (result.directory / "student" / "model.safetensors").is_file()


def test_a_push_that_cannot_work_is_refused_at_start(folders, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match="there is no token: set HF_TOKEN"):
        short_run(tmp_path / "run", folders["s"], folders["t"], push_to="me/mine")
    monkeypatch.setattr("opd.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        short_run(tmp_path / "run", folders["s"], folders["t"], push_to="me/mine")
    with pytest.raises(RecipeError, match="push_to"):
        short_run(tmp_path / "run", folders["s"], folders["t"], push_to="mine")
    assert not hub
    assert not (tmp_path / "run").exists()


def test_a_target_of_adapters_that_no_module_has_is_refused(folders, tmp_path):
    student = {**folders["s"], "lora": {"rank": 4, "targets": ["q_proj", "v_pro"]}}
    with pytest.raises(ModelError, match=r"no module is named 'v_pro' \(did you mean 'v_proj'\?\)"):
        short_run(tmp_path / "run", student, folders["t"])


def test_a_folder_with_a_misspelt_name_is_not_looked_for_on_a_hub(folders, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'models/studnet': models/ is here and holds no such folder"):
        short_run(tmp_path / "run", folders["s"], {"model": "models/studnet", "template": "plain"})


def test_an_adapter_of_a_model_without_some_layers_is_not_saved_alone(folders, tmp_path, capsys):
    student = {**folders["s"], "drop_layers": [0], "lora": {"rank": 4}}
    result = short_run(tmp_path / "run", student, folders["t"])
    folder = result.directory / "student"
    assert "would fit no model" in capsys.readouterr().err
    assert not (folder / "adapter").exists()
    torch.testing.assert_close(logits(loaded(folder)), logits(result.student), atol=1e-3, rtol=1e-3)


def test_an_adapter_of_another_number_of_layers_is_refused(folders, tokenizer, tmp_path):
    short = get_peft_model(tiny_model(vocabulary=len(tokenizer), layers=1), LoraConfig(r=2, task_type="CAUSAL_LM"))
    short.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": folders["s"]["model"]})
    )
    with pytest.raises(ModelError, match=r"made for another model.*4 matrices are stored.*places for 8"):
        short_run(tmp_path / "run", folders["s"], {"model": str(tmp_path / "a"), "template": "plain"})
    config["base_model_name_or_path"] = str(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an adapter of an adapter"):
        short_run(tmp_path / "run", folders["s"], {"model": str(tmp_path / "b"), "template": "plain"})
