"""Runs as the monitor leaves them, for tests of the report: what a page says of them, and a browser that opens it."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import struct
from array import array

import pytest
import yaml

from benchmarks.browser import CHROMIUM, Browser

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>\u2028\u202e"
WORDS = ["\n", " the", " a", "é", "<|im_end|>", "", "\ufffd", *(f" {a}{b}" for a in "bcdfgklmnprst" for b in "aeiou")]
NAMES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "log_q", "log_p")


def held_out_row(step, i, tokens=6):
    chance = random.Random(f"{step} {i}")

    def word():
        return WORDS[int(len(WORDS) * chance.random() ** 3)]

    def ranked():
        return [[word(), round(0.6 * chance.random() / 3**k, 4)] for k in range(4)]

    texts = [word() for _ in range(tokens)]
    return {
        "step": step,
        "id": f"p{i}",
        "prompt": f"question {i}",
        "completion": "".join(texts),
        "finished": i % 2 == 0,
        "reward": None,
        "tokens": texts,
        "values": {
            n: [round(chance.expovariate(0.7) * (-1 if n[:3] == "log" else 1), 4) for _ in texts] for n in NAMES
        },
        "alternatives": {side: [ranked() for _ in texts] for side in ("student", "teacher")},
    }


def training_row(step, tokens=6):
    row = held_out_row(step, step, tokens)
    del row["alternatives"]
    return row | {"values": {"divergence": row["values"]["reverse_kl"], "weight": [1.0] * tokens}}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_run(folder, steps=4, prompts=3, tokens=6, evaluations=2, finished=True, **recipe):
    """A run directory as the monitor writes it."""
    folder.mkdir(parents=True)
    measured = sorted({round(i * steps / (evaluations - 1)) for i in range(evaluations)})
    metrics = []
    for step in range(steps + 1):
        if step:
            phases = {"rollout": 0.5, "teacher": 0.25, "step": 1.0}
            metrics.append(
                {"step": step, "train/loss": 2 / step, **{f"train/seconds/{k}": v for k, v in phases.items()}}
            )
        if step in measured:
            metrics.append({"step": step, "held_out/reverse_kl": 2 - step / steps, "held_out/top1_agreement": 0.5})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", [held_out_row(s, i, tokens) for s in measured for i in range(prompts)])
    write_lines(folder / "rollouts.jsonl", [training_row(s, tokens) for s in range(1, steps + 1)])
    settings = {"name": folder.name, "steps": steps, "student": {"model": "s"}, "teacher": [{"model": "t"}], **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2.6"}, "command": ["opd", "train"]}))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"seconds": 12.0, "steps": steps, "stopped_early": False}))
    return folder


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def unpack(chunk):
    """What rows.js does: the rows of a chunk."""
    payload = gzip.decompress(base64.b64decode(chunk["data"]))
    (size,) = struct.unpack("<I", payload[:4])
    header = json.loads(payload[4 : 4 + size])
    place, columns = 4 + size, {}
    for column in header["columns"]:
        n = column["count"]
        planes = [payload[place + k * n : place + (k + 1) * n] for k in range(4)]
        integers = array("i", bytes(byte for four in zip(*planes, strict=True) for byte in four))
        columns[column["key"]] = [None if v == -(2**31) else v / column["scale"] for v in integers]
        place += 4 * n
    rows, start = [], 0
    for i, length in enumerate(chunk["index"]["length"]):
        here = slice(start, start + length)
        start += length
        rows.append(
            {
                "prompt": header["prompts"][header["prompt"][i]],
                "tokens": [header["strings"][int(v)] for v in columns["tokens"][here]],
                "values": {k.removeprefix("values."): v[here] for k, v in columns.items() if k.startswith("values.")},
                "text": header["text"][i],
                "extra": header["extra"][i],
                "teacher_answer": header["teacher_answer"][i],
                "teacher_prompt": None if (k := header["teacher_prompt"][i]) is None else header["prompts"][k],
            }
        )
    for key in [key for key in columns if key.endswith("/count")]:
        stem = key.removesuffix("/count")
        pairs = zip(columns[f"{stem}/text"], columns[f"{stem}/number"], strict=True)
        tokens = [
            [[header["strings"][int(t)], v] for t, v in (next(pairs) for _ in range(int(n)))] for n in columns[key]
        ]
        name, side = stem.rsplit("/", 1)
        for row in rows:
            row["extra"].setdefault(name, {})[side] = [tokens.pop(0) for _ in row["tokens"]]
    return rows


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs chromium, which is not installed")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()
