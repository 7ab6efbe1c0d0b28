"""Demonstrations: written by an expert in LeRobot's format, read from v3 and v2, and learnt from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from opd.acting.creation import create_policy
from opd.acting.lerobot import open_demonstrations, ranges
from opd.acting.model import PolicySettings, load_policy
from opd.acting.seeing import Statistics
from opd.api import execute
from opd.cli.main import app
from opd.context import Context
from opd.environments.pixel_pick import PixelWorld
from opd.errors import DataError, ModelError, RecipeError, RunError
from opd.jobs.demonstrations import sample_demonstrations
from opd.prompts.demonstrations import DemonstrationPrompts
from opd.rollouts import Request
from opd.rollouts.demonstrations import DemonstrationRollout, Demonstrations
from tests.acting.tiny import WORLD, episodes, recipe_of

PLAYED = {
    "teacher": {"kind": "scripted", "name": "expert"},
    "prompts": episodes(WORLD, 2),
    "rollout": {"kind": "simulator", "teacher": "expert", "decisions": 12, "greedy": True},
    "batch": {"prompts": 3, "group": 1, "micro": 4},
}


@pytest.fixture(scope="module")
def data(policies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pixels"
    recipe = recipe_of(policies[0], folder.parent / "run", **PLAYED)
    assert sample_demonstrations(recipe, folder, quiet=True) == (4, 4)
    return folder


def test_a_data_set_of_lerobot_holds_every_frame(data):
    info = json.loads((data / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["features"]["observation.images.camera0"] == {
        "dtype": "image",
        "shape": [24, 24, 3],
        "names": ["height", "width", "channels"],
    }
    assert {n: f["shape"] for n, f in info["features"].items() if n.startswith(("action", "observation.s"))} == {
        "action": [3],
        "observation.state": [4],
    }
    table = pq.read_table(data / "data/chunk-000/file-000.parquet")
    assert table["index"].to_pylist() == list(range(info["total_frames"]))
    assert pq.read_table(data / "meta/tasks.parquet")["task"].to_pylist() == list(WORLD.tasks().values())
    assert set(json.loads((data / "meta/stats.json").read_text())["action"]) >= {"mean", "q01", "q99"}


def test_played_again_the_actions_lead_to_the_frames(data):
    """But for the actuators' noise, which is small."""
    found = open_demonstrations(str(data))
    assert [episode.length for episode in found.episodes] == [len(found.read(i).actions) for i in range(4)]
    episode = found.read(0)
    assert episode.success
    places = np.stack([seen.proprio[:2] for seen in episode.seen])
    moved = (places[1:] - places[:-1]) / 2
    assert np.abs(moved - 0.08 * episode.actions[:-1, :2]).max() < 0.04
    assert episode.seen[0].images.shape == (1, 24, 24, 3)
    assert episode.seen[0].images.max() > 200


