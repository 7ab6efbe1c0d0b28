"""A store of trajectories and targets: written once, exactly, by any number of workers; read back as it was scored."""

from __future__ import annotations

import json
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import opd
from opd.assembly import build_models
from opd.cli.main import app
from opd.distributions import Categorical, Sampled, TopK
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.store import Store, Targets
from opd.store.shards import claim, is_written
from tests.conftest import said, writing
from tests.processes import Program
from tests.test_loop import models, recipe_for  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def recipe(models, tmp_path):  # noqa: F811
    return recipe_for(models, tmp_path, batch={"prompts": 4, "group": 2}, teacher={"batch": 3})


@pytest.fixture
def store(recipe, tmp_path):
    return sample(recipe, tmp_path / "store", prompts_per_shard=8, quiet=True)


def everything(recipe, store):
    """The store's trajectories and the live teacher's answer to them."""
    _, (teacher,), context = build_models(recipe, CPU)
    prompts = {p.id: p for p in load_prompts(recipe.prompts)}
    members = [prompts[name] for name in store.prompt_ids for _ in range(store.header.group)]
    trajectories = store.trajectories(range(store.header.rows), members, CPU)
    with torch.no_grad():
        return trajectories, said(teacher, trajectories, context)


def commands_of(page):
    """The first block of commands on a page of the docs, as the words of each."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    block = re.findall(r"```bash\n(.*?)```", text, re.S)[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_commands_of_the_page_work_as_printed(recipe, tmp_path, monkeypatch, capsys):
    """For a student that nobody fine-tuned: the page's default is no method that asks for more."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(recipe.dump()))
    commands = commands_of("store.md")
    assert [words[1] for words in commands] == ["rollout", "score", "store", "train"]
    for words in commands:
        assert words[0] == "opd"
        app([word.replace("RECIPE", "mine.yaml") for word in words[1:]], standalone_mode=False)
    told = capsys.readouterr()
    assert "every written file matches its checksum" in told.out
    assert "summary.json" in told.out
    assert "was made for" not in told.err, "no warning about completions that the store does not hold"
    trained = yaml.safe_load((recipe.directory / "recipe.yaml").read_text())
    assert (trained["rollout"]["kind"], trained["teacher"][0]["kind"]) == ("stored", "stored")
    assert trained["objective"][0]["kind"] == "reverse_kl"


def test_a_stored_rollout_is_as_long_as_the_store_says(recipe, store, tmp_path):
    held = store.header.budget
    stored = {"kind": "stored", "path": str(store.path)}

    def lengths(path, **more):
        rollout = parse_recipe({**recipe.dump(), "rollout": {**stored, "path": str(path), **more}}).rollout
        return rollout.budget, rollout.longest

    assert lengths(store.path) == (held, held)
    assert lengths(store.path, max_new_tokens=5) == (5, 5)
    assert lengths(store.path, max_new_tokens=held + 100) == (held, held)
    assert lengths(tmp_path / "elsewhere") == (4096, 4096)
    schedule = {"kind": "linear", "start": 2, "end": 4000}
    scheduled = parse_recipe({**recipe.dump(), "rollout": {**stored, "max_new_tokens": schedule}}).rollout
    assert scheduled.longest == held


def test_rows_are_what_the_student_writes_in_step_0(recipe, store):
    student, _, context = build_models(recipe.model_copy(update={"teacher": []}), CPU)
    source = writing(recipe.rollout, student, context=context)
    prompts = load_prompts(recipe.prompts)
    live = source(prompts[:8], 2, 12, stream=0)
    stored = store.trajectories(range(16), [p for p in prompts[:8] for _ in range(2)], CPU)
    for name in ("actions", "lengths", "behaviour_log_probs", "finished", "authors", "groups"):
        assert torch.equal(getattr(live, name), getattr(stored, name)), name
    assert all(torch.equal(a, b) for a, b in zip(live.contexts, stored.contexts, strict=True))
    ended = stored.completions()[int(stored.finished.nonzero()[0])]
    assert int(ended[-1]) == 0, "the end token is stored"


