"""What a browser is told: texts, classes, and questions without the texts and the predictions they are about."""

import json
from collections.abc import Iterable
from typing import Any

from .deal import Question
from .items import Item, Items
from .settings import CHECKS, CONFIDENCES, PRACTICE, StudySettings


def page_data(settings: StudySettings, items: Items, digest: str) -> dict[str, Any]:
    """What every page knows."""
    return {
        "study": digest,
        "title": settings.title,
        "consent": paragraphs(settings.consent),
        "instructions": [
            *paragraphs(settings.instructions),
            *([PRACTICE] if items.of_kind("training") else []),
            *([CHECKS] if items.of_kind("attention") else []),
        ],
        "contact": paragraphs(settings.contact),
        "completion": paragraphs(settings.completion),
        "show": settings.show,
        "words": settings.words,
        "classes": items.classes,
        "confidences": CONFIDENCES,
    }


def static_data(
    settings: StudySettings, items: Items, digest: str, booklets: Iterable[Iterable[Question]]
) -> dict[str, Any]:
    """What the pages know that work without a server: all that can be asked, and the right answers of practice."""
    by_id = {item.id: item for item in items.items}
    views: dict[str, dict[str, Any]] = {}
    dealt = []
    for one in booklets:
        dealt.append([[question.item, question.method] for question in one])
        for question in one:
            views.setdefault(
                f"{question.item} {question.method}", shown(question, by_id[question.item], settings, items)
            )
    right = {item.id: item.prediction for item in items.of_kind("training")}
    return {**page_data(settings, items, digest), "booklets": dealt, "views": views, "right": right}


def shown(question: Question, item: Item, settings: StudySettings, items: Items) -> dict[str, Any]:
    """A question's words, sentences and labels, as far as they are to be shown."""
    if question.kind == "attention":
        # It says itself what to answer, so that this tells nothing more.
        return {"check": item.prediction, "words": [], "sentences": [], "labels": []}
    concept = item.concepts[question.method]
    show = settings.show
    return {
        "check": None,
        "words": [[word.word, word.share] for word in concept.words] if "words" in show else [],
        "sentences": [[one.before, one.word, one.after] for one in concept.sentences] if "sentences" in show else [],
        "labels": list(concept.labels) if "labels" in show else [],
    }


def right_answer(question: Question, item: Item) -> int | None:
    """What a person is told after the answer; `None` but for practice."""
    return item.prediction if question.kind == "training" else None


def paragraphs(text: str) -> list[str]:
    """A plain text's paragraphs: what stands between empty lines."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            parts[-1].append(line.strip())
        else:
            parts.append([])
    return [" ".join(lines) for lines in parts if lines]


def script(data: dict[str, Any]) -> bytes:
    """Data as a script that defines it; no sign in it can end the script or be taken for markup."""
    return f"window.studyData = {safe_json(data)};\n".encode("ascii")


def safe_json(value: Any) -> str:
    """JSON that may stand in a script: ASCII, and no sign in it can end the script or be taken for markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
