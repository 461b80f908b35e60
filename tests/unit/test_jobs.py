"""Jobs in a database, and the file that says what they learn from."""

import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from trainer_service.jobs.database import Database
from trainer_service.jobs.jobs import CHANGED, CHECKPOINT, Jobs, Kept, Sampled
from trainer_service.jobs.tables import METADATA
from zimage_client import TrainStep
from zimage_core.digests import Named
from zimage_core.errors import InvalidRequest, InvalidSettings, NotFound, Unavailable
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example

EXAMPLE = Example("ab" * 32, 100, 640, 480, "a/b.png", "caf\u00e9 \u2603")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(Database(f"sqlite:///{tmp_path}/deeper/jobs.sqlite"))


def _learnt(step: int, loss: float = 0.5) -> TrainStep:
    return TrainStep(step, loss, 1.0, 1e-4, False, 0.1, 0.0)


def _kept(step: int) -> Kept:
    return Kept(step, Named("a" * 64, 1), (Named("b" * 64, 2),), float(step))


def test_the_same_request_makes_no_second_job(jobs: Jobs) -> None:
    first = jobs.create("me", "r1", b"asked", b"spec")
    assert jobs.create("me", "r1", b"asked", b"spec") == first
    assert jobs.create("you", "r1", b"asked", b"spec").id != first.id
    with pytest.raises(InvalidRequest, match="request_id"):
        jobs.create("me", "r1", b"other", b"spec")
    assert jobs.unfinished() == [first.id, jobs.page("you", math.inf, 9)[0].id]


def test_a_job_belongs_to_its_project(jobs: Jobs) -> None:
    job = jobs.create("me", "r1", b"asked", b"spec").id
    assert jobs.get("me", job).spec == b"spec"
    for project, wanted in (("you", job), ("me", "job-none")):
        with pytest.raises(NotFound):
            jobs.get(project, wanted)


def test_pages_lead_to_all(jobs: Jobs) -> None:
    made = [jobs.create("me", f"r{number}", b"", b"").id for number in range(5)]
    found: list[str] = []
    before = math.inf
    while page := jobs.page("me", before, 2):
        found += [job.id for job in page]
        before = page[-1].created
    assert found == made[::-1]


def test_what_happens_is_numbered_and_kept(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs"
    jobs = Jobs(Database(url))
    job = jobs.create("me", "r1", b"", b"").id
    jobs.change(job, "running")
    jobs.change(job, "running")  # nothing new
    jobs.add_checkpoint(job, _kept(3))
    jobs.change(job, "waiting", waits_for="the encoder")
    after = Jobs(Database(url))  # of another process
    happened = after.happened(job, 0)
    assert [one.sequence for one in happened] == [1, 2, 3, 4]
    assert [one.kind for one in happened] == [CHANGED, CHANGED, CHECKPOINT, CHANGED]
    assert after.happened(job, 3) == happened[3:]
    assert after.read(job).waits_for == "the encoder"
    assert after.read(job).checkpoints == (_kept(3),)


def test_checkpoints_are_thinned_out(jobs: Jobs) -> None:
    job = jobs.create("me", "r1", b"", b"").id
    for step in (3, 6, 9, 12):
        jobs.add_checkpoint(job, _kept(step))
    left = jobs.thin_out(job, 3, 2)
    assert [(one.step, len(one.state)) for one in left.checkpoints] == [(6, 0), (9, 1), (12, 1)]
    told = [one.step for one in jobs.happened(job, 0) if one.kind == CHECKPOINT]
    assert told == [6, 9, 12]
    assert jobs.thin_out(job, 0, 1).checkpoints[0] == left.checkpoints[0]


def test_what_is_learnt_again_replaces_what_was_said(jobs: Jobs) -> None:
    job = jobs.create("me", "r1", b"", b"").id
    jobs.add_steps(job, [_learnt(step) for step in range(6)])
    jobs.add_steps(job, [_learnt(4, 0.25), _learnt(5, math.nan)])
    assert jobs.read(job).step == 6
    losses = [one.loss for one in jobs.steps(job, -1, 100)]
    assert losses[:5] == [0.5, 0.5, 0.5, 0.5, 0.25]
    assert math.isnan(losses[5])
    assert [one.step for one in jobs.steps(job, 3, 1)] == [4]


@pytest.mark.parametrize("end", ["completed", "cancelled"])
def test_what_has_ended_stays_so(jobs: Jobs, end: str) -> None:
    job = jobs.create("me", "r1", b"", b"").id
    jobs.change(job, end)
    assert jobs.change(job, "running").state == end
    assert jobs.unfinished() == []


def test_what_rests_runs_only_after_it_was_resumed(jobs: Jobs) -> None:
    job = jobs.create("me", "r1", b"", b"").id
    jobs.change(job, "paused")
    for state in ("running", "waiting"):
        assert jobs.change(job, state).state == "paused"
    jobs.change(job, "waiting", wakes=True)
    assert jobs.change(job, "running").state == "running"


def test_stretches_are_counted(jobs: Jobs) -> None:
    job = jobs.create("me", "r1", b"", b"").id
    assert [jobs.begin_session(job) for _ in range(3)] == [1, 2, 3]


def test_a_database_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="database"):
        Database("nosuch://place")