def second(data, folder):
    """The same data set as v2.1 has it: a file an episode, JSON lines."""
    found = open_demonstrations(str(data))
    table = pq.read_table(data / "data/chunk-000/file-000.parquet")
    info = json.loads((data / "meta/info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    rows = [{"episode_index": e.index, "tasks": [e.task], "length": e.length} for e in found.episodes]
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for episode in found.episodes:
        part = table.filter(pa.compute.equal(table["episode_index"], episode.index))
        pq.write_table(part, folder / f"data/chunk-000/episode_{episode.index:06d}.parquet")
    return folder


def test_version_two_reads_alike(data, tmp_path):
    old, new = open_demonstrations(str(second(data, tmp_path / "old"))), open_demonstrations(str(data))
    for i in range(4):
        a, b = old.read(i), new.read(i)
        assert a.task == b.task
        assert np.array_equal(a.actions, b.actions)
        assert np.array_equal(a.seen[-1].images, b.seen[-1].images)


def test_the_rollout_cuts_episodes_into_chunks_with_the_played_tokens(data, model):
    prompts = DemonstrationPrompts(path=str(data)).load()
    settings = DemonstrationRollout()
    source = Demonstrations(settings, model)
    source.check_prompts(prompts)
    found = source(Request(prompts, 3, 64, 0, settings, Context(torch.device("cpu"))))
    layout = model.layout
    firsts = set()
    for i, (context, ids) in enumerate(zip(found.contexts, found.completions(), strict=True)):
        episode = open_demonstrations(str(data)).read(i // 3)
        whole = layout.actions.encode(model.statistics.scale(episode.actions)).ravel()
        learn = torch.split(found.learn, found.lengths.tolist())[i]
        kept = ids[learn].numpy()
        assert np.array_equal(kept, whole[-len(kept) :])
        first = len(episode.actions) - len(kept) // 3
        firsts.add(first)
        assert np.array_equal(context.seen[0].images, episode.seen[first].images)
        assert len(ids) == len(context.seen) * layout.tokens
    assert len(firsts) > 1, "the first frame is drawn"
    assert max(firsts) < layout.chunk
    assert found.rewards.tolist() == [1.0] * 12


def test_few_demonstrations_of_each_task(data):
    rows = DemonstrationPrompts(path=str(data), per_task=1).load()
    assert [row.view() for row in rows] == list(WORLD.tasks().values())


def test_imitation_trains_and_is_measured_in_the_simulator(data, policies, tmp_path):
    changes = {
        "steps": 6,
        "prompts": {"kind": "demonstrations", "path": str(data)},
        "rollout": "demonstrations",
        "objective": "sft",
        "batch": {"prompts": 4},
        "update": {"learning_rate": 3e-3},
    }
    result = execute(recipe_of(policies[0], tmp_path / "run", **changes), quiet=True)
    losses = [row["train/loss"] for row in result.history if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert "accuracy" in result.summary["after"]


def test_the_command_line_makes_a_policy_and_demonstrations(tmp_path):
    recipe = {
        "name": "few",
        "student": {"kind": "action_tokens", "model": str(tmp_path / "policy")},
        **PLAYED,
        "evaluation": {"prompts": episodes(WORLD, 1, 1)},
        "objective": "sft",
        "hardware": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(recipe))
    file = str(tmp_path / "few.yaml")
    sizes = ["--width", "32", "--layers", "1", "--heads", "2", "--bins", "16", "--patch", "6"]
    made = CliRunner().invoke(app, ["create-policy", str(tmp_path / "policy"), "--recipe", file, *sizes])
    assert made.exit_code == 0, made.output
    assert load_policy(PolicySettings(model=str(tmp_path / "policy")), "cpu").statistics.key == "pixel_pick"
    done = CliRunner().invoke(app, ["rollout", file, "--out", str(tmp_path / "data"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "4 of 4 episodes succeeded" in done.output
    assert len(open_demonstrations(str(tmp_path / "data")).episodes) == 4
    again = ["--demonstrations", str(tmp_path / "data"), "--overwrite"]
    made = CliRunner().invoke(app, ["create-policy", str(tmp_path / "policy"), "--recipe", file, *sizes, *again])
    assert made.exit_code == 0, made.output
    read = load_policy(PolicySettings(model=str(tmp_path / "policy")), "cpu").statistics.seen
    stats = json.loads((tmp_path / "data" / "meta" / "stats.json").read_text())
    assert read["proprio"][1] == pytest.approx(stats["observation.state"]["q99"])
    assert read["state"][0] == pytest.approx(stats["observation.environment_state"]["q01"])


def test_numbers_are_read_in_the_range_of_their_data():
    statistics = Statistics("k", (-1.0,), (1.0,), (True,), {"proprio": ((0.1, 2.0, 0.0), (0.3, 2.0, 10.0))})
    values = np.array([[0.1, 2.5, 5.0], [0.3, 2.0, 10.0], [9.0, 2.0, -5.0]], np.float32)
    wanted = [[-1.0, 0.5, 0.0], [1.0, 0.0, 1.0], [5.0, 0.0, -2.0]]
    np.testing.assert_allclose(statistics.read("proprio", values), wanted, atol=1e-5)
    assert statistics.read("state", values) is values


def test_ranges_of_another_body_or_none_are_refused(data, tmp_path):
    with pytest.raises(ModelError, match=r"the policy reads 4 numbers of proprio, and statistics of 'k' are of"):
        create_policy(tmp_path / "p", WORLD.body(), ["go"], key="k", seen={"proprio": ((0.0,), (1.0,))})
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "stats.json").write_text(json.dumps({"observation.state": {"min": [0]}}))
    with pytest.raises(DataError, match=r"stats.json does not say its numbers' range .*q01 and q99"):
        ranges(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda info: info.update(codebase_version="v1.6"), "codebase_version is 'v1.6'"),
        (lambda info: info["features"].update({"observation.images.x": {"dtype": "video"}}), "is a video"),
        (lambda info: info["features"].pop("action"), "no feature 'action'"),
    ],
)
def test_other_data_sets_are_refused(change, told, data, tmp_path):
    folder = tmp_path / "other"
    (folder / "meta").mkdir(parents=True)
    info = json.loads((data / "meta/info.json").read_text())
    change(info)
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=told):
        DemonstrationPrompts(path=str(folder)).load()


@pytest.mark.parametrize("which", ["some", "all"])
def test_episodes_that_are_over_at_once_are_left_out_and_counted(which, policies, tmp_path, monkeypatch):
    plain, told = PixelWorld.reset, "pixel_pick: an episode is over before anything was done in it"

    def reset(self, start):
        turn = plain(self, start)
        return replace(turn, done=True, outcome=1.0) if which == "all" or start.task == "red_block" else turn

    monkeypatch.setattr(PixelWorld, "reset", reset)
    recipe = recipe_of(policies[0], tmp_path / "run", **PLAYED)
    if which == "all":
        with pytest.raises(RunError, match=f"none of 4 episodes succeeded .of those that were lost: {told}"):
            sample_demonstrations(recipe, tmp_path / "data", quiet=True)
        return
    assert sample_demonstrations(recipe, tmp_path / "data", quiet=True) == (2, 4)
    result = execute(recipe_of(policies[0], tmp_path / "run", **PLAYED), quiet=True)
    (first, _) = [row for row in result.history if "train/loss" in row]
    assert first["train/invalid"] > 0
    assert np.isfinite(first["train/loss"])


def test_what_cannot_be_demonstrated_is_told(policies, data, tmp_path):
    with pytest.raises(DataError, match="give the folder of a data set"):
        DemonstrationPrompts(path=str(tmp_path)).load()
    recipe = recipe_of(policies[0], tmp_path / "run", rollout={"kind": "simulator", "decisions": 1}, objective="grpo")
    with pytest.raises(RunError, match="none of 24 episodes succeeded"):
        sample_demonstrations(recipe, tmp_path / "none", quiet=True)
    other = recipe_of(policies[0], tmp_path / "run", rollout="demonstrations", objective="sft")
    with pytest.raises(RecipeError, match="plays no episodes"):
        sample_demonstrations(other, tmp_path / "none", quiet=True)
    with pytest.raises(DataError, match="no demonstration stands in this row"):
        execute(other, quiet=True)
