"""The classes that a model chooses from, and the data's labels numbered as they are."""

from dataclasses import replace

from ..errors import ConfigError
from .config import ExtractConfig
from .data import Texts
from .source import ModelSource


def classes_of(source: ModelSource, config: ExtractConfig) -> list[str] | None:
    """Names of the classes of the model's head, or of the answers to the prompt; `None` where it is not asked."""
    if config.task == "classify":
        return source.class_names
    return list(config.answer_names) if config.task == "prompt" else None


def with_classes(source: ModelSource, texts: Texts, config: ExtractConfig) -> Texts:
    """The texts with their labels numbered as the classes are.

    Labels given as numbers are taken as they are, names are looked up.

    Raises
    ------
    ConfigError
        Where a label is none of the classes.
    """
    classes = classes_of(source, config)
    if classes is None or texts.class_names is None:
        return texts
    asked = config.task == "prompt"
    whose = "none of the answers" if asked else f"not a class of {source.name}"
    if not texts.labels_are_names:
        if len(texts.class_names) > len(classes):
            known = f"there are {len(classes)} answers" if asked else f"{source.name} knows {len(classes)} classes"
            todo = "give --answers one for each label" if asked else "use a model of this data, or --task none"
            raise ConfigError(
                f"the data has {len(texts.class_names)} labels and {known} ({', '.join(classes)}): {todo}"
            )
        return replace(texts, class_names=classes)
    place = {name.casefold(): number for number, name in enumerate(classes)}
    for name in texts.class_names:
        if name.casefold() not in place:
            there = f"the answers are {', '.join(classes)}" if asked else f"its classes are {', '.join(classes)}"
            todo = (
                f"name the answers as the labels are named, such as --answers {name}=…"
                if asked
                else "give the labels as the model's class names or numbers, or use --task none"
            )
            raise ConfigError(f"the label {name!r} is {whose} ({there}): {todo}")
    number_of = [place[name.casefold()] for name in texts.class_names]
    labels = [None if label is None else number_of[label] for label in texts.label]
    return replace(texts, label=labels, class_names=classes)
