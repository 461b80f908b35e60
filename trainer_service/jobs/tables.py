"""What the trainer remembers of jobs, as tables."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

METADATA = MetaData()

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String, primary_key=True),
    Column("project", String, nullable=False),
    Column("request_id", String, nullable=False),
    Column("asked", LargeBinary, nullable=False),  # the spec as it came
    Column("spec", LargeBinary, nullable=False),  # with everything decided
    Column("state", String, nullable=False),
    Column("waits_for", String, nullable=False, default=""),
    Column("failure", LargeBinary),
    Column("step", Integer, nullable=False, default=0),
    Column("session_epoch", Integer, nullable=False, default=0),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    UniqueConstraint("project", "request_id"),
)

EVENTS = Table(
    "events",
    METADATA,
    Column("job", ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("time", Double, nullable=False),
    Column("kind", String, nullable=False),
    Column("step", Integer, nullable=False),
)

STEPS = Table(
    "steps",
    METADATA,
    Column("job", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("loss", Double),
    Column("gradient_norm", Double),
    Column("learning_rate", Double, nullable=False),
    Column("skipped", Boolean, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("waited_seconds", Double, nullable=False),
    Column("device_bytes", BigInteger),
)

SAMPLES = Table(
    "samples",
    METADATA,
    Column("job", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("prompt", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("lost_detail", Double),
)

CHECKPOINTS = Table(
    "checkpoints",
    METADATA,
    Column("job", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("weights_sha256", String, nullable=False),
    Column("weights_bytes", BigInteger, nullable=False),
    Column("state", JSON, nullable=False),  # digest and bytes of each part
    Column("time", Double, nullable=False),
    Column("validation_loss", Double),
)
