"""Jobs that nothing makes forget: each change is one transaction, and what happened is kept in the
order in which it did."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sql
from sqlalchemy.engine import Connection, RowMapping

from trainer_service.jobs.database import Database
from trainer_service.jobs.tables import CHECKPOINTS, EVENTS, JOBS, SAMPLES, STEPS
from zimage_client import TrainStep
from zimage_core.digests import Named
from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.planning.curriculum import best

WAITING, RUNNING, PAUSED = "waiting", "running", "paused"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)

CHANGED, CHECKPOINT, DRAWN = "changed", "checkpoint", "drawn"
"""Kinds of events."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is."""

    id: str
    project: str
    spec: bytes
    """What was asked, everything decided; a message, which others read."""
    state: str
    waits_for: str
    failure: bytes
    """A message; empty without."""
    step: int
    """How many are behind it."""
    session_epoch: int
    created: float
    updated: float
    checkpoints: tuple["Kept", ...] = ()
    """The latest last."""

    @property
    def best(self) -> "Kept":
        """The checkpoint that loses the least on what is kept from learning; the latest where
        nothing is."""
        return self.checkpoints[best([one.validation_loss for one in self.checkpoints])]


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint."""

    step: int
    weights: Named
    state: tuple[Named, ...]
    """What training goes on from, in parts; empty once it is thinned out."""
    time: float
    validation_loss: float | None = None
    """On pictures that are kept from learning, where there are any."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A picture that was drawn with a checkpoint."""

    prompt: str
    picture: Named
    lost_detail: float | None = None
    """Which share of it, against the same with many steps; None where nobody looked."""


@dataclass(frozen=True, slots=True)
class Happened:
    """Something that happened to a job."""

    sequence: int
    time: float
    kind: str
    step: int
    """Of a checkpoint, and of what was drawn with it."""


