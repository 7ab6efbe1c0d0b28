"""What `opd` computes with a model is what the model computes, family by family; else it is refused at the start."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from opd.errors import ModelError, SelfTestError
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.language import logits, own_outputs
from opd.language.dropout import silence
from opd.language.engines import prefill
from opd.language.engines.cpu.packing import can_pack
from opd.language.engines.sampler import Sampler
from opd.language.engines.transformers import LanguageModel
from opd.language.experts import Experts, busiest
from opd.language.layers import decoder_of, drop_layers
from opd.language.own_outputs import check_draws, check_logits
from opd.language.positions import check_positions, table_size
from opd.recipe import parse_recipe
from opd.self_test import check_teachers
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.routed import RoutedTeacher, RoutedTeachers
from tests.conftest import tiny_model, trajectories_of
from tests.families import FAMILIES, PAGE, POSITIONS, Family, page, tiny
from tests.tiny import TEXTS, saved, short_run, turn_tokenizer

NAMES = {family.label or family.name: family for family in FAMILIES}
PLAIN = {"template": "plain"}


def ids(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def language_of(model):
    return LanguageModel(model, turn_tokenizer(), "plain").requires_grad_(False).eval()


def draw(language, tolerance=2e-3):
    made = Sampler(language, language.head(1.0), [2])
    check_draws(made, ids(9, 5), language, "the student", tolerance)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_family(name):
    family = NAMES[name]
    if family.name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family.name}")
    model = tiny(family)
    silence(model)
    language = language_of(model).train(not family.noisy)
    if family.rows == "refused":
        with pytest.raises(SelfTestError, match=family.why):
            check_logits(language, ids(9, 5), ids(5, 7), "the student")
        return
    check_logits(language, ids(9, 5), ids(5, 7), "the student")
    assert can_pack(model) == (family.rows == "packed")
    language.eval()
    if family.draws == "refused":
        with pytest.raises(SelfTestError, match=family.why):
            draw(language)
    else:
        assert (draw(language).cache_name is not None) == (family.draws == "cache")
    assert (table_size(decoder_of(model)) == POSITIONS) == family.table
    too_long = ids(POSITIONS + 6)[0]
    if family.table:
        with pytest.raises((IndexError, RuntimeError)):
            language.own_logits(too_long, ids(5)[0])
    else:
        assert bool(language.own_logits(too_long, ids(5)[0]).isfinite().all())
    fresh = tiny(family)
    if family.cut:
        drop_layers(fresh, [1])
        check_logits(language_of(fresh), ids(9, 5), ids(5, 7), "the student")
    else:
        with pytest.raises(ModelError, match="drop_layers"):
            drop_layers(fresh, [1])


def test_the_page_of_models_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.families"


def test_a_cut_model_loads_as_it_was_cut(tmp_path):
    model = tiny(Family("gpt2"))
    drop_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = ids(9)[0][None]
    torch.testing.assert_close(loaded(row).logits, model(row).logits)


def test_a_teacher_whose_logits_are_not_known_is_refused_wherever_it_stands():
    """A soft cap that is passed over makes another distribution, and KL falls all the same."""
    model = tiny_model(vocabulary=90)
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    right = LanguageTeacher(language_of(tiny_model(vocabulary=90)), LocalTeacher(model="x"), torch.device("cpu"))
    model.forward = capped
    wrong = LanguageTeacher(language_of(model), LocalTeacher(model="y"), torch.device("cpu"))
    trajectories = trajectories_of([6, 4])
    check_teachers([right], trajectories)
    with pytest.raises(SelfTestError, match=r"teacher 1: the model's own logits .* 'llama'"):
        check_teachers([right, wrong], trajectories)
    settings = RoutedTeacher(by="tag", routes={"a": {"model": "x"}, "b": {"model": "y"}})
    routed = RoutedTeachers(settings, {"a": right, "b": wrong})
    with pytest.raises(SelfTestError, match="the teacher of route 'b'"):
        check_teachers([routed], trajectories)


@pytest.fixture(scope="module")
def tokenizer():
    return turn_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    return saved(tmp_path_factory.mktemp("llama"), tiny_model(vocabulary=len(tokenizer), eos_token_id=1), tokenizer)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, tokenizer):
    config = {"logits_soft_cap": 3.0, "vocab_size": len(tokenizer), "eos_token_id": 1}
    return saved(tmp_path_factory.mktemp("gemma"), tiny(Family("recurrent_gemma", config=config)), tokenizer)


def recipe_of(llama, teacher, tmp_path, **changes):
    data = {
        "student": {"model": llama, **PLAIN},
        "teacher": {"model": teacher, **PLAIN},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "steps": 1,
        "rollout": {"max_new_tokens": 6},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    return parse_recipe({**data, **changes})


def test_scoring_a_store_tests_the_teacher(llama, gemma, tmp_path, monkeypatch):
    recipe = recipe_of(llama, gemma, tmp_path)
    sample(recipe, tmp_path / "store", quiet=True)
    score(recipe, tmp_path / "store", quiet=True, name="right")
    monkeypatch.setattr(logits, "SOFT_CAPS", ())
    with pytest.raises(SelfTestError, match="'recurrent_gemma' changes its logits"):
        score(recipe, tmp_path / "store", quiet=True, name="wrong")
    with pytest.raises(SelfTestError, match="'recurrent_gemma' changes its logits"):
        short_run(tmp_path / "run", {"model": llama, **PLAIN}, {"model": gemma, **PLAIN})


def test_whoever_writes_is_tested(llama, tmp_path, tokenizer, monkeypatch):
    """A cache that a family does not take is swallowed without a word, and every token is drawn without the others."""
    config = {"state_size": 8, "vocab_size": len(tokenizer), "eos_token_id": 1}
    mamba = saved(tmp_path / "mamba", tiny(Family("mamba", config=config)), tokenizer)
    writes = recipe_of(llama, mamba, tmp_path, rollout={"kind": "teacher", "max_new_tokens": 6})
    sample(writes, tmp_path / "right", quiet=True)
    monkeypatch.setattr(prefill, "cache_argument", lambda body: "somewhere")
    with pytest.raises(SelfTestError, match="the teacher: rollout log-probabilities"):
        sample(writes, tmp_path / "wrong", quiet=True)
    own = {"model": mamba, **PLAIN}
    held_out_only = {"kind": "data", "column": "response", "max_new_tokens": 6}
    rows = [{"prompt": text, "response": "yes"} for text in TEXTS]
    with pytest.raises(SelfTestError, match="the student: rollout log-probabilities"):
        short_run(tmp_path / "run", own, own, rows, rollout=held_out_only, objective="forward_kl")


def test_a_row_that_leaves_takes_its_states_along(monkeypatch):
    """Convolutions and recurrences keep their states beside keys and values (huggingface/transformers#46773)."""
    language = language_of(tiny(NAMES["lfm2"]))
    draw(language)
    monkeypatch.setattr("opd.language.engines.cache.STATES", ())
    with pytest.raises(SelfTestError, match="cannot run the family 'lfm2'"):
        draw(language)


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    language = language_of(tiny_model(vocabulary=64))
    monkeypatch.setattr(language, "body", lambda **inputs: {}["position_ids"])
    with pytest.raises(SelfTestError, match=r"the teacher: opd cannot run the family 'llama' .'position_ids'"):
        check_logits(language, ids(9, 5), ids(5, 7), "the teacher")


def test_a_layout_that_no_attention_reads_is_an_error(monkeypatch):
    """Otherwise every row of a packed one would see all before it, with the start-up test switched off in silence."""
    monkeypatch.setattr("opd.language.attention.NOT_TOLD", ())
    with pytest.raises(ModelError, match="'nemotron' does not tell its attention"):
        check_logits(language_of(tiny(NAMES["nemotron"])), ids(9, 5), ids(5, 7), "the student")


def gpt2(folder, tokenizer, **options):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": 3}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, **shape, **options)
    return {"model": saved(folder, GPT2LMHeadModel(config), tokenizer), **PLAIN}


def test_prompt_and_completion_must_fit_a_table_of_positions(llama, tmp_path, tokenizer):
    """huggingface/trl#1867: a crash in the middle of a run."""
    short = gpt2(tmp_path / "gpt2", tokenizer)
    longest = max(map(len, TEXTS))
    told = f"has 64 positions, and the longest prompt has {longest} tokens and a completion up to 60"
    numbers = f"{told}; let completions have at most {65 - longest} tokens"
    with pytest.raises(ModelError, match=f"the student {numbers}"):
        short_run(tmp_path / "run", short, short, rollout={"max_new_tokens": 60})
    with pytest.raises(ModelError, match=f"the teacher {numbers}"):
        short_run(tmp_path / "run", {"model": llama, **PLAIN}, short, rollout={"max_new_tokens": 60})
    grows = {"max_new_tokens": [[0, 8], [1, 60]]}
    with pytest.raises(ModelError, match="up to 60"):
        short_run(tmp_path / "run", short, short, rollout=grows)
    measured = {"held_out": 2, "max_new_tokens": 60}
    with pytest.raises(ModelError, match="up to 60"):
        short_run(tmp_path / "run", short, short, evaluation=measured)
    short_run(tmp_path / "run", short, short, rollout={"max_new_tokens": 65 - longest})
    with pytest.raises(ModelError, match="prompts of more than 64 tokens cannot be read"):
        short_run(tmp_path / "run", short, short, [*TEXTS, "long" * 17])


def test_other_positions_go_on_with_a_warning():
    language = language_of(tiny_model(vocabulary=64, max_position_embeddings=16))
    assert check_positions(language, 10, 7, "the student") is None
    warning = check_positions(language, 10, 8, "the student")
    assert warning is not None
    assert "16 positions (max_position_embeddings)" in warning
    assert "10 tokens and a completion up to 8" in warning


def test_dropout_of_the_config_is_off_unless_asked_for(tmp_path, tokenizer):
    noisy = gpt2(tmp_path / "gpt2", tokenizer, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    quiet = short_run(tmp_path / "quiet", noisy, noisy)
    assert max(row["train/rollout_gap"] for row in quiet.history if "train/rollout_gap" in row) < 1e-4
    asked = short_run(tmp_path / "asked", {**noisy, "dropout": "config"}, noisy)
    assert min(row["train/rollout_gap"] for row in asked.history if "train/rollout_gap" in row) > 1e-2
    for result in (quiet, asked):
        assert result.student.config.resid_pdrop == 0.2
    live = AutoModelForCausalLM.from_pretrained(noisy["model"])
    short_run(tmp_path / "live", live, noisy, tokenizer=tokenizer)
    assert live.transformer.drop.p == 0.2


def test_noise_that_cannot_be_turned_off_is_refused():
    """Some families read their rates from the config in every pass."""
    language = language_of(tiny(Family("falcon", config={"hidden_dropout": 0.5})))
    silence(language.model)
    with pytest.raises(SelfTestError, match=r"student\.dropout=config"):
        check_logits(language.train(), ids(9, 5), ids(5, 7), "the student")


def mixture(tokenizer, **options):
    config = {"vocab_size": len(tokenizer), "eos_token_id": 1, **options}
    return tiny(Family("qwen3_moe", config=config))


@pytest.mark.parametrize(("attention", "again"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_the_routers_loss_is_the_familys_own(tokenizer, attention, again):
    """Of rows without padding, of padded rows, and where activations are computed again in the backward pass."""
    model = mixture(tokenizer, output_router_logits=True, router_aux_loss_coef=0.5)
    model.set_attn_implementation(attention)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    language = LanguageModel(model, tokenizer, "plain")
    experts = Experts(model)
    assert experts.coefficient == 0.5
    contexts, completions = ids(9, 5), ids(5, 7)
    rows = torch.zeros(2, 13, dtype=torch.int64)
    for row, context, completion in zip(rows, contexts, completions, strict=True):
        fed = torch.cat([context, completion[:-1]])
        row[: len(fed)] = fed
    mask = torch.arange(13)[None] < torch.tensor([[13], [11]])
    theirs = model(input_ids=rows, attention_mask=mask.long(), output_router_logits=True).aux_loss
    with experts.watched(language.padding(contexts, completions)):
        language(contexts, completions)
    (loss,) = experts.losses(0.25)
    torch.testing.assert_close(loss.total, 0.5 * 0.25 * theirs)
    router = model.model.layers[0].mlp.gate.weight
    mine, expected = (torch.autograd.grad(x, router)[0] for x in (loss.total, 0.5 * 0.25 * theirs))
    assert expected.abs().max() > 0
    torch.testing.assert_close(mine, expected)
    signals = experts.signals(lambda values: values)
    assert signals["router_loss"] == pytest.approx(float(theirs.detach()))
    assert 1.0 <= signals["expert_load_max"] <= 4.0
    assert experts.signals(lambda values: values) == {}


def test_the_busiest_expert():
    assert busiest(torch.tensor([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]])) == pytest.approx((1 + 4) / 2)


def test_a_mixture_trains_with_its_routers_loss_and_says_what_it_adapts(llama, tmp_path, tokenizer, capsys):
    asks = saved(tmp_path / "asks", mixture(tokenizer, output_router_logits=True, router_aux_loss_coef=0.5), tokenizer)
    plain = saved(tmp_path / "plain", mixture(tokenizer), tokenizer)
    teacher = {"model": llama, **PLAIN}
    with_loss = short_run(tmp_path / "a", {"model": asks, **PLAIN}, teacher)
    assert "the auxiliary loss of routers is added, times 0.5" in capsys.readouterr().err
    without = short_run(tmp_path / "b", {"model": plain, **PLAIN}, teacher)
    assert "no auxiliary loss of routers is added" in capsys.readouterr().err
    first, other = (next(row for row in r.history if "train/loss" in row) for r in (with_loss, without))
    assert first["train/router_loss"] > 0
    assert "train/router_loss" not in other
    assert first["train/gradient_norm"] != pytest.approx(other["train/gradient_norm"], rel=1e-3)
    assert first["train/expert_load_max"] == pytest.approx(other["train/expert_load_max"])

    every = short_run(tmp_path / "c", {"model": plain, **PLAIN, "lora": {"rank": 2}}, teacher)
    told = capsys.readouterr().err
    assert "4 q_proj" in told
    assert "routers are not among them" in told
    assert not any(".gate." in name for name, p in every.student.named_parameters() if p.requires_grad)
    short_run(tmp_path / "d", {"model": plain, **PLAIN, "lora": {"rank": 2, "targets": ["q_proj"]}}, teacher)
    assert "LoRA adapts 4 weights: 4 q_proj; routers are not among them, experts are not" in capsys.readouterr().err


def test_models_without_noise_are_tested_in_the_mode_that_trains(llama, tmp_path, monkeypatch):
    seen = []
    check = own_outputs.check_logits

    def note(language, contexts, completions, which):
        seen.append((which, language.training))
        check(language, contexts, completions, which)

    monkeypatch.setattr("opd.policies.causal_lm.check_logits", note)
    short_run(tmp_path / "a", {"model": llama, **PLAIN}, {"model": llama, **PLAIN})
    short_run(tmp_path / "b", {"model": llama, **PLAIN, "lora": {"dropout": 0.5}}, {"model": llama, **PLAIN})
    assert seen == [("the student", True), ("the student", False)]
