"""The tiny tasks, one of each kind of student, and the choices that are tried in them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.combinations.parts import Part, Task
from benchmarks.combinations.worlds import Door, Walk
from opd.acting.creation import create_policy
from opd.choice import take_in
from opd.drafting.base import Outline
from opd.drafting.chain import Chain
from opd.drafting.native import save_drafter
from opd.flow.creation import create_flow_model
from opd.jobs.demonstrations import sample_demonstrations
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.language.creation import symbol_tokenizer
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.prompts.demonstrations import DemonstrationPrompts
from opd.prompts.episodes import EpisodePrompts
from opd.recipe import parse_recipe
from opd.server import ServedModel
from opd.server.serving import application
from opd.vision.creation import create_image_text_model

WORDS = ("0", "1", "2", "3", "4", "5", "+", "=", "?")
TALKS = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
"""A chat template that adds nothing but the end of a reply, and keeps every turn as it stood."""
COLOURS = ("red", "green", "blue", "square", "circle")
STEPS = 2
COMMON: dict[str, Any] = {
    "name": "pair",
    "steps": STEPS,
    "update": {"kind": "plain", "learning_rate": 1e-2},
    "checkpoint": {"every": 0},
    "tracking": {"trackers": []},
    "hardware": {"device": "cpu", "threads": 1},
}
PRIVATE = Part(
    "update",
    "differentially_private",
    {
        "kind": "differentially_private",
        "noise_multiplier": 0.0,
        "learning_rate": 1e-2,
        "seed": 0,
    },
    {
        "curriculum": {"kind": "poisson", "seed": 3},
        "batch": {"prompts": 5, "group": 1},
        "reduction": "sequence_mean",
    },
)
"""Without noise, behind which nobody would see that there is no gradient."""


def of_all(taught: dict[str, Any], alone: str = "reverse_kl") -> list[Part]:
    """Curricula that any kind of student takes, and the updates; `taught` is a rollout in which the teacher writes, and
    `alone` an objective in which a record counts by itself."""
    focusing = {"kind": "focusing", "size": 3, "responses": 2, "reliable_from": 0.0, "teacher": taught}
    return [
        Part("curriculum", "shuffled", {"kind": "shuffled"}),
        Part("curriculum", "poisson", {"kind": "poisson", "seed": 3}),
        Part("curriculum", "difficulty", {"kind": "difficulty", "responses": 4, "most": 3.0}),
        Part("curriculum", "focusing", focusing),
        Part("update", "plain", COMMON["update"]),
        replace(PRIVATE, needs={**PRIVATE.needs, "objective": {"kind": alone}}),
    ]


def of_tokens(given: dict[str, Any]) -> list[Part]:
    """Objectives on tokens; `given` is a rollout in which somebody else wrote."""
    plain = ("reverse_kl", "forward_kl", "jensen_shannon", "mixture", "reverse_kl_sampled", "squared_log_ratio")
    return [
        *(Part("objective", kind, {"kind": kind}) for kind in plain),
        Part("objective", "lightning", {"kind": "lightning"}),
        Part("objective", "reverse_kl_candidates", {"kind": "reverse_kl_candidates", "k": 4}),
        Part("objective", "hard_ce", {"kind": "hard_ce"}),
        Part("objective", "uld", {"kind": "uld"}),
        Part("objective", "grpo", {"kind": "grpo"}),
        Part("objective", "sft", {"kind": "sft"}, {"rollout": given}),
    ]


OF_BLOCKS = [Part("objective", kind, {"kind": kind}) for kind in ("pooled", "accepted", "rejected", "cross_entropy")]
SAMPLED = {"objective": {"kind": "reverse_kl_sampled"}}
DRIFT = {"kind": "drift", "drop": 0.5, "base": 0.1, "signal": {"kind": "overlap", "k": 3, "below": 0.9}}
SHAPINGS = [
    Part("shaping", "uniform", {"kind": "uniform"}),
    Part("shaping", "drift", DRIFT),
    Part("shaping", "margin_shift", {"kind": "margin_shift", "delta": 4.0}, SAMPLED),
    Part("shaping", "margin_mask", {"kind": "margin_mask", "delta": 4.0, "keep": 0.0}),
    Part("shaping", "outcome_balance", {"kind": "outcome_balance", "ratio": 0.5}),
    Part("shaping", "outcome_bonus", {"kind": "outcome_bonus"}, SAMPLED),
    Part("shaping", "log_ratio_gate", {"kind": "log_ratio_gate", "limit": 0.7}),
    Part("shaping", "truncated_importance", {"kind": "truncated_importance", "limit": 1.0}),
]
SIGNALS = [
    Part("compatibility", "overlap", {"kind": "overlap", "k": 3, "below": 0.9}),
    Part("compatibility", "weighted_overlap", {"kind": "weighted_overlap", "k": 3}),
    Part("compatibility", "top_p_acceptance", {"kind": "top_p_acceptance", "k": 3}),
]
BY_LENGTH = [
    Part("curriculum", "length_ladder", {"kind": "length_ladder", "lengths": [5, 6], "steps_per_rung": 1}),
    Part(
        "curriculum",
        "window",
        {"kind": "window", "minimum": 2, "maximum": 6, "start": 4, "by": 2, "margin": 1},
        {"shaping": DRIFT},
    ),
]
WATCHES = [
    Part("watch", "repetition", {"watch": {"kind": "repetition", "times": 3, "longest": 1}, "segment": 1}),
    Part("watch", "drift", {"watch": {"kind": "drift", "drop": 0.5, "signal": DRIFT["signal"]}, "segment": 1}),
]


def rows(folder: Path, count: int, first: int = 0, gap: str = "") -> list[dict[str, Any]]:
    """Sums of two digits, each with all columns that some choice reads; `gap` stands between what is written."""
    found = []
    world = Door()
    for i in range(first, first + count):
        a, b = divmod(i, 4)
        picture = folder / f"{i}.png"
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(picture)
        found.append(
            {
                "id": f"row-{i}",
                "prompt": gap.join(f"{a}+{b}="),
                "hint": gap.join(f"{a}+{b}={(a + b) % 6}?"),
                "response": [gap.join(text) for text in (f"{b}1", f"{a}2", f"3{b}14", "5")],
                "route": "ab"[i % 2],
                "image": str(picture),
                "environment": world.model_dump(mode="json"),
                "task": list(world.tasks())[i % 2],
                "seed": i,
            }
        )
    return found


def tiny(folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """A causal language model over the characters of `WORDS`, or of another tokenizer, with weights large enough to
    have opinions; its folder."""
    tokenizer = tokenizer or symbol_tokenizer([*WORDS, " "])
    tokenizer.chat_template = TALKS
    # An unknown token has no text that another tokenizer reads, and untrained students write every id they have.
    tokenizer.unk_token = "<eos>"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.25,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """Another tokenizer of the same texts: one id a byte, and some for two characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=2,
    )
    core.train_from_iterator([f"{a}+{b}={c}?" for a in "0123" for b in "0123" for c in "45"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def of_language(
    folder: Path,
    student: dict[str, Any],
    teachers: Sequence[dict[str, Any]],
    urls: Sequence[str] = (),
    helped: str = "",
    other: str = "",
    gap: str = "",
) -> Task:
    """Texts: every pair of causal_lm, and of image_text every choice. A store is sampled by the student, and scored.

    Args:
        urls: servers of a teacher and of the student.
        helped: a drafter for the student.
        other: a teacher of another tokenizer.
        gap: see `rows`.
    """
    base = {
        **COMMON,
        "student": student,
        "teacher": teachers[0],
        "prompts": {"kind": "inline", "prompts": rows(folder, 6, gap=gap)},
        "rollout": {"kind": "student", "max_new_tokens": 6},
        "curriculum": {"kind": "shuffled"},
        "verifier": {"kind": "coin"},
        "shaping": {"kind": "uniform"},
        "objective": {"kind": "reverse_kl"},
        "batch": {"prompts": 3, "group": 4, "micro": 12},
        "evaluation": {"prompts": {"kind": "inline", "prompts": rows(folder, 2, 10, gap)}, "samples": 0},
    }
    store = folder / "store"
    recipe = parse_recipe({**base, "output": str(folder / "run")})
    sample(recipe, store, quiet=True)
    second = parse_recipe({**base, "teacher": teachers[1], "output": str(folder / "run")})
    kinds = ("exact", "top_k", "sampled")
    for kind in kinds:
        score(second, store, kind, quiet=True, name=kind, **({"top_k": 4} if kind == "top_k" else {}))
    stored = {"kind": "stored", "path": str(store), "max_new_tokens": 6}
    writes = {"kind": "student", "max_new_tokens": 6}
    shown = {"kind": "teacher", "max_new_tokens": 6}
    talks = {"kind": "agent", "max_new_tokens": 6, "turns": 3, "max_context_tokens": 60}
    # The environment says what an episode is worth.
    unjudged = {"verifier": None}
    wording = dict.fromkeys(("role", "confidence", "revise", "focus", "begin", "end", "gap"), "")
    wording |= {"label": "{round} ", "identity": "", "cue": " =", "tag": "? {number}"}
    parts = [
        *of_all(shown),
        *BY_LENGTH,
        Part("rollout", "student", writes),
        Part("rollout", "teacher", shown),
        Part("rollout", "data", {"kind": "data", "max_new_tokens": 6}),
        Part("rollout", "stored", stored),
        Part("rollout", "mixture", {"kind": "mixture", "first": writes, "second": shown}),
        Part("rollout", "switch", {"kind": "switch", "first": shown, "then": writes, "position": 2}),
        Part("rollout", "speculative", {"kind": "speculative", "max_new_tokens": 6}),
        Part("rollout", "anchored", {"kind": "anchored", "texts": {"kind": "data", "max_new_tokens": 6}}),
        Part("rollout", "agent", talks, unjudged),
        Part("rollout", "agent (history of data)", {**talks, "history": "data"}, unjudged),
        *WATCHES,
        Part("teacher", teachers[0]["kind"], teachers[0]),
        Part("teacher", "self", {"kind": "self", "sees": "hint"}),
        *(
            Part(
                "teacher",
                f"stored ({kind})",
                {"kind": "stored", "path": str(store), "targets": kind, "consistency": "ignored"},
                {"rollout": stored, "objective": {"kind": "squared_log_ratio" if kind == "sampled" else "reverse_kl"}},
            )
            for kind in kinds
        ),
        Part("teacher", "routed", {"kind": "routed", "by": "route", "routes": dict(zip("ab", teachers, strict=True))}),
        Part(
            "teacher",
            "debate",
            {
                "kind": "debate",
                "experts": dict(zip("ab", teachers, strict=True)),
                "rounds": 1,
                "max_new_tokens": 4,
                "weighting": "uniform",
                "wording": wording,
            },
        ),
        Part("teacher", "target", {"kind": "target"}),
        *SHAPINGS,
        *SIGNALS,
        *of_tokens({"kind": "data", "max_new_tokens": 6}),
        *OF_BLOCKS,
    ]
    if urls:
        parts += [
            Part(
                "teacher",
                f"served ({kind})",
                {"kind": "served", "url": urls[0], "answers": kind} | ({"top_k": 4} if kind == "top_k" else {}),
                SAMPLED if kind == "sampled" else {},
            )
            for kind in kinds
        ]
        parts.append(Part("engine", "served", {"engine": {"kind": "served", "url": urls[1]}}))
    if helped:
        parts.append(Part("engine", "drafted", {"engine": {"kind": "drafted", "model": helped}}))
    if other:
        parts.append(Part("teacher", "local (own tokenizer)", {"kind": "local", "model": other, "tokenizer": "own"}))
    return Task(student["kind"], base, parts, pairs=bool(urls))


def of_drafts(folder: Path, target: str) -> Task:
    """A drafter and its target."""
    given = {"kind": "data", "max_new_tokens": 6}
    base = {
        **COMMON,
        "student": {
            "kind": "draft",
            "target": {"model": target, "template": "plain"},
            "drafter": {"kind": "chain", "proposals": 3, "taps": [0, 1]},
        },
        "teacher": {"kind": "target"},
        "prompts": {"kind": "inline", "prompts": rows(folder, 6)},
        "rollout": {"kind": "speculative", "max_new_tokens": 6, "text_temperature": 1.0, "proposing": "drawn"},
        "curriculum": {"kind": "shuffled"},
        "verifier": {"kind": "coin"},
        "shaping": {"kind": "uniform"},
        "objective": {"kind": "pooled"},
        "batch": {"prompts": 3, "group": 4, "micro": 12},
        "evaluation": {"prompts": {"kind": "inline", "prompts": rows(folder, 2, 10)}, "samples": 0},
    }
    # A new drafter and its target are further apart.
    wide = Part("shaping", "log_ratio_gate", {"kind": "log_ratio_gate", "limit": 1.0})
    speculative = base["rollout"]
    anchored = {"kind": "anchored", "texts": given}
    parts = [
        *of_all(speculative, "forward_kl"),
        *BY_LENGTH,
        Part("rollout", "speculative", speculative),
        Part("rollout", "anchored", anchored),
        Part("rollout", "anchored (text)", {**anchored, "slots": "text"}, {"objective": {"kind": "cross_entropy"}}),
        Part("rollout", "mixture", {"kind": "mixture", "first": speculative, "second": anchored}),
        Part("rollout", "switch", {"kind": "switch", "first": speculative, "then": speculative, "position": 2}),
        *(Part("rollout", kind, {"kind": kind, "max_new_tokens": 6}) for kind in ("student", "teacher", "data")),
        *WATCHES,
        Part("teacher", "target", {"kind": "target"}),
        Part("teacher", "local", {"kind": "local", "model": target, "template": "plain"}),
        Part("teacher", "self", {"kind": "self", "sees": "hint"}),
        *(wide if part.kind == "log_ratio_gate" else part for part in SHAPINGS),
        *SIGNALS,
        *OF_BLOCKS,
        *of_tokens({**anchored, "slots": "text"}),
    ]
    return Task("draft", base, parts)


def of_flow(folder: Path) -> Task:
    """Pictures of 8 pixels, drawn by a transformer."""
    tokenizer = symbol_tokenizer(COLOURS, words=True)
    sizes = {"size": 8, "layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4, "shift": 3.0}
    student, *teachers = (
        str(create_flow_model(folder / name, tokenizer, seed=seed, **sizes)) for seed, name in enumerate("sab")
    )
    texts = [f"{colour} {shape}" for colour in COLOURS[:3] for shape in COLOURS[3:]]
    data = []
    for i, text in enumerate([*texts, "red", "blue"]):
        picture = folder / f"{i}.png"
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(picture)
        data.append({"id": f"row-{i}", "prompt": text, "hint": "green", "route": "ab"[i % 2], "image": str(picture)})
    expert = {"kind": "flow", "model": teachers[0], "name": "expert"}
    writes = {"kind": "sde", "steps": 3}
    given = {"kind": "noised", "times": "grid", "steps": 3}
    base = {
        **COMMON,
        "student": {"kind": "flow_transformer", "model": student},
        "teacher": expert,
        "prompts": {"kind": "inline", "prompts": data[:6]},
        "rollout": writes,
        "curriculum": {"kind": "shuffled"},
        "verifier": {"kind": "bright"},
        "shaping": {"kind": "uniform"},
        "objective": {"kind": "gaussian_kl"},
        "batch": {"prompts": 3, "group": 4, "micro": 12},
        "evaluation": {"prompts": {"kind": "inline", "prompts": data[6:]}, "samples": 0, "steps": 2},
    }
    routes = {tag: {"kind": "flow", "model": model} for tag, model in zip("ab", teachers, strict=True)}
    # Pictures of one prompt are all bright or none is, and where none is balanced, nothing would show.
    kept = Part("shaping", "outcome_balance", {"kind": "outcome_balance", "ratio": "inf"})
    parts = [
        *of_all({**writes, "teacher": "expert"}),
        Part("rollout", "sde", writes),
        Part("rollout", "sde (of a teacher)", {**writes, "teacher": "expert"}),
        Part("rollout", "noised", given),
        Part("rollout", "mixture", {"kind": "mixture", "first": writes, "second": given}),
        Part("teacher", "flow", expert),
        Part("teacher", "self", {"kind": "self", "sees": "hint", "name": "expert"}),
        Part("teacher", "routed", {"kind": "routed", "by": "route", "routes": routes, "name": "expert"}),
        *(kept if part.kind == "outcome_balance" else part for part in SHAPINGS),
        Part("objective", "gaussian_kl", {"kind": "gaussian_kl"}),
        Part("objective", "grpo", {"kind": "grpo", "clip": 1e-4}),
        Part("objective", "sft", {"kind": "sft"}, {"rollout": given}),
    ]
    return Task("flow_transformer", base, parts)


def of_actions(folder: Path) -> Task:
    """A walk along a line, decided two steps at a time."""
    world = Walk(limit=8)
    words = list(world.tasks().values())
    sizes = {"width": 16, "layers": 1, "heads": 2, "bins": 8, "chunk": 2, "patch": 4}
    body = world.body()
    student = str(create_policy(folder / "student", body, words, reads=["proprio"], **sizes))
    teachers = [
        str(create_policy(folder / name, body, words, reads=["state"], seed=seed, **sizes))
        for seed, name in enumerate("ab", 1)
    ]
    plays = {"kind": "simulator", "decisions": 4}
    named = {"kind": "policy", "model": teachers[0], "name": "expert"}
    block = world.model_dump(mode="json")
    base = {
        **COMMON,
        "student": {"kind": "action_tokens", "model": student},
        "teacher": named,
        "rollout": plays,
        "curriculum": {"kind": "shuffled"},
        "shaping": {"kind": "uniform"},
        "objective": {"kind": "reverse_kl"},
        "batch": {"prompts": 3, "group": 4, "micro": 12},
        "evaluation": {"prompts": {"kind": "episodes", "environment": block}, "samples": 0, "frames": False},
    }
    episodes = EpisodePrompts(environment=block, per_task=3)
    expert = {"teacher": {"kind": "scripted", "name": "expert"}, "prompts": episodes.model_dump(mode="json")}
    shown = {"rollout": {**plays, "teacher": "expert", "greedy": True}, "batch": {"prompts": 2, "group": 1}}
    sample_demonstrations(
        parse_recipe({**base, **expert, **shown, "output": str(folder / "run")}), folder / "shown", quiet=True
    )
    demonstrated = [row for _, row in DemonstrationPrompts(path=str(folder / "shown")).rows()]
    # Rows that can be played and were, so that one set of prompts serves all rollouts.
    data = [
        {**{k: demonstrated[i % len(demonstrated)][k] for k in ("dataset", "episode")}, **row, "route": "ab"[i % 2]}
        for i, (_, row) in enumerate(episodes.rows())
    ]
    told = {words[0]: words[1], words[1]: words[0]}
    base["prompts"] = {"kind": "inline", "prompts": data}
    others = [{**row, "route": "a"} for _, row in EpisodePrompts(environment=block, per_task=1, seed=1).rows()]
    for row in (*data, *others):
        row["hint"] = told[row["prompt"]]
    base["evaluation"]["prompts"] = {"kind": "inline", "prompts": others}
    routes = {tag: {"kind": "policy", "model": model} for tag, model in zip("ab", teachers, strict=True)}
    given = {"kind": "demonstrations", "decisions": 4}
    parts = [
        *of_all({**plays, "teacher": "expert"}),
        Part("rollout", "simulator", plays),
        Part("rollout", "simulator (of a teacher)", {**plays, "teacher": "expert"}),
        Part("rollout", "demonstrations", given),
        Part("rollout", "mixture", {"kind": "mixture", "first": plays, "second": given}),
        Part("teacher", "policy", named),
        Part("teacher", "scripted", {"kind": "scripted", "name": "expert"}),
        Part("teacher", "self", {"kind": "self", "sees": "hint", "name": "expert"}),
        Part("teacher", "routed", {"kind": "routed", "by": "route", "routes": routes, "name": "expert"}),
        *SHAPINGS,
        *of_tokens(given),
    ]
    return Task("action_tokens", base, parts)


@contextlib.contextmanager
def served(model: str, follows: bool = False) -> Iterator[str]:
    """The address of `opd serve` with a model, in a thread of this process."""
    settings = ModelSettings(model=model)
    made = ServedModel(LanguageModel.load(settings, torch.device("cpu")), "tiny", follows=follows)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(application(made, None), log_level="critical", access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
    made.batcher.close()


def drafter_for(model: str, folder: Path) -> str:
    """The folder of a new drafter for a language model."""
    settings = ModelSettings(model=model)
    language = LanguageModel.load(settings, torch.device("cpu"))
    outline = Outline.of(language.base.config, "the student")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        drafter = Chain(proposals=3, taps=[0, 1]).build(outline, language.head(1.0).detach())
    save_drafter(folder, drafter, language.base.get_input_embeddings().weight)
    return str(folder)


@contextlib.contextmanager
def tasks(folder: Path, names: Sequence[str] = ()) -> Iterator[list[Task]]:
    """All tasks, or those of some kinds of student, made in a folder; servers run meanwhile."""

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    # The choices that are defined here.
    take_in()
    made: list[Task] = []
    with contextlib.ExitStack() as opened:
        if not names or "causal_lm" in names:
            here = place("causal_lm")
            student, *teachers = (tiny(here / name, seed) for seed, name in enumerate("sab"))
            urls = [opened.enter_context(served(teachers[1])), opened.enter_context(served(student, follows=True))]
            blocks = [{"kind": kind, "model": model} for kind, model in zip(
                ("causal_lm", "local", "local"), (student, *teachers), strict=True
            )]  # fmt: skip
            others = (drafter_for(student, here / "drafter"), tiny(here / "other", 3, pairs_tokenizer()))
            made.append(of_language(here, blocks[0], blocks[1:], urls, *others))
        if not names or "image_text" in names:
            here = place("image_text")
            sizes = {"width": 16, "layers": 1, "heads": 2, "vision_width": 16, "pixels": 32, "spread": 0.3}
            student, *teachers = (
                str(create_image_text_model(here / name, WORDS, seed=seed, **sizes)) for seed, name in enumerate("sab")
            )
            shown = {"images": "image"}
            blocks = [{"kind": "image_text", "model": model, **shown} for model in (student, *teachers)]
            made.append(of_language(here, blocks[0], blocks[1:], gap=" "))
        if not names or "draft" in names:
            here = place("draft")
            made.append(of_drafts(here, tiny(here / "target", 1)))
        if not names or "flow_transformer" in names:
            made.append(of_flow(place("flow_transformer")))
        if not names or "action_tokens" in names:
            made.append(of_actions(place("action_tokens")))
        yield made
