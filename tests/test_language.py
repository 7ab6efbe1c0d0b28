"""The model as hidden states and head: layouts, packing, layer removal, sampling."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from opd.context import Context
from opd.distributions import Vocabulary
from opd.errors import IncompatibleError, ModelError
from opd.language.agreement import agree_on_end, check_tokenizers, common_vocabulary
from opd.language.engines.base import Drawing
from opd.language.engines.cpu.decoder import Decoder
from opd.language.engines.cpu.packing import SHORT, pack, packed_attention
from opd.language.engines.cpu.prepacked import prepacked, worth_packing
from opd.language.engines.prefill import step
from opd.language.engines.sampler import Sampler, inverse_cdf
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings, load_model
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLM, CausalLMStudent
from opd.rollouts.student import StudentRollout
from tests.conftest import character_tokenizer, save_tiny, tiny_model, trajectories_of, writing


def plain(model):
    """log-probabilities of each completion token, one sequence at a time, by the model's own forward."""

    def score(trajectories):
        rows = []
        for context, y in zip(trajectories.contexts, trajectories.completions(), strict=True):
            ids = torch.cat([context, y])[None]
            log_probs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
            rows.append(log_probs[len(context) - 1 : -1].gather(1, y[:, None]).squeeze(1))
        return torch.cat(rows)

    return score


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["packed", "right", "left"])
def test_every_layout_gives_the_models_own_log_probabilities(kind, layout, tokenizer):
    model = tiny_model(kind)
    trajectories = trajectories_of([5, 1, 9, 3])
    with torch.no_grad():
        expected = plain(model)(trajectories)
        student = CausalLMStudent(LanguageModel(model, tokenizer, "plain"), None, Context(torch.device("cpu")))
        got = student(trajectories, layout=layout).log_probs().gather(1, trajectories.actions[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_a_shared_prompt_is_computed_once_and_changes_nothing(window, tokenizer):
    options = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    model = tiny_model("qwen3", **options)
    a, b = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([11, 12])
    trajectories = trajectories_of([4, 7, 1, 6, 2], contexts=[a, a, a, b, b])
    language = LanguageModel(model, tokenizer, "plain")
    fed = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: fed.append(i[0].numel()))
    got = language(trajectories.contexts, trajectories.completions(), "packed")
    assert fed[-1] == 6 + 2 + (4 + 7 + 1 + 6 + 2) - 5
    want = language(trajectories.contexts, trajectories.completions(), "right")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_a_common_beginning_of_all_prompts_is_computed_once(window, tokenizer):
    """A system prompt: five tokens that every prompt starts with, one group and two lone completions."""
    options = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    model = tiny_model("qwen3", **options)
    system = [5, 6, 7, 8, 9]
    a, b, c = (torch.tensor(system + own) for own in ([10], [11, 12, 13], [10, 4]))
    trajectories = trajectories_of([4, 1, 6, 2, 5], contexts=[a, b, b, b, c])
    language = LanguageModel(model, tokenizer, "plain")
    fed = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: fed.append(i[0].numel()))
    got = language(trajectories.contexts, trajectories.completions(), "packed")
    assert fed[-1] == 5 + (1 + 3 + 2) + (4 + 1 + 6 + 2 + 5) - 5
    want = language(trajectories.contexts, trajectories.completions(), "right")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_prefill_of_prompts_with_a_common_beginning(student):
    """Unequal prompts, two of them the same and apart: the cache holds each prompt's own keys in the right place."""
    contexts = [torch.tensor([5, 6, 7, *own]) for own in ([10], [11, 12, 13], [10], [10], [4, 4])]
    sampler = Sampler(student.language, student.language.head(1.0), [0])
    together = sampler.extend(sampler.start(contexts, 1, 8, list(range(5))), 8)
    for i, context in enumerate(contexts):
        alone = sampler.extend(sampler.start([context], 1, 8, [i]), 8)
        assert alone.rows()[0][0].tolist() == together.rows()[i][0].tolist()


