"""The log of a comparison: SQLite, append only. A picture and its scores are named by everything that they depend on.

So a run that was killed goes on where it was, one that gets another method or scorer draws or scores only what is new, and two configs with
the same plain model share its pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..hunt.files import file_error

FORMAT = 1
WAIT = 60.0  # seconds for another run that is writing
TABLES = """
create table if not exists pictures (key text primary key, seconds real not null, memory integer not null, png blob not null);
create table if not exists scores (key text not null, scorer text not null, part text not null, value real not null,
    primary key (key, scorer, part));
create table if not exists judged (key text not null, scorer text not null, primary key (key, scorer));
"""


def key_of(what: Any) -> str:
    """32 hexadecimal digits for plain data."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


class Log:
    """A file with pictures and scores.

    Raises:
        ValueError: when it is no such file, or cannot be used.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error("prove", path, error) from None
        with self._told():
            self.base = sqlite3.connect(path, timeout=WAIT)
            (version,) = self.base.execute("pragma user_version").fetchone()
            (tables,) = self.base.execute("select count(*) from sqlite_master").fetchone()
            if version not in (0, FORMAT) or (version == 0 and tables):
                self.base.close()
                raise ValueError(f"prove: {path} is no log of this version; move it away, or give the run another name.")
            self.base.executescript(TABLES)
            self.base.execute(f"pragma user_version = {FORMAT}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(
                f"prove: the log {self.path} cannot be used ({error}); make room, end other runs of this name, or move the file away."
            ) from None

    def picture(self, key: str) -> bytes | None:
        """A picture as PNG; None where it was not drawn yet."""
        with self._told():
            row = self.base.execute("select png from pictures where key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def has(self, key: str) -> bool:
        """Whether a picture is there."""
        with self._told():
            return self.base.execute("select 1 from pictures where key = ?", (key,)).fetchone() is not None

    def cost(self, key: str) -> tuple[float, int]:
        """Seconds that a picture took, and bytes at the most."""
        with self._told():
            return tuple(self.base.execute("select seconds, memory from pictures where key = ?", (key,)).fetchone())

    def draw(self, key: str, png: bytes, seconds: float, memory: int) -> None:
        """Keep a picture; one that is there stays."""
        with self._told(), self.base:
            self.base.execute("insert or ignore into pictures values (?, ?, ?, ?)", (key, seconds, memory, png))

    def scores(self, key: str, scorer: str) -> dict[str, float] | None:
        """A scorer's values of a picture by part; None where it was not judged yet."""
        with self._told():
            if not self.base.execute("select 1 from judged where key = ? and scorer = ?", (key, scorer)).fetchone():
                return None
            return dict(self.base.execute("select part, value from scores where key = ? and scorer = ?", (key, scorer)))

    def judge(self, key: str, scorer: str, values: Mapping[str, float]) -> None:
        """Keep what a scorer says of a picture, all or nothing."""
        rows = [(key, scorer, part, float(value)) for part, value in values.items()]
        with self._told(), self.base:
            self.base.executemany("insert or ignore into scores values (?, ?, ?, ?)", rows)
            self.base.execute("insert or ignore into judged values (?, ?)", (key, scorer))

    def close(self) -> None:
        self.base.close()
