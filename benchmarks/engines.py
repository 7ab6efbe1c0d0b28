"""Engines against this process: `python -m benchmarks.engines --vllm PYTHON [--part learning speed] [--json PATH]`.

PYTHON is that of an environment with vLLM (`make .venv-vllm/.ready` makes one with its build for CPUs). Two servers of
it are started, of SmolLM2-135M and of the same without its layers 10 to 17, and ended in the end.

`learning`: ten steps in which the small one heals under the whole one, once with both in this process and once with the
engine writing and the teacher served, with three seeds. Both students are then measured in this process, on the same
held-out prompts. `speed`: tokens a second that are written and scored by the server and here, taking turns, medians of
five rounds; and seconds of a step with the next one's completions written ahead and without, taking turns too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import opd
from benchmarks.loss_operator import describe_machine, versions
from benchmarks.sizes import MODELS, SMOLLM2
from opd.context import Context
from opd.distributions import Categorical, TopK
from opd.engines.served import ServedEngine, ServedWriter
from opd.language.engines.base import Drawing, Row
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings, load_model, load_tokenizer
from opd.language.rollout import pack_rows
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.prompts.file import FilePrompts
from opd.remote.launch import servers_of, started
from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher

SEEDS = (0, 1, 2)
STEPS = 10
ROUNDS = 5
ROWS, NEW = 32, 64
"""Rows that are written and scored side by side, and tokens of each."""

TOP_K = 64
DATA = Path(__file__).parent.parent / "recipes" / "data" / "instructions.jsonl"
PORTS = {"student": 18771, "teacher": 18772}

SERVING = [
    *("-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--dtype", "bfloat16", "--enforce-eager"),
    *("--max-model-len", "512", "--max-num-seqs", "32", "--max-logprobs", "64"),
    *("--logprobs-mode", "processed_logprobs"),
]
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def models() -> dict[str, Path]:
    """Folders of the two, made when they are not there yet."""
    found = {"student": MODELS / "smollm2-less", "teacher": MODELS / "smollm2-whole"}
    for name, folder in found.items():
        if not (folder / "model.safetensors").exists():
            dropped = list(range(10, 18)) if name == "student" else []
            settings = ModelSettings(model=SMOLLM2, dtype="float32", drop_layers=dropped)
            load_model(settings, "cpu").save_pretrained(folder)
            load_tokenizer(settings).save_pretrained(folder)
    return found


def start(python: str, folder: Path, name: str) -> dict[str, Any]:
    """The `url` and `start` of one server."""
    command = [python, *SERVING, "--model", str(folder), "--port", "{port}", "--served-model-name", name]
    return {"url": f"http://127.0.0.1:{PORTS[name]}", "start": {"command": command, "environment": ENVIRONMENT}}


@contextlib.contextmanager
def serving(python: str, folders: dict[str, Path], which: list[str], logs: Path) -> Iterator[None]:
    blocks = [ServedTeacher(name=name, **start(python, folders[name], name)) for name in which]

    @contextlib.contextmanager
    def status(text: str) -> Iterator[None]:
        print(text, flush=True)
        yield

    shown: Callable[[str], AbstractContextManager[None]] = status
    with started(servers_of(blocks, logs), shown):
        yield


def run(folder: Path, folders: dict[str, Path], seed: int, served: bool, **changes: Any) -> list[dict[str, float]]:
    """Heal for some steps; the log's rows."""
    teacher: dict[str, Any] = {"model": str(folders["teacher"])}
    rollout: dict[str, Any] = {"kind": "student", "max_new_tokens": 32}
    if served:
        teacher = {
            "kind": "served",
            "url": f"http://127.0.0.1:{PORTS['teacher']}",
            "answers": "top_k",
            "top_k": TOP_K,
            "tokenizer": str(folders["teacher"]),
        }
        rollout["engine"] = {"kind": "served", "url": f"http://127.0.0.1:{PORTS['student']}"}
    rollout |= changes.pop("rollout", {})
    settings = {
        "steps": STEPS,
        "seed": seed,
        "rollout": rollout,
        "objective": {"kind": "reverse_kl", "top_k": TOP_K},
        "update": {"learning_rate": {"kind": "cosine", "start": 4e-4, "warmup": 2}},
        "batch": {"prompts": 12, "micro": 12},
        "evaluation": {"held_out": 1, "samples": 0},
        "max_prompt_tokens": 256,
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "precision": "fp32"},
        "output": str(folder),
        **changes,
    }
    student = {"model": str(folders["student"]), "freeze": ["embed_tokens"]}
    prompts = [str(row["prompt"]) for _, row in FilePrompts(path=str(DATA)).rows()]
    return opd.distill(student, teacher, prompts, quiet=True, overwrite=True, **settings).history


