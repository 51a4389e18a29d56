"""Reading: equal to what was written, equal to what other Zarr readers see, and never silently wrong."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorstore
import torch
import zarr
from clvq import Cache
from clvq.cache.layout import ALL_COLUMNS, TEXTS, TEXTUAL_COLUMNS, Encoding, FileEntry, sealed_json
from clvq.cache.texts_file import texts_parquet
from clvq.errors import CacheCorrupt, ConfigError

from .cache_maker import CLASSES, FEW_COLUMNS, Known, contents, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SITES: dict[str, tuple[int, Encoding]] = {
    "hidden.1": (6, "bf16"),
    "hidden.2": (5, "fp32"),
    "mlp_out.2": (7, "fp16"),
    "mlp_out.3": (4, "int8"),
}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def made() -> Known:
    """The contents of the cache."""
    return known(widths=SITES, saliency=True)


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
    for site, (width, encoding) in SITES.items():
        yield f"sites/{site}", cache.bits(site, places)
        if encoding == "int8":
            for name, count in ((f"scales/{site}", len(places)), (f"channel_scale/{site}", width)):
                yield name, cache.files.read(name, cache.layouts[name], np.arange(count))
    for column in ALL_COLUMNS:
        yield f"rows/{column}", cache.column(column)
    texts = np.arange(cache.manifest.geometry.text_places)
    for name in ("texts/logits", "texts/convergence_delta"):
        yield name, cache.files.read(name, cache.layouts[name], texts)


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
    assert seen == len(SITES) + 2 + len(ALL_COLUMNS) + 2


def test_zarr_sees_groups_names_and_encodings(cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    assert sorted(name for name, _ in group.groups()) == ["channel_scale", "rows", "scales", "sites", "texts"]
    for name, (_, encoding) in SITES.items():
        assert group[f"sites/{name}"].attrs["encoding"] == encoding
        assert group[f"sites/{name}"].metadata.dimension_names == ("row", "d")


def test_vectors_are_what_was_written_rounded_as_torch_rounds(made: Known, cache: Cache) -> None:
    for site, (_, encoding) in SITES.items():
        if encoding != "int8":
            oracle = torch.from_numpy(made.vectors[site]).to(TORCH[encoding]).float().numpy()
            assert np.array_equal(cache.vectors(site, made.places), oracle)


def test_int8_vectors_are_what_zarr_reads_times_the_scales_of_row_and_channel(made: Known, cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    stored, rows, channels = (group[f"{kind}/mlp_out.3"][:] for kind in ("sites", "scales", "channel_scale"))
    oracle = (stored.astype(np.float32) * rows[:, None]) * channels
    mixed = np.random.default_rng(0).permutation(made.places)
    for places in (made.places, mixed, mixed[:1], mixed[:0]):
        assert np.array_equal(cache.vectors("mlp_out.3", places), oracle[places])
    error = np.linalg.norm(oracle[made.places] - made.vectors["mlp_out.3"], axis=1)
    assert np.median(error / np.linalg.norm(made.vectors["mlp_out.3"], axis=1)) < 0.01


def test_columns_and_logits_are_what_was_written(made: Known, cache: Cache) -> None:
    for column, (dtype, fill) in ALL_COLUMNS.items():
        unused = np.ones(made.geometry.row_places, dtype=bool)
        unused[made.places] = False
        assert unused.any()
        assert cache.column(column).dtype == dtype
        assert np.array_equal(cache.column(column)[made.places], made.columns[column])
        assert np.array_equal(cache.column(column)[unused], np.full(unused.sum(), fill), equal_nan=True)
    assert np.array_equal(cache.logits(), made.logits)
    assert np.array_equal(cache.convergence_delta(), made.convergence)


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
    assert (
        str(caught.value) == f"{cache.path} holds no site 'hidden.9'; it holds hidden.1, hidden.2, mlp_out.2, mlp_out.3"
    )


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
        damaged = Cache(copy)
        layout = cache.layouts[name]
        with pytest.raises(CacheCorrupt, match="is damaged: "):
            damaged.files.read(name, layout, np.arange(layout.shard) + int(shard) * layout.shard)
        file.write_bytes(data)
    assert len(list(arrays(Cache(copy)))) == len(SITES) + 2 + len(ALL_COLUMNS) + 2


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
    with pytest.raises(CacheCorrupt, match=r"texts\.parquet is missing; run `clvq cache verify` and get a whole copy"):
        _ = Cache(copy).texts


LINKED = [TEXTS, "activations.zarr/rows/special/c/0", "activations.zarr/sites/hidden.1", "activations.zarr"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_cache_is_followed_nowhere(copy: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    outside = tmp_path_factory.mktemp("outside") / "kept"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    cache = Cache(copy)
    with pytest.raises(CacheCorrupt) as caught:
        (cache.texts, list(arrays(cache)))
    assert str(caught.value) == f"{copy / name} is a symbolic link, and a cache holds none: get a whole copy of it"


def test_a_cache_behind_a_link_is_read(cache: Cache, made: Known, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache.path)
    other = Cache(tmp_path / "link")
    assert np.array_equal(other.vectors("hidden.1", made.places), cache.vectors("hidden.1", made.places))


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_no_file_is_missing(copy: Path, what: str) -> None:
    name = "activations.zarr/rows/special/c/1"
    (copy / name).unlink()
    (copy / name).mkdir() if what == "folder" else os.mkfifo(copy / name)
    with pytest.raises(CacheCorrupt, match=f"{name} is missing; run"):
        Cache(copy).column("special")


class Elsewhere(Cache):
    """A cache whose files lie in another folder than its manifest; notes which were asked for."""

    def __init__(self, path: Path, files: Path) -> None:
        super().__init__(path)
        self.there = files
        self.asked: set[str] = set()

    def local(self, name: str) -> Path:
        """The file elsewhere."""
        self.asked.add(name)
        return self.there / name


def test_every_file_but_the_manifest_is_found_by_local(cache: Cache, made: Known, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((cache.path / "manifest.json").read_bytes())
    split = Elsewhere(tmp_path, cache.path)
    assert split.texts.equals(cache.texts)
    for (_, ours), (_, wanted) in zip(arrays(split), arrays(cache), strict=True):
        assert ours.tobytes() == wanted.tobytes()
    assert np.array_equal(split.logits(), cache.logits())
    read = {name for name in cache.manifest.entries if "/c/" in name or name == TEXTS}
    assert split.asked == read


@pytest.fixture
def partial(cache: Cache, copy: Path) -> Cache:
    """A copy that lacks its shards 1 and 3 on purpose."""
    for shard in (1, 3):
        for name in cache.manifest.shards[shard].files:
            (copy / name).unlink()
    copied = Cache(copy)
    copied.absent_shards = frozenset({1, 3})
    return copied


def in_shards(made: Known, *numbers: int) -> np.ndarray:
    return np.isin(made.places // made.geometry.shard_rows, numbers)


def test_rows_of_absent_shards_count_as_unused(made: Known, cache: Cache, partial: Cache) -> None:
    gone = np.isin(np.arange(made.geometry.row_places) // made.geometry.shard_rows, [1, 3])
    for name, (_, fill) in ALL_COLUMNS.items():
        assert np.array_equal(partial.column(name)[gone], np.full(gone.sum(), fill), equal_nan=True)
        assert np.array_equal(partial.column(name)[~gone], cache.column(name)[~gone], equal_nan=True)
    lost = in_shards(made, 1, 3)[np.cumsum(made.counts) - 1]
    assert lost.any()
    assert np.isnan(partial.logits()[lost]).all()
    assert np.isnan(partial.convergence_delta()[lost]).all()
    assert np.array_equal(partial.logits()[~lost], cache.logits()[~lost])


def test_what_a_partial_copy_has_is_read_and_the_rest_is_refused(made: Known, cache: Cache, partial: Cache) -> None:
    there = made.places[~in_shards(made, 1, 3)]
    assert np.array_equal(partial.vectors("hidden.1", there), cache.vectors("hidden.1", there))
    texts = ~in_shards(made, 1, 3)[np.cumsum(made.counts) - 1]
    assert np.array_equal(partial.rows_of(texts), there)
    message = (
        f"shard 1 is not in this partial copy of a cache, {partial.path}: "
        "pull the split that needs it, or choose texts that are there"
    )
    for read in (
        lambda: partial.vectors("hidden.1", made.places),
        lambda: partial.rows_of(np.ones(len(texts), dtype=bool)),
        lambda: partial.chosen(np.ones(len(texts), dtype=bool), special="none"),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value) == message


def test_a_column_that_stayed_behind_with_the_texts_is_refused(tmp_path: Path) -> None:
    known(texts=5, columns=FEW_COLUMNS).write(tmp_path)
    cache = Cache(tmp_path)
    assert (cache.column("position")[cache.rows_of(np.ones(5, dtype=bool))] >= 0).all()
    for name in TEXTUAL_COLUMNS:
        with pytest.raises(ConfigError) as caught:
            cache.column(name)
        assert (
            str(caught.value)
            == f"{tmp_path} was shared without its texts, and `{name}` stayed behind: use a whole copy"
        )


def change_texts(path: Path, table: pa.Table) -> None:
    """Another `texts.parquet`, of which the manifest says that it is the right one."""
    (path / TEXTS).write_bytes(texts_parquet(table))
    manifest = Cache(path).manifest
    data = (path / TEXTS).read_bytes()
    entry = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (path / "manifest.json").write_bytes(
        sealed_json(manifest.model_copy(update={"files": {**manifest.files, TEXTS: entry}}))
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("first_row", -1, "a text has no place on the row axis"),
        ("first_row", 1, "the rows of a text lie outside its shard"),
        ("row_count", 10**6, "a text has no place on the row axis"),
    ],
)
def test_texts_that_overlap_or_leave_their_shard_are_refused(copy: Path, name: str, value: int, words: str) -> None:
    texts = Cache(copy).texts
    values = texts[name].to_pylist()
    values[3] = value
    change_texts(copy, texts.set_column(texts.schema.get_field_index(name), name, pa.array(values, pa.int64())))
    cache = Cache(copy)
    with pytest.raises(CacheCorrupt) as caught:
        cache.rows_of(np.ones(len(values), dtype=bool))
    assert str(caught.value) == f"{copy / TEXTS} cannot be read ({words}); get a whole copy of it"


def test_a_table_of_other_texts_than_the_manifest_counts_is_refused(copy: Path) -> None:
    texts = Cache(copy).texts
    change_texts(copy, texts.slice(1))
    with pytest.raises(CacheCorrupt) as caught:
        _ = Cache(copy).texts
    assert str(caught.value) == (
        f"{copy / TEXTS} cannot be read (it has {len(texts) - 1} texts, and the manifest counts {len(texts)}); "
        "get a whole copy of it"
    )


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors by /proc")
def test_a_cache_closes_its_files_when_told_and_when_it_is_gone(cache: Cache, made: Known) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = Cache(cache.path)
    other.vectors("hidden.1", made.places)
    assert len(os.listdir("/proc/self/fd")) > before
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before
    other.vectors("hidden.1", made.places)
    del other
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_in_a_folder_named_like_a_partition_adds_no_column(made: Known, tmp_path: Path) -> None:
    made.write(tmp_path / "seed=3")
    assert "seed" not in Cache(tmp_path / "seed=3").texts.column_names


def test_the_reader_on_the_format_page_reads_what_this_one_reads(cache: Cache, made: Known) -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    seen: dict[str, np.ndarray] = {}
    exec(code.replace("my-cache", str(cache.path)).replace("hidden.8", "hidden.1"), seen)
    assert np.array_equal(seen["vectors"], cache.vectors("hidden.1", made.places))
    for file in [*cache.manifest.model_fields_set, *ALL_COLUMNS]:
        assert f"`{file}`" in page


def test_a_shard_in_the_place_of_another_is_not_read(tmp_path: Path) -> None:
    made = known()
    made.write(tmp_path / "cache")
    folder = tmp_path / "cache/activations.zarr/sites/hidden.1/c"
    first, second = folder / "0/0", folder / "1/0"
    assert first.stat().st_size != second.stat().st_size
    first.write_bytes(second.read_bytes())
    with pytest.raises(
        CacheCorrupt, match=r"sites/hidden\.1/c/0/0 has [\d,]+ bytes instead of [\d,]+; `clvq cache verify`"
    ):
        Cache(tmp_path / "cache").vectors("hidden.1", np.arange(3))
