"""`clvq judge`."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_study import print_score
from .errors import ConfigError
from .options import Force, Json, Seed, key_of_items, settings_of
from .terminal import interval, print_json, printable, progress_bars, put, titled

if TYPE_CHECKING:
    from .evaluation.judges.judge import CallPlan, JudgeResult, Prices

KEY_VARIABLE = "CLVQ_JUDGE_KEY"


def judge(
    items: Annotated[Path, typer.Argument(help="An item file that `clvq study items` wrote.")],
    endpoint: Annotated[
        str, typer.Option(help="Base URL of an OpenAI-compatible API, such as http://127.0.0.1:8080/v1.")
    ],
    model: Annotated[list[str], typer.Option(help="A judge: the model's name at the endpoint. Give several.")],
    out: Annotated[Path, typer.Option(help="Folder for replies and results; judges of other endpoints may join it.")],
    protocol: Annotated[
        str, typer.Option(help="rate (all concepts at once), pairs (two by two, both orders) or guess (as people).")
    ] = "rate",
    orders: Annotated[int, typer.Option(help="With rate: presentations of an item, each in another order.")] = 2,
    reasons: Annotated[bool, typer.Option("--reasons", help="Let judges write a sentence before they answer.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also show the shares of labels of each concept.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the sampling of replies.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Of a reply; models that think need more.")] = 512,
    attempts: Annotated[int, typer.Option(help="Replies asked for until one is valid.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Calls at a time.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 120.0,
    retries: Annotated[int, typer.Option(help="Times that a call is made again after an error that may pass.")] = 6,
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the endpoint's API key; none is sent where it is not set.")
    ] = KEY_VARIABLE,
    price: Annotated[
        str, typer.Option(help="Of a million tokens of requests and of replies, such as 0.15,0.60: adds costs.")
    ] = "",
    key: Annotated[
        Path | None, typer.Option(help="The key of the item file, where it does not stand beside it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many calls there would be, and stop.")] = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Let language models judge the concepts of several methods, blind, in balanced orders, with controls."""
    from .evaluation.judges.config import CallConfig, JudgeConfig
    from .evaluation.judges.judge import judge as run_judges
    from .evaluation.judges.judge import plan_calls

    config = settings_of(
        JudgeConfig,
        protocol=protocol,
        orders=orders,
        reasons=reasons,
        labels=labels,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        attempts=attempts,
    )
    calls = settings_of(CallConfig, timeout=timeout, retries=retries, concurrency=concurrency)
    prices = _prices(price)
    if dry_run:
        plan = plan_calls(items, model, config, prices)
        if as_json:
            print_json(asdict(plan))
        else:
            _print_plan(plan)
        return
    secret = os.environ.get(key_env) or None
    if key_env != KEY_VARIABLE and secret is None:
        raise ConfigError(f"--key-env {key_env}: the environment has no such variable, or it is empty")
    names = key_of_items(items, key)
    with progress_bars() as progress:
        result = run_judges(
            items, out, endpoint, model, config, calls,
            key=secret, names=names, prices=prices, progress=progress, force=force,
        )  # fmt: skip
    if as_json:
        print_json(asdict(result))
    else:
        print_judgement(result)


def _prices(text: str) -> "Prices | None":
    from .evaluation.judges.judge import Prices

    if not text:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--price {text}: give two numbers with a comma between, such as 0.15,0.60") from error
    if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
        raise ConfigError(f"--price {text}: a price is 0 or more")
    return Prices(prompt, completion)


def _print_plan(plan: "CallPlan") -> None:
    each = f"{plan.questions:,} questions"
    put(f"{each} to each of {len(plan.judges)} judges: {plan.questions * len(plan.judges):,} calls, and more where a "
        "reply is not valid")  # fmt: skip
    put(f"{plan.characters:,} characters to each judge, roughly {plan.tokens:,} tokens")
    if plan.cost is not None:
        put(f"requests to all judges cost about {plan.cost:,.2f} at that price; replies come on top")


def print_judgement(result: "JudgeResult") -> None:
    """The tables of a judgement."""
    _print_tallies(result)
    if result.guesses is not None:
        print_score(result.guesses, people="judges")
    if result.analysis is not None:
        _print_methods(result)
        _print_biases(result)
        _print_agreement(result)
    put(f"{result.path} holds every reply, and these tables as JSON")


