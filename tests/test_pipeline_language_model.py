"""Hidden states read and replaced in a real forward pass, for every family that is supported."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clvq.errors import ClvqError, ConfigError, ModelError
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.source import find_model
from torch import Tensor

from .tiny import DEPTH, FAMILIES, WIDTH, load

TinyModel = Callable[..., Path]

# Two texts, the second padded; ids that no tokenizer here gives a special meaning.
ROWS = [[12, 9, 31, 17, 22, 9, 14], [25, 11, 30]]


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
        states, logits = model.read(ids, mask, range(DEPTH + 1))
    assert logits is None
    assert len(states) == DEPTH + 1 == len(theirs.hidden_states)
    for site, expected in enumerate(theirs.hidden_states):
        assert states[site].shape == (2, 7, WIDTH)
        torch.testing.assert_close(states[site][mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[DEPTH][mask], theirs.last_hidden_state[mask], rtol=1e-5, atol=1e-5)
    for site in range(DEPTH):
        assert not torch.allclose(states[site][mask], states[site + 1][mask], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model(family))))
    with torch.inference_mode():
        together, _ = model.read(*model.pad(ROWS), [0, DEPTH])
        alone, _ = model.read(*model.pad(ROWS[1:]), [0, DEPTH])
    for site in (0, DEPTH):
        torch.testing.assert_close(together[site][1, :3], alone[site][0], rtol=1e-4, atol=1e-4)


def test_a_model_whose_blocks_share_their_weights_is_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("albert", kind="metaspace")
    with pytest.raises(ModelError) as caught:
        load(find_model(str(folder)))
    assert str(caught.value) == (
        f"the layers of {folder.name} (albert) cannot be read: no stack of 3 blocks was found; there is "
        "encoder.albert_layer_groups (1), encoder.albert_layer_groups.0.albert_layers (1); "
        "this architecture is not supported"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_above_the_highest_site_runs(family: str, tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model(family))))
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        whole, _ = model.read(ids, mask, range(DEPTH + 1))
        for sites in ([0], [1], [2, 0], [DEPTH]):
            with counting(model) as calls:
                states, _ = model.read(ids, mask, sites)
            assert [count > 0 for count in calls] == [block < max(sites) for block in range(DEPTH)]
            for site in sites:
                assert torch.equal(states[site], whole[site])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_classifiers_own_and_run_all_blocks(family: str, tiny_model: TinyModel) -> None:
    model, theirs = classifier(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.inference_mode(), counting(model) as calls:
        states, logits = model.read(ids, mask, [1], logits=True)
        expected = [theirs(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    assert all(calls)
    assert list(states) == [1]
    assert logits is not None
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_the_models_own_states_are_its_logits(family: str, tiny_model: TinyModel) -> None:
    model, _ = classifier(family, tiny_model)
    ids, mask = model.pad(ROWS)
    with torch.inference_mode():
        states, logits = model.read(ids, mask, range(DEPTH), logits=True)
        assert logits is not None
        for site in range(DEPTH):
            with counting(model) as calls:
                again = model.logits_from(site, states[site], ids, mask)
            torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
            assert [count > 0 for count in calls] == [block >= site for block in range(DEPTH)]
        # Nothing of the patch is left behind.
        _, after = model.read(ids, mask, [0], logits=True)
    assert after is not None
    assert torch.equal(after, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_follow_the_given_states_alone(family: str, tiny_model: TinyModel) -> None:
    model, _ = classifier(family, tiny_model)
    ids, mask = model.pad([[12, 9, 31, 17], [25, 11, 30, 8]])
    same = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).expand(2, 4, WIDTH)
    with torch.inference_mode():
        for site in (1, 2):
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
        hidden = model.read(ids, mask, [1])[0][1]
    hidden.requires_grad_()

    def score(states: Tensor) -> Tensor:
        return model.logits_from(1, states, ids, mask)[:, 0].sum()

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
    with pytest.raises(ConfigError, match=r"^the model was loaded without a classification head$"):
        model.logits_from(1, states, ids, mask)
    headed, _ = classifier("bert", tiny_model)
    with pytest.raises(ConfigError, match=r"^no block lies above hidden\.3; the last site that can be changed is"):
        headed.logits_from(DEPTH, states, ids, mask)


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
        logits = model.read(*model.pad(ROWS), [1], logits=True)[1]
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
        logits = model.read(*model.pad(ROWS), [1], logits=True)[1]
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
        ours, theirs = (m.read(*m.pad(ROWS), [DEPTH])[0][DEPTH] for m in (model, whole))
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
