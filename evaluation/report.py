"""`clvq report`: the results in a folder as tables and figures, every number with its file and its command."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ..cache.files import make_folder, only_writer, sha256_of, write_file
from ..cache.layout import MANIFEST, to_json
from ..errors import ClvqError, ConfigError, DataError, DataNotFound, ResumeMismatch
from ..trainer.figures import save_figure
from ..trainer.folder import CONFIG, METRICS, MODEL, REPORT
from .quality import PER_CONCEPT
from .report_ablation import Ablation, read_ablation, studies
from .report_ablation_tables import ablation_section
from .report_commands import ablate_words, folder_word, joined, quality_words, settings_of, sweep_words, train_words
from .report_document import (
    Cell,
    Chart,
    Document,
    Entry,
    LeftOut,
    Number,
    Section,
    SourceFile,
    Table,
    say,
    shown,
    table_numbers,
)
from .report_figures import draw, with_any_signs
from .report_files import ABLATION, QUALITY, SWEEP, Found, name_of, read_json, search
from .report_html import html
from .report_markdown import markdown
from .report_quality import (
    Quality,
    Sweep,
    main_words,
    quality_section,
    read_quality,
    read_sweep,
    sweep_section,
    together,
)
from .report_runs import FALLING, FoundCache, FoundRun, cache_table, read_cache, read_run, run_tables, seed_table

FORMAT, VERSION = "clvq-report", 1
JSON, MARKDOWN, HTML, FIGURES = "report.json", "report.md", "report.html", "figures"
_OWN = (JSON, MARKDOWN, HTML, FIGURES)
_FIGURE = re.compile(r"(ablation-\d+-(effects|curves)|quality-\d+)\.(svg|png)")
Read = TypeVar("Read")


@dataclass(frozen=True)
class ReportResult:
    """What was reported, and what was left out."""

    path: Path
    caches: int
    runs: int
    ablations: int
    qualities: int
    sweeps: int
    tables: int
    figures: int
    numbers: int
    left_out: list[LeftOut]


def report(root: Path, out: Path | None = None, *, title: str | None = None, force: bool = False) -> ReportResult:
    """Gather the results below `root`; write `report.md`, `report.html`, `report.json` and `figures/` into `out`.

    Equal results give equal bytes where matplotlib is the same. Files that are damaged or of another version are named
    in the report and left out.

    Parameters
    ----------
    out
        Where it is not given, `report` in `root`. It is not searched for results.

    Raises
    ------
    DataNotFound
        Where the folder does not exist or holds no results.
    ConfigError
        Where `out` holds something else.
    ResumeMismatch
        Where `out` holds a report of other results, and `force` is not given.
    """
    if not root.is_dir():
        raise DataNotFound(f"{root} is no folder: give one that holds runs, ablations or other results of clvq")
    out = root / "report" if out is None else out
    gathered = gather(root, leave=out)
    if not gathered.results:
        first = next((f"; {left.path} is left out: {left.why}" for left in gathered.left_out), "")
        raise DataNotFound(
            f"{root} holds no results that can be read: no finished run and no {ABLATION}, {QUALITY} or {SWEEP}{first}"
        )
    document = gathered.document(shown(title or f"Results in {root.resolve().name}"))
    with only_writer(out):
        _write(out, document, force=force)
    return ReportResult(
        path=out,
        caches=len(gathered.caches),
        runs=len(gathered.runs),
        ablations=len(gathered.ablations),
        qualities=len(gathered.qualities),
        sweeps=len(gathered.sweeps),
        tables=len(document.tables),
        figures=len(document.charts),
        numbers=sum(1 for table in document.tables for _ in table_numbers(table)),
        left_out=list(document.left_out),
    )


def gather(root: Path, *, leave: Path) -> "Gathered":
    """Read all results below a folder, but for those in the folder `leave`.

    Raises
    ------
    DataError
        Where there is so much that it cannot be a folder of results.
    """
    gathered = Gathered(root)
    gathered.read(search(root, leave=leave))
    return gathered


@dataclass(frozen=True)
class Gathered:
    """Everything that was read."""

    root: Path
    caches: list[FoundCache] = field(default_factory=list)
    runs: list[FoundRun] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    words: dict[tuple[str, int], str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file that was read, by its name."""

    @property
    def results(self) -> bool:
        """Whether there is anything to report."""
        return any((self.runs, self.ablations, self.qualities, self.sweeps))

    def read(self, found: Found) -> None:
        """Read what was found; what cannot be read is noted."""
        self.left_out.extend(found.left_out)
        for folder in found.caches:
            self._add(
                self.caches, folder / MANIFEST, lambda folder: read_cache(self.root, folder, digests=self.digests)
            )
        for folder in found.runs:
            self._add(self.runs, folder / CONFIG, lambda folder: read_run(self.root, folder, digests=self.digests))
        for folder in found.ablations:
            self._add(self.ablations, folder / ABLATION, lambda folder: read_ablation(*self._json(folder / ABLATION)))
        for folder in found.qualities:
            self._add(self.qualities, folder / QUALITY, lambda folder: read_quality(*self._json(folder / QUALITY)))
        for folder in found.sweeps:
            self._add(self.sweeps, folder / SWEEP, lambda folder: read_sweep(*self._json(folder / SWEEP)))
        for quality in self.qualities:
            file = self.root / quality.folder / PER_CONCEPT
            if file.is_file() and not file.is_symlink():
                try:
                    self.words.update(main_words(file, quality))
                    self.digests[name_of(self.root, file)] = sha256_of(file)
                except (DataError, OSError) as error:
                    self._leave(file, error)
        self.left_out.sort(key=lambda left: left.path)

    def _json(self, file: Path) -> Any:
        return name_of(self.root, file.parent), read_json(self.root, file, digests=self.digests)

    def _add(self, these: list[Read], file: Path, read: Callable[[Path], Read]) -> None:
        try:
            these.append(read(file.parent))
        except (ClvqError, OSError) as error:
            self._leave(file, error)

    def _leave(self, file: Path, error: Exception) -> None:
        # Where the folder lies is no part of the report.
        why = str(error).replace(f"{self.root}/", "")
        self.left_out.append(LeftOut(shown(name_of(self.root, file)), shown(why)))

    def document(self, title: str) -> Document:
        """The whole report."""
        class_names = {cache.id: names for cache in self.caches if (names := cache.class_names) is not None}
        sections = [
            self._overview(),
            *([sweep_section(self.sweeps)] if self.sweeps else []),
            *(ablation_section(study) for study in studies(self.ablations, class_names, self.words)),
            *(quality_section(number, group) for number, group in enumerate(together(self.qualities), start=1)),
        ]
        return Document(title, version("clvq"), tuple(sections), tuple(self._entries()), tuple(self.left_out))

    def _overview(self) -> Section:
        used = {run.description.cache_id: "" for run in self.runs}
        used |= {quality.cache_id: "" for quality in self.qualities}
        used |= {sweep.cache_id: "" for sweep in self.sweeps}
        for ablation in self.ablations:
            name = None if ablation.model is None else ablation.model.find("name")
            used[ablation.cache_id] = "" if name is None else name.text()
        over_seeds = seed_table(self.runs)
        text = [
            say(
                "FVU: share of the variance that is unexplained, on held-out texts. Dead share: concepts without a "
                "training row, of latents those long unused. A loss is still falling where the last epoch of a phase "
                f"lowered the held-out loss by more than {100 * FALLING:g} %; in brackets how it changed."
            )
        ]
        tables = [
            *([cache_table(self.caches, used)] if used or self.caches else []),
            *run_tables(self.runs),
            *([] if over_seeds is None else [over_seeds]),
        ]
        return Section("What there is", tuple(text) if self.runs else (), tuple(tables))

    def _entries(self) -> list[Entry]:
        made = [
            *(self._cache_entry(cache) for cache in self.caches),
            *(self._run_entry(run) for run in self.runs),
            *(self._ablation_entry(ablation) for ablation in self.ablations),
            *(self._quality_entry(quality) for quality in self.qualities),
            *(self._sweep_entry(sweep) for sweep in self.sweeps),
        ]
        return [Entry(number=number, **fields) for number, fields in enumerate(made, start=1)]

    def _cache_entry(self, cache: FoundCache) -> dict[str, Any]:
        return self._entry("cache", cache.name, (MANIFEST,), cache.id)

    def _run_entry(self, run: FoundRun) -> dict[str, Any]:
        description = run.description
        words = train_words(description.config)
        seed = ["--seed", str(description.config.seed), "--out", folder_word(run.name)]
        return self._entry(
            "run", run.name, (CONFIG, REPORT, METRICS, MODEL), description.cache_id,
            runs={run.name: run.sha256},
            clvq=description.clvq,
            settings=settings_of(run.config.at("config")),
            command=None if words is None else [*words, *seed],
        )  # fmt: skip

    def _ablation_entry(self, ablation: Ablation) -> dict[str, Any]:
        local = ablation.model is not None and ablation.model.find("commit") is None
        folders = self._folders(ablation.runs)
        return self._entry(
            "ablation", ablation.folder, (ABLATION,), ablation.cache_id,
            runs=ablation.runs,
            clvq=ablation.clvq,
            settings=settings_of(ablation.config),
            command=ablate_words(ablation.config, folders, ablation.folder, local_model=local),
        )  # fmt: skip

    def _quality_entry(self, quality: Quality) -> dict[str, Any]:
        config, folders = quality.settings.at("config"), self._folders(quality.runs)
        return self._entry(
            "quality", quality.folder, (QUALITY, PER_CONCEPT), quality.cache_id,
            runs=quality.runs,
            clvq=quality.clvq,
            settings=settings_of(config),
            command=quality_words(config, folders, quality.folder, tagged=quality.tagged),
        )  # fmt: skip

    def _sweep_entry(self, sweep: Sweep) -> dict[str, Any]:
        members = {_inside(sweep.folder, name) for names in sweep.runs for name in names}
        mine = [run for run in self.runs if run.name in members]
        return self._entry(
            "sweep", sweep.folder, (SWEEP,), sweep.cache_id,
            runs={run.name: run.sha256 for run in mine},
            command=sweep_words(
                [run.description.config for run in mine],
                [{name: node.value for name, node in row.items()} for row in sweep.settings],
                sweep.folder,
                members=len(members) + sweep.failed,
            ),
        )  # fmt: skip

    def _entry(
        self,
        kind: str,
        name: str,
        files: tuple[str, ...],
        cache_id: str,
        *,
        runs: Mapping[str, str] | None = None,
        clvq: str | None = None,
        settings: tuple[tuple[str, str], ...] = (),
        command: list[str] | None = None,
    ) -> dict[str, Any]:
        inside = [_inside(name, file) for file in files]
        return {
            "kind": kind,
            "name": shown(name),
            "files": tuple(SourceFile(file, self.digests[file]) for file in inside if file in self.digests),
            "cache_id": shown(cache_id),
            "runs": tuple((shown(run), shown(sha256[:12])) for run, sha256 in (runs or {}).items()),
            "clvq": None if clvq is None else shown(clvq),
            "settings": settings,
            "command": None if command is None or not (said := joined(command)).isprintable() else said,
        }

    def _folders(self, runs: Mapping[str, str]) -> list[str]:
        """Where the runs of a result lie, as far as they are here; of copies the one of the same name."""
        folders = []
        for name, sha256 in runs.items():
            here = [run.name for run in self.runs if run.sha256 == sha256]
            folders.append(next((path for path in here if Path(path).name == name), here[0] if here else name))
        return folders


