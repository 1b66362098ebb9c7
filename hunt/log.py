"""The log of a search: scores of head sets, one SQLite file per search name, in ComfyUI's user folder.

A batch is written in one transaction, so a killed search loses what it was computing and nothing else. A file may hold the scores of
several settings; which of them a search may use is decided by everything that scores depend on (see `identity`).
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np

from .files import file_error, file_name
from .identity import Identity, same

FORMAT = 1  # of the tables; a file of before this was written down has 0 and the same tables
WAIT = 60.0  # seconds for another search that is writing

TABLES = """
create table if not exists searches (id integer primary key, exact text not null, close blob not null);
create table if not exists evaluations (search integer not null, heads text not null, image integer not null, score real not null,
    picture blob, primary key (search, heads, image));
"""
COLUMNS = {"searches": {"id", "exact", "close"}, "evaluations": {"search", "heads", "image", "score", "picture"}}
ELSEWHERE = "move it away, or search under another name"


def log_path(name: str) -> Path:
    """Where a search keeps its evaluations.

    Raises:
        ValueError: for a name that cannot be a file's.
    """
    return Path(folder_paths.get_user_directory()) / "attune" / "headhunter" / f"{file_name(name)}.sqlite"


@dataclass(frozen=True)
class Evaluation:
    """One picture of one head set: the set's text, the picture's number, a score of every scorer, and perhaps a small JPEG."""

    heads: str
    image: int
    scores: tuple[float, ...]
    picture: bytes | None = None


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's errors as sentences that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            do = "is in use by another search. Wait until that one ends, or search under another name"
        elif "full" in text:
            do = "cannot grow: the disk is full. Make room and search again; what was finished is kept"
        elif "readonly" in text or "unable to open" in text:
            do = f"cannot be written. Give ComfyUI's user the right to write in {path.parent}, or {ELSEWHERE}"
        elif "I/O" in text:
            do = f"cannot be read or written ({text}). Look at the disk, or {ELSEWHERE}"
        else:
            do = f"is not a log of HeadHunter, or it is damaged ({text}); {ELSEWHERE}"
        raise ValueError(f"HeadHunter: {path} {do}.") from None


class Log:
    """A file with evaluations.

    Raises:
        ValueError: when the file is not one, is of another version, or cannot be used.
    """

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error("HeadHunter", path, error) from None
        self.path = path
        with _told(path):
            self.base = sqlite3.connect(path, timeout=WAIT)
        try:
            with _told(path):
                (version,) = self.base.execute("pragma user_version").fetchone()
                if version <= FORMAT:
                    self.base.executescript(TABLES)
                held = {t: {row[1] for row in self.base.execute(f"pragma table_info({t})")} for t in COLUMNS}
                if version > FORMAT or held != COLUMNS:
                    raise ValueError(
                        f"HeadHunter: {path} was written by another version of Attune, or by another program; {ELSEWHERE}."
                    )
                if version < FORMAT:
                    self.base.execute(f"pragma user_version = {FORMAT}")
        except ValueError:
            self.base.close()
            raise

    def evaluations(self, identities: Sequence[Identity]) -> Evaluations:
        """The evaluations that a search may use, new or known: one identity for each scorer.

        Raises:
            ValueError: when the file cannot be used.
        """
        with _told(self.path):
            return Evaluations(self.base, self.path, tuple(self._number(*one) for one in identities))

    def _number(self, exact: dict[str, object], close: np.ndarray) -> int:
        text = json.dumps(exact, sort_keys=True)
        with self.base:
            self.base.execute("begin immediate")  # two searches that start at once agree on a number
            for number, blob in self.base.execute("select id, close from searches where exact = ? order by id", (text,)):
                if same(np.frombuffer(blob, np.float32), close):
                    return int(number)
            made = self.base.execute(
                "insert into searches (exact, close) values (?, ?)", (text, close.astype(np.float32).tobytes())
            )
            return int(made.lastrowid or 0)

    def close(self) -> None:
        self.base.close()


@dataclass(frozen=True)
class Evaluations:
    """What one search may use and adds to: a number of ``searches`` for each of its scorers.

    Every method raises ValueError, with what to do, when the file cannot be used any more.
    """

    base: sqlite3.Connection
    path: Path
    numbers: tuple[int, ...]

    def of_others(self) -> int:
        """How many pictures of other settings are in the file."""
        marks = ", ".join("?" * len(self.numbers))
        with _told(self.path):
            query = f"select count(*) from evaluations where search not in ({marks})"
            return int(self.base.execute(query, self.numbers).fetchone()[0])

    def has(self, heads: str, images: Sequence[int]) -> bool:
        """Whether all of these pictures of a set are scored, by every scorer."""
        query = "select image from evaluations where search = ? and heads = ? and image between ? and ?"
        with _told(self.path):
            for number in self.numbers:
                found = self.base.execute(query, (number, heads, min(images), max(images)))
                if not set(images) <= {image for (image,) in found}:
                    return False
        return True

    def add(self, found: Iterable[Evaluation]) -> None:
        """Write a finished batch, all or nothing; what is there already stays.

        Raises:
            ValueError: for a score that is not a number.
        """
        found = list(found)
        if not all(math.isfinite(score) for one in found for score in one.scores):
            raise ValueError("HeadHunter: the scorer gave something that is not a number; choose another scorer or objective.")
        rows = [
            (number, one.heads, one.image, score, one.picture if i == 0 else None)
            for one in found
            for i, (number, score) in enumerate(zip(self.numbers, one.scores, strict=True))
        ]
        with _told(self.path), self.base:
            self.base.executemany("insert or ignore into evaluations values (?, ?, ?, ?, ?)", rows)

    def scores(self, heads: str, count: int, scorer: int = 0) -> list[float]:
        """Scores of a set on the first ``count`` pictures, in order."""
        query = "select score from evaluations where search = ? and heads = ? and image < ? order by image"
        with _told(self.path):
            return [score for (score,) in self.base.execute(query, (self.numbers[scorer], heads, count))]

    def means(self, heads: str, count: int) -> tuple[float, ...]:
        """Every scorer's mean score of a set on the first ``count`` pictures."""
        every = [self.scores(heads, count, i) for i in range(len(self.numbers))]
        if any(len(scores) != count for scores in every):
            raise RuntimeError(f"only {min(map(len, every))} of {count} pictures of “{heads}” are in the log")
        return tuple(math.fsum(scores) / count for scores in every)

    def pictures(self, heads: str) -> list[bytes]:
        """The small pictures that are kept of a set."""
        query = "select picture from evaluations where search = ? and heads = ? and picture is not null order by image"
        with _told(self.path):
            return [picture for (picture,) in self.base.execute(query, (self.numbers[0], heads))]

    def keep_pictures(self, names: Sequence[str]) -> None:
        """Forget the small pictures of all other sets."""
        query = "select distinct heads from evaluations where search = ? and picture is not null"
        with _told(self.path), self.base:
            held = self.base.execute(query, self.numbers[:1]).fetchall()
            others = [(self.numbers[0], heads) for (heads,) in held if heads not in names]
            self.base.executemany("update evaluations set picture = null where search = ? and heads = ?", others)
