"""The server of a study: who gets in, what is said, and that no answer is lost or doubled, also when it is killed."""

import http.client
import json
import random
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from clvq.errors import ConfigError, DataError, DataNotFound, FolderInUse, Interrupted, MissingExtra
from clvq.evaluation.guard import POLICY
from clvq.evaluation.study.build import build
from clvq.evaluation.study.database_file import read_answers
from clvq.evaluation.study.folder import read_study
from clvq.evaluation.study.server import links, serve
from clvq.evaluation.study.settings import StudySettings

from .study_maker import make_items
from .study_processes import Server, an_answer, ask

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
NEEDED = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}


def built(folder, *, annotators: int = 3, **settings):
    made = {name: settings.pop(name) for name in ("items", "methods", "training", "attention") if name in settings}
    make_items(folder / "items.json", **{"items": 6, "methods": 3, **made})
    build(folder / "items.json", folder / "study", StudySettings(annotators=annotators, **settings))
    return folder / "study"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the tests that leave no trace of their own."""
    folder = built(tmp_path_factory.mktemp("served"), annotators=90)
    with Server(folder, public_url="https://study.example.org/here") as running:
        yield running


@pytest.fixture
def link(server):
    """A link that no other test has used."""
    server.used = getattr(server, "used", -1) + 1
    return server.links[server.used]


def raw(port: int, method: str, path: str, headers: dict | None = None, body: bytes = b"", *, chunked: bool = False):
    """Status, headers and body of a request whose headers are these and no others."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": f"127.0.0.1:{port}", **(headers or {})}.items():
            if value is not None:
                connection.putheader(name, value)
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        elif body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        try:
            for start in range(0, len(body), 4_000):
                part = body[start : start + 4_000]
                connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            if chunked:
                connection.send(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            # Refused before all was sent.
            pass
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def posted(server, path: str, body: object = None, *, chunked: bool = False, data: bytes | None = None, **changed):
    """Status of a POST as a page sends it, but for what is changed; a header that is `None` is left out."""
    headers = {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": "application/json"}
    headers |= {name.replace("_", "-"): value for name, value in changed.items()}
    sent = json.dumps(body).encode() if data is None else data
    return raw(server.port, "POST", path, headers, sent, chunked=chunked)[0]


def path_of(link: str) -> str:
    return "/a/" + link.split("/a/")[1]


def test_a_person_answers_everything_over_http(tmp_path):
    with Server(built(tmp_path)) as server:
        link = server.links[1]
        assert ask(f"{link}state")[1] == {"answered": 0, "total": 0, "stage": "consent", "question": None}
        standing = ask(f"{link}consent", {})[1]
        study = read_study(tmp_path / "study")
        while standing["stage"] == "question":
            question = standing["question"]
            assert ask(f"{link}state")[1] == standing
            status, saved = ask(f"{link}answers", an_answer(standing))
            right = study.item(question["item"]).prediction if question["practice"] else None
            assert (status, saved["right"]) == (200, right)
            standing = saved["standing"]
        assert standing == {"answered": 10, "total": 10, "stage": "done", "question": None}
        # While the server runs.
        assert len(read_answers(tmp_path / "study" / "answers.sqlite")) == 10


def test_questions_are_numbered_after_practice(server, link):
    standing = ask(f"{link}consent", {})[1]
    seen = []
    while standing["stage"] == "question":
        question = standing["question"]
        seen.append((question["practice"], question["number"], question["of"]))
        standing = ask(f"{link}answers", an_answer(standing))[1]["standing"]
    assert seen == [(True, 1, 2), (True, 2, 2), *((False, number, 8) for number in range(1, 9))]


def test_what_the_server_sends_holds_no_text_and_no_prediction(server, link):
    study = read_study(server.folder)
    bodies = [raw(server.port, "GET", path_of(link) + name)[2] for name in ("", "study-data.js", "study.js")]
    standing = ask(f"{link}consent", {})[1]
    while standing["stage"] == "question":
        bodies.append(json.dumps(standing).encode())
        assert set(standing["question"]) == {
            "place", "item", "method", "practice", "number", "of", "check", "words", "sentences", "labels",
        }  # fmt: skip
        saved = ask(f"{link}answers", an_answer(standing))[1]
        assert (saved["right"] is None) == (study.item(standing["question"]["item"]).kind != "training")
        standing = saved["standing"]
    assert b"secret" not in b"".join(bodies)
    # Nor other questions than the one that is asked.
    assert b"booklets" not in bodies[1]


def test_an_answer_that_is_sent_again_is_saved_once_and_the_first_one_stays(server, link):
    standing = ask(f"{link}consent", {})[1]
    first = ask(f"{link}answers", an_answer(standing, answer=1))
    assert ask(f"{link}answers", an_answer(standing, answer=0)) == first
    assert ask(f"{link}answers", an_answer(standing, answer=1)) == first
    number = server.links.index(link) + 1
    found = [one for one in read_answers(server.folder / "answers.sqlite") if one.annotator == str(number)]
    assert [(one.place, one.answer) for one in found] == [(0, 1)]


def test_nothing_is_changed_by_looking(server, link):
    with closing(sqlite3.connect(server.folder / "answers.sqlite")) as connection:
        before = connection.execute("PRAGMA data_version").fetchone(), list(connection.iterdump())
        for name in ("", "state", "study-data.js", "consent", "answers"):
            for method in ("GET", "HEAD"):
                raw(server.port, method, path_of(link) + name)
        assert (connection.execute("PRAGMA data_version").fetchone(), list(connection.iterdump())) == before
    assert ask(f"{link}state")[1]["stage"] == "consent"


@pytest.mark.parametrize(
    "path", ["/", "/a/{token}/", "/a/{token}/state", "/a/{token}/study.js", "/nothing", "/a/x/state"]
)
def test_every_response_has_the_headers_that_protect_it(server, link, path):
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        status, headers, body = raw(server.port, method, path.format(token=link.split("/")[-2]))
        assert {name: headers[name] for name in NEEDED} == NEEDED, (method, status)
        assert "server" not in headers
        assert "set-cookie" not in headers
        assert status in ((200, 404) if method in ("GET", "HEAD") else (403, 405))
        assert method != "HEAD" or body == b""


def test_only_the_pages_of_the_study_are_served(server, link):
    path = path_of(link)
    wanted = {"", "study.js", "study-text.js", "study-store.js", "study.css", "study-data.js", "state"}
    for name in sorted(wanted):
        assert raw(server.port, "GET", path + name)[0] == 200, name
    for name in (
        "items.json", "study.json", "answers.sqlite", "../study.json", "..%2fstudy.json", "%2e%2e/items.json",
        "pages/study.js", "study.js/", "//etc/passwd", "%00", "study.js%00", "index.html%0d%0aX: y", "\\items.json",
    ):  # fmt: skip
        if " " not in name:
            assert raw(server.port, "GET", path + name)[0] == 404, name
    for name in ("/study.js", "/study-data.js", "/a/", "/a", "/items.json", "/.."):
        assert raw(server.port, "GET", name)[0] == 404, name
    assert raw(server.port, "GET", "/")[0] == raw(server.port, "GET", "/study.css")[0] == 200
    assert b"personal link is needed" in raw(server.port, "GET", "/")[2]


def test_an_unknown_link_is_answered_as_anything_else_that_is_not_there(server):
    known = raw(server.port, "GET", "/no/such/page")
    for path in ("/a/" + "x" * 32 + "/", "/a/" + "x" * 32 + "/state", "/a/%ff%fe/state", "/a/" + "x" * 5_000 + "/"):
        status, headers, body = raw(server.port, "GET", path)
        assert (status, body) == (404, known[2])
        assert headers.keys() == known[1].keys()
    assert posted(server, "/a/" + "x" * 32 + "/consent", {}) == 404
    assert posted(server, "/a/" + "x" * 32 + "/answers", {}) == 404


def test_a_link_without_its_last_slash_leads_to_the_page(server, link):
    status, headers, _ = raw(server.port, "GET", path_of(link).removesuffix("/"))
    assert (status, headers["location"]) == (307, link.split("/")[-2] + "/")
    assert raw(server.port, "GET", "/a/" + "x" * 32)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "study.example.org.evil.example", "", None]
)
def test_a_request_for_another_host_is_refused(server, link, host):
    status, _, body = raw(server.port, "GET", path_of(link), {"Host": host})
    # Without any, the HTTP library refuses it before the study sees it.
    assert status == (400 if host is None else 421)
    assert host is None or b"--public-url" in body


