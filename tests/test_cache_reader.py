"""Reading: equal to what was written, equal to what other Zarr readers see, and never silently wrong."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from clvq import Cache
from clvq.cache.layout import ROW_COLUMNS, TEXTS, Encoding
from clvq.errors import CacheCorrupt, ConfigError

from .cache_maker import CLASSES, Known, contents, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SITES: dict[str, tuple[int, Encoding]] = {"hidden.1": (6, "bf16"), "hidden.2": (5, "fp32"), "mlp_out.2": (7, "fp16")}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def made() -> Known:
    """The contents of the cache."""
    return known(widths=SITES)


@pytest.fixture(scope="module")
def cache(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache that no test changes."""
    path = tmp_path_factory.mktemp("reader") / "cache"
    made.write(path)
    return Cache(path)


@pytest.fixture
def copy(cache: Cache, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    for name, data in contents(cache.path).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def arrays(cache: Cache) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of the cache, whole, as this package reads it."""
    places = np.arange(cache.manifest.geometry.row_places)
    for site in cache.manifest.sites:
        yield f"sites/{site}", cache.bits(site, places)
    for column in ROW_COLUMNS:
        yield f"rows/{column}", cache.column(column)
    texts = np.arange(cache.manifest.geometry.text_places)
    yield "texts/logits", Cache.read_array(cache.path, "texts/logits", cache._layouts["texts/logits"], texts)


def test_zarr_and_tensorstore_see_the_same_bits_in_every_array_unused_places_included(cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    seen = 0
    for name, ours in arrays(cache):
        store = {"driver": "zarr3", "kvstore": f"file://{cache.path}/activations.zarr/{name}/"}
        for theirs in (group[name][:], tensorstore.open(store).result().read().result()):
            assert theirs.dtype == ours.dtype
            assert theirs.shape == ours.shape
            assert theirs.tobytes() == ours.tobytes()
        seen += 1
    assert seen == len(SITES) + len(ROW_COLUMNS) + 1


def test_zarr_sees_groups_names_and_encodings(cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    assert sorted(name for name, _ in group.groups()) == ["rows", "sites", "texts"]
    for name, (_, encoding) in SITES.items():
        assert group[f"sites/{name}"].attrs["encoding"] == encoding
        assert group[f"sites/{name}"].metadata.dimension_names == ("row", "d")


def test_vectors_are_what_was_written_rounded_as_torch_rounds(made: Known, cache: Cache) -> None:
    for site, (_, encoding) in SITES.items():
        oracle = torch.from_numpy(made.vectors[site]).to(TORCH[encoding]).float().numpy()
        assert np.array_equal(cache.vectors(site, made.places), oracle)


def test_columns_and_logits_are_what_was_written(made: Known, cache: Cache) -> None:
    for column, (dtype, fill) in ROW_COLUMNS.items():
        unused = np.ones(made.geometry.row_places, dtype=bool)
        unused[made.places] = False
        assert unused.any()
        assert cache.column(column).dtype == dtype
        assert np.array_equal(cache.column(column)[made.places], made.columns[column])
        assert (cache.column(column)[unused] == fill).all()
    assert np.array_equal(cache.logits(), made.logits)


def test_rows_in_any_order_and_repeated_are_the_rows_asked_for(made: Known, cache: Cache) -> None:
    rows = np.random.default_rng(1).choice(made.geometry.row_places, 500)
    whole = cache.bits("hidden.1", np.arange(made.geometry.row_places))
    assert np.array_equal(cache.bits("hidden.1", rows), whole[rows])
    assert cache.vectors("hidden.1", rows[:0]).shape == (0, 6)


def test_blocks_join_to_the_vectors(made: Known, cache: Cache) -> None:
    blocks = list(cache.blocks(["hidden.1", "hidden.2"], made.places, size=100))
    assert [len(rows) for rows, _ in blocks[:-1]] == [100] * (len(blocks) - 1)
    assert np.array_equal(np.concatenate([rows for rows, _ in blocks]), made.places)
    for site in ("hidden.1", "hidden.2"):
        joined = np.concatenate([vectors[site] for _, vectors in blocks])
        assert np.array_equal(joined, cache.vectors(site, made.places))


@pytest.mark.parametrize("row", [-1, 10**9])
def test_a_row_outside_the_axis_is_refused(made: Known, cache: Cache, row: int) -> None:
    last = made.geometry.row_places - 1
    with pytest.raises(IndexError, match=rf"^sites/hidden\.1 has places 0 to {last}; places .* were asked for$"):
        cache.vectors("hidden.1", np.array([3, row]))


def test_texts_are_the_table_with_the_models_predictions(made: Known, cache: Cache) -> None:
    assert made.logits is not None
    assert cache.texts.drop_columns("prediction").equals(made.texts())
    assert cache.texts["prediction"].to_pylist() == made.logits.argmax(1).tolist()
    assert cache.manifest.class_names == CLASSES


def test_a_text_without_finite_logits_has_no_prediction(tmp_path: Path) -> None:
    made = known(texts=5)
    assert made.logits is not None
    made.logits[2] = np.nan
    made.write(tmp_path)
    predicted = Cache(tmp_path).texts["prediction"].to_pylist()
    assert [value is None for value in predicted] == [False, False, True, False, False]
    assert np.isnan(Cache(tmp_path).logits()[2]).all()


def test_a_cache_without_predictions_says_so(tmp_path: Path) -> None:
    known(texts=5, predictions=False).write(tmp_path)
    cache = Cache(tmp_path)
    assert not cache.manifest.predictions
    assert cache.texts["prediction"].null_count == 5
    assert not (tmp_path / "activations.zarr/texts").exists()
    with pytest.raises(ConfigError) as caught:
        cache.logits()
    assert str(caught.value) == f"{tmp_path} holds no predictions; extract with `--task classify`"


def test_rows_of_are_the_rows_of_the_chosen_texts_and_special_kinds(made: Known, cache: Cache) -> None:
    chosen = cache.splits(["dev"])
    assert np.array_equal(chosen, np.array(made.splits) == "dev")
    owned = np.isin(made.columns["text"], made.placement.text_id[chosen])
    for special, kinds in {"all": [0, 1, 2], "leading": [0, 1], "none": [0]}.items():
        wanted = owned & np.isin(made.columns["special"], kinds)
        assert np.array_equal(cache.rows_of(chosen, special=special), made.places[wanted])
    assert len(cache.rows_of(cache.splits([]))) == 0


def test_split_counts_in_the_manifest_are_right(made: Known, cache: Cache) -> None:
    for name, split in cache.manifest.splits.items():
        inside = np.array(made.splits) == name
        assert (split.texts, split.rows) == (inside.sum(), made.counts[inside].sum())


def test_statistics_in_the_manifest_are_of_the_values_as_stored(made: Known, cache: Cache) -> None:
    for name, site in cache.manifest.sites.items():
        values = cache.vectors(name, made.places).astype(np.float64)
        assert site.statistics.count == made.geometry.rows
        assert np.allclose(site.statistics.mean, values.mean(0), rtol=1e-9)
        assert np.allclose(site.statistics.variance(), values.var(0), rtol=1e-9)


def test_a_site_is_found_by_its_number_and_an_unknown_one_is_named(cache: Cache) -> None:
    assert cache.site("1") == cache.site("hidden.1") == "hidden.1"
    assert cache.width("mlp_out.2") == 7
    with pytest.raises(ConfigError) as caught:
        cache.site("9")
    assert str(caught.value) == f"{cache.path} holds no site 'hidden.9'; it holds hidden.1, hidden.2, mlp_out.2"


def test_an_unknown_split_is_named(cache: Cache) -> None:
    with pytest.raises(ConfigError) as caught:
        cache.splits(["train", "test"])
    assert str(caught.value) == f"{cache.path} holds no split 'test'; it holds dev, train"


def test_every_flipped_bit_in_any_array_is_detected_by_reading(cache: Cache, copy: Path) -> None:
    generator = np.random.default_rng(0)
    files = sorted(copy.glob("activations.zarr/*/*/c/**/*"))
    files = [file for file in files if file.is_file()]
    for _ in range(200):
        file = files[generator.integers(len(files))]
        data = file.read_bytes()
        place, bit = generator.integers(len(data)), 1 << generator.integers(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        name, shard = re.findall(r"activations\.zarr/(.+)/c/(\d+)", file.as_posix())[0]
        layout = cache._layouts[name]
        with pytest.raises(CacheCorrupt, match="is damaged: "):
            Cache.read_array(copy, name, layout, np.arange(layout.shard) + int(shard) * layout.shard)
        file.write_bytes(data)
    assert len(list(arrays(Cache(copy)))) == len(SITES) + len(ROW_COLUMNS) + 1


def test_a_file_cut_anywhere_is_detected_by_reading(copy: Path) -> None:
    file = copy / "activations.zarr/sites/hidden.1/c/1/0"
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(CacheCorrupt):
            list(arrays(Cache(copy)))


@pytest.mark.parametrize("name", ["sites/hidden.1/c/1/0", "rows/special/c/0", "texts/logits/c/1/0"])
def test_a_missing_file_is_named_and_never_read_as_zeros(copy: Path, name: str) -> None:
    (copy / "activations.zarr" / name).unlink()
    with pytest.raises(CacheCorrupt) as caught:
        list(arrays(Cache(copy)))
    assert str(caught.value) == (
        f"{copy}/activations.zarr/{name} is missing; run `clvq cache verify` and get a whole copy of it"
    )


def test_changed_texts_are_refused(copy: Path) -> None:
    data = (copy / TEXTS).read_bytes()
    for place in range(0, len(data), 101):
        (copy / TEXTS).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CacheCorrupt) as caught:
            _ = Cache(copy).texts
        assert str(caught.value) == f"{copy / TEXTS} has other bytes than were written; get a whole copy of it"


def test_missing_texts_are_refused(copy: Path) -> None:
    (copy / TEXTS).unlink()
    with pytest.raises(CacheCorrupt, match=r"texts\.parquet cannot be read \(.*No such file.*\); get a whole copy of"):
        _ = Cache(copy).texts


def test_reading_in_a_folder_named_like_a_partition_adds_no_column(made: Known, tmp_path: Path) -> None:
    made.write(tmp_path / "seed=3")
    assert "seed" not in Cache(tmp_path / "seed=3").texts.column_names


def test_the_reader_on_the_format_page_reads_what_this_one_reads(cache: Cache, made: Known) -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    seen: dict[str, np.ndarray] = {}
    exec(code.replace("my-cache", str(cache.path)).replace("hidden.8", "hidden.1"), seen)
    assert np.array_equal(seen["vectors"], cache.vectors("hidden.1", made.places))
    for file in [*cache.manifest.model_fields_set, *ROW_COLUMNS]:
        assert f"`{file}`" in page