def test_every_row_lies_where_the_header_says(store):
    assert store.header.rows == 40
    assert [store.locate(row) for row in (0, 15, 16, 39)] == [(0, 0), (0, 15), (1, 0), (2, 7)]
    assert [row for shard in range(3) for row in store.rows_of_shard(shard)] == list(range(40))
    assert store.rows_of(store.prompt_ids[9]) == [18, 19]


@pytest.mark.parametrize("kind", ["sampled", "top_k", "exact"])
def test_stored_answers_are_the_live_teachers(recipe, store, kind):
    targets = score(recipe, store.path, kind, top_k=5, dtype="float32", quiet=True)
    trajectories, live = everything(recipe, store)
    answer = targets.answer(trajectories.stored.tolist(), trajectories.lengths.tolist())
    tight = {"atol": 1e-5, "rtol": 1e-5}
    if kind == "sampled":
        assert isinstance(answer, Sampled)
        torch.testing.assert_close(answer.log_probs, Sampled.of(live, trajectories.actions).log_probs, **tight)
    elif kind == "top_k":
        expected = TopK.of(live, 5)
        assert torch.equal(answer.ids, expected.ids)
        torch.testing.assert_close(answer.log_probs, expected.log_probs, **tight)
    else:
        assert isinstance(answer, Categorical)
        torch.testing.assert_close(answer.log_probs(), live.log_probs(), **tight)


def test_a_cut_row_has_the_beginning_of_its_targets(recipe, store):
    targets = score(recipe, store.path, "sampled", quiet=True)
    whole = [targets.answer([row], [int(store.row(row).actions.numel())]).log_probs for row in range(6)]
    lengths = [min(len(w), 3) for w in whole]
    cut = targets.answer(range(6), lengths).log_probs
    assert torch.equal(cut, torch.cat([w[:3] for w in whole]))


def test_a_shard_reads_without_opd(recipe, store):
    """As docs/store.md says: eight bytes of length, a JSON header, then plain little-endian arrays."""
    targets = score(recipe, store.path, "sampled", quiet=True)

    def array(path, name):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        entry = json.loads(data[8 : 8 + size])[name]
        start, stop = entry["data_offsets"]
        kinds = {"I32": "i", "F32": "f", "U8": "B"}
        body = data[8 + size + start : 8 + size + stop]
        return list(
            struct.unpack(f"<{len(body) // struct.calcsize(kinds[entry['dtype']])}{kinds[entry['dtype']]}", body)
        )

    lengths = array(store.shard_path(1), "lengths")
    assert array(store.shard_path(1), "actions")[: lengths[0]] == store.row(16).actions.tolist()
    log_probs = array(targets.shard_path(1), "log_probs")
    assert log_probs[: lengths[0]] == targets.answer([16], [lengths[0]]).log_probs.tolist()
    done = subprocess.run(["sha256sum", "-c", "000001.safetensors.sha256"], cwd=store.path / "rollouts")
    assert done.returncode == 0


def test_an_interrupted_job_ends_in_the_same_store(recipe, store, tmp_path):
    first = score(recipe, store.path, "exact", quiet=True).content()
    other = sample(recipe, tmp_path / "other", prompts_per_shard=8, quiet=True)
    # A worker died between writing a shard and its checksum, and left a part of another one.
    other.shard_path(1).with_name("000001.safetensors.sha256").unlink()
    (other.path / "rollouts" / ".000001.safetensors.99999").write_bytes(b"half a")
    (other.path / "rollouts" / ".000002.safetensors.lock").touch()
    assert other.missing() == [1]
    again = sample(recipe, tmp_path / "other", prompts_per_shard=8, quiet=True)
    assert again.content() == store.content()
    assert sorted(p.name for p in (again.path / "rollouts").iterdir()) == sorted(
        p.name for p in (store.path / "rollouts").iterdir()
    )
    assert score(recipe, again.path, "exact", quiet=True).content() == first


