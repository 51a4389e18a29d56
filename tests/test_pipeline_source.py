"""Models before their weights are loaded: what is found, what it is called, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clvq.errors import ClvqError, ConfigError, ModelError, ModelNotFound
from clvq.pipeline.source import ModelSource, find_model

from .tiny import DEPTH, WIDTH, WINDOW, make_config, make_tokenizer

TinyModel = Callable[..., Path]


@pytest.fixture
def copy(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of a BERT that a test may damage."""
    return Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_model_tells_its_depth_width_and_window(family: str, tiny_model: TinyModel) -> None:
    source = find_model(str(tiny_model(family)))
    assert (source.depth, source.width, source.window) == (DEPTH, WIDTH, WINDOW)
    assert source.commit is None
    assert source.name == tiny_model(family).name


def test_an_encoder_decoder_tells_what_its_encoder_has(tiny_model: TinyModel) -> None:
    source = find_model(str(tiny_model("bart")))
    assert (source.depth, source.width, source.window) == (DEPTH, WIDTH, WINDOW)
    # T5 has relative positions: only its tokenizer knows a limit.
    source = find_model(str(tiny_model("t5")))
    assert (source.depth, source.width, source.window) == (DEPTH, WIDTH, WINDOW)
    assert not hasattr(source.config, "max_position_embeddings")


def test_an_encoder_decoder_of_two_configurations_is_known_by_its_encoders() -> None:
    from transformers import AutoConfig

    encoder, decoder = (
        {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2, "head_dim": 8}
        for width, depth in ((16, 5), (16, 2))
    )
    config = AutoConfig.for_model("t5gemma", encoder=encoder, decoder=decoder)
    source = ModelSource("m", None, Path(), config, make_tokenizer("bytes"))
    assert (source.depth, source.width) == (5, 16)


def test_a_tokenizer_with_a_smaller_limit_sets_the_window(copy: Path) -> None:
    change(copy / "tokenizer_config.json", model_max_length=17)
    assert find_model(str(copy)).window == 17


def test_a_model_without_any_limit_asks_for_one() -> None:
    tokenizer = make_tokenizer("bytes", window=10**30)
    source = ModelSource("m", None, Path(), make_config("gpt2", tokenizer, max_position_embeddings=-1), tokenizer)
    with pytest.raises(ModelError, match=r"^m does not say how long its texts may be; give --max-length$"):
        source.window  # noqa: B018 — the property raises


@pytest.mark.parametrize(
    ("given", "full"),
    [
        (["1", "3"], ["hidden.1", "hidden.3"]),
        (["hidden.2", "0"], ["hidden.2", "hidden.0"]),
        (["02"], ["hidden.2"]),
        (["hidden.02"], ["hidden.2"]),
        (["0", "mlp_in.0", "mlp_out.02", "attn_out.2"], ["hidden.0", "mlp_in.0", "mlp_out.2", "attn_out.2"]),
    ],
)
def test_sites_are_called_by_number_or_name(given: list[str], full: list[str], tiny_model: TinyModel) -> None:
    assert find_model(str(tiny_model("bert"))).sites(given) == full


SITES = (
    "sites are hidden.0 … hidden.3, or just numbers, and "
    "mlp_in.0 … mlp_in.2, mlp_out.0 … mlp_out.2, attn_out.0 … attn_out.2"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no site is asked for; give --sites, such as --sites 8,12"),
        (
            ["4"],
            "site hidden.4 is beyond the last layer: NAME has 3 blocks, so its sites are "
            "hidden.0 (embeddings) … hidden.3",
        ),
        (["-1"], f"'-1' is not a site; {SITES}"),
        (["²"], f"'²' is not a site; {SITES}"),
        (["mlp.1"], f"'mlp.1' is not a site; {SITES}"),
        (["hidden."], f"'hidden.' is not a site; {SITES}"),
        ([""], f"'' is not a site; {SITES}"),
        (["1", "2", "hidden.1"], "site hidden.1 is asked for twice"),
        (["1", "01"], "site hidden.1 is asked for twice"),
        (["mlp_in.1", "1", "mlp_in.01"], "site mlp_in.1 is asked for twice"),
        (["mlp_in"], f"'mlp_in' is not a site; {SITES}"),
        (["x.mlp_in.1"], f"'x.mlp_in.1' is not a site; {SITES}"),
        (
            ["attn_out.3"],
            "site attn_out.3 is beyond the last block: NAME has 3 blocks, so its sites of that kind are "
            "attn_out.0 … attn_out.2",
        ),
    ],
)
def test_a_site_that_is_none_is_refused(given: list[str], message: str, tiny_model: TinyModel) -> None:
    folder = tiny_model("bert")
    with pytest.raises(ConfigError) as caught:
        find_model(str(folder)).sites(given)
    assert str(caught.value) == message.replace("NAME", folder.name)


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_type(folder: Path) -> None:
    change(folder / "config.json", model_type="nothing-like-it")


