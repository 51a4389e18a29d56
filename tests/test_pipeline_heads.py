"""What heads say: the answers of a prompted decoder, and which models have no head for a task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clvq.errors import ConfigError, ModelError
from clvq.pipeline.language_model import LanguageModel, Task
from clvq.pipeline.source import find_model

from .tiny import DEPTH, WIDTH, load

TinyModel = Callable[..., Path]

ROWS = [[12, 9, 31, 17, 22, 9, 14], [25, 11, 30]]
ANSWERS = [40, 7, 19]
HIDDEN = [f"hidden.{number}" for number in range(DEPTH + 1)]
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"tie_word_embeddings": False},
    # So small that it changes every logit.
    "gemma2": {"final_logit_softcapping": 1.5},
    "gpt_neox": {},
    "opt": {},
}


def prompted(family: str, tiny_model: TinyModel) -> tuple[LanguageModel, Any]:
    """Our model, and transformers' own of the same weights."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, continues=True, **DECODERS[family])
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return load(find_model(str(folder)), task="prompt", answers=ANSWERS), theirs


@pytest.mark.parametrize("family", DECODERS)
def test_answers_have_the_models_own_logits_at_the_last_token_of_each_text(family: str, tiny_model: TinyModel) -> None:
    model, theirs = prompted(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        states, logits = model.read(ids, mask, HIDDEN, logits=True)
        outputs = [theirs(input_ids=torch.tensor([row]), output_hidden_states=True) for row in ROWS]
    assert logits is not None
    assert logits.shape == (2, 3)
    for text, output in enumerate(outputs):
        torch.testing.assert_close(logits[text], output.logits[0, -1, ANSWERS], rtol=1e-4, atol=1e-5)
        for site, expected in zip(HIDDEN, output.hidden_states, strict=True):
            torch.testing.assert_close(states[site][text, : len(ROWS[text])], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("family", DECODERS)
def test_answers_follow_from_replaced_states_and_can_be_differentiated(family: str, tiny_model: TinyModel) -> None:
    model, _ = prompted(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.no_grad():
        states, logits = model.read(ids, mask, HIDDEN, logits=True)
    for site in HIDDEN[:-1]:
        hidden = states[site].clone().requires_grad_()
        again = model.logits_from(site, hidden, ids, mask)
        torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(again[1, 0], hidden)
        # The text's own tokens matter, its padding and other texts do not.
        assert gradient[1, :3].abs().amax(dim=-1).min() > 0
        assert not gradient[0].any()
        assert not gradient[1, 3:].any()


def test_the_gradient_of_an_answer_is_that_of_the_models_own_logit(tiny_model: TinyModel) -> None:
    # hidden.0 of a Llama is the embeddings alone, which transformers takes in place of token ids.
    model, theirs = prompted("llama", tiny_model)
    ids, mask = model.pad(ROWS)
    embedded = theirs.get_input_embeddings()(torch.tensor([ROWS[1]])).detach().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(inputs_embeds=embedded).logits[0, -1, ANSWERS[0]], embedded)
    hidden = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.logits_from("hidden.0", hidden, ids, mask)[1, 0], hidden)
    torch.testing.assert_close(gradient[1, :3], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", DECODERS)
def test_answers_have_their_logits_in_half_precision_too(family: str, dtype: Any, tiny_model: TinyModel) -> None:
    whole, _ = prompted(family, tiny_model)
    half = LanguageModel(whole.source, task="prompt", dtype=dtype, device=torch.device("cpu"), answers=ANSWERS)
    ids, mask = whole.pad(ROWS)
    with torch.inference_mode():
        (_, expected), (_, logits) = (model.read(ids, mask, ["hidden.1"], logits=True) for model in (whole, half))
    assert expected is not None
    assert logits is not None
    assert logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("family", DECODERS)
def test_the_head_sees_one_position_of_each_text_and_nothing_where_no_logits_are_wanted(
    family: str, tiny_model: TinyModel
) -> None:
    model, _ = prompted(family, tiny_model)
    ids, mask = model.pad(ROWS)
    given: list[torch.Size] = []
    model.model.get_output_embeddings().register_forward_hook(lambda _, args, output: given.append(args[0].shape))
    with torch.inference_mode():
        model.read(ids, mask, HIDDEN)
        assert given == []
        model.read(ids, mask, ["hidden.1"], logits=True)
    assert given == [(2, 1, WIDTH)]


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "gpt_neox", "opt", "t5", "bart", "gemma2"])
def test_attention_is_the_fused_one_where_transformers_has_it(family: str, tiny_model: TinyModel) -> None:
    # Gemma 2 caps its attention scores, which the fused one cannot do.
    expected = "eager" if family == "gemma2" else "sdpa"
    assert load(find_model(str(tiny_model(family)))).model.config._attn_implementation == expected


@pytest.mark.parametrize(
    ("task", "family", "settings", "message"),
    [
        ("prompt", "bert", {}, "NAME (bert) does not continue texts, so that it cannot be prompted: use a decoder"),
        ("prompt", "modernbert", {}, "NAME (modernbert) does not continue texts, so that it cannot be prompted: use a"),
        ("prompt", "gpt2", {}, "NAME has no language-model head (it is GPT2Model), so that it cannot be prompted: use"),
        ("prompt", "t5", {}, "NAME is an encoder-decoder (t5), of which the encoder alone is read: use --task none"),
        ("classify", "bart", {}, "NAME is an encoder-decoder (bart), of which the encoder alone is read: use --task"),
    ],
)
def test_a_model_without_the_head_for_a_task_is_named(
    task: Task, family: str, settings: dict[str, Any], message: str, tiny_model: TinyModel
) -> None:
    folder = tiny_model(family, **settings)
    with pytest.raises(ModelError) as caught:
        load(find_model(str(folder)), task=task, answers=ANSWERS if task == "prompt" else ())
    assert str(caught.value).startswith(message.replace("NAME", folder.name))


def test_an_architecture_that_fills_gaps_can_be_prompted_where_it_was_built_as_a_decoder(
    tiny_model: TinyModel,
) -> None:
    folder = tiny_model("bert", continues=True, is_decoder=True)
    model = load(find_model(str(folder)), task="prompt", answers=ANSWERS)
    with torch.inference_mode():
        states, _ = model.read(*model.pad([[12, 9, 31], [12, 9, 8]]), ["hidden.3"])
    torch.testing.assert_close(states["hidden.3"][0, :2], states["hidden.3"][1, :2])


@pytest.mark.parametrize(
    ("task", "answers", "message"),
    [
        ("prompt", [], "the task prompt needs the tokens of its answers, and no other task has any"),
        ("none", [3], "the task prompt needs the tokens of its answers, and no other task has any"),
        ("prompt", [3, 262], r"token 262 is no answer: gpt2\d* has the tokens 0 … 261"),
        ("prompt", [-1], r"token -1 is no answer: gpt2\d* has the tokens 0 … 261"),
    ],
)
def test_answers_that_are_none_are_refused(task: Task, answers: list[int], message: str, tiny_model: TinyModel) -> None:
    source = find_model(str(tiny_model("gpt2", continues=True)))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load(source, task=task, answers=answers)
