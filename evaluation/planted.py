"""Caches of synthetic rows whose concepts are known, each difficulty of real layers under a switch of its own."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..cache.extraction import Extraction, Shard
from ..cache.layout import ROW_COLUMNS, SiteLayout
from ..cache.placement import Placement, place
from ..cache.reader import Cache
from ..cache.writer import CacheWriter
from .agreement import Recovery, recovery

LOWER, UPPER = "hidden.1", "hidden.2"

Kind = Literal["duplicated", "crossed", "row pair", "neighbour pair", "plain"]

# Of a crossed concept's two lower factors; their squares add up to 1, the variance of any other centre.
_FACTORS = (0.8, 0.6)
# Stands in for a noise of 0 where it divides.
_LEAST_NOISE = 1e-6


class PlantedConfig(BaseModel):
    """What is planted. A channel of a concept's centre has variance 1, at either site; lengths count in that unit.

    Whatever can be 0 is then absent, and by default it is. Random numbers of different parts are drawn apart: what one
    switch adds leaves the rest of the data as it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(default=0, ge=0)
    concepts: int = Field(default=50, ge=2)
    zipf: float = Field(default=1.0, ge=0)
    """The r-th most frequent concept has a frequency in proportion to r^−zipf. Members of a pair share theirs."""
    texts: int = Field(default=1_200, ge=2)
    shortest: int = Field(default=8, ge=1)
    """Rows of the shortest text that may occur."""
    longest: int = Field(default=24, ge=1)
    dev_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the texts in the split `dev`; the others are in `train`."""
    width: int = Field(default=64, ge=1)
    upper_width: int = Field(default=64, ge=1)
    noise: float = Field(default=0.5, ge=0)
    """Standard deviation of a lower channel about what is planted there."""
    upper_noise: float = Field(default=0.5, ge=0)
    offset: float = Field(default=3.0, ge=0)
    """Standard deviation of the channels of the mean that all rows of a site share."""

    duplicated: int = Field(default=0, ge=0)
    """Concepts with several unrelated lower centres, its synonyms, and one upper centre."""
    synonyms: int = Field(default=3, ge=1)
    """Lower centres of a duplicated concept."""
    crossed: int = Field(default=0, ge=0)
    """Groups of concepts that two lower factors decide together, and neither alone: a Latin square."""
    crossing: int = Field(default=4, ge=2)
    """Concepts of such a group, and values of each of its factors."""
    superposed: int = Field(default=0, ge=0)
    """Other concepts' lower centres that are added to each row."""
    superposition: float = Field(default=0.5, ge=0)
    """Weight of each of them."""
    row_pairs: int = Field(default=0, ge=0)
    """Pairs of concepts whose lower rows differ within the quiet subspace only."""
    row_pair_gap: float = Field(default=6.0, ge=0)
    """Distance of such two, in units of `quiet_noise`."""
    quiet: int = Field(default=8, ge=1)
    """Dimensions of the quiet subspace, which is there where there are row pairs. Nothing else is found in it."""
    quiet_noise: float = Field(default=0.05, gt=0)
    """Standard deviation of the rows along each of them."""
    neighbour_pairs: int = Field(default=0, ge=0)
    """Pairs of concepts with one lower centre; which of the two a row is, the row before it decides."""
    nuisance_types: int = Field(default=0, ge=0)
    """Types of row, as words have types, that have nothing to do with the concept."""
    nuisance: float = Field(default=2.0, ge=0)
    """Standard deviation of the channels of a type's lower centre."""
    positional: float = Field(default=0.0, ge=0)
    """Root mean square of the channels of what is added in proportion to the position, at a text's two ends."""
    upper_nuisance: float = Field(default=0.0, ge=0)
    """The same at the upper site, of types and of the position, as a share of the lower site's."""
    outlier_channels: int = Field(default=0, ge=0)
    """Channels with heavy tails."""
    outlier_scale: float = Field(default=100.0, ge=0)
    """Of their values, by which Student's t with 3 degrees of freedom is multiplied."""
    upper_outliers: float = Field(default=0.0, ge=0)
    """Share of these values that the same channels of the upper site have too."""

    @model_validator(mode="after")
    def _fits(self) -> "PlantedConfig":
        asked = self.duplicated + self.crossed * self.crossing + 2 * (self.row_pairs + self.neighbour_pairs)
        if asked > self.concepts:
            raise ValueError(
                f"duplicated, crossed and paired concepts are {asked} together, of {self.concepts} concepts: "
                f"ask for fewer, or set concepts to {asked} or more"
            )
        if self.longest < self.shortest:
            raise ValueError(f"longest = {self.longest} is less than shortest = {self.shortest}: exchange them")
        if self.row_pairs and self.width <= self.quiet:
            raise ValueError(f"quiet = {self.quiet} takes all of the {self.width} channels: set width higher")
        channels = min(self.width, self.upper_width) if self.upper_outliers else self.width
        if self.outlier_channels > channels:
            raise ValueError(f"outlier_channels = {self.outlier_channels}, of {channels} channels: set it lower")
        return self

    def generator(self, part: str) -> np.random.Generator:
        """Random numbers of one part of the data."""
        return np.random.default_rng([self.seed, *part.encode()])


