"""The first tables."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes them."""
    op.create_table(
        "jobs",
        sql.Column("id", sql.String, primary_key=True),
        sql.Column("project", sql.String, nullable=False),
        sql.Column("request_id", sql.String, nullable=False),
        sql.Column("asked", sql.LargeBinary, nullable=False),
        sql.Column("spec", sql.LargeBinary, nullable=False),
        sql.Column("state", sql.String, nullable=False),
        sql.Column("waits_for", sql.String, nullable=False),
        sql.Column("failure", sql.LargeBinary),
        sql.Column("step", sql.Integer, nullable=False),
        sql.Column("session_epoch", sql.Integer, nullable=False),
        sql.Column("created", sql.Double, nullable=False),
        sql.Column("updated", sql.Double, nullable=False),
        sql.UniqueConstraint("project", "request_id"),
    )
    op.create_table(
        "events",
        sql.Column("job", sql.String, sql.ForeignKey("jobs.id"), primary_key=True),
        sql.Column("sequence", sql.Integer, primary_key=True),
        sql.Column("time", sql.Double, nullable=False),
        sql.Column("kind", sql.String, nullable=False),
        sql.Column("step", sql.Integer, nullable=False),
    )
    op.create_table(
        "steps",
        sql.Column("job", sql.String, sql.ForeignKey("jobs.id"), primary_key=True),
        sql.Column("step", sql.Integer, primary_key=True),
        sql.Column("loss", sql.Double),
        sql.Column("gradient_norm", sql.Double),
        sql.Column("learning_rate", sql.Double, nullable=False),
        sql.Column("skipped", sql.Boolean, nullable=False),
        sql.Column("seconds", sql.Double, nullable=False),
        sql.Column("waited_seconds", sql.Double, nullable=False),
    )
    op.create_table(
        "samples",
        sql.Column("job", sql.String, sql.ForeignKey("jobs.id"), primary_key=True),
        sql.Column("step", sql.Integer, primary_key=True),
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("prompt", sql.String, nullable=False),
        sql.Column("sha256", sql.String, nullable=False),
        sql.Column("bytes", sql.BigInteger, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sql.Column("job", sql.String, sql.ForeignKey("jobs.id"), primary_key=True),
        sql.Column("step", sql.Integer, primary_key=True),
        sql.Column("weights_sha256", sql.String, nullable=False),
        sql.Column("weights_bytes", sql.BigInteger, nullable=False),
        sql.Column("state", sql.JSON, nullable=False),
        sql.Column("time", sql.Double, nullable=False),
        sql.Column("validation_loss", sql.Double),
    )
