"""Rows one behind the other without padding, through transformers' own attention: the numbers of each row alone."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from opd.errors import ModelError, RecipeError, SelfTestError
from opd.language.attention import attention_of, check_attention, check_dtype
from opd.language.dropout import silence
from opd.language.engines.layouts import can_flatten, flatten, usual_layout
from opd.language.engines.transformers import LanguageModel
from opd.language.own_outputs import check_logits
from opd.plan import make_plan
from opd.recipe import parse_recipe
from tests import flash
from tests.conftest import save_tiny, tiny_model, trajectories_of
from tests.families import FAMILIES, tiny
from tests.tiny import TEXTS, short_run, turn_tokenizer

NAMES = {family.label or family.name: family for family in FAMILIES if family.rows != "refused"}
SINKS = ("flint", "granite_swa", "gpt_oss")
"""Families whose attention has more than flash-attn 2 computes."""


def ids(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def language_of(model):
    return LanguageModel(model, turn_tokenizer(), "plain").requires_grad_(False).eval()


def fed(model):
    """Shapes of the ids that a model gets from now on."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: shapes.append(tuple(i[0].shape)))
    return shapes


def test_a_flat_row_by_hand():
    row = flatten([torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([1, 2]), torch.tensor([3])])
    assert row.ids.tolist() == [[5, 6, 7, 1, 8]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 0]]
    assert row.bounds.tolist() == [0, 4, 5]
    assert row.longest == 4
    assert row.scored.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in NAMES for attention in ("sdpa", "flash")]
    + [(name, "eager") for name in ("llama", "qwen3_moe", "mistral", "gemma2", "gpt_oss", "opt", "mamba")],
)
def test_a_family_gives_each_rows_own_logits(name, attention, monkeypatch):
    """Those whose layers look elsewhere too are padded, whatever is asked for."""
    family = NAMES[name]
    if family.name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family.name}")
    model = tiny(family)
    silence(model)
    # One row is one token, one completion is one token, and neighbours begin alike.
    contexts, completions = ids(9, 5, 9, 1, 7), ids(5, 7, 1, 1, 12)
    language = language_of(model).train(not family.noisy)
    own = torch.cat([language.own_logits(*row) for row in zip(contexts, completions, strict=True)])
    if attention == "flash":
        if name in SINKS or not (model._supports_flash_attn and can_flatten(model)):
            pytest.skip("not with flash-attn 2, or padded")
        flash.install(monkeypatch, half=False)
        flash.use(model)
    elif attention_of(model) != attention:
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            pytest.skip(f"not with {attention}")
    shapes = fed(model)
    with torch.enable_grad():  # else flash attention makes bfloat16 of all
        got = language.head(1.0).logits(language(contexts, completions, "varlen"))
    width = min(own.shape[1], got.shape[1])
    assert float((got[:, :width] - own[:, :width]).abs().max() / own.abs().max()) < (
        1e-4 if can_flatten(model) else 2e-3
    )
    if name in ("llama", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "gemma2"):
        assert shapes[-1] == (1, 9 + 5 + 9 + 1 + 7 + 4 + 6 + 0 + 0 + 11)
    if name in ("mamba", "lfm2", "jamba", "qwen3_next", "bloom", "gpt2"):
        assert shapes[-1][0] == 5


