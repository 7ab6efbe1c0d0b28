"""Which session a job of a comparison of steps is run by."""

from __future__ import annotations

from benchmarks.bare import FloorSession
from benchmarks.contestants import FLOOR, GKD, OPD, TRL, TRL_TILED, GkdSession, OpdSession, TrlSession
from benchmarks.pictured import Pictured
from benchmarks.session import Job, Session
from benchmarks.vision_contestants import BarePictures, OpdPictures, TrlPictures

TEXT: dict[str, type[Session]] = {
    OPD: OpdSession,
    FLOOR: FloorSession,
    TRL: TrlSession,
    TRL_TILED: TrlSession,
    GKD: GkdSession,
}
PICTURES: dict[str, type[Session]] = {OPD: OpdPictures, FLOOR: BarePictures, TRL: TrlPictures}


def open_session(job: Job) -> Session:
    """Load what the job names."""
    if isinstance(job.size, Pictured):
        return PICTURES[job.contestant](job)
    return OpdSession(job) if job.changes is not None else TEXT[job.contestant](job)
