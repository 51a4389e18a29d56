"""The live explorer: removals equal those of `clvq ablate`, typed texts those of the cache, and who gets in."""

import http.client
import json
import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest
from clvq.errors import ConfigError, DataNotFound, MissingExtra, RunMismatch
from clvq.evaluation.ablate import AblateConfig, ablate
from clvq.evaluation.rows import rows_by_text
from clvq.explorer.build import ExploreConfig, explore
from clvq.explorer.data_files import read_script
from clvq.explorer.server import serve
from clvq.trainer.run import Run

from .explorer_maker import Served, serving

KINDS = {
    "tokens": {},
    "words": {"rows": "word", "pool": "mean", "encoding": "int8"},
    "decoder": {
        "family": "llama", "task": "prompt", "prompt": "say {text} is ", "answers": ("no", "yes"),
        "answer_names": ("anger </script>", "joy & <b>"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = {}

    def of(kind: str) -> Served:
        if kind not in made:
            made[kind] = Served(tmp_path_factory.mktemp(kind), **KINDS[kind])
        return made[kind]

    return of


@pytest.mark.parametrize("removal", ["centred", "projection"])
@pytest.mark.parametrize(("run", "name"), [("r0", "km"), ("r1", "sparse")])
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_concepts_of_a_text_taken_out_is_what_ablate_does(served, tmp_path, kind, run, name, removal):
    one = served(kind)
    config = AblateConfig(
        read_outs=("model",), removals=(removal,), controls=(), rows_changed="all", split=("dev",), saliency="gradient"
    )
    ablate(one.shown.cache, {name: one.shown.runs[name]}, tmp_path, lambda: one.shown.model, config)
    compared = 0
    for line in pq.read_table(tmp_path / "texts.parquet").to_pylist():
        if line["removed"] != "own code" or line["probability_lost"] is None or np.isnan(line["probability_lost"]):
            continue
        number = one.site.text_ids.index(line["text_id"])
        codes = [code for code in one.texts[number]["codes"][run] if code is not None]
        told = one.live.remove(run, number, sorted(set(codes)), removal, None)
        best = int(np.argmax(told["before"]))
        assert told["before"][best] - told["after"][best] == pytest.approx(line["probability_lost"], abs=2e-5)
        assert len(told["rows"]) == len(codes)
        compared += 1
    assert compared > 8


def test_one_concept_taken_out_is_what_ablate_says_of_each(served, tmp_path):
    one = served("tokens")
    config = AblateConfig(
        read_outs=("model",), removals=("centred",), controls=(), rows_changed="all", split=("dev",), concepts=True
    )
    result = ablate(one.shown.cache, {"km": one.shown.runs["km"]}, tmp_path, lambda: one.shown.model, config)
    dev = [text for text in one.texts if text["split"] == "dev"]
    assert result.concepts
    for effect in result.concepts:
        mine = [text for text in dev if effect.concept in text["codes"]["r0"]]
        told = [one.live.remove("r0", text["n"], [effect.concept], "centred", None) for text in mine]
        lost = [max(each["before"]) - each["after"][int(np.argmax(each["before"]))] for each in told]
        assert len(mine) == effect.texts
        assert np.mean(lost) == pytest.approx(effect.probability_lost, abs=2e-5)
        changes = np.mean([np.subtract(each["after"], each["before"]) for each in told], axis=0)
        assert changes == pytest.approx(effect.class_changes, abs=2e-5)
    # And the site shows what was measured.
    site = tmp_path / "site"
    explore(one.shown.cache, one.shown.runs, site, ExploreConfig(), ablation=tmp_path)
    columns = read_script(site, "r0/overview")
    for effect in result.concepts:
        if effect.concept in columns["code"]:
            at = columns["code"].index(effect.concept)
            assert columns["effect"][at] == pytest.approx(effect.probability_lost, rel=1e-3)
            assert columns["effect_texts"][at] == effect.texts


def test_only_the_rows_asked_for_change(served):
    one = served("tokens")
    text = one.texts[0]
    code = text["codes"]["r0"][2]
    rows = [row for row, own in enumerate(text["codes"]["r0"]) if own == code]
    assert one.live.remove("r0", 0, [code], "centred", None)["rows"] == rows
    some = one.live.remove("r0", 0, [code], "centred", rows[:1])
    assert some["rows"] == rows[:1]
    nothing = one.live.remove("r0", 0, [code], "centred", [])
    assert nothing["rows"] == []
    assert nothing["before"] == nothing["after"] == some["before"]
    assert some["after"] != some["before"]
    assert one.live.remove("r0", 0, [], "centred", None)["rows"] == []


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_typed_text_has_the_rows_concepts_and_prediction_of_the_same_text_in_the_cache(served, kind):
    one = served(kind)
    compared = 0
    for text in one.texts[:20]:
        if not text["text"].strip():
            continue
        typed = one.live.read(text["text"])
        assert typed["rows"] == text["rows"]
        assert typed["codes"] == text["codes"]
        assert typed["prediction"] == text["prediction"]
        assert typed["probabilities"] == pytest.approx(text["probabilities"], abs=1e-3)
        codes = [code for code in text["codes"]["r2"] if code is not None][:2]
        of_typed = one.live.remove("r2", text["text"], codes, "centred", None)
        of_stored = one.live.remove("r2", text["n"], codes, "centred", None)
        assert of_typed["rows"] == of_stored["rows"]
        assert of_typed["after"] == pytest.approx(of_stored["after"], abs=1e-6)
        compared += 1
    assert compared > 10


def test_saliency_of_a_typed_text_is_there_where_the_cache_has_it(tmp_path):
    one = Served(tmp_path, saliency="gradient", saliency_site="hidden.1")
    text = one.texts[0]
    assert one.live.read(text["text"])["saliency"] == pytest.approx(text["saliency"], rel=2e-3, abs=1e-6)


def test_a_text_longer_than_the_window_says_how_much_was_left_out(served):
    told = served("tokens").live.read("cat " * 100)
    # Each letter is a token, and two of the window's 32 are special.
    assert told["truncated"] == 300 - 30
    assert len(told["rows"]) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("r9", 0, [0], "centred", None), "the site has no run 'r9'; it has r0, r1, r2"),
        (("r0", 10_000, [0], "centred", None), "the site has no text 10000: they are numbered 0 to"),
        (("r0", 0, [24], "centred", None), "there is no concept 24: they are numbered 0 to 23"),
        (("r0", 0, [0], "centred", [99]), "the text has no row 99: they are numbered 0 to"),
        (("r0", " \n", [0], "centred", None), "the text is empty: type some words"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(served, arguments, message):
    with pytest.raises(ConfigError) as refused:
        served("tokens").live.remove(*arguments)
    assert str(refused.value).startswith(message)


def test_an_empty_text_is_told_so(served):
    with pytest.raises(ConfigError, match="the text is empty: type some words"):
        served("tokens").live.read("\u2003 ")


def test_other_runs_than_the_site_was_built_from_are_refused(served):
    one = served("tokens")
    with pytest.raises(RunMismatch, match="was built from another cache or other runs"):
        one.make({"km": one.shown.runs["km"]})
    swapped = {"km": one.shown.runs["upper"], "sparse": one.shown.runs["sparse"], "upper": one.shown.runs["km"]}
    with pytest.raises(RunMismatch, match="was built from another cache or other runs"):
        one.make(swapped)


# The rest asks a real server.
pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")


@pytest.fixture(scope="module")
def running(served):
    with serving(served("tokens")) as one:
        yield one


def asked(port: int, method: str, path: str, body: object = None, **headers):
    """Status, headers and body; a header that is `None` is left out."""
    sent = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Host": f"127.0.0.1:{port}"}
    if method == "POST":
        usual |= {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in (usual | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                connection.putheader(name, value)
        if sent:
            connection.putheader("Content-Length", str(len(sent)))
        connection.endheaders(sent or None)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_the_pages_and_their_data_are_served_with_a_strict_policy(running):
    for name in running.site.files():
        status, headers, data = asked(running.port, "GET", f"/{name}")
        assert status == 200
        if name != "data/site.js":
            assert data == (running.folder / name).read_bytes()
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert asked(running.port, "GET", "/")[2] == (running.folder / "index.html").read_bytes()


def test_what_is_served_says_that_it_is_live_and_the_folder_does_not(running):
    told = asked(running.port, "GET", "/data/site.js")[2]
    assert told.startswith(b'clvq.receive("site",{')
    assert b'"live":true' in told
    assert not read_script(running.folder, "site")["live"]


@pytest.mark.parametrize(
    "path",
    [
        "/site.json", "/data", "/data/", "/../site.json", "/%2e%2e/site/site.json", "/data/%2e%2e/site.json",
        "/data/..%2fsite.json", "//etc/passwd", "/etc/passwd", "/app.js%00", "/data/r0/overview.js/", "/secret.txt",
        "/link.js",        "/data/r7/overview.js", "/api/remove", "/api/nothing", "/..\\site.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(running, path):
    (running.folder / "secret.txt").write_text("secret")
    if not (running.folder / "data" / "r7").exists():
        (running.folder / "data" / "r7").symlink_to("/etc")
        (running.folder / "link.js").symlink_to("/etc/passwd")
    status, _, data = asked(running.port, "GET", path)
    assert status in (404, 405)
    assert b"secret" not in data
    assert b"root:" not in data


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost", "[::1]", None])
def test_another_name_of_the_server_is_refused(running, host):
    status, _, data = asked(running.port, "GET", "/", Host=host)
    assert status == (400 if host is None else 421)
    assert b"explorer" in data or host is None


@pytest.mark.parametrize("origin", ["http://evil.example", "null", None, "https://127.0.0.1"])
def test_requests_of_other_pages_are_refused(running, origin):
    assert asked(running.port, "POST", "/api/text", {"text": "a cat"}, Origin=origin)[0] == 403


def test_the_model_is_asked_over_http(running):
    text = running.texts[0]
    code = text["codes"]["r0"][2]
    body = {"run": "r0", "text": 0, "typed": None, "codes": [code], "removal": "centred", "rows": "all"}
    status, _, data = asked(running.port, "POST", "/api/remove", body)
    assert (status, json.loads(data)) == (200, running.live.remove("r0", 0, [code], "centred", None))
    status, _, data = asked(running.port, "POST", "/api/text", {"text": "the cat <b>"})
    assert (status, json.loads(data)) == (200, running.live.read("the cat <b>"))
    body |= {"text": None, "typed": "the cat <b>", "rows": [1]}
    status, _, data = asked(running.port, "POST", "/api/remove", body)
    assert (status, json.loads(data)) == (200, running.live.remove("r0", "the cat <b>", [code], "centred", [1]))


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("text", {"text": ""}, 422, "the text is empty: type some words"),
        ("text", {"text": "x" * 12_001}, 422, "text: String should have at most 12000 characters"),
        ("text", {"text": 7}, 422, "text: Input should be a valid string"),
        ("text", b"{", 400, "this cannot be read"),
        ("text", b"[" * 5_000, 400, "this cannot be read"),
        ("text", {"text": "a", "path": "/etc"}, 422, "path: Extra inputs are not permitted"),
        ("remove", {"run": "r0", "codes": [0]}, 422, "the request: Value error, give text or typed, one of them"),
        ("remove", {"run": "r0", "text": 0, "codes": [99]}, 422, "there is no concept 99: they are numbered 0 to 23"),
        ("remove", {"run": "r0", "text": 0, "codes": [0], "removal": "all"}, 422, "removal: Input should be"),
        ("remove", {"run": "r0", "text": True, "codes": [0]}, 422, "text: Input should be a valid integer"),
    ],
)
def test_a_wrong_question_gets_one_line(running, path, body, status, error):
    found, _, data = asked(running.port, "POST", f"/api/{path}", body)
    assert found == status
    said = json.loads(data)["error"]
    assert said.startswith(error)
    assert "\n" not in said


def test_a_body_that_is_too_long_is_refused(running):
    assert asked(running.port, "POST", "/api/text", {"text": "x" * 120_000})[0] == 413


_CODE = """
import sys
from pathlib import Path
from clvq.errors import ClvqError
from clvq.explorer.server import serve
try:
    serve(Path(sys.argv[1]), port=0, ready=lambda address: print(address, flush=True))
except ClvqError as error:
    sys.exit(getattr(error, "signal_number", 1))
"""


def test_a_site_is_served_without_the_model_until_it_is_told_to_stop(served):
    folder = served("tokens").folder
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, str(folder)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        assert b'"live":false' in asked(port, "GET", "/data/site.js")[2]
        assert asked(port, "POST", "/api/text", {"text": "a cat"})[0] == 404
        process.terminate()
        assert process.wait(10) == 15


def test_only_this_machine_may_reach_the_server(served):
    with pytest.raises(ConfigError, match=r"'0.0.0.0' could be reached from other machines"):
        serve(served("tokens").folder, host="0.0.0.0")


def test_what_is_no_site_is_not_served(tmp_path):
    with pytest.raises(DataNotFound, match=r"is no site: it has no site\.json"):
        serve(tmp_path)


def test_a_missing_extra_is_named(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clvq\[explore\]'"):
        serve(served("tokens").folder)


def test_the_rows_of_the_site_are_those_of_the_cache(served):
    one = served("words")
    whole = rows_by_text(one.shown.cache, np.ones(len(one.shown.cache.texts), dtype=bool))
    by_text = {int(one.shown.cache.texts["text_id"][rows.text].as_py()): rows for rows in whole}
    run = Run.from_pretrained(one.shown.runs["km"])
    for text, text_id in zip(one.texts, one.site.text_ids, strict=True):
        rows = by_text[text_id]
        codes = run.assign(one.shown.cache.vectors("hidden.1", rows.row)).tolist()
        kept = [None if kind > 1 else code for code, kind in zip(codes, rows.special.tolist(), strict=True)]
        assert text["codes"]["r0"] == kept