def test_gradients_do_not_depend_on_the_layout(student):
    trajectories = trajectories_of([5, 1, 9, 3])
    grads = []
    for layout in ("packed", "right", "left"):
        student.module.zero_grad()
        student(trajectories, layout=layout).log_probs().gather(1, trajectories.actions[:, None]).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.module.parameters()]))
    for other in grads[1:]:
        assert (other - grads[0]).norm() / grads[0].norm() < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_short_segments_attend_in_float32(autocast):
    """Under autocast the rotated queries and keys are float32 and the values are not."""
    lengths, generator = [5, SHORT + 7], torch.Generator().manual_seed(0)
    row = pack([torch.tensor([i]) for i in range(2)], [torch.arange(n) for n in lengths])
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3))
    module = SimpleNamespace(is_causal=True, training=False)
    value = value.bfloat16()
    given = (query, key, value) if autocast else (query.bfloat16(), key.bfloat16(), value)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = packed_attention(module, *given, None, opd_layout=row)
    exact, _ = packed_attention(module, *(x.float() for x in given), None, opd_layout=row)
    short, long = (slice(0, 5), slice(5, None))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, short], exact[:, short].bfloat16())
    assert torch.allclose(found[:, long].float(), exact[:, long], atol=3e-2)


def test_removed_layers_leave_a_model_that_saves_caches_and_reloads(tmp_path):
    path = save_tiny(tmp_path / "full", kind="qwen3", layers=4)
    model = load_model(ModelSettings(model=path, drop_layers="1-2", template="plain"), "cpu")
    assert model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    model.save_pretrained(tmp_path / "cut")
    again = type(model).from_pretrained(tmp_path / "cut")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= 4


@pytest.mark.parametrize(("layers", "message"), [([9], r"\[9\]"), ([0, 1, 2, 3], "0 to 3")])
def test_impossible_layer_removal_is_refused(layers, message, tmp_path):
    path = save_tiny(tmp_path / "full", layers=4)
    with pytest.raises(ModelError, match=message):
        load_model(ModelSettings(model=path, drop_layers=layers, template="plain"), "cpu")


def rollout(student, group=1, budget=12, prompts=None, stream=0, **settings):
    return writing(StudentRollout(**settings), student)(prompts, group, budget, stream)


def test_recorded_log_probabilities_are_those_of_the_policy(student, prompts):
    trajectories = rollout(student, prompts=prompts, group=2)
    with torch.no_grad():
        expected = plain(student.language.model)(trajectories)
    torch.testing.assert_close(trajectories.behaviour_log_probs, expected, atol=1e-4, rtol=1e-4)


LOOKS = {"watch": {"kind": "repetition", "times": 99}}


@pytest.mark.parametrize(
    "settings", [{"batch": 1}, {"batch": 3}, {"segment": 1, **LOOKS}, {"segment": 5, "batch": 3, **LOOKS}, LOOKS]
)
def test_draws_do_not_depend_on_batch_or_segment(settings, student, prompts):
    reference = rollout(student, prompts=prompts, group=2)
    other = rollout(student, prompts=prompts, group=2, **settings)
    assert torch.equal(other.actions, reference.actions)
    assert torch.equal(other.lengths, reference.lengths)


def test_streams_and_seeds_differ_and_repeat(student, prompts):
    one, again, other = (rollout(student, prompts=prompts, stream=s) for s in (0, 0, 1))
    assert torch.equal(one.actions, again.actions)
    assert not torch.equal(one.actions[:20], other.actions[:20])
    members = rollout(student, prompts=prompts[:1], group=2).completions()
    assert members[0].tolist() != members[1].tolist()


def test_end_token_is_kept_and_decides_the_length(student, prompts):
    trajectories = rollout(student, prompts=prompts, group=8, budget=40)
    ended = 0
    for completion, finished in zip(trajectories.completions(), trajectories.finished.tolist(), strict=True):
        assert 0 not in completion[:-1].tolist()
        assert (completion[-1].item() == 0) == finished
        assert finished or len(completion) == 40
        ended += finished
    assert ended > 0


