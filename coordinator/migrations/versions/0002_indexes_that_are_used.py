"""indexes that are used

On SQLite the partial ones were not: it takes one only where a query has its very words (`suspect = 1`, not `suspect`).
A report cost 77 ms on a machine with 100,000 experiments, and finding one by its tested commit read them all.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("ix_experiments_heads", "ix_experiments_reruns", "ix_experiments_suspects"):
        op.drop_index(name, table_name="experiments")
    op.create_index(
        "ix_experiments_heads",
        "experiments",
        ["machine_id", "profile", "rung", "number"],
        sqlite_where=sa.text("status = 'keep' AND suspect = 0"),
        postgresql_where=sa.text("status = 'keep' AND NOT suspect"),
    )
    op.create_index(
        "ix_experiments_reruns",
        "experiments",
        ["machine_id", "profile", "rung", "position", "squares", "scored"],
        sqlite_where=sa.text("scored > 1 AND suspect = 0"),
        postgresql_where=sa.text("scored > 1 AND NOT suspect"),
    )
    op.create_index(
        "ix_experiments_suspects",
        "experiments",
        ["machine_id", "profile", "rung"],
        sqlite_where=sa.text("suspect = 1"),
        postgresql_where=sa.text("suspect"),
    )
    op.create_index("ix_experiments_tested", "experiments", ["tested"])