def test_the_names_of_this_machine_and_of_the_public_address_are_served(server, link):
    for host in (f"localhost:{server.port}", f"LOCALHOST:{server.port}", f"[::1]:{server.port}", "study.example.org"):
        assert raw(server.port, "GET", path_of(link), {"Host": host})[0] == 200, host
    assert (
        posted(server, path_of(link) + "consent", {}, Host="study.example.org", Origin="https://study.example.org")
        == 200
    )
    assert server.public[0] == f"https://study.example.org/here{path_of(server.links[0])}"


@pytest.mark.parametrize(
    "origin", [None, "null", "", "https://evil.example", "http://study.example.org", "http://127.0.0.1:1"]
)
def test_a_change_asked_for_by_another_site_is_refused(server, link, origin):
    assert posted(server, path_of(link) + "consent", {}, Origin=origin) == 403
    assert ask(f"{link}state")[1]["stage"] == "consent"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_change_that_is_not_json_is_refused(server, link, kind):
    assert posted(server, path_of(link) + "consent", {}, Content_Type=kind) == 415
    assert posted(server, path_of(link) + "consent", {}, Content_Type="application/json; charset=utf-8") == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(server, link, chunked):
    path = path_of(link) + "consent"
    assert posted(server, path, data=b" " * 16_001, chunked=chunked) == 413
    assert posted(server, path, data=b" " * 15_998 + b"{}", chunked=chunked) == 200


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 10_000, b"null", b"[]", b"{}", b'{"place": 1e999}', b"9" * 5_000],
    ids=lambda data: repr(data[:12]),
)
def test_a_body_that_says_nothing_is_refused(server, link, data):
    ask(f"{link}consent", {})
    assert posted(server, path_of(link) + "answers", data=data) == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"answer": 2}, 400),
        ({"answer": -1}, 400),
        ({"answer": True}, 400),
        ({"answer": "0"}, 400),
        ({"answer": 0.0}, 400),
        ({"confidence": 0}, 400),
        ({"confidence": 5}, 400),
        ({"milliseconds": -1}, 400),
        ({"milliseconds": 86_400_001}, 400),
        ({"milliseconds": None}, 400),
        ({"place": 10**30}, 400),
        ({"item": "x" * 33}, 400),
        ({"item": "\ud800"}, 400),
        ({"more": 1}, 400),
        ({"place": 1}, 409),
        ({"item": "item-999"}, 409),
        ({"method": "' OR 1=1 --"}, 409),
    ],
)
def test_an_answer_that_cannot_be_is_refused_and_changes_nothing(server, link, change, status):
    standing = ask(f"{link}consent", {})[1]
    assert ask(f"{link}answers", an_answer(standing) | change)[0] == status
    assert ask(f"{link}state")[1] == standing


