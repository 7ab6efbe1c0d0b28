"""Episodes of a language agent as logs show them: their turns as one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.language.calls import Reply
from opd.prompts import Prompt
from opd.prompts.messages import text_of

TURN = "(turn)"
"""Column of a turn's prompt that no data holds: `number` from 1, what the agent `said` and the
environment answered (`heard`, messages), why a call could not be read (`fault`), and why the episode `ended` behind the
last one: by `itself`, by the number of `turns`, or for the length of its `context`."""


def call_message(reply: Reply) -> dict[str, Any]:
    """A reply that no model wrote, as a message that a chat template writes."""
    calls = [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for i, call in enumerate(reply.calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    return {**message, "tool_calls": calls} if calls else message


def as_episodes(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows of trajectories for logs, where those of the turns of one episode become one: its tokens are those of all
    replies with what the environment said between them, `authors` tells them apart, values by token are None where the
    environment wrote, and `turns` holds what was said in each. Rows that are no turns stay as they are."""
    found: list[dict[str, Any]] = []
    for row, prompt in zip(rows, prompts, strict=True):
        told = prompt.fields.get(TURN)
        if not isinstance(told, dict):
            found.append(row)
            continue
        last = found[-1] if found else {}
        goes_on = last.get("id") == row["id"] and len(last.get("turns", ())) == told["number"] - 1 > 0
        turn = _turn(row, told)
        if not goes_on:
            empty = dict(row, tokens=[], values={name: [] for name in row["values"]}, authors=[], turns=[])
            if "alternatives" in row:
                empty["alternatives"] = {side: [] for side in row["alternatives"]}
            found.append(empty)
        _add(found[-1], row, turn)
    return found


def _turn(row: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What the report shows of a turn."""
    heard = [{"role": m.get("role"), "content": text_of(m.get("content"))} for m in told.get("heard", ())]
    turn = {"said": told.get("said", ""), "heard": heard}
    turn |= {name: told[name] for name in ("fault", "ended") if told.get(name) is not None}
    for name in ("reverse_kl", "divergence"):
        known = [value for value in row["values"].get(name, ()) if value is not None]
        if known:
            turn["divergence"] = round(sum(known) / len(known), 4)
            break
    return turn | ({"debate": row["debate"]} if "debate" in row else {})


def _add(episode: dict[str, Any], row: dict[str, Any], turn: dict[str, Any]) -> None:
    texts = [f"\n{each['role']}: {each['content']}\n" for each in turn["heard"]]
    episode["tokens"] += [*row["tokens"], *texts]
    episode["authors"] += ["student"] * len(row["tokens"]) + ["environment"] * len(texts)
    for name, values in episode["values"].items():
        values += [*row["values"].get(name, [None] * len(row["tokens"])), *([None] * len(texts))]
    for side, places in episode.get("alternatives", {}).items():
        places += [*row["alternatives"].get(side, [[]] * len(row["tokens"])), *([[]] * len(texts))]
    episode["turns"].append(turn)
    episode["finished"] = row["finished"]
    episode["completion"] = "\n".join(
        part for each in episode["turns"] for part in (each["said"], *(m["content"] for m in each["heard"])) if part
    )
    for name in ("debate", "stopped"):
        episode.pop(name, None)