def _inside(folder: str, file: str) -> str:
    return file if folder == "." else f"{folder}/{file}"


def _write(out: Path, document: Document, *, force: bool) -> None:
    data = to_json(plain(document))
    _check(out, data, force=force)
    # The mark of a whole report goes first and comes last.
    (out / JSON).unlink(missing_ok=True)
    make_folder(out / FIGURES)
    wanted = {f"{chart.name}.{kind}" for chart in document.charts for kind in ("svg", "png")}
    for file in sorted((out / FIGURES).iterdir()):
        if _FIGURE.fullmatch(file.name) and file.name not in wanted:
            file.unlink()
    with with_any_signs():
        for chart in document.charts:
            save_figure(out / FIGURES, chart.name, draw(chart))
    images = {chart.name: (out / FIGURES / f"{chart.name}.svg").read_bytes() for chart in document.charts}
    write_file(out / MARKDOWN, markdown(document, figures=FIGURES).encode())
    write_file(out / HTML, html(document, images).encode())
    write_file(out / JSON, data)


def _check(out: Path, data: bytes, *, force: bool) -> None:
    """Make sure that the folder is empty, or holds this report, or another one that may go."""
    names = sorted(entry.name for entry in out.iterdir() if not entry.name.endswith(".aside"))
    strange = [name for name in names if name not in _OWN]
    if strange:
        raise ConfigError(f"{out} holds something that is no report ({strange[0]!r}): give another --out")
    if not names or force:
        return
    try:
        before = (out / JSON).read_bytes()
        is_report = json.loads(before).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        before, is_report = b"", False
    if not is_report:
        raise ConfigError(
            f"{out} is not empty and holds no whole report: give another --out, or --force to write "
            f"over {', '.join(names)}"
        )
    if before != data:
        raise ResumeMismatch(
            f"{out} holds a report of other results or with another title: give another --out, or --force to replace it"
        )