def test_a_dataset_file_is_the_same_for_the_same() -> None:
    data = dataset_file.dump([EXAMPLE, EXAMPLE])
    assert dataset_file.load(data) == (EXAMPLE, EXAMPLE)
    assert dataset_file.dump(dataset_file.load(data)) == data


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"\n", b"", "no examples"),
        (b"{", b"[{", "line 1"),
        (b'"caption"', b'"text"', "line 1"),
        (b"abab", b"zzzz", "line 1"),
        (b"640", b"0", "width_px 0"),
        (b"1.0", b"-1.0", "weight -1.0"),
        (b"false", b"3", "flips 3"),
        (b"100", b"1e9", "size_bytes"),
    ],
)
def test_a_dataset_file_that_is_none_is_refused(old: bytes, new: bytes, said: str) -> None:
    data = dataset_file.dump([EXAMPLE])
    broken = b"" if not new else data.replace(old, new, 1)
    with pytest.raises(InvalidRequest, match=r"spec\.dataset") as refusal:
        dataset_file.load(broken)
    assert said in refusal.value.message


def test_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs"
    Database(url)
    with sql.create_engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_jobs_of_an_older_trainer_are_read(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs"
    with sql.create_engine(url).begin() as connection:
        config = Config()
        config.set_main_option("script_location", "trainer_service:jobs/migrations")
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        for row in (
            "INSERT INTO jobs VALUES ('j', 'p', 'r', '', '', 'running', '', NULL, 1, 1, 1.0, 1.0)",
            "INSERT INTO steps VALUES ('j', 0, 0.5, 1.0, 0.1, 0, 0.1, 0.0)",
            "INSERT INTO samples VALUES ('j', 1, 0, 'a dog', 'ab', 7)",
        ):
            connection.execute(sql.text(row))
    jobs = Jobs(Database(url))
    assert jobs.read("j").step == 1
    assert jobs.steps("j", -1, 10)[0].device_bytes is None
    assert jobs.samples("j", 1) == [Sampled("a dog", Named("ab", 7))]


def test_a_database_of_a_newer_trainer_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs"
    Database(url)
    with sql.create_engine(url).begin() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidSettings, match="a newer trainer made it"):
        Database(url)


def test_one_trainer_at_a_time_has_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs"
    first, second = Database(url), Database(url)
    assert first.take()
    assert first.take()
    assert not second.take()
    taking = f"from trainer_service.jobs.database import Database; print(Database({url!r}).take())"
    other = subprocess.run([sys.executable, "-c", taking], capture_output=True, check=True)
    assert other.stdout.strip() == b"False"


def test_a_database_that_is_busy_is_waited_for(tmp_path: Path) -> None:
    jobs = Jobs(Database(f"sqlite:///{tmp_path}/jobs?timeout=0.1"))
    job = jobs.create("me", "r1", b"", b"").id
    other = sqlite3.connect(tmp_path / "jobs", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="database cannot be used"):
        jobs.change(job, "running")
    other.execute("ROLLBACK")
    assert jobs.change(job, "running").state == "running"
