"""From a file, a list of answers and a model's chat template to the settings of a prompted extraction."""

from datetime import date
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .prompt import MARKER
from .source import ModelSource

FIXED_DATE = "26 Jul 2024"
"""What templates that take a date are given, so that a cache does not depend on the day it was made."""
_DATES = ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y")


def prompt_settings(
    source: ModelSource, *, task: str, prompt: Path | None, answers: str, chat: bool | None
) -> dict[str, Any]:
    """The fields of `ExtractConfig` that have to do with a prompt.

    Parameters
    ----------
    prompt
        A UTF-8 file with the prompt.
    answers
        Comma-separated, each `answer` or `name=answer`.
    chat
        Write the prompt as a user's message with the model's chat template; `None`: where there is one.

    Raises
    ------
    ConfigError
        Where the options do not fit the task or each other, the file cannot be read, or the model's chat template
        is absent or of no use.
    """
    if task != "prompt":
        given = {"--prompt": prompt is not None, "--answers": bool(answers), "--chat": chat is not None}
        for option in (name for name, there in given.items() if there):
            raise ConfigError(f"{option} is for --task prompt, and --task is {task}")
        return {}
    if prompt is None or not answers:
        raise ConfigError("--task prompt needs --prompt FILE and --answers, such as --answers negative,positive")
    names, texts = _answers(answers)
    template = source.tokenizer.chat_template
    if chat and not template:
        raise ConfigError(f"{source.name} has no chat template: use --no-chat")
    wording = _read(prompt)
    chat = bool(template) if chat is None else chat
    return {
        "prompt": in_chat(source, wording) if chat else wording,
        "answers": texts,
        "answer_names": names,
        "chat": chat,
    }


def in_chat(source: ModelSource, wording: str) -> str:
    """A prompt as a user's message in the model's chat template, up to where the model's reply begins.

    Raises
    ------
    ConfigError
        Where the template fails, changes the message, or writes the day's date.
    """
    from jinja2 import TemplateError

    if wording.count(MARKER) != 1:
        # Said better, and for all prompts, by `Prompt`.
        return wording
    template = source.tokenizer.get_chat_template()
    settings: dict[str, Any] = {}
    if "date_string" in template:
        settings["date_string"] = FIXED_DATE
    elif "strftime_now" in template:
        raise ConfigError(_dated(source))
    if "enable_thinking" in template:
        # The answer is to be the first thing said.
        settings["enable_thinking"] = False
    stand_in = "ClvqText"
    while stand_in in wording or stand_in in template:
        stand_in += "X"
    message = {"role": "user", "content": wording.replace(MARKER, stand_in)}
    try:
        shown = source.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, **settings)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"the chat template of {source.name} fails ({error}): use --no-chat") from error
    if shown.count(stand_in) != 1 or MARKER in shown:
        raise ConfigError(
            f"the chat template of {source.name} does not write the message once, as it is: use --no-chat with the "
            "template's text written out in the prompt"
        )
    if any(day in shown and day not in wording for day in map(date.today().strftime, _DATES)):
        raise ConfigError(_dated(source))
    return str(shown.replace(stand_in, MARKER))


def _dated(source: ModelSource) -> str:
    return (
        f"the chat template of {source.name} writes today's date, so that the cache would be another one tomorrow: "
        "use --no-chat with the template's text, and a date, written out in the prompt"
    )


def _answers(given: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes, and what the model says for each."""
    names, texts = [], []
    for part in given.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        names.append(name)
        texts.append(text if equals else name)
        if not name:
            raise ConfigError(f"--answers {given}: an answer has no name; write them as negative,positive")
        if name.casefold() in [other.casefold() for other in names[:-1]]:
            raise ConfigError(f"--answers {given}: the class {name!r} is given twice")
    return tuple(names), tuple(texts)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--prompt {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    # Editors end the last line, which is no part of the prompt.
    return text.replace("\r\n", "\n").removesuffix("\n")