def test_a_padding_token_equal_to_the_end_token_is_scored_like_any_other(student):
    """pad = eos: nothing is inferred from values, so end tokens inside and at the end all count."""
    contexts = [torch.tensor([0, 0, 7]), torch.tensor([9])]
    trajectories = trajectories_of([3, 6], contexts=contexts)
    trajectories.actions[2] = 0
    trajectories.actions[-1] = 0
    got = {layout: student(trajectories, layout=layout).log_probs() for layout in ("packed", "right", "left")}
    assert len(got["right"]) == 9
    expected = plain(student.language.model)(trajectories)
    for log_probs in got.values():
        torch.testing.assert_close(
            log_probs.gather(1, trajectories.actions[:, None])[:, 0], expected, atol=1e-5, rtol=1e-5
        )


def test_sampling_follows_the_distribution(student):
    """4,000 first tokens of one prompt against the exact probabilities (chi-square, five sigma)."""
    head = student.language.head(1.0)
    sampler = Sampler(student.language, head, [0])
    state = sampler.start([torch.tensor([5, 6, 7])], 4000, 1, list(range(4000)))
    p = torch.softmax(head.logits(state.hidden[:1])[0], -1).detach()
    sampler.extend(state, 1)
    counts = torch.bincount(state.actions[:, 0], minlength=64).float()
    big = p > 1e-3
    chi = ((counts[big] - 4000 * p[big]) ** 2 / (4000 * p[big])).sum()
    freedom = big.sum() - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_top_k_and_top_p_cut_the_distribution_and_the_recorded_log_probabilities(student, prompts):
    trajectories = rollout(student, prompts=prompts, top_k=1)
    assert trajectories.behaviour_log_probs.abs().max() < 1e-6
    narrow = rollout(student, prompts=prompts, top_p=0.3)
    wide = rollout(student, prompts=prompts)
    assert narrow.behaviour_log_probs.mean() > wide.behaviour_log_probs.mean()


def test_inverse_cdf_never_draws_an_impossible_id():
    log_probs = torch.tensor([[float("-inf"), 0.5, 0.5, float("-inf")]]).log_softmax(-1).repeat(4, 1)
    drawn = inverse_cdf(log_probs, torch.tensor([0.0, 0.4999, 0.5001, 1.0 - 2**-24]))
    assert drawn.tolist() == [1, 1, 2, 2]


def test_rows_can_be_dropped_between_segments(student, prompts):
    sampler = student.language.sampler(Drawing(student.context))
    contexts = [student.language.encode(p) for p in prompts[:3]]
    state = sampler.start(contexts, 1, 20, [1, 2, 3])
    sampler.extend(state, 2)
    state.drop(torch.tensor([1]))
    sampler.extend(state, 3)
    assert state.lengths[1] <= 2
    assert state.lengths.max() > 2


def test_padded_vocabularies_are_cut_to_the_common_ids(tokenizer):
    models = [LanguageModel(tiny_model(vocabulary=v), tokenizer, "plain") for v in (64, 80)]
    assert common_vocabulary(models) == Vocabulary(len(tokenizer))
    student = CausalLMStudent(models[1], None, Context(torch.device("cpu"), agreed=Tokens(vocabulary=Vocabulary(64))))
    assert student(trajectories_of([3])).log_probs().shape == (3, 64)


def test_other_tokenizers_are_refused(tokenizer):
    other = character_tokenizer()
    other.add_tokens(["<extra>"])
    ours, theirs = (LanguageModel(tiny_model(), t, "plain") for t in (tokenizer, other))
    check_tokenizers(ours, theirs, "the teacher")
    from transformers import PreTrainedTokenizerFast

    vocabulary = tokenizer.get_vocab()
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    core = type(tokenizer._tokenizer)(type(tokenizer._tokenizer.model)(swapped, unk_token="<unk>"))
    theirs.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(IncompatibleError, match=r"2 of \d+ ids differ"):
        check_tokenizers(ours, theirs, "the teacher")


