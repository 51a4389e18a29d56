"""Answers in SQLite: every answer is on the disk before it is acknowledged, once, whatever is sent again.

A person's questions are planned when they begin (see `deal`), and planned anew when it has changed who still takes
part. An answer and the dealing of the next question are one transaction. The first answer to a question stays.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from .database_file import errors_of, open_database
from .deal import Pool, Question, booklet, main_questions


@dataclass(frozen=True)
class Standing:
    """How far an annotator is."""

    consented: bool
    answered: int
    total: int
    place: int | None
    """Of the open question; `None` before consent and after the last answer."""
    question: Question | None


@dataclass(frozen=True)
class Given:
    """What a person answered, as it comes in."""

    place: int
    item: str
    method: str
    answer: int
    confidence: int
    milliseconds: int


class Database:
    """The answers of a study, open for writing; one writer at a time.

    Parameters
    ----------
    path
        Created where missing, for its owner's eyes only.
    digest
        Of the study.
    idle
        After so long without an answer, what is planned for a person no longer counts as expected.

    Raises
    ------
    DataError
        The file is damaged, or belongs to another study.
    FormatVersion, ConfigError, DiskFull
    """

    def __init__(self, path: Path, digest: str, pool: Pool, *, idle: timedelta) -> None:
        self.path, self._pool, self._idle = path, pool, idle
        self._item_at = {item: place for place, item in enumerate(pool.main)}
        self._method_at = {method: place for place, method in enumerate(pool.methods)}
        self._connection = open_database(path, digest)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with errors_of(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # Where the disk is full, SQLite may have rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _one(self, query: str, *values: object) -> Any:
        return self._connection.execute(query, values).fetchone()

    def tokens(self, annotators: int = 0) -> list[str]:
        """The secret of each annotator, from number 1 on; new ones are made up to that many, none is removed."""
        with self._transaction():
            found = [token for (token,) in self._connection.execute("SELECT token FROM annotators ORDER BY number")]
            new = [secrets.token_urlsafe(24) for _ in range(annotators - len(found))]
            self._connection.executemany(
                "INSERT INTO annotators (number, token) VALUES (?, ?)", enumerate(new, start=len(found) + 1)
            )
        return found + new

    def standing(self, annotator: int) -> Standing:
        """How far an annotator is; changes nothing."""
        with errors_of(self.path):
            total, answered = self._one(
                "SELECT count(*), count(answered_at) FROM questions WHERE annotator = ?", annotator
            )
            row = self._one(
                "SELECT place, item, method, kind FROM questions "
                "WHERE annotator = ? AND dealt_at IS NOT NULL AND answered_at IS NULL",
                annotator,
            )
            question = Question(*row[1:]) if row else None
            return Standing(total > 0, answered, total, row[0] if row else None, question)

    def consent(self, annotator: int, *, now: datetime) -> Standing:
        """Plan an annotator's questions and deal the first one; where they have begun, nothing changes."""
        with self._transaction():
            if not self._one("SELECT 1 FROM questions WHERE annotator = ?", annotator):
                active = self._active(annotator, now)
                questions = booklet(self._pool, self._counts(active), annotator)
                self._connection.executemany(
                    "INSERT INTO questions (annotator, place, item, method, kind) VALUES (?, ?, ?, ?, ?)",
                    [(annotator, place, one.item, one.method, one.kind) for place, one in enumerate(questions)],
                )
                self._connection.execute(
                    "UPDATE annotators SET consented_at = ?, active_at = ? WHERE number = ?",
                    (_text(now), _text(now), annotator),
                )
                self._planned(annotator, active, now)
                self._deal(annotator, now)
        return self.standing(annotator)

    def answer(self, annotator: int, given: Given, *, now: datetime) -> Question | None:
        """Save an answer and deal the next question. Sent again, it changes nothing; the first answer stays.

        Returns
        -------
        What was answered; `None` where this is not what was asked at that place.
        """
        with self._transaction():
            row = self._one(
                "SELECT item, method, kind FROM questions WHERE annotator = ? AND place = ? AND item = ? "
                "AND method = ? AND dealt_at IS NOT NULL",
                annotator,
                given.place,
                given.item,
                given.method,
            )
            if row is None:
                return None
            changed = self._connection.execute(
                "UPDATE questions SET answered_at = ?, answer = ?, confidence = ?, milliseconds = ? "
                "WHERE annotator = ? AND place = ? AND answered_at IS NULL",
                (_text(now), given.answer, given.confidence, given.milliseconds, annotator, given.place),
            ).rowcount
            if changed:
                self._plan_anew(annotator, now)
                more = self._deal(annotator, now)
                self._connection.execute(
                    "UPDATE annotators SET active_at = ? WHERE number = ?", (_text(now) if more else None, annotator)
                )
        return Question(*row)

    def _deal(self, annotator: int, now: datetime) -> bool:
        """Deal the next question; whether there was one."""
        changed = self._connection.execute(
            "UPDATE questions SET dealt_at = ? WHERE annotator = ? AND place = "
            "(SELECT min(place) FROM questions WHERE annotator = ? AND dealt_at IS NULL)",
            (_text(now), annotator, annotator),
        ).rowcount
        return changed > 0

    def _active(self, annotator: int, now: datetime) -> list[int]:
        """The others of whom more answers are expected."""
        return sorted(
            self._numbers(
                "SELECT number FROM annotators WHERE number <> ? AND active_at >= ?",
                annotator,
                _text(now - self._idle),
            )
        )

    def _counts(self, active: list[int]) -> Int64[np.ndarray, "item method"]:
        """Answers of each cell: given, or expected of those who are active."""
        marks = ",".join("?" * len(active))
        found = self._connection.execute(
            "SELECT item, method, count(*) FROM questions "
            f"WHERE kind = 'main' AND (answered_at IS NOT NULL OR annotator IN ({marks})) GROUP BY item, method",
            active,
        )
        counts = np.zeros((len(self._pool.main), len(self._pool.methods)), dtype=np.int64)
        for item, method, number in found:
            counts[self._item_at[item], self._method_at[method]] = number
        return counts

    def _plan_anew(self, annotator: int, now: datetime) -> None:
        """Where it has changed who takes part, plan what the annotator has not seen yet so that it fills the gaps."""
        active = self._active(annotator, now)
        before, planned_at, active_at = self._one(
            "SELECT planned_for, planned_at, active_at FROM annotators WHERE number = ?", annotator
        )
        # Of those who have finished since, everything came that was expected; those who began since have planned around
        # what this annotator was expected to answer.
        finished = self._numbers("SELECT number FROM annotators WHERE consented_at IS NOT NULL AND active_at IS NULL")
        begun = self._numbers("SELECT number FROM annotators WHERE consented_at > ?", planned_at)
        if set(map(int, before.split())) - finished == set(active) - begun and active_at >= _text(now - self._idle):
            if begun:
                self._planned(annotator, active, now)
            return
        places = self._connection.execute(
            "SELECT place FROM questions WHERE annotator = ? AND dealt_at IS NULL AND kind = 'main' ORDER BY place",
            (annotator,),
        ).fetchall()
        seen = np.zeros(len(self._pool.main), dtype=np.bool_)
        own = np.zeros(len(self._pool.methods), dtype=np.int64)
        for item, method in self._connection.execute(
            "SELECT item, method FROM questions WHERE annotator = ? AND dealt_at IS NOT NULL AND kind = 'main'",
            (annotator,),
        ):
            seen[self._item_at[item]] = True
            own[self._method_at[method]] += 1
        questions = main_questions(self._pool, self._counts(active), seen, own, annotator)
        self._connection.execute(
            "DELETE FROM questions WHERE annotator = ? AND dealt_at IS NULL AND kind = 'main'", (annotator,)
        )
        self._connection.executemany(
            "INSERT INTO questions (annotator, place, item, method, kind) VALUES (?, ?, ?, ?, 'main')",
            [(annotator, place, one.item, one.method) for (place,), one in zip(places, questions, strict=True)],
        )
        self._planned(annotator, active, now)

    def _planned(self, annotator: int, active: list[int], now: datetime) -> None:
        """Note for whom the annotator's questions leave room."""
        self._connection.execute(
            "UPDATE annotators SET planned_for = ?, planned_at = ? WHERE number = ?",
            (" ".join(map(str, active)), _text(now), annotator),
        )

    def _numbers(self, query: str, *values: object) -> set[int]:
        return {number for (number,) in self._connection.execute(query, values)}


def _text(time: datetime) -> str:
    # Of equal length, so that texts compare as times.
    return time.astimezone(UTC).isoformat(timespec="milliseconds")