def _own_code(folder: Path) -> None:
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (folder / "mine.py").write_text("raise SystemExit('this code ran')")


def _several_gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("model.Q4_1.gguf", "model.Q8_0.gguf"):
        (folder / name).touch()


def _bad_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def _slow_tokenizer(folder: Path) -> None:
    _no_tokenizer(folder)
    (folder / "vocab.txt").touch()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer", "model_max_length": 64}')


MISTAKES: list[tuple[Callable[[Path], None], type[ClvqError], str]] = [
    (_no_config, ModelNotFound, "MODEL is not a Hugging Face model folder: it has no config.json"),
    (_only_bin, ModelError, "MODEL has no *.safetensors weights; convert them first (other formats can run code)"),
    (_bad_config, ModelError, "MODEL cannot be read by transformers: It looks like the config file at"),
    (
        _unknown_type,
        ModelError,
        "MODEL cannot be read by transformers: The checkpoint you are trying to load has model",
    ),
    (_own_code, ModelError, "MODEL cannot be read by transformers: The repository MODEL contains custom code"),
    (
        _several_gguf,
        ModelError,
        "MODEL holds several GGUF files (model.Q4_1.gguf, model.Q8_0.gguf): name one of them",
    ),
    (_bad_gguf, ModelError, "MODEL cannot be read by transformers: "),
    (_no_tokenizer, ModelError, "MODEL has no tokenizer; put its tokenizer.json beside its weights"),
    (_bad_tokenizer, ModelError, "MODEL cannot be read by transformers: "),
    (
        _slow_tokenizer,
        ModelError,
        "the tokenizer of MODEL gives no character offsets, which rows need; use a model with",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_model_that_cannot_be_used_is_named(
    damage: Callable[[Path], None], kind: type[ClvqError], message: str, copy: Path
) -> None:
    damage(copy)
    with pytest.raises(kind) as caught:
        find_model(str(copy))
    said = str(caught.value).replace(str(copy), "MODEL")
    assert said.startswith(message)
    assert "\n" not in said


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    message = f"{name} is not a folder: give a Hugging Face model folder, or the name of a Hub model"
    with pytest.raises(ModelNotFound, match=f"^{re.escape(message)}$"):
        find_model(name)


def test_a_hub_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound) as caught:
        find_model("nobody/nothing")
    said = str(caught.value)
    assert said.startswith("'nobody/nothing' is no local folder, and could not be had from the Hub: LocalEntryNotFound")
    assert "\n" not in said


def test_a_hub_model_is_known_by_its_commit(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(tiny_model("bert"), tmp_path / "c0ffee"))
    asked = []

    def download(name: str, *, revision: str | None, **patterns: Any) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_model("someone/bert", revision="v1")
    assert asked == [("someone/bert", "v1")]
    assert (source.name, source.commit) == ("someone/bert", "c0ffee")
    assert source.identity()["commit"] == "c0ffee"


def test_the_identity_follows_weights_configuration_and_tokenizer(copy: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(copy, tmp_path / "elsewhere" / "model"))

    def identity(folder: Path) -> str:
        source = find_model(str(folder))
        return json.dumps([source.identity(), source.tokenizer_identity()])

    before = identity(copy)
    assert identity(moved) == before
    assert str(tmp_path) not in before
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        saved = (moved / file).read_bytes()
        (moved / file).write_bytes(saved + b" ")
        assert identity(moved) != before
        (moved / file).write_bytes(saved)


def test_the_identity_of_a_tokenizer_without_a_file_ignores_what_it_did_last(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("wordpiece")
    source = ModelSource("m", None, tmp_path, make_config("bert", tokenizer), tokenizer)
    before = source.tokenizer_identity()
    source.tokenize(["a long text, which will be cut"], max_length=4)
    assert source.tokenizer_identity() == before


def test_texts_are_cut_at_their_end_whatever_the_tokenizer_prefers(copy: Path) -> None:
    change(copy / "tokenizer_config.json", truncation_side="left", padding_side="left")
    tokens = find_model(str(copy)).tokenize(["abcdef", "a"], max_length=5)[0]
    assert tokens.start.tolist() == [0, 0, 1, 2, 0]
    assert tokens.truncated == 3
    assert tokens.cut == 3