def test_disjoint_end_tokens_are_refused_unless_named(tokenizer):
    ours = LanguageModel(tiny_model(), tokenizer, "plain")
    theirs = LanguageModel(tiny_model(eos_token_id=5), tokenizer, "plain")
    theirs.tokenizer = character_tokenizer()
    theirs.tokenizer.eos_token = "2"
    with pytest.raises(IncompatibleError, match="end_tokens"):
        agree_on_end(ours, [("the teacher", theirs)], None)
    assert agree_on_end(ours, [("the teacher", theirs)], [5]) == (5,)


def test_frozen_parts_stay_out_of_training(tmp_path):
    path = save_tiny(tmp_path / "m")
    context = Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,)))
    student = CausalLM(model=path, template="plain", freeze=["embed_tokens", "lm_head"]).build(context)
    student(trajectories_of([5, 3])).log_probs().sum().backward()
    for name, p in student.module.named_parameters():
        assert (p.grad is None) == ("embed_tokens" in name or "lm_head" in name)
    with pytest.raises(ModelError, match="no parameter's name holds 'embedding'"):
        CausalLM(model=path, template="plain", freeze=["embedding"]).build(context)
    with pytest.raises(ModelError, match="no parameter to train"):
        CausalLM(model=path, template="plain", freeze=["model", "lm_head"]).build(context)