def test_an_answer_before_consent_is_refused(server, link):
    body = {"place": 0, "item": "item-000", "method": "ma", "answer": 0, "confidence": 1, "milliseconds": 5}
    assert ask(f"{link}answers", body)[0] == 409


def test_a_study_is_served_once(server):
    with pytest.raises(FolderInUse, match="another process"):
        serve(server.folder, port=0)


def test_a_port_in_use_is_told(tmp_path):
    folder = built(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used .* give another --port"):
            serve(folder, port=port)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "could reach 0.0.0.0, without encryption"),
        ({"host": "0.0.0.0", "expose": True}, "no address that a link can name"),
        ({"public_url": "study.example.org"}, "is no address of a study"),
        ({"public_url": "https://me:secret@study.example.org"}, "is no address of a study"),
        ({"public_url": "https://study.example.org:x"}, "is no address of a study"),
        ({"port": 99_999}, "port 99999 is none"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        serve(built(tmp_path), **{"port": 0, **settings})


def test_serving_for_other_machines_warns_that_nothing_is_encrypted(tmp_path, caplog):
    def stop(made):
        raise Interrupted("stop", signal_number=2)

    with pytest.raises(Interrupted):
        serve(built(tmp_path), host="0.0.0.0", port=0, expose=True, public_url="http://10.0.0.1:80", ready=stop)
    assert "is not encrypted" in caplog.text


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clvq\[study\]'"):
        serve(built(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_says_so(tmp_path, number):
    with Server(built(tmp_path)) as server:
        ask(f"{server.links[0]}consent", {})
        status, said = server.end(number)
    assert status == number
    assert said == f"Interrupted stopped by {number.name}; every answer is saved: run the same command again to go on\n"


def test_no_secret_is_logged(tmp_path):
    with Server(built(tmp_path)) as server:
        ask(f"{server.links[0]}consent", {})
        ask(f"{server.links[0]}answers", {})
        posted(server, path_of(server.links[0]) + "answers", data=b"{")
        said = server.end()[1]
    assert not any(link.split("/")[-2] in said for link in server.links)


def test_links_stay_and_more_are_made_on_request(tmp_path):
    folder = built(tmp_path)
    with pytest.raises(DataNotFound, match="made when it is first served"):
        links(folder, "https://study.example.org")
    with Server(folder) as server:
        first = server.links
    with Server(folder, annotators=5) as server:
        assert (server.links[0].split("/a/")[1], len(server.links)) == (first[0].split("/a/")[1], 5)
        five = server.links
    with Server(folder) as server:
        assert len(server.links) == 5
    found = links(folder, "https://study.example.org/x/")
    assert found == [f"https://study.example.org/x/a/{link.split('/a/')[1]}" for link in five]


def test_answers_of_another_study_are_not_added_to(tmp_path):
    folder = built(tmp_path)
    with Server(folder) as server:
        server.end()
    (tmp_path / "other").mkdir()
    other = built(tmp_path / "other", seed=9)
    (other / "answers.sqlite").write_bytes((folder / "answers.sqlite").read_bytes())
    with pytest.raises(DataError, match="do not belong together"):
        serve(other, port=0)


def test_a_full_disk_is_no_answer_lost(tmp_path, monkeypatch, caplog):
    from clvq.errors import DiskFull
    from clvq.evaluation.study.database import Database

    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx2")
    from datetime import timedelta

    from clvq.evaluation.study.application import make_app

    study = read_study(built(tmp_path))
    database = Database(study.folder / "answers.sqlite", study.digest, study.pool, idle=timedelta(hours=1))
    tokens = database.tokens(1)
    app = make_app(study, database, tokens, hosts={"testserver"}, origins={"http://testserver"})
    client = testclient.TestClient(app, headers={"Origin": "http://testserver"})
    standing = client.post(f"/a/{tokens[0]}/consent", json={}).json()

    def full(*given, **named):
        raise DiskFull("no room left on the disk")

    with monkeypatch.context() as patched:
        patched.setattr(database, "answer", full)
        assert client.post(f"/a/{tokens[0]}/answers", json=an_answer(standing)).status_code == 503
    assert "no room left" in caplog.text
    assert client.post(f"/a/{tokens[0]}/answers", json=an_answer(standing)).status_code == 200
    database.close()


class Person(threading.Thread):
    """Answers everything; sends again after an error, and now and then twice on purpose."""

    def __init__(self, link: str, number: int) -> None:
        super().__init__(daemon=True)
        self.link, self.dice = link, random.Random(number)
        self.connection = http.client.HTTPConnection(urlsplit(link).netloc, timeout=10)
        self.acknowledged: list[tuple[int, str, str, int]] = []
        self.sent = 0

    def insist(self, name: str, body: dict):
        parts = urlsplit(self.link)
        headers = {"Content-Type": "application/json", "Origin": f"http://{parts.netloc}"}
        while True:
            try:
                self.sent += 1
                self.connection.request("POST", parts.path + name, json.dumps(body), headers)
                answer = self.connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException):
                self.connection.close()
                time.sleep(0.05)
                continue
            assert answer.status == 200, (answer.status, data)
            return json.loads(data)

    def run(self) -> None:
        standing = self.insist("consent", {})
        while standing["stage"] == "question":
            body = an_answer(standing, answer=self.dice.randrange(2), confidence=self.dice.randrange(1, 5))
            got = self.insist("answers", body)
            self.acknowledged.append((body["place"], body["item"], body["method"], body["answer"]))
            if self.dice.random() < 0.1:
                assert self.insist("answers", {**body, "answer": 1 - body["answer"]}) == got
            standing = got["standing"]
        self.connection.close()


@pytest.mark.soak
def test_no_answer_is_lost_or_doubled_when_the_server_is_killed(tmp_path, soak, tell):
    people, items, kills = (20, 500, 6) if soak else (20, 25, 2)
    folder = built(tmp_path, annotators=people, items=items, methods=5, training=2, attention=4)
    total = people * (items + 6)
    began = time.monotonic()
    with Server(folder) as server:
        threads = [Person(link, number) for number, link in enumerate(server.links)]
        for thread in threads:
            thread.start()
        for kill in range(1, kills + 1):
            while sum(len(thread.acknowledged) for thread in threads) < total * kill / (kills + 1):
                time.sleep(0.01)
                assert any(thread.is_alive() for thread in threads)
            server.kill()
            time.sleep(0.1)
            server.start()
        for thread in threads:
            thread.join(250)
            assert not thread.is_alive()
        server.end()
    found = read_answers(folder / "answers.sqlite")
    # Each acknowledged answer is there as it was given, and nothing else.
    theirs = Counter(
        (str(number), *answer) for number, thread in enumerate(threads, start=1) for answer in thread.acknowledged
    )
    assert theirs == Counter((one.annotator, one.place, one.item, one.method, one.answer) for one in found)
    assert set(theirs.values()) == {1}
    assert len(found) == total
    # All at once, and everything in balance.
    study = read_study(folder)
    cells = Counter((one.item, one.method) for one in found if one.kind == "main")
    assert set(cells.values()) == {people // 5}
    sent = sum(thread.sent for thread in threads)
    tell(
        f"study: {people} people × {items + 6} answers, {sent:,} requests, {kills} kills: {len(found):,} answers "
        f"saved, 0 lost, 0 doubled, {time.monotonic() - began:.0f} s"
    )
    assert sent > total
    assert len(study.pool.main) == items