def plain(document: Document) -> dict[str, Any]:
    """The content of `report.json`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "clvq": document.clvq,
        "title": document.title,
        "sections": [
            {
                "title": section.title,
                "text": [_cell(cell) for cell in section.text],
                "tables": [_table(document, table) for table in section.tables],
                "figures": [_chart(document, chart) for chart in section.charts],
            }
            for section in document.sections
        ],
        "sources": [_entry(entry) for entry in document.entries],
        "left_out": [{"path": left.path, "why": left.why} for left in document.left_out],
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "kind": entry.kind,
        "name": entry.name,
        "files": {file.file: file.sha256 for file in entry.files},
        "cache_id": entry.cache_id,
        "runs": dict(entry.runs),
        "clvq": entry.clvq,
        "settings": dict(entry.settings),
        "command": entry.command,
    }


def _table(document: Document, table: Table) -> dict[str, Any]:
    return {
        "caption": table.caption,
        "columns": list(table.columns),
        "rows": [[_cell(cell) for cell in row] for row in table.rows],
        "notes": [_cell(note) for note in table.notes],
        "sources": document.entries_of(table_numbers(table)),
    }


def _chart(document: Document, chart: Chart) -> dict[str, Any]:
    return {
        "name": chart.name,
        "title": chart.title,
        "caption": chart.caption,
        "numbers": [_number(number) for number in chart.numbers],
        "sources": document.entries_of(chart.numbers),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {"text": cell.text, "numbers": [_number(number) for number in cell.numbers]}


def _number(number: Number) -> dict[str, Any]:
    return {
        "value": number.value,
        "text": number.text,
        "rule": number.rule,
        "sources": [{"file": source.file, "pointer": source.pointer} for source in number.sources],
    }
