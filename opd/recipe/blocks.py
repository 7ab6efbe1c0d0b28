"""Blocks of a recipe that belong to no axis."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from opd.choice import Settings
from opd.hardware import DEVICE


class Batch(Settings):
    """How many trajectories make one step, and how many of them share one forward pass."""

    prompts: int = Field(16, ge=1, le=1_000_000, description="Prompts of one optimiser step, over all processes")
    group: int = Field(1, ge=1, le=1_000_000, description="Trajectories of each prompt")
    micro: int = Field(16, ge=1, description="Trajectories of one forward and backward pass; changes memory only")


class Hardware(Settings):
    """Device and precision; everything else about devices is `accelerate`'s."""

    device: str = Field("auto", pattern=f"^auto$|{DEVICE}", description="As torch names it")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="Compute dtype; weights keep the student's dtype. auto: bf16 where the device is fast at it",
    )
    threads: int | None = Field(None, ge=1, le=1024, description="torch's threads; default all cores")


class Tracking(Settings):
    """`accelerate`'s trackers; metrics.jsonl is always written."""

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml"]] = Field(
        default=["tensorboard"], description="Trackers to log to"
    )
    project: str = Field("opd", description="Name under which the trackers put runs")

    @field_validator("trackers")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is listed twice; list each once")
        return value

    @field_validator("project")
    @classmethod
    def _inside_the_run(cls, value: str, info: ValidationInfo) -> str:
        """tensorboard makes a folder of it in the run's."""
        own = ("student", "checkpoints", ".", "..")
        if "tensorboard" in info.data.get("trackers", ()) and (Path(value).name != value or value in own):
            raise ValueError(
                "with tensorboard this is a folder in the run directory; give one name that is not the run's own "
                "(student, checkpoints)"
            )
        return value


class Checkpoint(Settings):
    """What makes a run survive being killed: `opd train RECIPE --resume` goes on from the newest checkpoint."""

    every: int = Field(50, ge=0, description="Steps between checkpoints; one more at the end. 0 = none at all")
    keep_last: int = Field(2, ge=1, description="How many of the newest stay on the disk")
    keep_best: str | None = Field(
        None, description="A held-out metric, as in evaluation.stop: its best evaluation is written too and stays"
    )


class Failures(Settings):
    """When a run gives up."""

    skips_in_a_row: int = Field(
        3, ge=1, description="Updates skipped in a row, for a loss or gradient that is not finite, before the run stops"
    )
    empty_at_start: int | None = Field(
        50, ge=1, description="Steps from the start without anything to learn before the run stops; null never stops"
    )
    max_invalid: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the rollouts of `invalid_over` steps that may go without their teacher's answer, as of a "
        "server that failed, before the run stops",
    )
    invalid_over: int = Field(10, ge=1, description="The newest steps that max_invalid is about")
