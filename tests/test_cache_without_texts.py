"""A cache that is shared without its texts: what stays behind, what can still be done with it."""

import hashlib
import hmac
import stat
from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
import zarr
from clvq.cache.sharing.pull import pull
from clvq.cache.sharing.push import push
from clvq.cache.verify import verify
from clvq.errors import CacheCorrupt, ConfigError
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.data import Texts
from clvq.trainer.fit import fit
from clvq.trainer.run import Run

from .cache_maker import contents
from .caches import LOWER, UPPER, make_cache
from .sharing import resealed

COPIES = 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> clvq.Cache:
    """Sixty texts, of which ten have the contents of others."""
    folder = tmp_path_factory.mktemp("texts") / "cache"
    identity = make_cache(folder, copies=COPIES).manifest.identity
    data = {"files": {"train": "0123456789abcdef" * 4}, "text_field": "text"}
    file = folder / "manifest.json"
    file.write_bytes(resealed(file.read_bytes(), identity=identity | {"data": data}))
    return clvq.Cache(folder)


@pytest.fixture(scope="module")
def shared(cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> clvq.Cache:
    """The cache as somebody else gets it."""
    place, copy = (tmp_path_factory.mktemp("texts") / name for name in ("place", "copy"))
    push(cache.path, str(place), without_texts=True)
    pull(str(place), copy)
    return clvq.Cache(copy)


def test_texts_and_all_that_they_could_be_put_together_from_stay_behind(cache: clvq.Cache, shared: clvq.Cache) -> None:
    assert shared.texts.column_names == [
        "text_id", "source_row", "split", "text_sha256", "label", "prediction", "truncated_tokens", "first_row",
        "row_count",
    ]  # fmt: skip
    arrays = zarr.open_group(shared.path / "activations.zarr", mode="r")
    assert sorted(arrays["rows"].array_keys()) == ["position", "special", "subwords", "text"]
    hashes = set(cache.texts["text_sha256"].to_pylist())
    for name, data in contents(shared.path).items():
        assert not any(f"/{column}/" in name for column in ("token", "word", "char_start", "char_end"))
        assert name != "salt"
        assert not any(digest.encode() in data for digest in hashes)
        assert b"text 7" not in data
    assert not hashes & set(shared.texts["text_sha256"].to_pylist())
    for column in ("token", "word", "char_start", "char_end"):
        with pytest.raises(ConfigError, match=f"was shared without its texts, and `{column}` stayed behind"):
            shared.column(column)


def test_hashes_are_keyed_with_a_secret_that_stays_here(cache: clvq.Cache, shared: clvq.Cache) -> None:
    salt = (cache.path / "salt").read_bytes()
    assert len(salt) == 32
    assert stat.S_IMODE((cache.path / "salt").stat().st_mode) == 0o600
    keyed = [
        hmac.new(salt, digest.encode(), hashlib.sha256).hexdigest() for digest in cache.texts["text_sha256"].to_pylist()
    ]
    assert shared.texts["text_sha256"].to_pylist() == keyed
    assert len(set(keyed)) == len(keyed) - COPIES
    # A file of few texts could be guessed as well.
    data = shared.manifest.identity["data"]
    assert data == {
        "files": {"train": hmac.new(salt, b"0123456789abcdef" * 4, hashlib.sha256).hexdigest()},
        "text_field": "text",
    }
    assert verify(cache.path).problems == []


def test_vectors_and_everything_else_are_as_they_were(cache: clvq.Cache, shared: clvq.Cache) -> None:
    assert verify(shared.path).problems == []
    assert shared.id != cache.id
    assert shared.manifest.vectors_id == cache.manifest.vectors_id
    # The original's id is a hash of its texts.
    assert not any(cache.id.encode() in file.read_bytes() for file in shared.path.rglob("*") if file.is_file())
    rows = cache.rows_of(cache.splits(["train", "dev"]))
    assert np.array_equal(rows, shared.rows_of(shared.splits(["train", "dev"])))
    for site in (LOWER, UPPER):
        assert np.array_equal(cache.vectors(site, rows), shared.vectors(site, rows))
        assert shared.manifest.sites[site] == cache.manifest.sites[site]
    assert np.array_equal(cache.logits(), shared.logits())
    for name in ("text_id", "split", "label", "prediction", "first_row", "row_count"):
        assert shared.texts[name].to_pylist() == cache.texts[name].to_pylist()


def test_the_card_warns_that_vectors_can_be_turned_back_into_text(shared: clvq.Cache) -> None:
    card = (shared.path / "README.md").read_text(encoding="utf-8")
    assert "**Activations can still be partly turned back into text**" in " ".join(card.split())
    assert "made without its texts" in card
    assert "keep the licence of the data set" not in card


def test_pushed_again_it_has_the_same_bytes_and_another_copy_of_the_cache_has_another_secret(
    cache: clvq.Cache, shared: clvq.Cache, tmp_path: Path
) -> None:
    again = push(cache.path, str(tmp_path / "place"), without_texts=True)
    assert again.cache_id == shared.id
    assert contents(tmp_path / "place") == contents(shared.path)
    assert push(cache.path, str(tmp_path / "place"), without_texts=True).was_there
    pull(str(cache.path), tmp_path / "copy")
    other = push(tmp_path / "copy", str(tmp_path / "other"), without_texts=True)
    assert other.cache_id != shared.id


def test_a_cache_without_texts_is_passed_on_as_it_is(shared: clvq.Cache, tmp_path: Path) -> None:
    passed = push(shared.path, str(tmp_path / "place"), without_texts=True)
    assert passed.cache_id == shared.id
    assert not (shared.path / "salt").exists()


def test_a_secret_that_cannot_be_one_is_named(cache: clvq.Cache, tmp_path: Path) -> None:
    pull(str(cache.path), tmp_path / "copy")
    (tmp_path / "copy" / "salt").write_bytes(b"short")
    with pytest.raises(CacheCorrupt) as caught:
        push(tmp_path / "copy", str(tmp_path / "place"), without_texts=True)
    assert str(caught.value) == (f"{tmp_path}/copy/salt has 5 bytes instead of 32: delete it to have a new one made")
    assert not (tmp_path / "place").exists()


def test_training_works_and_equal_texts_stay_on_one_side(cache: clvq.Cache, shared: clvq.Cache, tmp_path: Path) -> None:
    config = with_overrides(
        preset_config("default", lower=LOWER, upper=UPPER, codes=9),
        {
            "decoder.layers": "1",
            "decoder.heads": "2",
            "decoder.hidden": "8",
            "fit.epochs": "2",
            "fit.texts_per_batch": "8",
            "encoder.epochs": "1",
        },
    )
    config = config.model_copy(update={"split": ("train", "dev"), "held_out": None})
    sides = Texts.of(shared, config)
    words = np.asarray(cache.texts["text"].to_pylist())
    assert sides.held_out.any()
    assert not set(words[sides.train]) & set(words[sides.held_out])
    fit(shared, config, tmp_path / "run", device=torch.device("cpu"))
    assert Run.from_pretrained(tmp_path / "run").cache_id == shared.id


def test_the_secret_is_told_neither_in_the_clear_nor_in_hexadecimal(cache: clvq.Cache, shared: clvq.Cache) -> None:
    salt = (cache.path / "salt").read_bytes()
    for data in contents(shared.path).values():
        assert salt not in data
        assert salt.hex().encode() not in data