class Jobs:
    """Those of one database, which is waited for: call them from threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, project: str, request_id: str, asked: bytes, spec: bytes) -> Job:
        """A new one, or that of the same request; raises InvalidRequest where that was another."""
        with self._database.changing() as connection:
            if made := _made_of(connection, project, request_id, asked):
                return made
            now, job = time.time(), f"job-{secrets.token_hex(6)}"
            values = {
                "id": job, "project": project, "request_id": request_id, "asked": asked,
                "spec": spec, "state": WAITING, "created": now, "updated": now,
            }  # fmt: skip
            connection.execute(JOBS.insert().values(values))
            _enter(connection, job, now, CHANGED)
            return _read(connection, job)

    def made_of(self, project: str, request_id: str, asked: bytes) -> Job | None:
        """The job of a request that came before; None for a new one."""
        with self._database.reading() as connection:
            return _made_of(connection, project, request_id, asked)

    def decide(self, job: str, spec: bytes) -> None:
        """Enters what was decided only when it began."""
        with self._database.changing() as connection:
            _update(connection, job, spec=spec)

    def get(self, project: str, job: str) -> Job:
        """One of a project; raises NotFound."""
        with self._database.reading() as connection:
            found = _read(connection, job)
        if found.project != project:
            raise _missing(job)
        return found

    def page(self, project: str, before: float, count: int) -> list[Job]:
        """Those of a project that were made before, the latest first."""
        wanted = (
            sql.select(JOBS)
            .where(JOBS.c.project == project, JOBS.c.created < before)
            .order_by(JOBS.c.created.desc())
            .limit(count)
        )
        with self._database.reading() as connection:
            return [_job(connection, row) for row in connection.execute(wanted).mappings()]

    def unfinished(self) -> list[str]:
        """All that should be learning, the oldest first."""
        wanted = (
            sql.select(JOBS.c.id)
            .where(JOBS.c.state.in_([WAITING, RUNNING]))
            .order_by(JOBS.c.created)
        )
        with self._database.reading() as connection:
            return list(connection.scalars(wanted))

    def ids(self) -> set[str]:
        """Of all."""
        with self._database.reading() as connection:
            return set(connection.scalars(sql.select(JOBS.c.id)))

    def delete(self, job: str) -> None:
        """Forgets all of one."""
        with self._database.changing() as connection:
            for table in (EVENTS, STEPS, SAMPLES, CHECKPOINTS):
                connection.execute(table.delete().where(table.c.job == job))
            connection.execute(JOBS.delete().where(JOBS.c.id == job))

    def read(self, job: str) -> Job:
        """One of any project; raises NotFound."""
        with self._database.reading() as connection:
            return _read(connection, job)

    def change(
        self,
        job: str,
        state: str,
        *,
        waits_for: str = "",
        failure: bytes = b"",
        wakes: bool = False,
    ) -> Job:
        """Enters how it is now. What has ended stays so, and what rests, unless it is woken."""
        with self._database.changing() as connection:
            before = _read(connection, job)
            is_over = before.state in (COMPLETED, CANCELLED)
            is_asleep = before.state == PAUSED and state in (RUNNING, WAITING) and not wakes
            if is_over or is_asleep or (before.state, before.waits_for) == (state, waits_for):
                return before
            now = time.time()
            _update(connection, job, state=state, waits_for=waits_for, failure=failure, updated=now)
            _enter(connection, job, now, CHANGED)
            return _read(connection, job)

    def begin_session(self, job: str) -> int:
        """The number of its next stretch: whatever went on before is over."""
        with self._database.changing() as connection:
            epoch = _read(connection, job).session_epoch + 1
            _update(connection, job, session_epoch=epoch)
            return epoch

    def add_steps(self, job: str, learnt: Sequence[TrainStep]) -> None:
        """Enters what came of steps; those that are learnt again replace what was said before."""
        if not learnt:
            return
        with self._database.changing() as connection:
            steps = [one.step for one in learnt]
            connection.execute(STEPS.delete().where(STEPS.c.job == job, STEPS.c.step >= min(steps)))
            connection.execute(STEPS.insert(), [_step(job, one) for one in learnt])
            _update(connection, job, step=max(steps) + 1, updated=time.time())

    def add_checkpoint(self, job: str, kept: Kept) -> None:
        """Enters a checkpoint whose files are there."""
        values = {
            "job": job, "step": kept.step, "time": kept.time,
            "weights_sha256": kept.weights.sha256, "weights_bytes": kept.weights.size_bytes,
            "state": [[part.sha256, part.size_bytes] for part in kept.state],
            "validation_loss": kept.validation_loss,
        }  # fmt: skip
        with self._database.changing() as connection:
            same = sql.and_(CHECKPOINTS.c.job == job, CHECKPOINTS.c.step == kept.step)
            connection.execute(CHECKPOINTS.delete().where(same))
            connection.execute(CHECKPOINTS.insert().values(values))
            _enter(connection, job, kept.time, CHECKPOINT, kept.step)

    def thin_out(self, job: str, checkpoint_count: int, state_count: int) -> Job:
        """Keeps so many checkpoints, the latest and the best, 0 for all, and of so many of them all
        that training goes on from."""
        with self._database.changing() as connection:
            now = _read(connection, job)
            kept = [one.step for one in now.checkpoints]
            old = kept[:-checkpoint_count] if checkpoint_count else []
            dropped = [step for step in old if step != now.best.step]
            stateless = [step for step in kept[:-state_count] if step not in dropped]
            for table in (CHECKPOINTS, EVENTS):
                of_job = sql.and_(table.c.job == job, table.c.step.in_(dropped))
                is_its = [table.c.kind == CHECKPOINT] if table is EVENTS else []
                connection.execute(table.delete().where(of_job, *is_its))
            of_job = sql.and_(CHECKPOINTS.c.job == job, CHECKPOINTS.c.step.in_(stateless))
            connection.execute(CHECKPOINTS.update().where(of_job).values(state=[]))
            return _read(connection, job)

    def add_samples(self, job: str, step: int, drawn: Sequence[Sampled]) -> None:
        """Enters pictures of a checkpoint, whose files are there."""
        rows = [
            {
                "job": job, "step": step, "number": number, "prompt": one.prompt,
                "sha256": one.picture.sha256, "bytes": one.picture.size_bytes,
                "lost_detail": one.lost_detail,
            }
            for number, one in enumerate(drawn)
        ]  # fmt: skip
        with self._database.changing() as connection:
            same = sql.and_(SAMPLES.c.job == job, SAMPLES.c.step == step)
            connection.execute(SAMPLES.delete().where(same))
            connection.execute(SAMPLES.insert(), rows)
            _enter(connection, job, time.time(), DRAWN, step)

    def samples(self, job: str, step: int) -> list[Sampled]:
        """The pictures of a checkpoint."""
        wanted = (
            sql.select(SAMPLES)
            .where(SAMPLES.c.job == job, SAMPLES.c.step == step)
            .order_by(SAMPLES.c.number)
        )
        with self._database.reading() as connection:
            return [
                Sampled(row["prompt"], Named(row["sha256"], row["bytes"]), row["lost_detail"])
                for row in connection.execute(wanted).mappings()
            ]

    def happened(self, job: str, after: int) -> list[Happened]:
        """What happened behind an event."""
        wanted = (
            sql.select(EVENTS)
            .where(EVENTS.c.job == job, EVENTS.c.sequence > after)
            .order_by(EVENTS.c.sequence)
        )
        with self._database.reading() as connection:
            return [
                Happened(row["sequence"], row["time"], row["kind"], row["step"])
                for row in connection.execute(wanted).mappings()
            ]

    def steps(self, job: str, after: int, count: int) -> list[TrainStep]:
        """What came of steps behind one, of so many at most."""
        wanted = (
            sql.select(STEPS)
            .where(STEPS.c.job == job, STEPS.c.step > after)
            .order_by(STEPS.c.step)
            .limit(count)
        )
        with self._database.reading() as connection:
            return [_learnt(row) for row in connection.execute(wanted).mappings()]


def _made_of(connection: Connection, project: str, request_id: str, asked: bytes) -> Job | None:
    same = sql.and_(JOBS.c.project == project, JOBS.c.request_id == request_id)
    there = connection.execute(sql.select(JOBS).where(same)).mappings().first()
    if there is None:
        return None
    if there["asked"] != asked:
        allowed = "one that named no other request"
        raise InvalidRequest.given("request_id", request_id, allowed, "REQUEST_ID")
    return _job(connection, there)


def _read(connection: Connection, job: str) -> Job:
    row = connection.execute(sql.select(JOBS).where(JOBS.c.id == job)).mappings().first()
    if row is None:
        raise _missing(job)
    return _job(connection, row)


def _job(connection: Connection, row: RowMapping) -> Job:
    wanted = (
        sql.select(CHECKPOINTS).where(CHECKPOINTS.c.job == row["id"]).order_by(CHECKPOINTS.c.step)
    )
    kept = tuple(
        Kept(
            one["step"],
            Named(one["weights_sha256"], one["weights_bytes"]),
            tuple(Named(*part) for part in one["state"]),
            one["time"],
            one["validation_loss"],
        )
        for one in connection.execute(wanted).mappings()
    )
    return Job(
        id=row["id"],
        project=row["project"],
        spec=row["spec"],
        state=row["state"],
        waits_for=row["waits_for"],
        failure=row["failure"] or b"",
        step=row["step"],
        session_epoch=row["session_epoch"],
        created=row["created"],
        updated=row["updated"],
        checkpoints=kept,
    )


def _update(connection: Connection, job: str, **values: object) -> None:
    connection.execute(JOBS.update().where(JOBS.c.id == job).values(values))


def _enter(connection: Connection, job: str, now: float, kind: str, step: int = 0) -> None:
    last = sql.select(sql.func.coalesce(sql.func.max(EVENTS.c.sequence), 0)).where(
        EVENTS.c.job == job
    )
    sequence = connection.execute(last).scalar_one() + 1
    values = {"job": job, "sequence": sequence, "time": now, "kind": kind, "step": step}
    connection.execute(EVENTS.insert().values(values))


def _step(job: str, learnt: TrainStep) -> dict[str, object]:
    return {
        "job": job,
        "step": learnt.step,
        "loss": learnt.loss,
        "gradient_norm": learnt.gradient_norm,
        "learning_rate": learnt.learning_rate,
        "skipped": learnt.skipped,
        "seconds": learnt.seconds,
        "waited_seconds": learnt.waited_seconds,
        "device_bytes": learnt.device_bytes,
    }


def _learnt(row: RowMapping) -> TrainStep:
    nothing = float("nan")  # SQL knows none: it is kept as nothing
    return TrainStep(
        step=row["step"],
        loss=nothing if row["loss"] is None else row["loss"],
        gradient_norm=nothing if row["gradient_norm"] is None else row["gradient_norm"],
        learning_rate=row["learning_rate"],
        skipped=row["skipped"],
        seconds=row["seconds"],
        waited_seconds=row["waited_seconds"],
        device_bytes=row["device_bytes"],
    )


def _missing(job: str) -> NotFound:
    return NotFound(
        f"there is no job {job[:200]}", reason="JOB_NOT_FOUND", fields={"field": "id", "given": job}
    )
