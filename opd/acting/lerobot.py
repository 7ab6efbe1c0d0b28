"""Demonstrations on the disk, in the format of LeRobot's data sets (v3.0 is written, v2.1 and v3.0 are read), without
that library: Parquet files, a row a frame, and JSON beside them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from opd.acting.seeing import NO_PICTURE, Numbers, Seen
from opd.errors import DataError, first_line
from opd.pictures import png

INFO = "meta/info.json"
IMAGES, PROPRIO, STATE = "observation.images.", "observation.state", "observation.environment_state"
FRAMES_PER_FILE = 20_000
EVERY = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
    "next.done": "bool",
    "next.success": "bool",
}
"""What each frame has besides what was seen and done."""


@dataclass(frozen=True)
class Demonstration:
    """One episode, frame by frame.

    Attributes:
        task: the instruction.
        seen: F observations.
        actions: float32 `[F, A]`, what was done at each, in the environment's units.
        success: whether it reached its goal.
    """

    task: str
    seen: Sequence[Seen]
    actions: np.ndarray
    success: bool


@dataclass(frozen=True)
class Listed:
    """Where an episode stands in a data set."""

    index: int
    task: str
    length: int
    file: str


def write_demonstrations(folder: Path, episodes: Sequence[Demonstration], fps: int = 10) -> None:
    """Write a data set into an empty folder.

    Raises:
        DataError: there is no episode.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not episodes:
        raise DataError("no episode was kept, so there is nothing to demonstrate")
    tasks = {task: i for i, task in enumerate(dict.fromkeys(episode.task for episode in episodes))}
    first = episodes[0]
    cameras = [f"{IMAGES}camera{i}" for i in range(len(first.seen[0].images))]
    numbers = {"action": first.actions.shape[1], PROPRIO: len(first.seen[0].proprio), STATE: len(first.seen[0].state)}
    numbers = {name: size for name, size in numbers.items() if size}
    fields = [(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])) for name in cameras]
    fields += [(name, pa.list_(pa.float32(), size)) for name, size in numbers.items()]
    fields += [(name, pa.type_for_alias(kind)) for name, kind in EVERY.items()]
    schema = pa.schema(fields)
    listed: list[dict[str, Any]] = []
    index, file, rows = 0, 0, list[dict[str, Any]]()
    data = folder / "data" / "chunk-000"
    data.mkdir(parents=True)
    for number, episode in enumerate(episodes):
        length = len(episode.actions)
        listed.append(
            {
                "episode_index": number,
                "tasks": [episode.task],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": index,
                "dataset_to_index": index + length,
                "success": episode.success,
            }
        )
        for i, (seen, action) in enumerate(zip(episode.seen, episode.actions, strict=True)):
            rows.append(
                {
                    **{name: {"bytes": png(seen.images[c]), "path": None} for c, name in enumerate(cameras)},
                    "action": action.tolist(),
                    PROPRIO: seen.proprio.tolist(),
                    STATE: seen.state.tolist(),
                    "timestamp": i / fps,
                    "frame_index": i,
                    "episode_index": number,
                    "index": index,
                    "task_index": tasks[episode.task],
                    "next.done": i == length - 1,
                    "next.success": episode.success and i == length - 1,
                }
            )
            index += 1
        if len(rows) >= FRAMES_PER_FILE or number == len(episodes) - 1:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), data / f"file-{file:03d}.parquet")
            rows, file = [], file + 1
    features: dict[str, Any] = {
        name: {
            "dtype": "image",
            "shape": list(first.seen[0].images.shape[1:]),
            "names": ["height", "width", "channels"],
        }
        for name in cameras
    }
    features |= {name: {"dtype": "float32", "shape": [size], "names": None} for name, size in numbers.items()}
    features |= {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in EVERY.items()}
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(listed), folder / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": list(tasks.values()), "task": list(tasks)}), folder / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(episodes),
        "total_frames": index,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }
    stats = {name: _stats(np.concatenate([_column(e, name) for e in episodes])) for name in numbers}
    for name, value in (("info", info), ("stats", stats)):
        (folder / "meta" / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _column(episode: Demonstration, name: str) -> np.ndarray:
    if name == "action":
        return episode.actions
    return np.stack([seen.proprio if name == PROPRIO else seen.state for seen in episode.seen])


def _stats(values: np.ndarray) -> dict[str, list[float]]:
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    return {name: [float(v) for v in value] for name, value in found.items()} | {"count": [float(len(values))]}


def ranges(folder: Path) -> dict[str, tuple[Numbers, Numbers]]:
    """1st and 99th percentiles of a data set's `proprio` and `state`, as far as it has them.

    Raises:
        DataError: its `meta/stats.json` is missing or holds something else.
    """
    path = folder / "meta" / "stats.json"
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        return {
            ours: (tuple(map(float, stats[theirs]["q01"])), tuple(map(float, stats[theirs]["q99"])))
            for ours, theirs in (("proprio", PROPRIO), ("state", STATE))
            if theirs in stats
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say its numbers' range ({first_line(error)}); `opd rollout` writes q01 and q99"
        ) from None


@dataclass(frozen=True)
class DemonstrationSet:
    """A data set that lies on this machine; frames are read when they are asked for."""

    folder: Path
    cameras: tuple[str, ...]
    episodes: tuple[Listed, ...]

    def read(self, index: int) -> Demonstration:
        """The episode at a place of `episodes`.

        Raises:
            DataError: its frames are not there, or are no such frames.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        one = self.episodes[index]
        try:
            table = pq.read_table(self.folder / one.file, filters=[("episode_index", "=", one.index)])
            rows = table.sort_by("frame_index").to_pylist()
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataError(
                f"{self.folder}: episode {one.index} cannot be read ({first_line(error)}); copy the data set again"
            ) from None
        if len(rows) != one.length or not rows:
            raise DataError(
                f"{self.folder}: episode {one.index} has {len(rows)} frames in {one.file} and {one.length} in meta/; "
                "copy the data set again"
            )
        seen = [
            Seen(
                np.stack([_picture(row[name], self.folder) for name in self.cameras]) if self.cameras else NO_PICTURE,
                _numbers(row.get(PROPRIO)),
                _numbers(row.get(STATE)),
            )
            for row in rows
        ]
        success = bool(rows[-1].get("next.success", True))
        return Demonstration(one.task, seen, np.stack([_numbers(row["action"]) for row in rows]), success)


def _numbers(values: Any) -> np.ndarray:
    return np.asarray([] if values is None else values, dtype=np.float32).ravel()


def _picture(value: Any, folder: Path) -> np.ndarray:
    """uint8 `[H, W, 3]` of an image of a row: its bytes, or a file of the data set."""
    from PIL import Image

    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else folder / str(value["path"])
    try:
        with Image.open(source) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: an image cannot be read ({first_line(error)})") from None


@lru_cache(maxsize=16)
def open_demonstrations(path: str) -> DemonstrationSet:
    """A data set of LeRobot, v2.1 or v3.0.

    Raises:
        DataError: there is none, or one of another kind.
    """
    folder = Path(path).expanduser()
    info = _json(folder / INFO, folder)
    version, features = str(info.get("codebase_version")), info.get("features") or {}
    videos = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    if videos:
        raise DataError(
            f"{folder}: {videos[0]!r} is a video, which is not decoded here; convert the data set to images "
            "(LeRobot writes those with use_videos=False)"
        )
    if "action" not in features:
        raise DataError(f"{folder}: the data set has no feature 'action'")
    if version.startswith("v3"):
        episodes = tuple(_third(folder, str(info["data_path"])))
    elif version.startswith("v2"):
        episodes = tuple(_second(folder, info))
    else:
        raise DataError(f"{folder}: codebase_version is {version!r}; v2.0, v2.1 and v3.0 are read")
    cameras = tuple(sorted(name for name, feature in features.items() if feature.get("dtype") == "image"))
    return DemonstrationSet(folder, cameras, episodes)


def _third(folder: Path, pattern: str) -> Iterator[Listed]:
    import pyarrow.parquet as pq

    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"{folder}: meta/episodes holds no file; copy the data set again")
    for file in files:
        for row in pq.read_table(file).to_pylist():
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            yield Listed(row["episode_index"], str(row["tasks"][0]), int(row["length"]), pattern.format(**place))


def _second(folder: Path, info: dict[str, Any]) -> Iterator[Listed]:
    size, pattern = int(info.get("chunks_size") or 1000), str(info["data_path"])
    try:
        lines = (folder / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{folder}: meta/episodes.jsonl cannot be read ({error.strerror})") from None
    for line in lines:
        row = json.loads(line)
        index = int(row["episode_index"])
        file = pattern.format(episode_chunk=index // size, episode_index=index)
        yield Listed(index, str(row["tasks"][0]), int(row["length"]), file)


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON object"
        raise DataError(
            f"{folder}: {INFO} cannot be read ({reason}); give the folder of a data set of LeRobot (opd rollout writes "
            "one)"
        ) from None
    return found