def test_a_further_draw_is_appended(recipe, store):
    before = {p.name: p.read_bytes() for p in (store.path / "rollouts").glob("*.safetensors")}
    more = sample(recipe, store.path, draws=2, prompts_per_shard=8, quiet=True)
    assert more.header.rows == 80
    assert len(more.rows_of(more.prompt_ids[0])) == 4
    assert all((more.path / "rollouts" / name).read_bytes() == data for name, data in before.items())
    assert not torch.equal(more.row(0).actions, more.row(40).actions)
    # One draw is a part of the store that has two.
    assert sample(recipe, store.path, prompts_per_shard=8, quiet=True).header.draws == 2


def test_scoring_and_a_further_draw_want_the_texts_that_the_store_was_sampled_from(recipe, store):
    data = recipe.dump()
    texts = data["prompts"][0]["prompts"]
    rows = [{"id": name, "prompt": text} for name, text in zip(store.prompt_ids, texts, strict=True)]
    data["prompts"] = [{**data["prompts"][0], "prompts": rows}]
    score(parse_recipe(data), store.path, name="same", quiet=True)
    rows[3]["prompt"] = rows[4]["prompt"]
    told = f"prompt '{store.prompt_ids[3]}' has other tokens than in"
    with pytest.raises(opd.DataError, match=told):
        score(parse_recipe(data), store.path, name="other", quiet=True)
    with pytest.raises(opd.DataError, match=told):
        sample(parse_recipe(data), store.path, draws=2, prompts_per_shard=8, quiet=True)
    assert Store.open(store.path).header.draws == 1


def test_a_store_of_other_settings_is_refused(recipe, store):
    with pytest.raises(opd.RunError, match="another seed"):
        sample(recipe.model_copy(update={"seed": 3}), store.path, prompts_per_shard=8, quiet=True)
    score(recipe, store.path, "top_k", top_k=3, name="t", quiet=True)
    with pytest.raises(opd.OpdError, match=r"--top-k is 47, and student and teacher have 47 ids in common; give 46"):
        score(recipe, store.path, "top_k", top_k=47, name="all", quiet=True)
    with pytest.raises(opd.RunError, match="another top_k"):
        score(recipe, store.path, "top_k", top_k=4, name="t", quiet=True)


