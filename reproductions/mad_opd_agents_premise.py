"""The premise of MAD-OPD with agents, measured before any arm: behind two rounds each teacher knows more than the
better one alone.

python -m reproductions.mad_opd_agents_premise runs/mad-opd-agents-premise
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd.api import assembled
from opd.context import Context
from opd.environments.rows import start_of
from opd.language.calls import Reply
from opd.prompts import Prompt
from opd.prompts.messages import Messages
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from opd.reproductions.training import filled
from opd.teachers.debate import LiveDebate
from opd.teachers.speaking import Manner, shown
from opd.teachers.transcripts import Debate
from reproductions.mad_opd_agents_machine import State, TwoTools, right_call, state_of
from reproductions.mad_opd_agents_models import (
    CAP,
    DEMONSTRATIONS,
    NEW,
    SAVED,
    SIZES,
    STAGES,
    START,
    TEACHER,
    TEXT,
    VALIDATION,
    WORDS,
    alone_in,
    episodes,
    model,
)
from reproductions.mad_opd_models import EXPERTS, WORDING, Expert

ROUNDS = 2


def debate(rounds: int = ROUNDS, **changes: Any) -> dict[str, Any]:
    """The recipe's block of the teachers' debate, whose draws are the same in every run."""
    experts = {name: model(f"{{{TEACHER[name]}}}/{SAVED}", batch=64) for name in EXPERTS}
    own = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": TEXT, "wording": WORDING, "seed": 0}
    return {"kind": "debate", "rounds": rounds, "experts": experts, **(own if rounds else {}), **changes}


def outcomes(
    teacher: LiveDebate, expert: Expert, rounds: int, rows: Sequence[Prompt], context: Context
) -> tuple[list[float], list[tuple[State, Debate]]]:
    """Whether each episode is a success when one teacher plays it, at temperature 1, in the very view in which it
    scores a student's calls behind so many rounds; and the debates about its states."""
    worlds = [TwoTools().build() for _ in rows]
    starts = [start_of(row, 0) for row in rows]
    turns = [world.reset(start) for world, start in zip(worlds, starts, strict=True)]
    said: list[Messages] = [list(turn.observation) for turn in turns]
    held, manner, calls = list[tuple[State, Debate]](), Manner(1.0, 1.0, 0, CAP), 0
    while going := [i for i, turn in enumerate(turns) if not turn.over]:
        read = [shown(rows[i], list(said[i])) for i in going]
        if rounds:
            debates = [found for found in teacher.debates(read, context) if found is not None]
            held += [(state_of(said[i]), found) for i, found in zip(going, debates, strict=True)]
            read = [
                shown(rows[i], WORDS.scoring(said[i], expert, EXPERTS, found.rounds[:rounds]))
                for i, found in zip(going, debates, strict=True)
            ]
        seeds = [len(rows) * calls + i for i in going]
        written = teacher.speakers[expert].begin(read, seeds, manner, context)()
        for i, text in zip(going, written, strict=True):
            turns[i] = worlds[i].step(Reply(text.text))
            said[i] += [{"role": "assistant", "content": text.text}, *turns[i].observation]
        calls += 1
    return [turn.outcome for turn in turns], held


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int) -> Figures:
    """Shares of validation episodes in which a teacher succeeds: `alone_A` and `alone_B`, and `behind_R_A` and
    `behind_R_B` in the view in which it scores behind R rounds; `gain`, the worse behind two rounds less the better
    alone. Of the debates about these states `tagged`, the share of texts with a tag by round and expert; `disputed`,
    the share in which the last texts differ; and `surer_right`, the share of these in which the surer one is right."""
    run = assembled(
        parse_recipe(
            filled(
                alone_in(
                    folder / "run",
                    f"{{{TEACHER['A']}}}/{SAVED}",
                    episodes(size, VALIDATION),
                    seed=0,
                    teacher=debate(),
                    objective=["jensen_shannon"],
                ),
                inputs,
            ),
            "recipe of this measurement",
        )
    )
    (teacher,) = run.teachers
    assert isinstance(teacher, LiveDebate)
    found: Figures = {}
    held: list[tuple[State, Debate]] = []
    for rounds in range(ROUNDS + 1):
        for name in EXPERTS:
            won, debates = outcomes(teacher, name, rounds, run.held_out, run.context)
            found[f"behind_{rounds}_{name}" if rounds else f"alone_{name}"] = sum(won) / len(won)
            held += debates if rounds == ROUNDS else []
    run.rollout.close()
    of_all = {key: [found[f"{key}_{name}"] for name in EXPERTS] for key in ("alone", f"behind_{ROUNDS}")}
    found["gain"] = min(of_all[f"behind_{ROUNDS}"]) - max(of_all["alone"])
    found["tagged"] = {
        f"round {r + 1}, {name}": sum(WORDS.sure(each.rounds[r][k]) is not None for _, each in held) / len(held)
        for r in range(ROUNDS)
        for k, name in enumerate(EXPERTS)
    }
    last = [(state, [WORDS.without_tag(text) for text in each.rounds[-1]], teacher.sure(each)) for state, each in held]
    disputed = [
        said[0 if (sure[0] or 0.0) > (sure[1] or 0.0) else 1] == right_call(state)
        for state, said, sure in last
        if said[0] != said[1]
    ]
    found["disputed"] = len(disputed) / len(held)
    return {**found, "surer_right": sum(disputed) / max(1, len(disputed))}


STAGE = Stage(premise, {"size": SIZES["validation"]}, list(TEACHER.values()))
GATES = [
    Gate("premise", "gain", at_least=0.05),
    Gate("premise", "tagged", at_least=0.95, worst=True),
    Gate("premise", "disputed", at_least=0.05),
    Gate(START, "accuracy", at_least=0.1),
    Gate(START, "accuracy", at_most=0.45),
]
"""Without the gain the claim cannot be tested: the teachers are mended first, and the page says so. Where nothing is
disputed in the end, weights change nothing. A start must have something to learn and something to begin with."""
ONCE = ("new teacher", *(f"lessons of {name}" for name in EXPERTS), *TEACHER.values(), DEMONSTRATIONS)
OF_SEED = (NEW, START)


def measured(folder: Path, name: str, stage: Stage, places: Mapping[str, Path], **own: Any) -> Figures:
    """What a stage returns, run in `folder` where that was not done before."""
    done = folder / "job.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        figures = stage.function(folder, {each: places[each] for each in stage.inputs}, **stage.params, **own)
        record = {"figures": figures, "cpu_seconds": time.process_time() - started}
        done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(done.read_text(encoding="utf-8"))
    print(f"{name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
    found: Figures = record["figures"]
    for gate in GATES:
        if gate.stage == name:
            value, _ = gate.measured(name, found)
            print(f"gate {gate.figure} {gate.limit}: {'yes' if gate.passes(value) else 'NO'}, {value:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make teachers and starts where they are missing, and measure them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="of the starts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places = {name: options.folder / name for name in ONCE}
    for name in ONCE:
        measured(places[name], name, STAGES[name], places)
    for name, value in measured(options.folder / "premise", "premise", STAGE, places).items():
        print(f"{name}: {value if isinstance(value, dict) else round(value, 3)}", flush=True)
    for seed in options.seeds:
        here = places | {name: options.folder / f"{name}, seed {seed}" for name in OF_SEED}
        for name in OF_SEED:
            measured(here[name], name, STAGES[name], here, seed=seed)


if __name__ == "__main__":
    main()
