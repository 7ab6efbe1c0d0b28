"""What tests of language agents share: a small game, a template with tools, and tiny models that talk in turns."""

from __future__ import annotations

from opd.recipe import parse_recipe
from tests import games  # noqa: F401  # their kinds
from tests.conftest import tiny_model
from tests.tiny import CHARACTERS, CHAT, SPECIAL, saved, turn_tokenizer

TOOLS = (
    "{% if tools %}<turn>tools\n{% for t in tools %}{{ t['function']['name'] }}\n{% endfor %}<end_of_turn>\n{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}[CALL]\n{{ c['function'] | tojson }}\n[END]{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
"""A template that writes calls between two marks, and keeps every turn as it stood."""
KEEPS = TOOLS
DROPS = CHAT
"""Another one writes `assistant` where the reply was begun with `model`."""
WORDS = len(SPECIAL) + len(CHARACTERS)


def talking(tmp_path, seeds=(1, 2), template=TOOLS):
    """Folders of a student and a teacher."""
    return [
        saved(
            tmp_path / name,
            tiny_model(vocabulary=WORDS, seed=seed, eos_token_id=5, max_position_embeddings=1024),
            turn_tokenizer(template),
        )
        for name, seed in zip(("student", "teacher"), seeds, strict=True)
    ]


def game(**settings):
    return {"kind": "episodes", "environment": {"kind": "guess", **settings}, "per_task": 4}


def agents(models, tmp_path, **changes):
    """A recipe of episodes of at most three turns."""
    student, teacher = models
    settings = {
        "student": {"model": student, "template": "chat"},
        "teacher": {"model": teacher, "template": "chat"},
        "prompts": game(),
        "rollout": {"kind": "agent", "max_new_tokens": 6, "turns": 3, "max_context_tokens": 300},
        "objective": "jensen_shannon",
        "reduction": "sequence_mean",
        "batch": {"prompts": 3, "group": 2, "micro": 5},
        "evaluation": {"prompts": {**game(), "seed": 1, "per_task": 2}, "k": 1, "samples": 1},
        "steps": 2,
    }
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(settings.get(key), dict) and "kind" not in value
        settings[key] = {**settings[key], **value} if both else value

    data = {"name": "t", "output": str(tmp_path / "run"), "update": {"learning_rate": 1e-2}}
    data |= {"tracking": {"trackers": []}, "hardware": {"device": "cpu", "threads": 1}, **settings}
    return parse_recipe(data)
