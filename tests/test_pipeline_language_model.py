"""Hidden states read and replaced in a real forward pass, for every family that is tested, and what heads say."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from clvq.errors import ClvqError, ConfigError, ModelError
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.source import find_model
from torch import Tensor

from .tiny import DEPTH, FAMILIES, WIDTH, load, make_tokenizer

TinyModel = Callable[..., Path]

# Two texts, the second padded; ids that no tokenizer here gives a special meaning.
ROWS = [[12, 9, 31, 17, 22, 9, 14], [25, 11, 30]]
HIDDEN = [f"hidden.{number}" for number in range(DEPTH + 1)]


def classifier(family: str, tiny_model: TinyModel, **changes: Any) -> tuple[LanguageModel, Any]:
    """Our model, and transformers' own of the same weights."""
    from transformers import AutoModelForSequenceClassification

    folder = tiny_model(family, classes=3, **changes)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval().requires_grad_(False)
    return load(find_model(str(folder)), task="classify"), theirs


@contextmanager
def counting(model: LanguageModel) -> Iterator[list[int]]:
    """How often each block computes: calls of its first part."""
    calls = [0] * model.depth

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    handles = []
    for number, block in enumerate(model._blocks):
        handles += [part.register_forward_hook(count(number)) for part in list(block.modules())[1:]]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_transformers_own_at_every_site(family: str, tiny_model: TinyModel) -> None:
    from transformers import AutoModel

    folder = tiny_model(family)
    model = load(find_model(str(folder)))
    ids, mask = model.pad(ROWS)
    assert mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    with torch.inference_mode():
        theirs = AutoModel.from_pretrained(folder).eval()(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True
        )
        states, logits = model.read(ids, mask, HIDDEN)
    assert logits is None
    assert len(states) == DEPTH + 1 == len(theirs.hidden_states)
    for site, expected in zip(HIDDEN, theirs.hidden_states, strict=True):
        assert states[site].shape == (2, 7, WIDTH)
        torch.testing.assert_close(states[site][mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[HIDDEN[-1]][mask], theirs.last_hidden_state[mask], rtol=1e-5, atol=1e-5)
    for site, above in pairwise(HIDDEN):
        assert not torch.allclose(states[site][mask], states[above][mask], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model(family))))
    with torch.inference_mode():
        together, _ = model.read(*model.pad(ROWS), [HIDDEN[0], HIDDEN[-1]])
        alone, _ = model.read(*model.pad(ROWS[1:]), [HIDDEN[0], HIDDEN[-1]])
    for site in (HIDDEN[0], HIDDEN[-1]):
        torch.testing.assert_close(together[site][1, :3], alone[site][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"), [("t5", ()), ("t5", (("feed_forward_proj", "gated-gelu"),)), ("bart", ())]
)
def test_of_an_encoder_decoder_the_encoder_is_read(family: str, changes: Any, tiny_model: TinyModel) -> None:
    from transformers import AutoModel

    folder = tiny_model(family, **dict(changes))
    model = load(find_model(str(folder)))
    assert model.depth == DEPTH
    ids, mask = model.pad(ROWS)
    whole = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = whole(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=ids, output_hidden_states=True)
        states, _ = model.read(ids, mask, HIDDEN)
    assert len(theirs.encoder_hidden_states) == DEPTH + 1
    for site, expected in zip(HIDDEN, theirs.encoder_hidden_states, strict=True):
        torch.testing.assert_close(states[site][mask], expected[mask], rtol=1e-5, atol=1e-5)
    # The decoder is not kept.
    ours, all_of_it = (sum(part.numel() for part in net.parameters()) for net in (model.model, whole))
    assert ours < 0.7 * all_of_it
    assert ours == sum(part.numel() for part in whole.get_encoder().parameters())


def test_an_encoder_stored_without_its_decoder_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    folder = Path(shutil.copytree(tiny_model("t5"), tmp_path / "model"))
    T5EncoderModel.from_pretrained(folder).save_pretrained(folder)
    model, whole = load(find_model(str(folder))), load(find_model(str(tiny_model("t5"))))
    with torch.inference_mode():
        ours, theirs = (m.read(*m.pad(ROWS), ["hidden.3"])[0]["hidden.3"] for m in (model, whole))
    assert torch.equal(ours, theirs)


def test_a_model_whose_blocks_share_their_weights_is_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("albert", kind="metaspace")
    with pytest.raises(ModelError) as caught:
        load(find_model(str(folder)))
    assert str(caught.value) == (
        f"the layers of {folder.name} (albert) cannot be read: no stack of 3 blocks was found; there is "
        "encoder.albert_layer_groups (1), encoder.albert_layer_groups.0.albert_layers (1); "
        "this architecture is not supported"
    )


def test_a_model_that_takes_something_else_than_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"d_model": WIDTH, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokenizer = make_tokenizer("bytes")
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")}
    config = AutoConfig.for_model("whisper", encoder_layers=DEPTH, vocab_size=len(tokenizer), **sizes, **ids)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load(find_model(str(tmp_path / "model")))
    said = str(caught.value)
    assert said.startswith("the layers of model (whisper) cannot be read: it does not run on token ids alone (")
    assert said.endswith("); this architecture is not supported")
    assert "\n" not in said


def test_a_site_of_another_width_than_the_model_is_refused_and_the_others_are_read(tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model("opt", word_embed_proj_dim=16))))
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        states, _ = model.read(ids, mask, ["hidden.0", "mlp_out.2"])
        assert {state.shape for state in states.values()} == {(2, 7, WIDTH)}
        with pytest.raises(
            ModelError, match=r"^hidden\.3 of opt\d+ has 16 channels where its other sites have 32: leave"
        ):
            model.read(ids, mask, ["hidden.3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_above_the_highest_site_runs(family: str, tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model(family))))
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        whole, _ = model.read(ids, mask, HIDDEN)
        for numbers in ([0], [1], [2, 0], [DEPTH]):
            with counting(model) as calls:
                states, _ = model.read(ids, mask, [HIDDEN[number] for number in numbers])
            assert [count > 0 for count in calls] == [block < max(numbers) for block in range(DEPTH)]
            for number in numbers:
                assert torch.equal(states[HIDDEN[number]], whole[HIDDEN[number]])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_classifiers_own_and_run_all_blocks(family: str, tiny_model: TinyModel) -> None:
    model, theirs = classifier(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.inference_mode(), counting(model) as calls:
        states, logits = model.read(ids, mask, ["hidden.1"], logits=True)
        expected = [theirs(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    assert all(calls)
    assert list(states) == ["hidden.1"]
    assert logits is not None
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_the_models_own_states_are_its_logits(family: str, tiny_model: TinyModel) -> None:
    model, _ = classifier(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        states, logits = model.read(ids, mask, HIDDEN[:-1], logits=True)
        assert logits is not None
        for number, site in enumerate(HIDDEN[:-1]):
            with counting(model) as calls:
                again = model.logits_from(site, states[site], ids, mask)
            torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
            assert [count > 0 for count in calls] == [block >= number for block in range(DEPTH)]
        # Nothing of the patch is left behind.
        _, after = model.read(ids, mask, ["hidden.0"], logits=True)
    assert after is not None
    assert torch.equal(after, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_follow_the_given_states_alone(family: str, tiny_model: TinyModel) -> None:
    model, _ = classifier(family, tiny_model)
    ids, mask = model.pad([[12, 9, 31, 17], [25, 11, 30, 8]])
    same = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).expand(2, 4, WIDTH)
    with torch.inference_mode():
        for site in ("hidden.1", "hidden.2"):
            logits = model.logits_from(site, same, ids, mask)
            torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
            other = model.logits_from(site, -same, ids, mask)
            assert not torch.allclose(logits, other, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_can_be_differentiated(family: str, tiny_model: TinyModel) -> None:
    model, _ = classifier(family, tiny_model)
    model.model.double()
    ids, mask = model.pad(ROWS)
    with torch.no_grad():
        hidden = model.read(ids, mask, ["hidden.1"])[0]["hidden.1"]
    hidden.requires_grad_()

    def score(states: Tensor) -> Tensor:
        return model.logits_from("hidden.1", states, ids, mask)[:, 0].sum()

    (gradient,) = torch.autograd.grad(score(hidden), hidden)
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction *= mask[..., None]
    step = 1e-4
    with torch.no_grad():
        slope = (score(hidden + step * direction) - score(hidden - step * direction)) / (2 * step)
    assert slope.abs() > 1e-4
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-6)


def test_logits_need_a_head_and_a_block_above(tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model("bert"))))
    ids, mask = model.pad(ROWS)
    states = torch.zeros(2, 7, WIDTH)
    for ask in (
        lambda: model.logits_from("hidden.1", states, ids, mask),
        lambda: model.read(ids, mask, ["hidden.1"], logits=True),
    ):
        with pytest.raises(ConfigError, match=r"^the model was loaded without a head: load it with the task classify"):
            ask()
    headed, _ = classifier("bert", tiny_model)
    with pytest.raises(ConfigError, match=r"^no block lies above hidden\.3; the last site that can be changed is"):
        headed.logits_from("hidden.3", states, ids, mask)
    with pytest.raises(
        ConfigError, match=r"^mlp_in\.1 cannot be changed; sites that can be are hidden\.0 … hidden\.2$"
    ):
        headed.logits_from("mlp_in.1", states, ids, mask)


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_decoders_head_finds_the_end_of_a_text_where_only_the_tokenizer_knows_the_padding(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    _, theirs = classifier("llama", tiny_model)
    folder = Path(shutil.copytree(tiny_model("llama", classes=3), tmp_path / "model"))
    change(folder / "config.json", pad_token_id=None)
    model = load(find_model(str(folder)), task="classify")
    with torch.inference_mode():
        logits = model.read(*model.pad(ROWS), ["hidden.1"], logits=True)[1]
        expected = [theirs(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    assert logits is not None
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_decoders_head_finds_the_end_of_a_text_where_only_the_configuration_knows_the_padding(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    _, theirs = classifier("gpt2", tiny_model)
    folder = Path(shutil.copytree(tiny_model("gpt2", classes=3), tmp_path / "model"))
    change(folder / "config.json", pad_token_id=5)
    change(folder / "tokenizer_config.json", pad_token=None)
    source = find_model(str(folder))
    assert source.tokenizer.pad_token_id is None
    model = load(source, task="classify")
    with torch.inference_mode():
        logits = model.read(*model.pad(ROWS), ["hidden.1"], logits=True)[1]
        expected = [theirs(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    assert logits is not None
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_model_without_a_pooler_in_its_checkpoint_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    assert any("pooler" in name for name in weights)
    rest = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    model, whole = load(find_model(str(folder))), load(find_model(str(tiny_model("bert"))))
    with torch.inference_mode():
        ours, theirs = (m.read(*m.pad(ROWS), ["hidden.3"])[0]["hidden.3"] for m in (model, whole))
    assert torch.equal(ours, theirs)


def _no_head(folder: Path) -> None:
    change(folder / "config.json", architectures=["BertModel"])


def _one_label(folder: Path) -> None:
    change(folder / "config.json", id2label={"0": "x"}, label2id={"x": 0})


def _several_labels(folder: Path) -> None:
    change(folder / "config.json", problem_type="multi_label_classification")


def _head_lost(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    rest = {name: value for name, value in weights.items() if name != "classifier.weight"}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})


def _another_size(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=48)


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_padding(folder: Path) -> None:
    change(folder / "config.json", pad_token_id=None)
    change(folder / "tokenizer_config.json", pad_token=None)


MISTAKES: list[tuple[Callable[[Path], None], type[ClvqError], str]] = [
    (_no_head, ModelError, "model has no classification head (it is BertModel): use --task none, or fine-tune it for"),
    (_one_label, ModelError, "model is no single-label classifier (1 labels, problem type None); use --task none"),
    (
        _several_labels,
        ModelError,
        "model is no single-label classifier (3 labels, problem type multi_label_classificati",
    ),
    (_head_lost, ModelError, "the weights of model are incomplete: classifier.weight is missing or has another shape"),
    (_another_size, ModelError, "model cannot be loaded: "),
    (_cut_short, ModelError, "model cannot be loaded: "),
    (_no_padding, ModelError, "model has no padding token, by which classification heads find the end of a text: set"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_model_that_cannot_classify_is_named(
    damage: Callable[[Path], None], kind: type[ClvqError], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("bert", classes=3), tmp_path / "model"))
    damage(folder)
    with pytest.raises(kind) as caught:
        load(find_model(str(folder)), task="classify")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
