"""What more is told: a device's memory with each step, and lost detail with each picture."""

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Makes room for both; nobody looked before."""
    op.add_column("steps", sql.Column("device_bytes", sql.BigInteger))
    op.add_column("samples", sql.Column("lost_detail", sql.Double))
