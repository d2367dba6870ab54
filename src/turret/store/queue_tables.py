"""The tables of the queue of trainings. See `turret.store.queue`.

- `queue`: a row per queued run: whose it is, how urgent, how often it was tried, and the recipe as it was given; `due`
  is the second, by the catalog's clock, from which on it may be tried; `cancelled` is when its end was asked for
- `queue_limits`: how many trainings of a tenant may run and wait; NULL for no limit
- `run_log`: lines of progress and errors of queued runs, append-only
"""

from __future__ import annotations

from sqlalchemy import Column, Float, ForeignKey, Integer, String, Table, Text

from turret.database import bytewise, metadata, runs

DEFAULT = "default"

queue = Table(
    "queue",
    metadata,
    Column("run", ForeignKey(runs.c.id), primary_key=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT, index=True),
    Column("priority", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("queued", String(32), nullable=False),
    Column("started", String(32)),
    Column("due", Float, nullable=False),
    Column("cancelled", String(32)),
    Column("who", String(100)),
    Column("recipe", Text, nullable=False),
)
queue_limits = Table(
    "queue_limits",
    metadata,
    Column("tenant", bytewise(64), primary_key=True, server_default=DEFAULT),
    Column("running", Integer),
    Column("waiting", Integer),
)
run_log = Table(
    "run_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", ForeignKey(runs.c.id), nullable=False, index=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("at", String(32), nullable=False),
    Column("line", String(500), nullable=False),
)
