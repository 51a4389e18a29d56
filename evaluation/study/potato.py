"""A study for the annotation tool Potato (package `potato-annotation`, Pei et al. 2022, arXiv 2212.08620).

Each booklet becomes the fixed batch of one of Potato's users, `annotator-1` and so on, so that the deal is the study's
own. Practice is left out: its feedback is the study pages' own. Potato shows HTML, so all text is escaped.
"""

import html
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...cache.files import make_folder, only_writer, write_file
from ...cache.layout import to_json
from ...errors import ConfigError, DataError, DataNotFound
from .answers import Answer
from .deal import Question, booklets, make_pool
from .items import Item, Items, read_items
from .pages import paragraphs
from .settings import CHECKS, CONFIDENCES, StudySettings

CONFIG, QUESTIONS, OUTPUT = "config.yaml", "questions.jsonl", "annotation_output"
_STATE = "user_state.json"
_LARGEST = 64 << 20


@dataclass(frozen=True)
class PotatoResult:
    """What was written for Potato."""

    path: Path
    questions: int
    """Lines of the data file."""
    annotators: int
    per_annotator: int


def export_potato(items_path: Path, out: Path, settings: StudySettings, *, force: bool = False) -> PotatoResult:
    """Write a folder that `potato start OUT/config.yaml` serves.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
        The item file cannot be read.
    ConfigError
        `out` is not empty and `force` is not given, or more questions are asked for than there are items.
    FolderInUse, DiskFull
    """
    items, _ = read_items(items_path)
    pool = make_pool(items, settings)
    dealt = [
        [question for question in questions if question.kind != "training"]
        for questions in booklets(pool, settings.annotators)
    ]
    by_id = {item.id: item for item in items.items}
    lines = {
        _name(question): {"id": _name(question), "text": _shown(question, by_id[question.item], settings, items)}
        for questions in dealt
        for question in questions
    }
    with only_writer(out):
        if any(out.iterdir()) and not force:
            raise ConfigError(f"{out} is not empty: give another --out, or --force to write over what is there")
        make_folder(out / "data")
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        write_file(out / "data" / QUESTIONS, text.encode())
        # YAML reads JSON.
        write_file(out / CONFIG, to_json(_config(dealt, items, settings)))
    return PotatoResult(out, len(lines), len(dealt), len(dealt[0]))


def _name(question: Question) -> str:
    return f"{question.item}_{question.method}" if question.method else question.item


def _config(dealt: list[list[Question]], items: Items, settings: StudySettings) -> dict[str, Any]:
    checks = CHECKS if items.of_kind("attention") else ""
    introduction = [
        one for text in (settings.consent, settings.instructions, checks, settings.contact) for one in paragraphs(text)
    ]
    return {
        "annotation_task_name": settings.title,
        "task_dir": ".",
        "output_annotation_dir": OUTPUT,
        "data_files": [f"data/{QUESTIONS}"],
        "item_properties": {"id_key": "id", "text_key": "text"},
        "require_password": False,
        "annotation_instructions": "".join(f"<p>{_escaped(one)}</p>" for one in introduction),
        "annotation_schemes": [
            _scheme("answer", "Which class did the model give to the text?", items.classes),
            _scheme("confidence", "How sure are you?", CONFIDENCES),
        ],
        "assignment_strategy": "batch",
        "batch_assignment": {
            "groups": [
                {"annotators": [f"annotator-{number}"], "instances": [_name(question) for question in questions]}
                for number, questions in enumerate(dealt, start=1)
            ]
        },
    }


def _scheme(name: str, description: str, labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "annotation_type": "radio",
        "name": name,
        "description": description,
        # The number in front is what tells the class, whatever its name looks like once it is escaped.
        "labels": [f"{number}. {_escaped(label)}" for number, label in enumerate(labels, start=1)],
        "label_requirement": {"required": True},
    }


def _escaped(text: str) -> str:
    """Text as HTML that shows it: no sign of it is markup, a template, or turns the direction of what follows."""
    plain = "".join(sign if sign.isprintable() else " " for sign in text)
    return html.escape(plain).replace("{", "&#123;").replace("}", "&#125;")