def test_an_attention_that_takes_lengths_is_told_them_once(monkeypatch):
    """Numbers for the lengths, and no search in the positions, which would wait for a device in every layer."""
    flash.install(monkeypatch, half=False)
    seen = []
    told = flash.flash_attn_varlen_func

    def spy(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        seen.append((cu_seqlens_q.tolist(), max_seqlen_q, type(max_seqlen_q)))
        return told(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs)

    monkeypatch.setattr(flash, "flash_attn_varlen_func", spy)
    flash.install(monkeypatch, half=False)
    language = language_of(flash.use(tiny_model("qwen3")))
    language(ids(3, 2), ids(2, 4), "varlen")
    assert seen == [([0, 4, 9], 5, int)] * 2


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_padded_rows(again, monkeypatch):
    """Of both implementations, and where activations are computed again in the backward pass."""
    flash.install(monkeypatch, half=False)
    trajectories = trajectories_of([5, 1, 9, 3])
    gradients = {}
    for attention, layout in [("sdpa", "right"), ("sdpa", "varlen"), ("flash", "varlen")]:
        model = tiny_model("qwen3")
        if attention == "flash":
            flash.use(model)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        language = LanguageModel(model, turn_tokenizer(), "plain").train(again)
        hidden = language(trajectories.contexts, trajectories.completions(), layout)
        language.head(1.0).logits(hidden).log_softmax(-1)[:, 3].sum().backward()
        gradients[attention, layout] = torch.cat([p.grad.flatten() for p in model.parameters()])
    padded = gradients.pop(("sdpa", "right"))
    for found in gradients.values():
        assert (found - padded).norm() / padded.norm() < 1e-5


def test_auto_takes_it_on_cuda_with_flash_attention_alone(monkeypatch):
    llama, mamba = tiny_model(), tiny(NAMES["mamba"])
    assert (usual_layout(llama, "cpu"), usual_layout(llama, "cuda"), usual_layout(mamba, "cuda")) == (
        "packed",
        "right",
        "right",
    )
    for name in ("eager", "flex_attention"):
        llama.config._attn_implementation = name
        assert (usual_layout(llama, "cpu"), usual_layout(llama, "cuda")) == ("right", "right")
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        llama.config._attn_implementation = name
        assert usual_layout(llama, "cuda") == "varlen"
        mamba.config._attn_implementation = name
        assert usual_layout(mamba, "cuda") == "right"


def test_the_test_at_the_start_compares_it(monkeypatch):
    """Every row and each alone, in the layout that trains; rows that are not kept apart are found."""
    flash.install(monkeypatch)
    flash.as_on_cuda(monkeypatch)
    language = language_of(flash.use(tiny_model("qwen3", vocabulary=64)).bfloat16())
    shapes = fed(language.model)
    check_logits(language, ids(9, 5), ids(5, 7), "the student")
    assert (1, 13 + 13 + 11 + 9) in shapes

    def one_row(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        return flash.flash_attn_func(q[None], k[None], v[None], softmax_scale=kwargs["softmax_scale"], causal=True)[0]

    monkeypatch.setattr("transformers.modeling_flash_attention_utils._flash_varlen_fn", one_row)
    with pytest.raises(SelfTestError, match=r"lets one row or its padding reach another; attention: sdpa pads rows"):
        check_logits(language, ids(9, 5), ids(5, 7), "the student")


def test_a_run_in_bf16_trains_in_it(monkeypatch, tmp_path):
    """float32 weights under autocast; rollouts, the test at the start and evaluation attend by it too."""
    flash.install(monkeypatch)
    flash.as_on_cuda(monkeypatch)
    rows = []
    flat = LanguageModel._flat
    monkeypatch.setattr(LanguageModel, "_flat", lambda self, c, y: rows.append(len(y)) or flat(self, c, y))
    tokenizer = turn_tokenizer()
    models = [flash.use(tiny_model("qwen3", vocabulary=len(tokenizer), seed=seed, eos_token_id=1)) for seed in (1, 2)]
    hardware = {"device": "cpu", "threads": 1, "precision": "bf16"}
    result = short_run(
        tmp_path / "run",
        *models,
        tokenizer=tokenizer,
        hardware=hardware,
        rollout={"max_new_tokens": 12, "dtype": "bfloat16"},
    )
    assert result.summary["steps"] == 2
    assert rows.count(4) >= 4
    models = [flash.use(tiny_model("qwen3", vocabulary=len(tokenizer), seed=seed, eos_token_id=1)) for seed in (1, 2)]
    with pytest.raises(
        ModelError, match=r"'flash_attention_2' computes in bfloat16 and float16 alone, .* float32; set"
    ):
        short_run(tmp_path / "fp32", *models, tokenizer=tokenizer, hardware={**hardware, "precision": "fp32"})


def test_what_no_device_here_can_do_is_refused(monkeypatch, tmp_path):
    check_attention("sdpa", "student.attention", "cpu")
    check_attention(None, "student.attention", "cpu")
    with pytest.raises(ModelError, match=r"student\.attention is 'flash_attention_2', which computes on no CPU; take"):
        check_attention("flash_attention_2", "student.attention", "cpu")
    monkeypatch.setattr("opd.language.attention._installed", lambda module: False)
    with pytest.raises(ModelError, match=r"neither flash_attn_interface nor kernels is installed"):
        check_attention("flash_attention_3", "teacher.attention", "cuda")
    monkeypatch.setattr("opd.language.attention._installed", lambda module: module == "kernels")
    check_attention("flash_attention_2", "student.attention", "cuda:0")
    check_dtype("flash_attention_2", torch.bfloat16, "the student")
    path = save_tiny(tmp_path / "m")
    for role in ("student", "teacher"):
        of = {"student": {"model": path, "template": "plain"}, "teacher": {"model": path, "template": "plain"}}
        of[role]["attention"] = "flash_attention_2"
        with pytest.raises(ModelError, match=rf"{role}\.attention is 'flash_attention_2', which computes on no CPU"):
            short_run(tmp_path / "run", of["student"], of["teacher"])


def test_a_plan_says_how_rows_share_a_pass_and_with_what(monkeypatch, tmp_path):
    path = save_tiny(tmp_path / "m")

    def plan(attention=None, **hardware):
        model = {"model": path, "template": "plain"}
        prompts = {"kind": "inline", "prompts": TEXTS}
        asked = {**model, "attention": attention} if attention else model
        recipe = {"student": asked, "teacher": model, "prompts": prompts, "hardware": hardware}
        recipe["evaluation"] = {"held_out": 2}
        return make_plan(parse_recipe(recipe))

    own = "one row without padding, what rows share computed once; attention sdpa"
    assert plan(device="cpu").as_dict()["rows_share_a_pass"] == [own, own]
    assert plan("eager", device="cpu").rows == ("padded; attention eager", own)
    assert plan(device="cuda").rows == ("padded; attention sdpa",) * 2
    monkeypatch.setattr("opd.language.attention._installed", lambda module: True)
    flashed = plan("flash_attention_2", device="cuda", precision="bf16")
    assert flashed.rows == ("one row without padding; attention flash_attention_2", "padded; attention sdpa")
    assert ("rows in a pass", [("student", flashed.rows[0]), ("teacher 0", flashed.rows[1])]) in flashed.sections()
    with pytest.raises(ModelError, match=r"student\.attention is 'flash_attention_2', which computes on no CPU"):
        plan("flash_attention_2", device="cpu")
    with pytest.raises(ModelError, match=r"computes in bfloat16 and float16 alone, and is asked in float32"):
        plan("flash_attention_2", device="cuda", precision="fp32")
    with pytest.raises(RecipeError, match=r"'flash2' is no attention of transformers; take one of eager, flash_att"):
        plan("flash2")
    mamba = tiny(NAMES["mamba"])
    mamba.save_pretrained(tmp_path / "mamba")
    path = str(tmp_path / "mamba")
    with pytest.raises(ModelError, match=r"the family 'mamba' has no attention 'flash_attention_2' in transformers"):
        plan("flash_attention_2", device="cuda", precision="bf16")