def test_lora_trains_adapters_only_and_saves_a_plain_model(tmp_path):
    path = save_tiny(tmp_path / "base")
    settings = CausalLM(model=path, template="plain", lora={"rank": 4, "targets": ["q_proj", "v_proj", "lm_head"]})
    student = settings.build(Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))
    trained = [n for n, p in student.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    trajectories = trajectories_of([5, 3])
    with torch.no_grad():
        for name, p in student.module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
        own = student.language.model(torch.cat([trajectories.contexts[0], trajectories.completions()[0]])[None]).logits
    got = student(trajectories)
    torch.testing.assert_close(got.log_probs()[:5], torch.log_softmax(own[0, -6:-1], -1), atol=1e-5, rtol=1e-5)
    student(trajectories).log_probs().sum().backward()
    head_grads = [p.grad for n, p in student.module.named_parameters() if "lm_head" in n and p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in head_grads)
    student.save(tmp_path / "out", "card")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(merged(ids).logits, student.language.model(ids).logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


def test_the_cache_grows_in_place_and_keeps_what_it_holds(student, prompts):
    """More tokens than a buffer has room for at first, rows that leave in between: the log-probabilities recorded while
    sampling are those of a fresh forward pass."""
    trajectories = rollout(student, prompts=prompts, budget=150)
    assert trajectories.lengths.max() > 100
    assert trajectories.lengths.min() < 100
    again = student(trajectories).log_probs().gather(1, trajectories.actions[:, None])[:, 0]
    torch.testing.assert_close(again, trajectories.behaviour_log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_layers_multiply_as_before(dtype, rows):
    layers = torch.nn.ModuleDict({"large": torch.nn.Linear(512, 300), "small": torch.nn.Linear(512, 8)}).to(dtype)
    x = torch.randn(rows, 2, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    large, small = layers["large"], layers["small"]
    with torch.no_grad():
        want = large(x)
        with prepacked(layers):
            assert ("forward" in vars(large)) == worth_packing(large.weight)
            assert "forward" not in vars(small)
            torch.testing.assert_close(large(x), want)
            with torch.autocast("cpu", torch.bfloat16):
                assert large(x).dtype == torch.bfloat16
    assert "forward" not in vars(large)


@pytest.mark.parametrize("broken", [False, True])
def test_rollouts_pack_the_weights_as_they_are_now_and_give_them_back(broken, student, prompts, monkeypatch):
    """With every layer packed, and weights that change between two rollouts; a short one packs nothing."""
    monkeypatch.setattr("opd.language.engines.cpu.prepacked.SMALLEST", 1)
    monkeypatch.setattr("opd.language.engines.sampler.Decoder.known", lambda body: False)
    monkeypatch.setattr("opd.language.engines.in_process.FEWEST", 12)
    source = writing(StudentRollout(), student)
    packed = []
    keep = Sampler.start

    def start(sampler, *arguments):
        packed.append(sum("forward" in vars(m) for m in student.module.modules()))
        if broken:
            raise RuntimeError("no room")
        return keep(sampler, *arguments)

    monkeypatch.setattr(Sampler, "start", start)
    for _ in range(2):
        if broken:
            with pytest.raises(RuntimeError, match="no room"):
                source(prompts, 1, 12, stream=0)
        else:
            found = source(prompts, 1, 12, stream=0)
            own = student(found).log_probs().gather(1, found.actions[:, None])[:, 0]
            torch.testing.assert_close(found.behaviour_log_probs, own, atol=1e-5, rtol=1e-5)
        assert not any("forward" in vars(m) for m in student.module.modules())
        with torch.no_grad():
            for p in student.module.parameters():
                p.mul_(1.5)
    linear = sum(type(m) is torch.nn.Linear for m in student.language.base.get_decoder().modules())
    assert packed == [linear] * 2
    if not broken:
        source(prompts, 1, 11, stream=0)
        assert packed[2:] == [0]


SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECODERS = {
    "llama": tiny_model,
    "biases and scaled positions": lambda: tiny_model(
        attention_bias=True, mlp_bias=True, rope_parameters={**SCALED, "original_max_position_embeddings": 32}
    ),
    "qwen2": lambda: qwen2(),
    "qwen3": lambda: tiny_model("qwen3"),
}


def qwen2(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **options)).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_without_modules_gives_the_modules_states(kind, dtype, packed, tokenizer, monkeypatch):
    """Token by token over rows of unequal length, from the same caches."""
    monkeypatch.setattr("opd.language.engines.cpu.prepacked.SMALLEST", 1)
    model = DECODERS[kind]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn(weight.shape) / 4)
    model.to(dtype)
    language = LanguageModel(model, tokenizer, "plain")
    sampler = Sampler(language, language.head(1.0), [0], packed=packed)
    contexts = [torch.arange(3, 3 + n) for n in (2, 9, 5)]
    own, theirs = (sampler.start(contexts, 2, 40, range(6)) for _ in range(2))
    with torch.no_grad():
        for drawn in range(1, 21):
            token = torch.randint(0, 64, (6,))
            mask, position = own.mask[:, : own.width + drawn], own.following + drawn - 1
            got = sampler.decoder(token, mask[:, None, None], position, own.cache)
            want = step(language, sampler.cache_name, token[:, None], mask.long(), position, theirs.cache)[:, -1]
            tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
            assert (got - want).norm() < tolerance * want.norm()
            assert got.dtype == want.dtype


def test_decoders_that_are_not_written_out_go_through_their_modules(tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(Decoder, "__call__", lambda *args: pytest.fail("not this one"))

    def written_out(model):
        language = LanguageModel(model, tokenizer, "plain")
        student = CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))
        made = rollout(student, prompts=prompts)
        own = student(made).log_probs().gather(1, made.actions[:, None])[:, 0]
        torch.testing.assert_close(made.behaviour_log_probs, own, atol=1e-4, rtol=1e-4)
        return Decoder.known(language.base.get_decoder())

    class Other(LlamaDecoderLayer):
        pass

    strange = tiny_model()
    for layer in strange.model.layers:
        layer.__class__ = Other
    growing = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert not written_out(strange)
    assert not written_out(growing)
    assert not written_out(tiny_model(hidden_act="gelu"))
    assert not written_out(peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    # Known, but some layers do not see everything, and less than a prompt.
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert written_out(tiny_model("qwen3", **window))