def _isolated(text: str) -> str:
    # Potato's HTML has no `bdi`; these signs do the same.
    return f"\u2068{_escaped(text)}\u2069"


def _shown(question: Question, item: Item, settings: StudySettings, items: Items) -> str:
    if question.kind == "attention":
        asked = _isolated(items.classes[item.prediction])
        return f"<p>This is a check that you read. Please answer “{asked}” and “{CONFIDENCES[-1]}”.</p>"
    concept = item.concepts[question.method]
    parts = []
    if "words" in settings.show and concept.words:
        words = "".join(f"<li>{_isolated(one.word)} ({one.share:.1%})</li>" for one in concept.words)
        parts.append(f"<h3>Words of the group</h3><ul>{words}</ul>")
    if "sentences" in settings.show and concept.sentences:
        sentences = "".join(
            f"<li>{_isolated(one.before)}<mark>{_isolated(one.word)}</mark>{_isolated(one.after)}</li>"
            for one in concept.sentences
        )
        parts.append(f"<h3>Sentences with these words</h3><ul>{sentences}</ul>")
    if "labels" in settings.show and concept.labels:
        shares = zip(items.classes, concept.labels, strict=True)
        labels = "".join(f"<li>{_isolated(name)} ({share:.1%})</li>" for name, share in shares)
        parts.append(f"<h3>Classes of texts with these words</h3><ul>{labels}</ul>")
    return "".join(parts) or "<p>This group is empty: there is nothing to show.</p>"


def read_potato(folder: Path, items_path: Path) -> list[Answer]:
    """The answers that Potato has kept in a folder that `export_potato` wrote, from its users' states.

    A question counts where both the class and the confidence were given.

    Raises
    ------
    DataNotFound
        Nobody has answered yet.
    DataError
        A state is damaged, or does not belong to the item file.
    """
    items, _ = read_items(items_path)
    by_id = {item.id: item for item in items.items}
    paths = sorted((folder / OUTPUT).glob(f"*/{_STATE}"))
    if not paths:
        raise DataNotFound(f"{folder / OUTPUT} holds no {_STATE} of an annotator: nothing was answered with Potato yet")
    answers = []
    for path in paths:
        try:
            if path.stat().st_size > _LARGEST:
                raise DataError(f"{path} has more than {_LARGEST:,} bytes")
            answers += _answers_of(json.loads(path.read_bytes()), items, by_id)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged, or of another study than {items_path}: {error!r}") from error
    return answers


def _answers_of(state: Any, items: Items, by_id: dict[str, Item]) -> list[Answer]:
    places = {name: place for place, name in enumerate(state["instance_id_ordering"])}
    answers = []
    for name, given in state["instance_id_to_label_to_value"].items():
        values = {str(label["schema"]): str(value) for label, value in given}
        if not {"answer", "confidence"} <= values.keys():
            continue
        item, _, method = str(name).partition("_")
        behaviour = state.get("instance_id_to_behavioral_data", {}).get(name, {})
        # Seconds since 1970 of each choice; the last one is the answer.
        changed = max(float(change["timestamp"]) for change in behaviour["annotation_changes"])
        answers.append(
            Answer(
                annotator=str(state["user_id"]),
                place=places[name],
                item=by_id[item].id,
                method=method,
                kind=by_id[item].kind,
                answer=_number(values["answer"], len(items.classes)) - 1,
                confidence=_number(values["confidence"], len(CONFIDENCES)),
                milliseconds=max(0, math.floor(1000 * (changed - float(behaviour["session_start"])))),
                answered_at=datetime.fromtimestamp(changed, UTC).isoformat(timespec="milliseconds"),
            )
        )
    return sorted(answers, key=lambda answer: answer.place)


def _number(label: str, most: int) -> int:
    """The number that a label begins with."""
    number = int(label.split(".", 1)[0])
    if not 1 <= number <= most:
        raise ValueError(f"{number} of {most}")
    return number