@dataclass(frozen=True)
class Planted:
    """A cache with the truth about its rows. Row columns have a value for every place of the cache; −1 = not in use."""

    config: PlantedConfig
    cache: Cache
    kinds: tuple[Kind, ...]
    """Of each concept."""
    upper_centres: Float64[np.ndarray, "concept d_upper"]
    """Mean upper row of each concept, what all rows share included."""
    concept: Int64[np.ndarray, " row_place"]
    form: Int64[np.ndarray, " row_place"]
    """Which lower centre a row has: synonyms of a concept have several, neighbour pairs share one."""
    guess: Int64[np.ndarray, " row_place"]
    """The concept most probable to someone who sees the lower row and knows all that was added to its centre but the
    noise; the pair's first one for neighbour pairs."""
    guess_with_neighbour: Int64[np.ndarray, " row_place"]
    """The same for someone who also sees the row before."""

    def rows(self, split: str) -> Int64[np.ndarray, " row"]:
        """Places of a split's rows."""
        return self.cache.rows_of(self.cache.splits([split]))

    def of_kind(self, kind: Kind) -> Int64[np.ndarray, " concept"]:
        """The concepts of one kind."""
        return np.flatnonzero(np.array(self.kinds) == kind)

    def ceiling(self, rows: Int64[np.ndarray, " row"], *, neighbours: bool) -> Recovery:
        """Recovery by someone who is told more about each row than any method can know.

        Without neighbours, a pair that only they decide is either taken for one concept or halved blindly; of the two
        figures the better one is given. `matched_f1` needs the second: one code serves one concept.
        """
        if neighbours:
            return recovery(self.concept[rows], self.guess_with_neighbour[rows])
        whole = self.guess[rows]
        first = np.isin(whole, self.of_kind("neighbour pair"))
        halved = whole + (first & (np.arange(len(rows)) % 2 == 1))
        ways = [vars(recovery(self.concept[rows], guess)) for guess in (whole, halved)]
        return Recovery(**{name: max(way[name] for way in ways) for name in ways[0]})