def _print_tallies(result: "JudgeResult") -> None:
    paid = any(tally.cost is not None for tally in result.tallies)
    columns = ["judge", "JSON schema", "questions", "valid", "valid at once", "invalid", "refused", "no answer"]
    columns += ["cut off", "calls", "tokens in", "tokens out", "seconds a call", *(["cost"] if paid else [])]
    table = titled(columns, "judges; valid: replies that answer the question in the form asked for")
    for tally in result.tallies:
        table.add_row(
            printable(tally.judge),
            tally.json_schema,
            f"{tally.questions:,}",
            f"{_ratio(tally.valid, tally.questions)}",
            f"{_ratio(tally.valid_at_once, tally.questions)}",
            f"{_ratio(tally.invalid, tally.questions)}",
            f"{tally.refused:,}",
            f"{tally.unanswered:,}",
            f"{tally.cut:,}",
            f"{tally.calls:,}",
            "–" if tally.prompt_tokens is None else f"{tally.prompt_tokens:,}",
            "–" if tally.completion_tokens is None else f"{tally.completion_tokens:,}",
            f"{tally.seconds / tally.calls:.2f}" if tally.calls else "–",
            *(["–" if tally.cost is None else f"{tally.cost:.4f}"] if paid else []),
        )
    put(table, whole=True)


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _print_methods(result: "JudgeResult") -> None:
    analysis = result.analysis
    if analysis is None:
        return
    columns = ["judge", "method", "role", "rating", "win share", "first", "ties", "Bradley–Terry"]
    table = titled(
        [*columns, "win share − random control"],
        f"{analysis.items:,} items, means by their weights with 95 % bootstrap intervals over items",
    )
    tables = [("all, each judge alike", analysis.pooled)] if len(analysis.judges) > 1 else []
    for name, one in [*tables, *((judge.judge, judge.table) for judge in analysis.judges)]:
        table.add_section()
        for line in one.methods:
            table.add_row(
                printable(name),
                printable(line.name),
                line.role or "–",
                interval(line.figures.rating, ".2f"),
                interval(line.figures.win_share, ".3f"),
                interval(line.figures.first_share, ".3f"),
                interval(line.figures.tie_share, ".2f"),
                interval(line.figures.log_strength, "+.2f"),
                interval(line.over_random.win_share, "+.3f") if line.over_random else "–",
            )
    put(table, whole=True)
    for repeat in analysis.pooled.duplicates:
        put(
            f"the duplicate against what it repeats: win share {interval(repeat.difference.win_share, '+.3f')}, "
            f"head to head {interval(repeat.head_to_head, '.3f')} (0.5: no difference)"
        )


def _print_biases(result: "JudgeResult") -> None:
    analysis = result.analysis
    if analysis is None:
        return
    places = max((len(judge.biases.positions) for judge in analysis.judges), default=0)
    columns = ["judge", "attention passed", "first wins", "flips", "longer wins", "length ρ", "per 100 characters"]
    table = titled(
        [*columns, *(f"place {place + 1}" for place in range(places)), "own α"],
        "judges: what they go by besides the concepts (no bias: first and longer wins 0.5, the others 0)",
    )
    for judge in analysis.judges:
        found = judge.biases
        positions = [interval(value, "+.2f") for value in found.positions]
        table.add_row(
            printable(judge.judge),
            f"{judge.attention.passed} of {judge.attention.seen}" if judge.attention.seen else "–",
            interval(found.first_wins, ".2f"),
            interval(found.flips, ".2f"),
            interval(found.longer_wins, ".2f"),
            interval(found.length_correlation, "+.2f"),
            interval(found.length_slope, "+.2f"),
            *positions,
            *["–"] * (places - len(positions)),
            interval(judge.consistency, ".2f"),
        )
    put(table, whole=True)


def _print_agreement(result: "JudgeResult") -> None:
    analysis = result.analysis
    if analysis is None or len(analysis.judges) < 2:
        return
    found = analysis.agreement
    over_methods = "–" if math.isnan(found.w_methods) else f"{found.w_methods:.2f}"
    put(
        f"agreement of the judges: Krippendorff's α {interval(found.alpha, '.2f')}; Kendall's W over methods "
        f"{over_methods}, within items {interval(found.w_items, '.2f')}"
    )
