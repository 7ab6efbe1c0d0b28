"""Small real models: a character tokenizer and tiny transformers, made in memory."""

from __future__ import annotations

import gc
import os
import signal

from opd.language.tokens import Tokens

# A background job of a shell starts with interrupts ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.context import Context
from opd.language.engines.transformers import LanguageModel
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import Prompt
from opd.rollouts import HeldOutSampler
from opd.trajectories import Trajectories

# What two runs differ in is told as where a test itself compares.
pytest.register_assert_rewrite("tests.checkpoints")


def pytest_collection_finish(session):
    # Each run collects garbage in its end, and would go through all that was imported: a fifth of the tests' CPU time.
    gc.collect()
    gc.freeze()


CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=?.,#"


def character_tokenizer(pad: str = "<eos>") -> PreTrainedTokenizerFast:
    """One id a character; `pad` is the end token itself unless said otherwise."""
    vocabulary = {"<eos>": 0, "<unk>": 1, "<pad>": 2}
    vocabulary |= {c: i for i, c in enumerate(CHARACTERS, start=len(vocabulary))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token=pad)


def tiny_model(kind: str = "llama", vocabulary: int = 64, seed: int = 0, width: int = 32, layers: int = 2, **options):
    """A float32 causal LM of about 30k parameters, with weights large enough to have opinions."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **options,
    }
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=width // 4, **shared)).eval()
    return LlamaForCausalLM(LlamaConfig(**shared)).eval()


def save_tiny(folder, **options):
    """A model folder as `from_pretrained` reads it; returns its path as text."""
    tiny_model(**options).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def student(tokenizer):
    language = LanguageModel(tiny_model(), tokenizer, template="plain")
    return CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))


@pytest.fixture
def prompts():
    texts = ["12+7=", "spell a word", "9", "what is 3?", "abc def ghi jkl mno", "1+1=", "no", "q?"]
    return [Prompt(f"p{i}", {"prompt": text}, where=f"test:{i}") for i, text in enumerate(texts)]


def writing(settings, student, teachers=(), context=None):
    """A rollout, built, as tests ask it: with prompts, group, budget and stream."""
    context = context or student.context
    return HeldOutSampler(settings.build(context, student, teachers), settings, context)


def rolled_out(run, prompts, group, budget, stream=0):
    """What a run's rollout writes in its first step's settings."""
    return run.rollout(run.at(0).request(prompts, budget, stream=stream, group=group))


def said(teacher, trajectories, context=None):
    """The distribution of a teacher that gives one answer."""
    context = context or Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,)))
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    return target.distribution


def trajectories_of(lengths, contexts=None, seed=0, vocabulary=47, prompts=None):
    """Random trajectories with the given completion lengths, of the character tokenizer's ids."""
    g = torch.Generator().manual_seed(seed)
    contexts = contexts or [torch.randint(3, vocabulary, (n % 7 + 1,), generator=g) for n in lengths]
    total = sum(lengths)
    return Trajectories(
        prompts=prompts or [Prompt(f"t{i}", {"prompt": "x"}) for i in range(len(lengths))],
        contexts=contexts,
        actions=torch.randint(0, vocabulary, (total,), generator=g),
        lengths=torch.tensor(lengths),
        behaviour_log_probs=torch.zeros(total),
        finished=torch.ones(len(lengths), dtype=torch.bool),
        learn=torch.ones(total, dtype=torch.bool),
        authors=torch.zeros(total, dtype=torch.uint8),
        groups=torch.arange(len(lengths)),
    )