def plant(config: PlantedConfig, folder: Path) -> Planted:
    """Write the cache and tell the truth about it. Equal settings give, on one machine, equal bytes.

    The rows' `token` is their form, and the texts name the forms; nothing in the cache names a concept.

    Raises
    ------
    ResumeMismatch
        Where the folder holds another cache.
    ConfigError
        Where the folder holds something else.
    """
    words = _Words.of(config)
    rows = _Rows.of(config, words)
    lower, offsets = _lower(config, words, rows)
    centres = config.generator("upper centres").normal(size=(config.concepts, config.upper_width))
    centres += config.offset * config.generator("upper offset").normal(size=config.upper_width)
    upper = _upper(config, centres, rows)
    placement = place(rows.counts, row_bytes=4 * max(config.width, config.upper_width))
    _write(config, folder, placement, rows, {LOWER: lower, UPPER: upper})
    cache = Cache(folder)
    places = np.repeat(placement.first_row, rows.counts) + rows.position

    def placed(values: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row_place"]:
        column = np.full(cache.manifest.geometry.row_places, -1, dtype=np.int64)
        column[places] = values
        return column

    guess = words.owner[_likeliest_form(config, words, offsets)]
    other = words.paired[guess] & (rows.cue == 1)
    return Planted(
        config=config,
        cache=cache,
        kinds=words.kinds,
        upper_centres=centres,
        concept=placed(rows.concept),
        form=placed(rows.form),
        guess=placed(guess),
        guess_with_neighbour=placed(guess + other),
    )


@dataclass(frozen=True)
class _Words:
    """Concepts and their forms. The members of a pair are neighbours by number."""

    kinds: tuple[Kind, ...]
    frequency: Float64[np.ndarray, " concept"]
    paired: Bool[np.ndarray, " concept"]
    """Whether the row before decides between the concept and its neighbour by number."""
    cue: Int64[np.ndarray, " concept"]
    """What a row of the concept decides for the row after it."""
    first_form: Int64[np.ndarray, " concept"]
    forms: Int64[np.ndarray, " concept"]
    """Number of forms."""
    owner: Int64[np.ndarray, " form"]
    """The first concept of each form."""
    centres: Float64[np.ndarray, "form d"]
    """Lower centres, the quiet dimensions first."""

    @classmethod
    def of(cls, config: PlantedConfig) -> "_Words":
        counts = {
            "duplicated": config.duplicated,
            "crossed": config.crossed * config.crossing,
            "row pair": 2 * config.row_pairs,
            "neighbour pair": 2 * config.neighbour_pairs,
        }
        counts["plain"] = config.concepts - sum(counts.values())
        kinds = tuple(kind for kind in get_args(Kind) for _ in range(counts[kind]))
        named = np.array(kinds)
        paired = named == "neighbour pair"
        frequency = _frequencies(config, (named == "row pair") | paired)

        forms = np.ones(config.concepts, dtype=np.int64)
        forms[named == "duplicated"] = config.synonyms
        forms[named == "crossed"] = config.crossing
        seconds = np.flatnonzero(paired)[1::2]
        own = forms.copy()
        own[seconds] = 0
        first_form = np.cumsum(own) - own
        first_form[seconds] -= 1
        owner = np.repeat(np.arange(config.concepts), own)
        centres = _lower_centres(config, named, owner)
        return cls(kinds, frequency, paired, _cues(frequency, paired), first_form, forms, owner, centres)


def _frequencies(config: PlantedConfig, in_pair: Bool[np.ndarray, " concept"]) -> Float64[np.ndarray, " concept"]:
    shares = np.arange(1, config.concepts + 1) ** -config.zipf
    shares = config.generator("ranks").permutation(shares / shares.sum())
    members = np.flatnonzero(in_pair).reshape(-1, 2)
    shares[members] = shares[members].mean(axis=1, keepdims=True)
    return shares


def _cues(
    frequency: Float64[np.ndarray, " concept"], paired: Bool[np.ndarray, " concept"]
) -> Int64[np.ndarray, " concept"]:
    """0 or 1 for each concept, about equally frequent; the same for both of a neighbour pair, which look the same."""
    cue, sums = np.zeros(len(frequency), dtype=np.int64), np.zeros(2)
    seconds = np.flatnonzero(paired)[1::2]
    for concept in np.argsort(-frequency, kind="stable"):
        if concept not in seconds:
            cue[concept] = sums.argmin()
            sums[cue[concept]] += frequency[concept] * (1 + paired[concept])
    cue[seconds] = cue[seconds - 1]
    return cue


def _lower_centres(
    config: PlantedConfig, named: np.ndarray, owner: Int64[np.ndarray, " form"]
) -> Float64[np.ndarray, "form d"]:
    quiet = config.quiet if config.row_pairs else 0
    loud = config.width - quiet
    centres = np.zeros((len(owner), config.width))
    centres[:, quiet:] = config.generator("lower centres").normal(size=(len(owner), config.width))[:, quiet:]

    size = config.crossing
    factors = config.generator("factors").normal(size=(2, config.crossed, size, loud))
    for group, concepts in enumerate(np.flatnonzero(named == "crossed").reshape(-1, size)):
        for number, concept in enumerate(concepts):
            for one, form in enumerate(np.flatnonzero(owner == concept)):
                first, second = factors[0, group, one], factors[1, group, (number - one) % size]
                centres[form, quiet:] = _FACTORS[0] * first + _FACTORS[1] * second

    directions = config.generator("quiet directions").normal(size=(config.row_pairs, quiet))
    for direction, pair in zip(directions, np.flatnonzero(named == "row pair").reshape(-1, 2), strict=True):
        one, other = np.flatnonzero(owner == pair[0])[0], np.flatnonzero(owner == pair[1])[0]
        half = config.row_pair_gap / 2 * config.quiet_noise * direction / np.linalg.norm(direction)
        centres[other] = centres[one]
        centres[one, :quiet], centres[other, :quiet] = half, -half
    return centres


@dataclass(frozen=True)
class _Rows:
    """The rows of all texts, text after text."""

    counts: Int64[np.ndarray, " text"]
    position: Int64[np.ndarray, " row"]
    concept: Int64[np.ndarray, " row"]
    form: Int64[np.ndarray, " row"]
    cue: Int64[np.ndarray, " row"]
    """What the row before says; 0 at the start of a text."""
    kind: Int64[np.ndarray, " row"]
    """The row's nuisance type; all 0 where there are none."""

    @classmethod
    def of(cls, config: PlantedConfig, words: _Words) -> "_Rows":
        counts = config.generator("lengths").integers(config.shortest, config.longest + 1, config.texts)
        rows = int(counts.sum())
        position = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
        drawn = config.generator("concepts").choice(config.concepts, rows, p=words.frequency)
        cue = np.where(position > 0, words.cue[np.roll(drawn, 1)], 0)
        firsts = words.owner[words.first_form[drawn]]
        concept = np.where(words.paired[drawn], firsts + cue, drawn)
        form = words.first_form[concept] + config.generator("forms").integers(words.forms[concept])
        kind = config.generator("types").integers(max(1, config.nuisance_types), size=rows)
        return cls(counts, position, concept, form, cue, kind)

    def along(self, config: PlantedConfig) -> Float64[np.ndarray, "row one"]:
        """The position, from −1 at a text's start to about 1 at the end of the longest."""
        along: Float64[np.ndarray, "row one"] = (2 * self.position / config.longest - 1)[:, None]
        return along


def _lower(
    config: PlantedConfig, words: _Words, rows: _Rows
) -> tuple[Float32[np.ndarray, "row d"], Float64[np.ndarray, "row d"]]:
    """The lower rows; and each row's centre with nothing but the noise, before rotation, which the ceilings judge."""
    quiet = config.quiet if config.row_pairs else 0
    noise = config.generator("noise").normal(size=(len(rows.form), config.width))
    noise[:, :quiet] *= config.quiet_noise
    noise[:, quiet:] *= config.noise
    centred = words.centres[rows.form] + noise

    added = np.zeros_like(centred)
    others = config.generator("superposed").integers(len(words.centres), size=(config.superposed, len(rows.form)))
    for other in others:
        added += config.superposition * words.centres[other]
    added += _nuisance(config, rows, config.width, "lower")
    added[:, :quiet] = 0

    # A quiet subspace along axes could be seen by looking at the channels one by one.
    rotation = np.linalg.qr(config.generator("rotation").normal(size=(config.width, config.width)))[0]
    lower = (centred + added) @ rotation + config.offset * config.generator("offset").normal(size=config.width)
    lower[:, : config.outlier_channels] += _outliers(config, len(lower))
    return lower.astype(np.float32), centred


def _upper(
    config: PlantedConfig, centres: Float64[np.ndarray, "concept d"], rows: _Rows
) -> Float32[np.ndarray, "row d"]:
    shape = (len(rows.concept), config.upper_width)
    upper = centres[rows.concept] + config.upper_noise * config.generator("upper noise").normal(size=shape)
    if config.upper_nuisance:
        upper += config.upper_nuisance * _nuisance(config, rows, config.upper_width, "upper")
    if config.upper_outliers:
        upper[:, : config.outlier_channels] += config.upper_outliers * _outliers(config, len(upper))
    stored: Float32[np.ndarray, "row d"] = upper.astype(np.float32)
    return stored


def _nuisance(config: PlantedConfig, rows: _Rows, width: int, site: str) -> Float64[np.ndarray, "row d"]:
    types = config.generator(f"{site} types").normal(size=(max(1, config.nuisance_types), width))
    slope = config.generator(f"{site} position").normal(size=width)
    scale = config.nuisance if config.nuisance_types else 0.0
    nuisance: Float64[np.ndarray, "row d"] = scale * types[rows.kind] + config.positional * rows.along(config) * slope
    return nuisance


def _outliers(config: PlantedConfig, rows: int) -> Float64[np.ndarray, "row channel"]:
    drawn = config.generator("outliers").standard_t(3, size=(rows, config.outlier_channels))
    return np.multiply(config.outlier_scale, drawn)


def _likeliest_form(
    config: PlantedConfig, words: _Words, centred: Float64[np.ndarray, "row d"]
) -> Int64[np.ndarray, " row"]:
    """Bayes' decision on centres with Gaussian noise."""
    quiet = config.quiet if config.row_pairs else 0
    scales = np.full(config.width, max(config.noise, _LEAST_NOISE))
    scales[:quiet] = config.quiet_noise
    centres = words.centres / scales
    frequency = words.frequency / words.forms
    prior = frequency[words.owner] * (1 + words.paired[words.owner])
    score = centred / scales @ centres.T - np.square(centres).sum(axis=1) / 2 + np.log(prior)
    likeliest: Int64[np.ndarray, " row"] = score.argmax(axis=1)
    return likeliest


def _write(
    config: PlantedConfig,
    folder: Path,
    placement: Placement,
    rows: _Rows,
    vectors: dict[str, Float32[np.ndarray, "row d"]],
) -> None:
    columns, contents = _columns(placement, rows)
    identity = {"model": {"name": "planted"}, "planted": config.model_dump(mode="json")}
    sites = {site: SiteLayout(width=values.shape[1], encoding="fp32") for site, values in vectors.items()}
    ends = np.r_[0, np.cumsum(rows.counts)]
    with CacheWriter(folder, Extraction(identity, placement.geometry, sites, None)) as writer:
        if writer.finished:
            return
        for shard in range(placement.geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2]
            mine = slice(ends[first], ends[end])
            writer.commit(
                Shard(
                    shard,
                    {site: values[mine] for site, values in vectors.items()},
                    {name: values[mine] for name, values in columns.items()},
                    int(end - first),
                )
            )
        writer.finish(_texts(config, placement, rows, contents), class_names=None, counts={"texts": config.texts})


def _columns(placement: Placement, rows: _Rows) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of the row axis, and the texts: the rows' forms by name, one space apart."""
    names = np.array([f"w{form}" for form in range(int(rows.form.max()) + 1)])
    contents = [" ".join(names[part]) for part in np.split(rows.form, np.cumsum(rows.counts)[:-1])]
    lengths = np.char.str_len(names)[rows.form]
    ends = np.cumsum(lengths + 1)
    before = np.repeat(np.r_[0, ends[np.cumsum(rows.counts)[:-1] - 1]], rows.counts)
    values = {
        "text": np.repeat(placement.text_id, rows.counts),
        "position": rows.position,
        "subwords": np.ones(len(ends)),
        "token": rows.form,
        "word": rows.position,
        "char_start": ends - lengths - 1 - before,
        "char_end": ends - 1 - before,
        "special": np.zeros(len(ends)),
    }
    return {name: values[name].astype(dtype) for name, (dtype, _) in ROW_COLUMNS.items()}, contents


def _texts(config: PlantedConfig, placement: Placement, rows: _Rows, contents: list[str]) -> pa.Table:
    dev = np.zeros(config.texts, dtype=bool)
    wanted = min(max(1, round(config.dev_share * config.texts)), config.texts - 1)
    dev[config.generator("splits").permutation(config.texts)[:wanted]] = True
    return pa.table(
        {
            "text_id": pa.array(placement.text_id, pa.int64()),
            "source_row": pa.array(range(config.texts), pa.int64()),
            "split": np.where(dev, "dev", "train").tolist(),
            "text": contents,
            "text_sha256": [hashlib.sha256(content.encode()).hexdigest() for content in contents],
            "label": pa.nulls(config.texts, pa.int32()),
            "truncated_tokens": pa.array([0] * config.texts, pa.int32()),
            "first_row": placement.first_row,
            "row_count": rows.counts,
        }
    )
