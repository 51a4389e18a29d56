"""int8 extraction, and making shards again from model and texts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import clvq
import numpy as np
import pytest
from clvq.cache.layout import read_manifest
from clvq.cache.recode import recode
from clvq.cache.repair import repair
from clvq.cache.verify import verify
from clvq.errors import ConfigError, ResumeMismatch
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.remake import Extractor
from clvq.pipeline.source import find_model

from .cache_maker import contents
from .tiny import load, plan_of, run, write_texts

TinyModel = Callable[..., Path]
NAMES = ((0, "joy"), (1, "anger"), (2, "fear"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("again") / "texts", texts=300)


def bert(tiny_model: TinyModel, **settings: object) -> Path:
    return tiny_model("bert", id2label=NAMES, classes=3, **settings)


def extractor(path: Path, model: Path, data: Path) -> Extractor:
    source = find_model(str(model))

    def loaded() -> LanguageModel:
        return load(source, task="classify")

    return Extractor(read_manifest(path)[0], source, str(data), loaded)


@pytest.fixture(scope="session")
def int8(data: Path, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "cache"
    run(plan_of(bert(tiny_model), data, encoding="int8", task="classify"), out)
    return out


def test_an_int8_extraction_holds_the_models_values_to_half_a_step(
    int8: Path, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    run(plan_of(bert(tiny_model), data, encoding="fp32", task="classify"), tmp_path / "exact")
    exact, rounded = clvq.Cache(tmp_path / "exact"), clvq.Cache(int8)
    everything = np.ones(len(exact.texts), dtype=bool)
    for site in ("hidden.1", "hidden.3"):
        values = exact.vectors(site, exact.rows_of(everything))
        rows = rounded.rows_of(everything)
        stored = rounded.vectors(site, rows)
        layout = rounded.layouts
        row = rounded.files.read(f"scales/{site}", layout[f"scales/{site}"], rows)
        channel = rounded.files.read(f"channel_scale/{site}", layout[f"channel_scale/{site}"], np.arange(32))
        # The two models ran in other batches, hence the last term.
        assert (np.abs(stored - values) <= 0.501 * row[:, None] * channel + 1e-5).all()
        loss = rounded.manifest.sites[site].loss
        relative = np.linalg.norm(stored.astype(np.float64) - values) / np.linalg.norm(values.astype(np.float64))
        assert loss.relative_l2 == pytest.approx(relative, rel=1e-3)


def test_an_extraction_that_goes_on_keeps_the_scales_that_it_began_with(
    int8: Path, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from clvq.cache.writer import CacheWriter

    plan = plan_of(bert(tiny_model), data, encoding="int8", task="classify")
    theirs = {site: np.full(32, 0.5, dtype=np.float32) for site in ("hidden.1", "hidden.3")}
    with CacheWriter(tmp_path / "cache", plan.extraction()) as writer:
        writer.fix_scales(lambda: theirs)
    run(plan, tmp_path / "cache")
    cache = clvq.Cache(tmp_path / "cache")
    for site, scale in theirs.items():
        name = f"channel_scale/{site}"
        assert np.array_equal(cache.files.read(name, cache.layouts[name], np.arange(32)), scale)
    assert cache.id != clvq.Cache(int8).id


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_damaged_shards_are_extracted_again_to_the_same_bytes(
    encoding: str, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = bert(tiny_model)
    settings = {"encoding": encoding, "task": "classify", "rows": "word", "min_count": 2, "max_occurrences": 9}
    run(plan_of(model, data, **settings), tmp_path / "whole")
    path = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cache"))
    (path / "activations.zarr/sites/hidden.3/c/2/0").write_bytes(b"junk")
    (path / "activations.zarr/texts/logits/c/5/0").unlink()
    (path / "texts.parquet").unlink()
    if encoding == "int8":
        (path / "activations.zarr/channel_scale/hidden.3/c/0").unlink()
    assert len(verify(path).problems) == 3 + (encoding == "int8")
    assert repair(path, extractor(path, model, data)).problems == []
    assert contents(path) == contents(tmp_path / "whole")


def test_where_the_model_lies_does_not_matter_but_what_it_is(
    int8: Path, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(bert(tiny_model), tmp_path / "another-name"))
    extractor(int8, moved, data)
    with pytest.raises(ResumeMismatch, match=r"identity\.model\.weights"):
        extractor(int8, bert(tiny_model, seed=7), data)


def test_other_texts_are_refused_by_name(int8: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    others = write_texts(tmp_path / "texts", texts=299)
    with pytest.raises(ResumeMismatch, match=r"the model or the data are not those .*identity\.data\.files"):
        extractor(int8, bert(tiny_model), others)


def test_a_recoded_cache_is_not_extracted_again(int8: Path, data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    recode(clvq.Cache(int8), tmp_path / "bf16", "bf16")
    with pytest.raises(ConfigError, match=r"was made from another cache, not by `clvq extract`"):
        extractor(tmp_path / "bf16", bert(tiny_model), data)
