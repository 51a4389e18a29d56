"""The wording of a prompt: the file, the answers, and a model's chat template."""

import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from clvq.errors import ConfigError
from clvq.pipeline.prompt import Prompt
from clvq.pipeline.source import ModelSource
from clvq.pipeline.wording import FIXED_DATE, in_chat, prompt_settings
from hypothesis import given
from hypothesis import strategies as st

from .tiny import KINDS, make_config, make_tokenizer

WORDING = "say how\n{text}\nit is. mood: "
ANSWERS = ("joy", "anger", "fear")
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@cache
def source(kind: str, template: str | None = None) -> ModelSource:
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template
    return ModelSource("tiny", None, Path("nowhere"), make_config("llama", tokenizer), tokenizer)


def settings_of(source: ModelSource, folder: Path, wording: str = WORDING, **options: Any) -> dict[str, Any]:
    file = folder / "prompt.txt"
    file.write_bytes(wording.encode())
    given: dict[str, Any] = {"task": "prompt", "prompt": file, "answers": ",".join(ANSWERS), "chat": None}
    return prompt_settings(source, **(given | options))


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_what_stands_in_the_file_is_the_prompt(ending: str, tmp_path: Path) -> None:
    wording = "Is {this} {text}\r\n{}{0} %s \\n? "
    found = settings_of(source("bytes"), tmp_path, f"\ufeff{wording}{ending}", answers="no = nay ,yes,  may be=so so")
    assert found == {
        "prompt": wording.replace("\r\n", "\n"),
        "answers": ("nay", "yes", "so so"),
        "answer_names": ("no", "yes", "may be"),
        "chat": False,
    }
    prompt = Prompt(source("bytes").tokenizer, found["prompt"], found["answers"], chat=False)
    (tokens,) = prompt.tokenize(["{text}"], max_length=100)
    string = (
        "".join(source("bytes").tokenizer.convert_ids_to_tokens(tokens.ids.tolist()))
        .replace("Ġ", " ")
        .replace("Ċ", "\n")
    )
    assert string == "Is {this} {text}\n{}{0} %s \\n? "


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "--task prompt needs --prompt FILE and --answers, such as --answers negative,p"),
    "no answers": ({"answers": ""}, "--task prompt needs --prompt FILE and --answers, such as --answers negative,p"),
    "a prompt without the task": ({"task": "none"}, "--prompt is for --task prompt, and --task is none"),
    "answers without the task": (
        {"task": "classify", "prompt": None},
        "--answers is for --task prompt, and --task is classify",
    ),
    "chat without the task": (
        {"task": "none", "prompt": None, "answers": "", "chat": False},
        "--chat is for --task prompt, and --task is none",
    ),
    "no file": ({"prompt": Path("nowhere/p.txt")}, "--prompt nowhere/p.txt cannot be read: No such file or directory"),
    "a folder": ({"prompt": Path()}, "--prompt . cannot be read: Is a directory"),
    "no template": ({"chat": True}, "tiny has no chat template: use --no-chat"),
    "a class twice": ({"answers": "No=nay,no=never"}, "--answers No=nay,no=never: the class 'no' is given twice"),
    "a class without a name": ({"answers": "=a,b"}, "--answers =a,b: an answer has no name; write them as negative,po"),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_options_that_do_not_fit_are_named(mistake: str, tmp_path: Path) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        settings_of(source("bytes"), tmp_path, **options)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"^--prompt .*/p is not UTF-8 \(byte 2\): save it as UTF-8$"):
        settings_of(source("bytes"), tmp_path, prompt=tmp_path / "p")


@given(text=st.text(max_size=40), kind=st.sampled_from(KINDS))
def test_a_chat_is_what_the_tokenizer_makes_of_the_message(text: str, kind: str) -> None:
    model = source(kind, CHAT)
    wording = in_chat(model, "how is {text}?\n")
    assert wording == "<s>[user]how is {text}?\n</s>[assistant]"
    prompt = Prompt(model.tokenizer, wording, ("joy", "fear"), chat=True)
    (tokens,) = prompt.tokenize([text], max_length=10_000)
    message = [{"role": "user", "content": f"how is {text}?\n"}]
    theirs = model.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokens.ids.tolist() == theirs
    # The template's own tokens are the instruction's, whatever they are.
    assert set(tokens.kind[: tokens.kind.argmin()].tolist()) <= {3}
    assert set(tokens.kind.tolist()) <= {0, 3}


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    model = source("metaspace", CHAT)
    chat = settings_of(model, tmp_path)
    assert chat["chat"]
    assert chat["prompt"] == f"<s>[user]{WORDING}</s>[assistant]"
    assert settings_of(model, tmp_path, chat=True) == chat
    plain = settings_of(model, tmp_path, chat=False)
    assert (plain["chat"], plain["prompt"]) == (False, WORDING)
    # The text may stand at the end of the message, since the reply begins behind it.
    assert settings_of(model, tmp_path, "how is {text}")["prompt"] == "<s>[user]how is {text}</s>[assistant]"


def test_a_template_that_takes_a_date_is_given_a_fixed_one() -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    model = source("bytes", f"{dated}{{{{ date_string + ' ' }}}}{CHAT}")
    assert in_chat(model, "how is {text}?") == f"{FIXED_DATE} <s>[user]how is {{text}}?</s>[assistant]"


def test_a_template_that_can_have_the_model_think_first_is_told_not_to() -> None:
    thinks = "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    assert in_chat(source("bytes", CHAT + thinks), "{text}").endswith("[assistant]<think></think>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ strftime_now('%Y') }}" + CHAT,
            "the chat template of tiny writes today's date, so that the cache would be another one tomorrow: use "
            "--no-chat with the template's text, and a date, written out in the prompt",
        ),
        ("{{ today }}" + CHAT, "the chat template of tiny writes today's date, so that the cache would be another"),
        ("{{ raise_exception('no system') }}", r"the chat template of tiny fails (no system): use --no-chat"),
        ("{{ messages[0].content | upper }}", "the chat template of tiny does not write the message once, as it is"),
        (CHAT + CHAT, "the chat template of tiny does not write the message once, as it is: use --no-chat with the"),
        (CHAT + "{{ '{text}' }}", "the chat template of tiny does not write the message once, as it is: use --no-"),
    ],
)
def test_a_template_that_cannot_be_relied_on_is_refused(template: str, message: str) -> None:
    model = source("bytes", template.replace("{{ today }}", f"{date.today():%d %B %Y} "))
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        in_chat(model, "how is {text}?")