def test_a_full_disk_is_named_and_what_was_written_stays(recipe, store, monkeypatch):
    from opd.store import shards

    before, whole = store.content(), Path.write_bytes

    def full(path, data):
        if "targets" in str(path) and "000001" in path.name:
            whole(path, data[:10])
            raise OSError(28, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(shards.Path, "write_bytes", full)
    with pytest.raises(opd.RunError, match=r"cannot write .*000001.*No space left"):
        score(recipe, store.path, "sampled", name="t", quiet=True)
    monkeypatch.undo()
    left = sorted(p.name for p in (store.path / "targets" / "t").iterdir())
    assert left == ["000000.safetensors", "000000.safetensors.sha256", "targets.json"]
    assert score(recipe, store.path, "sampled", name="t", quiet=True).missing() == []
    assert store.content() == before


def test_two_claims_on_one_shard(tmp_path):
    path = tmp_path / "000000.safetensors"
    with claim(path) as mine, claim(path) as other:
        assert mine
        assert not other
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_row_is_named(recipe, store):
    targets = score(recipe, store.path, "sampled", quiet=True)

    def flip(path):
        data = bytearray(path.read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        name = "log_probs" if "targets" in str(path) else "actions"
        data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
        path.write_bytes(data)

    flip(targets.shard_path(1))
    again = Targets.open(Store.open(store.path), None)
    again.answer(range(16), [1] * 16)
    with pytest.raises(opd.DataError, match=r"row 16 \(prompt .* is damaged"):
        again.answer([17, 16], [1, 1])
    with pytest.raises(opd.DataError, match=r"000001.safetensors is damaged"):
        list(again.check())
    flip(store.shard_path(2))
    with pytest.raises(opd.DataError, match=r"row 32 .*run opd rollout"):
        Store.open(store.path).row(32)
    store.shard_path(0).write_bytes(b"\x00" * 40)
    with pytest.raises(opd.DataError, match=r"000000.safetensors is damaged"):
        Store.open(store.path).row(0)


def test_targets_belong_to_the_rows_that_were_scored(recipe, store):
    targets = score(recipe, store.path, "sampled", quiet=True)
    store.shard_path(0).unlink()
    other = sample(recipe.model_copy(update={"seed": 1}), store.path.parent / "other", prompts_per_shard=8, quiet=True)
    store.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    with pytest.raises(opd.DataError, match="row 0"):
        Targets.open(Store.open(store.path), targets.path.name).answer([0], [1])


@pytest.mark.slow
def test_a_ray_data_job_writes_the_same_targets(recipe, store, monkeypatch):
    pytest.importorskip("ray")
    from opd.jobs.ray_job import score_with_ray

    # Workers import opd from where this test does.
    monkeypatch.setenv("PYTHONPATH", str(Path(opd.__file__).parent.parent))
    with_ray = score_with_ray(recipe, store.path, "exact", 2, name="ray").content()
    assert with_ray == score(recipe, store.path, "exact", name="one", quiet=True).content()


def test_without_ray_the_extra_is_named(recipe, store, monkeypatch):
    from opd.jobs.ray_job import score_with_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(opd.RunError, match=r"pip install 'opd\[ray\]'"):
        score_with_ray(recipe, store.path, "sampled", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "nowhere", "--recipe", "heal"], "no store at nowhere"),
        (["score", "nowhere"], "needs --recipe"),
        (["score", "nowhere", "--recipe", "heal", "--kind", "all"], "accepted: sampled, top_k, exact"),
        (["store", "nowhere"], "opd rollout RECIPE --out nowhere makes one"),
    ],
)
def test_mistakes_on_the_command_line(words, message, monkeypatch, capsys, tmp_path):
    from opd.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["opd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_shared_jobs_of_the_command_line(recipe, tmp_path):
    """SIGKILL in the middle, then two workers side by side: the store of one undisturbed process."""
    file = tmp_path / "recipe.yaml"
    data = recipe.dump()
    data["prompts"] = [{"kind": "inline", "prompts": [f"{i}+{i}=" for i in range(60)]}]
    data["rollout"]["max_new_tokens"] = 100
    file.write_text(yaml.safe_dump(data))
    recipe = parse_recipe(data)
    whole = sample(recipe, tmp_path / "whole", prompts_per_shard=2, quiet=True)
    expected = score(recipe, whole.path, "exact", quiet=True).content()

    def killed_after(shards, folder, *words):
        process = Program(tmp_path, *words, "--quiet")
        while process.poll() is None and sum(is_written(p) for p in folder.glob("*.safetensors")) < shards:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    roll = ("rollout", file, "--out", "s", "--prompts-per-shard", 2)
    killed_after(3, tmp_path / "s" / "rollouts", *roll)
    assert Store.open(tmp_path / "s").missing()
    for process in [Program(tmp_path, *roll, "--quiet") for _ in range(2)]:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert Store.open(tmp_path / "s").content() == whole.content()
    scoring = ("score", "s", "--recipe", file, "--kind", "exact", "--name", "t")
    killed_after(4, tmp_path / "s" / "targets" / "t", *scoring)
    for process in [Program(tmp_path, *scoring, "--quiet") for _ in range(2)]:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert Targets.open(Store.open(tmp_path / "s"), "t").content() == expected
    shown = Program(tmp_path, "store", "s")
    out, _ = shown.communicate(timeout=120)
    assert shown.returncode == 0
    assert "every written file matches" in out