def measured(folder: Path, folders: dict[str, Path]) -> dict[str, float]:
    """A trained student against the teacher in this process, on the same held-out prompts with the same draws."""
    student = {"model": str(folder / "student")}
    prompts = [str(row["prompt"]) for _, row in FilePrompts(path=str(DATA)).rows()]
    with tempfile.TemporaryDirectory() as place:
        result = opd.distill(
            student,
            {"model": str(folders["teacher"])},
            prompts,
            quiet=True,
            overwrite=True,
            steps=1,
            seed=0,
            rollout={"max_new_tokens": 32},
            update={"learning_rate": 0.0},
            batch={"prompts": 1, "micro": 16},
            evaluation={"held_out": 64, "samples": 0},
            max_prompt_tokens=256,
            checkpoint={"every": 0},
            tracking={"trackers": []},
            hardware={"device": "cpu", "precision": "fp32"},
            output=place,
        )
    return {name: value for name, value in result.before.items() if name in ("reverse_kl", "forward_kl")}


def learning(
    folders: dict[str, Path], place: Path, before: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Held-out divergences of both ways by seed, their ratio, and the gaps of the served runs; seeds that are there
    `before` are not run again."""
    found: list[dict[str, Any]] = list(before.get("rows", []))
    for seed in SEEDS:
        if any(row["seed"] == seed for row in found):
            continue
        row: dict[str, Any] = {"seed": seed}
        for way in ("here", "served"):
            folder = place / f"{way}-{seed}"
            history = run(folder, folders, seed, way == "served")
            row[way] = measured(folder, folders)
            gaps = [step["train/rollout_gap"] for step in history if "train/rollout_gap" in step]
            scores = [step["train/engine/score_gap"] for step in history if "train/engine/score_gap" in step]
            row[f"{way}_gap"] = {"mean": statistics.mean(gaps), "most": max(gaps)}
            if scores:
                row["score_gap_most"] = max(scores)
            print(json.dumps(row), flush=True)
        row["ratio"] = row["served"]["reverse_kl"] / row["here"]["reverse_kl"]
        found.append(row)
        keep({"rows": found})
    first = {"before": measured_untrained(folders), "rows": found}
    means = {way: statistics.mean(row[way]["reverse_kl"] for row in found) for way in ("here", "served")}
    return {**first, "means": means, "ratio_of_means": means["served"] / means["here"]}


def measured_untrained(folders: dict[str, Path]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "student").symlink_to(folders["student"])
        return measured(Path(place), folders)


def speed(
    folders: dict[str, Path], place: Path, before: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Tokens a second that are written and scored, and a step's seconds: medians, and all of them. Rounds that are
    there `before` are not run again."""
    context = Context(torch.device("cpu"), agreed=Tokens())
    found: dict[str, Any] = {"written": {}, "scored": {}, "steps": {}}
    found |= {name: rows for name, rows in before.items() if name in found}

    def rounds(which: str, count: int, ways: dict[str, Callable[[], float]]) -> None:
        for round_ in range(count):
            for way, work in ways.items():
                rows = found[which].setdefault(way, {"all": []})
                if len(rows["all"]) > round_:
                    continue
                rows["all"].append(work())
                rows["median"] = statistics.median(rows["all"])
            keep(found)
            print(which, round_, json.dumps({way: found[which][way]["all"][-1] for way in ways}), flush=True)

    texts = [str(row["prompt"]) for _, row in FilePrompts(path=str(DATA)).rows()][:ROWS]
    prompts = [Prompt(str(i), {"prompt": text}) for i, text in enumerate(texts)]
    language, half = (
        LanguageModel.load(ModelSettings(model=str(folders["student"]), dtype=dtype), context.device)
        for dtype in ("float32", "bfloat16")
    )
    contexts = [language.encode(prompt) for prompt in prompts]
    writer = ServedWriter(ServedEngine(url=[f"http://127.0.0.1:{PORTS['student']}"]), language, context)
    writers: dict[str, Any] = {"server, bfloat16": writer, "here, bfloat16": half, "here, float32": language}

    def write(who: Any) -> list[Row]:
        rows: list[Row] = who.sample(contexts, 1, NEW, range(ROWS), Drawing(context))
        return rows

    def rate(rows: Sequence[Row], work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        return sum(len(row.actions) for row in rows) / (time.perf_counter() - begun)

    def written(who: Any) -> float:
        begun = time.perf_counter()
        return sum(len(row.actions) for row in write(who)) / (time.perf_counter() - begun)

    rows = write(writer)
    rounds("written", ROUNDS, {way: partial(written, who) for way, who in writers.items()})
    writer.close()

    trajectories = pack_rows(prompts, contexts, 1, rows, "student")
    address = f"http://127.0.0.1:{PORTS['teacher']}"
    asked: dict[str, Teacher] = {
        "server, bfloat16": ServedTeacher(
            url=[address], answers="top_k", top_k=TOP_K, tokenizer=str(folders["teacher"])
        ),
        "here, bfloat16": LocalTeacher(model=str(folders["teacher"]), dtype="bfloat16"),
        "here, float32": LocalTeacher(model=str(folders["teacher"]), dtype="float32"),
    }
    teachers = {way: teacher.build(context, None) for way, teacher in asked.items()}

    def score(way: str) -> None:
        answer = teachers[way].answer(trajectories, asked[way], context)[0].distribution
        if isinstance(answer, Categorical):
            # What the server gives as well: the likeliest ids.
            with torch.no_grad():
                TopK.of(answer, TOP_K)

    rounds("scored", ROUNDS, {way: partial(rate, rows, partial(score, way)) for way in teachers})
    for teacher in teachers.values():
        teacher.close()

    def step(way: str) -> float:
        engine = {"kind": "served", "url": f"http://127.0.0.1:{PORTS['student']}", "overlap": way == "ahead"}
        history = run(
            place / "steps", folders, 0, True,
            rollout={"max_new_tokens": 32, "engine": engine}, steps=5, evaluation={"held_out": 1, "samples": 0},
        )  # fmt: skip
        # The first step has nothing to be ahead of, and the last nothing to write.
        taken = [row["train/seconds/step"] for row in history if "train/seconds/step" in row][1:-1]
        return statistics.mean(taken)

    rounds("steps", ROUNDS, {way: partial(step, way) for way in ("ahead", "not ahead")})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--part", nargs="+", choices=("learning", "speed"), default=["learning", "speed"])
    parser.add_argument("--json", type=Path, help="where the figures go; parts that are there already stay")
    options = parser.parse_args()
    folders = models()
    found: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    found |= {"machine": describe_machine("cpu"), "versions": versions()}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        with serving(options.vllm, folders, ["student", "teacher"], work / "logs"):
            for part, measure in (("learning", learning), ("speed", speed)):
                if part not in options.part:
                    continue

                def keep(figures: dict[str, Any], part: str = part) -> None:
                    found[part] = figures
                    if options.json is not None:
                        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

                keep(measure(folders, work, found.get(part, {}), keep))
                print(json.dumps(found[part], indent=2), flush=True)


if __name__ == "__main__":
    main()
