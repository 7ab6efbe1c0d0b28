"""`opd score --ray N`: the same scoring as a Ray Data job over the shards of a store, on one machine or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch

from opd.errors import RunError
from opd.jobs.scoring import Scorer, ScoringOptions, teacher_started
from opd.recipe import Recipe
from opd.store.shards import tidy
from opd.store.store import Store
from opd.store.targets import Kind, Targets


class ShardWorker:
    """What an actor of the job holds: a loaded teacher."""

    def __init__(self, recipe: Recipe, path: Path, kind: Kind, options: ScoringOptions):
        self.scorer = Scorer(recipe, path, kind, **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["item"]:
            self.scorer.score(int(shard))
        return {"targets": [self.scorer.targets.path.name] * len(batch["item"])}


def score_with_ray(recipe: Recipe, path: Path, kind: Kind, workers: int, **options: Unpack[ScoringOptions]) -> Targets:
    """Score a store with `workers` actors, each of one GPU where there is one; the result is that of one process.

    The store's folder must be reachable under the same path by every machine of the cluster. Connects to the cluster
    that the environment names, or starts one here.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise RunError("--ray needs Ray Data: pip install 'opd[ray]'") from None
    path = path.resolve()
    store = Store.open(path)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, logging_level="ERROR")
    try:
        gpus = 1 if torch.cuda.is_available() and recipe.hardware.device in ("auto", "cuda") else 0
        shards = ray.data.from_items(list(range(store.header.shards)), override_num_blocks=store.header.shards)
        done = shards.map_batches(
            ShardWorker,
            fn_constructor_args=(recipe, path, kind, options),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=1,
            num_gpus=gpus,
        )
        with teacher_started(recipe, path, options.get("teacher"), quiet=False):
            name = str(done.take_all()[0]["targets"])
    finally:
        if started:
            ray.shutdown()
    targets = Targets.open(store, name)
    tidy(targets.path)
    return targets
