"""The database of jobs: opened, brought up to date, held by one trainer at a time."""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import alembic.command
import sqlalchemy as sql
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine

from zimage_core.errors import InvalidSettings, Unavailable

_MIGRATIONS = "trainer_service.jobs:migrations"
_RETRY_SECONDS = 2.0


class Database:
    """It is waited for: call it from threads."""

    def __init__(self, url: str) -> None:
        """Raises InvalidSettings for what is none."""
        try:
            self._engine = _engine(url)
        except (sql.exc.ArgumentError, ImportError, OSError) as error:
            raise _refusal(url, str(error)) from error
        self._url = self._engine.url.render_as_string(hide_password=True)
        self._writing = threading.Lock()
        """Held for each change: the next number of an event is read before it is written."""
        self._owner: Any = None
        self._bring_up_to_date()

    @contextmanager
    def changing(self) -> Iterator[Connection]:
        """One transaction. Raises Unavailable while the database cannot be used."""
        with _named_errors(), self._writing, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """What is there. Raises Unavailable while the database cannot be used."""
        with _named_errors(), self._engine.connect() as connection:
            yield connection

    def take(self) -> bool:
        """Whether it is this process's from now on, until it ends: another may have it."""
        with _named_errors():
            if self._owner is None and self._engine.dialect.name == "postgresql":
                self._owner = self._locked_there()
            elif self._owner is None:
                self._owner = self._locked_here()
        return self._owner is not None

    def _locked_there(self) -> Connection | None:
        """A connection that holds a lock of the database, which goes with it."""
        key = int.from_bytes(hashlib.sha256(b"zimage trainer").digest()[:8], "little", signed=True)
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if connection.execute(sql.select(sql.func.pg_try_advisory_lock(key))).scalar_one():
            return connection
        connection.close()
        return None

    def _locked_here(self) -> object:
        """A file beside the database's, locked by this process."""
        path = _file(self._engine)
        if path is None:
            return self
        with suppress(ImportError):  # Windows has no such locks
            import fcntl

            lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                return None
        return self

    def _bring_up_to_date(self) -> None:
        tables = sql.inspect(self._engine).get_table_names()
        if "jobs" in tables and "alembic_version" not in tables:
            what = "it was made before there was a first release; begin with another, or remove it"
            raise _refusal(self._url, what)
        config = Config()
        config.set_main_option("script_location", _MIGRATIONS)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        try:
            with self._engine.begin() as connection:
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except CommandError as error:
            raise _refusal(self._url, f"a newer trainer made it ({error})") from error


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except (sql.exc.OperationalError, sql.exc.InterfaceError) as error:
        raise Unavailable(
            f"the trainer's database cannot be used: {error.orig}",
            reason="DATABASE",
            retry_after=_RETRY_SECONDS,
        ) from error


def _engine(url: str) -> Engine:
    engine = sql.create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        if path := _file(engine):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

        @sql.event.listens_for(engine, "connect")
        def _settle(connection: Any, _record: object) -> None:
            connection.isolation_level = None  # or it would begin transactions only to write
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")

        @sql.event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _file(engine: Engine) -> Path | None:
    """Of SQLite; None where it is in memory."""
    path = engine.url.database
    return Path(path).expanduser() if path and path != ":memory:" else None


def _refusal(url: str, what: str) -> InvalidSettings:
    return InvalidSettings(f"database {url}: {what}", fields={"field": "database", "given": url})
