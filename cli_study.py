"""`clvq study …`: items for judges and people, pages, the server, and what the answers say."""

import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, DataNotFound
from .options import Device, Json, Seed, device_of, model_loader, named, names, settings_of
from .terminal import interval, print_json, printable, progress_bars, put, titled

if TYPE_CHECKING:
    from .evaluation.study.make import ItemsResult
    from .evaluation.study.method_scores import MethodTable
    from .evaluation.study.score import StudyScore

study_app = typer.Typer(
    name="study",
    help="Concepts before people: the items, their pages, a server for them, and what the answers say.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@study_app.command()
def items(
    cache: Annotated[str, typer.Argument(help="The cache that the runs were trained on: a folder, s3://… or hf://….")],
    runs: Annotated[list[Path], typer.Argument(help="The runs to compare; the first is also the duplicate control.")],
    out: Annotated[Path, typer.Option(help="The item file, such as items.json; its key is written beside it.")],
    model: Annotated[str | None, typer.Option(help="The model's folder; needed where it is not from the Hub.")] = None,
    count: Annotated[int, typer.Option("--items", help="Texts to draw.")] = 100,
    training: Annotated[int, typer.Option(help="Further texts for people to practise on.")] = 3,
    attention: Annotated[int, typer.Option(help="Items that say how they want to be answered.")] = 3,
    words: Annotated[int, typer.Option(help="Words of a concept that are shown, at most.")] = 10,
    sentences: Annotated[int, typer.Option(help="Sentences of a concept that are shown, at most.")] = 5,
    examples: Annotated[str, typer.Option(help="Sentences drawn at random, or the most typical.")] = "random",
    allocation: Annotated[
        str, typer.Option(help="Texts by prediction and right or wrong: proportional to their number, or equal.")
    ] = "proportional",
    controls: Annotated[str, typer.Option(help="duplicate, random, both with a comma between, or nothing.")] = (
        "duplicate,random"
    ),
    saliency: Annotated[
        str, typer.Option(help="The salient word by gradient, or as stored in the cache.")
    ] = "gradient",
    classes: Annotated[
        str, typer.Option(help="Names to show for the classes, in order; else those of the cache.")
    ] = "",
    split: Annotated[str, typer.Option(help="Splits to draw from; else the texts that the runs held out.")] = "",
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an item file made with other settings.")] = False,
    as_json: Json = False,
) -> None:
    """Draw texts, and show for each what every method makes of its salient word: one file for judges and people."""
    from .cache.sharing.remote import open_cache
    from .evaluation.study.make import ItemConfig, make_items

    unknown = set(names(controls)) - {"duplicate", "random"}
    if unknown:
        raise ConfigError(f"--controls {controls}: {sorted(unknown)[0]!r} is none; give duplicate, random, or both")
    opened = open_cache(cache)
    where = device_of(device)
    config = settings_of(
        ItemConfig,
        items=count,
        training=training,
        attention=attention,
        words=words,
        sentences=sentences,
        examples=examples,
        allocation=allocation,
        duplicate="duplicate" in names(controls),
        random="random" in names(controls),
        saliency=saliency,
        split=tuple(names(split)),
        classes=tuple(names(classes)),
        seed=seed,
    )
    load = model_loader(opened.manifest.identity, model, what=cache, device=where)
    labelled = named(runs)
    with progress_bars() as progress:
        result = make_items(opened, labelled, out, load, config, progress=progress, force=force)
    if as_json:
        print_json(_plain_items(result))
    else:
        _print_items(result)


def _plain_items(result: "ItemsResult") -> dict[str, Any]:
    return {
        "path": result.path,
        "key": result.key,
        "digest": result.digest,
        "items": {kind: len(result.items.of_kind(kind)) for kind in ("main", "training", "attention")},
        "classes": result.items.classes,
        "methods": result.items.methods,
        "sampling": result.items.sampling.model_dump(mode="json"),
    }


def _print_items(result: "ItemsResult") -> None:
    made, sampling = result.items, result.items.sampling
    table = titled(["prediction", "right", "texts", "items", "weight of one"], "texts drawn, by stratum")
    for stratum in sampling.strata:
        share = (
            stratum.texts / sampling.population / (stratum.items / len(made.of_kind("main"))) if stratum.items else 0
        )
        table.add_row(
            printable(made.classes[stratum.prediction]),
            {True: "yes", False: "no", None: "–"}[stratum.right],
            f"{stratum.texts:,}",
            f"{stratum.items:,}",
            f"{share:.2f}" if stratum.items else "–",
        )
    put(table)
    counts = ", ".join(f"{len(made.of_kind(kind)):,} {kind}" for kind in ("main", "training", "attention"))
    put(f"{result.path}: {counts} items of {sampling.population:,} texts × {len(made.methods)} methods")
    for why, count in sampling.left_out.items():
        put(f"{count:,} texts {why} were not drawn from")
    roles = Counter(method.role for method in result.names.values())
    controls = ", ".join(role for role in ("duplicate", "random") if roles[role]) or "none"
    put(f"methods {', '.join(made.methods)}: {roles['run']} runs; controls: {controls}")
    put(f"{result.key}: the key, which says which is which; keep it from those who judge")


@study_app.command()
def build(
    items_file: Annotated[Path, typer.Argument(metavar="ITEMS", help="An item file that `clvq study items` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    title: Annotated[str | None, typer.Option(help="Of the pages.")] = None,
    consent: Annotated[Path | None, typer.Option(help="Text file: what people agree to; an empty line parts.")] = None,
    instructions: Annotated[Path | None, typer.Option(help="Text file: what people are told to do.")] = None,
    contact: Annotated[str | None, typer.Option(help="Whom to ask; on the first and the last page.")] = None,
    completion: Annotated[str | None, typer.Option(help="Shown at the end, such as a code for payment.")] = None,
    annotators: Annotated[
        int, typer.Option(help="People planned: so many links, and booklets for pages without server.")
    ] = 10,
    per_annotator: Annotated[
        int | None, typer.Option(help="Questions per person; every item once where not given.")
    ] = None,
    show: Annotated[
        str, typer.Option(help="words, sentences, labels: what is shown of a concept.")
    ] = "words,sentences",
    words: Annotated[str, typer.Option(help="Words as a cloud or a list.")] = "cloud",
    idle_minutes: Annotated[
        int, typer.Option(help="After so long without an answer, a person's open questions go to others too.")
    ] = 60,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a study that nobody has answered.")] = False,
    as_json: Json = False,
) -> None:
    """Make the pages in which people see concepts and guess what the model predicts."""
    from .evaluation.study.build import build as build_study
    from .evaluation.study.settings import StudySettings

    given = {
        "title": title,
        "consent": _text_of(consent),
        "instructions": _text_of(instructions),
        "contact": contact,
        "completion": completion,
        "per_annotator": per_annotator,
    }
    settings = settings_of(
        StudySettings,
        **{name: value for name, value in given.items() if value is not None},
        annotators=annotators,
        show=tuple(names(show)),
        words=words,
        idle_minutes=idle_minutes,
        seed=seed,
    )
    result = build_study(items_file, out, settings, force=force)
    if as_json:
        print_json(asdict(result))
        return
    put(
        f"{result.path}: {result.questions:,} questions per person (with {result.training:,} for practice and "
        f"{result.attention:,} checks) of {result.main:,} items × {result.methods:,} methods"
    )
    put(
        f"{result.annotators:,} people who answer all give each item and method {result.fewest:,} to {result.most:,} "
        "answers"
    )
    put(f"serve it:            clvq study serve {result.path}")
    put(f"or without a server: open {result.path / 'pages' / 'index.html'}, and collect the files that people save")


def _text_of(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8") from error


@study_app.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study that `clvq study build` made.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes one that is free.")] = 8765,
    annotators: Annotated[
        int | None, typer.Option(min=1, help="Make links for so many people, where more came.")
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="Address of the proxy that encrypts, such as https://study.example.org.")
    ] = None,
    expose: Annotated[
        bool, typer.Option("--expose", help="Allow a --host that other machines reach; nothing is encrypted.")
    ] = False,
) -> None:
    """Serve a study to people, each by a personal link, until Ctrl-C."""
    from .evaluation.study.server import serve as serve_study

    def ready(links: list[str]) -> None:
        put("personal links; whoever has one answers as that person:")
        for number, link in enumerate(links, start=1):
            put(f"{number:4}  {link}")
        put("serving until Ctrl-C; `clvq study score` and `export` may be run meanwhile")
        sys.stdout.flush()

    serve_study(folder, host=host, port=port, public_url=public_url, expose=expose, annotators=annotators, ready=ready)


@study_app.command()
def links(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study that was served.")],
    url: Annotated[str, typer.Option(help="Address under which people reach it.")] = "http://127.0.0.1:8765",
) -> None:
    """Print the personal links again."""
    from .evaluation.study.server import links as links_of

    for number, link in enumerate(links_of(folder, url), start=1):
        put(f"{number:4}  {link}")


@study_app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study that was served; it may go on meanwhile.")],
    out: Annotated[Path, typer.Option(help="File of the answers: .csv or .jsonl.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write all answers that were given so far."""
    from .evaluation.study.answer_files import export as export_answers

    count = export_answers(folder, out, force=force)
    put(f"{out}: {count:,} answers")


@study_app.command()
def potato(
    items_file: Annotated[Path, typer.Argument(metavar="ITEMS", help="An item file that `clvq study items` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of a project for potato, the annotation tool.")],
    annotators: Annotated[int, typer.Option(help="People planned.")] = 10,
    per_annotator: Annotated[
        int | None, typer.Option(help="Questions per person; every item once where not given.")
    ] = None,
    show: Annotated[
        str, typer.Option(help="words, sentences, labels: what is shown of a concept.")
    ] = "words,sentences",
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what stands there.")] = False,
) -> None:
    """Write the same questions for those who run potato already."""
    from .evaluation.study.potato import export_potato
    from .evaluation.study.settings import StudySettings

    settings = settings_of(
        StudySettings, annotators=annotators, per_annotator=per_annotator, show=tuple(names(show)), seed=seed
    )
    result = export_potato(items_file, out, settings, force=force)
    put(f"{result.path}: {result.questions:,} questions; start it with: potato start {result.path / 'config.yaml'}")


@study_app.command()
def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study that `clvq study build` made.")],
    answers: Annotated[
        list[Path] | None, typer.Option(help="A file that a page without server saved. Give all of them.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key of the item file; without it methods go by blind ids.")
    ] = None,
    potato_folder: Annotated[
        Path | None, typer.Option("--potato", help="A folder that `clvq study potato` wrote and people answered in.")
    ] = None,
    judged: Annotated[Path | None, typer.Option(help="Judgements of the same items, to compare people with.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What people recover of the model's predictions from each method's concepts, against chance and controls."""
    from .evaluation.study.answer_files import read_answer_files
    from .evaluation.study.database_file import read_answers
    from .evaluation.study.folder import ANSWERS, ITEMS, read_study
    from .evaluation.study.items import read_key
    from .evaluation.study.potato import read_potato
    from .evaluation.study.score import score as score_study

    study = read_study(folder)
    digest = study.items_sha256
    served = read_answers(folder / ANSWERS) if (folder / ANSWERS).exists() else []
    given = [*served, *read_answer_files(answers or [], study)]
    if potato_folder is not None:
        given += read_potato(potato_folder, folder / ITEMS)
    if not given:
        raise DataNotFound(f"{folder} has no answers yet: serve it, or give the files that its pages saved: --answers")
    result = score_study(study.items, given, key=None if key is None else read_key(key, digest), seed=seed)
    people = None
    if judged is not None:
        from .evaluation.judges.agreement import agreement_with_people
        from .evaluation.judges.said import read_replies

        people = agreement_with_people(study.items, read_replies(judged, study.items, digest), given, seed=seed)
    if as_json:
        print_json(asdict(result) | ({} if people is None else {"judges": asdict(people)}))
        return
    print_score(result)
    if people is not None:
        put(
            f"people and judges of {judged}: Spearman's ρ {interval(people.spearman, '.2f')} over {people.units:,} "
            f"concepts of {people.items:,} items; over {people.methods} methods ρ "
            f"{_number(people.methods_spearman)}, Kendall's τ {_number(people.methods_kendall)}"
        )
    if key is None:
        put("methods go by their blind ids: give --key to see which is which")


def print_score(result: "StudyScore", *, people: str = "annotators") -> None:
    """The tables of a score.

    Parameters
    ----------
    people
        What annotators are called.
    """
    chance = result.chance
    _print_methods(result.all, f"all {result.all.annotators:,} {people}: share of answers that are the prediction")
    put(
        f"at chance {chance.uniform:.3f}, always the most frequent class {chance.most_frequent:.3f}, "
        f"each class by its frequency {chance.proportional:.3f}"
    )
    if result.failed:
        failed = ", ".join(printable(name) for name in result.failed)
        put(f"failed an attention item: {failed}; the same without them:")
        _print_methods(result.attentive, f"{result.attentive.annotators:,} {people} who failed no attention item")
    _print_differences(result.all)
    _print_people(result, people)
    agreement = result.all.agreement
    put(
        f"agreement over {agreement.questions:,} questions with two answers or more: Krippendorff's α "
        f"{interval(agreement.alpha)}, Fleiss' κ {_number(agreement.kappa)}"
    )


def _print_methods(table: "MethodTable", title: str) -> None:
    columns = "method,role,answers,items,accuracy,− chance,− most frequent,− random control,sure if right,if wrong"
    shown = titled([*columns.split(","), "seconds"], f"{title}; 95 % intervals")
    for line in table.methods:
        shown.add_row(
            printable(line.name),
            line.role or "–",
            f"{line.answers:,}",
            f"{line.items:,}",
            interval(line.accuracy),
            interval(line.over_uniform, "+.3f"),
            interval(line.over_most_frequent, "+.3f"),
            interval(line.over_random, "+.3f"),
            _number(line.confidence_right),
            _number(line.confidence_wrong),
            _number(line.seconds, ".1f"),
        )
    put(shown, whole=True)


def _print_differences(table: "MethodTable") -> None:
    names_of = {line.method: printable(line.name) for line in table.methods}
    repeats = {(line.first, line.second) for line in table.duplicates}
    shown = titled(["first", "second", "first − second", "p", "p, Holm"], "methods against each other, same draws")
    for line in table.differences:
        note = " (the same concepts)" if {(line.first, line.second), (line.second, line.first)} & repeats else ""
        shown.add_row(
            names_of[line.first],
            names_of[line.second] + note,
            interval(line.difference, "+.3f"),
            _number(line.p, ".4f"),
            _number(line.p_holm, ".4f"),
        )
    put(shown, whole=True)


def _print_people(result: "StudyScore", people: str) -> None:
    shown = titled(
        [people, "answers", "accuracy", "practice right", "attention failed", "seconds"], f"each of the {people}"
    )
    for line in result.annotators:
        shown.add_row(
            printable(line.annotator),
            f"{line.answers:,}",
            interval(line.accuracy),
            f"{line.training_right} of {line.training_seen}" if line.training_seen else "–",
            f"{line.attention_failed} of {line.attention_seen}" if line.attention_seen else "–",
            _number(line.seconds, ".1f"),
        )
    put(shown, whole=True)


def _number(value: float, form: str = ".2f") -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"
