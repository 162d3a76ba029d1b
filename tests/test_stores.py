"""A store that fails for a while is tried again, with its reason; what will not pass is an error at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.errors import CheckpointError
from mptfoundry.stores import Patience, SilentStore, is_final, patiently, reason_of, uploader

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a store answers 503, SlowDown or not at all, or closes connections",
        "uploads and downloads",
        "retries and says so; training continues",
    ),
]

# For calls to a server, which may take a while.
SOME = Patience(seconds=60.0, quiet_seconds=30.0, first_pause=0.01)
SHORT = Patience(seconds=1.0, quiet_seconds=0.2, first_pause=0.01, longest_pause=0.04)


class Answer(Exception):
    """An error as boto has it."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code}) when calling the PutObject operation")
        self.response = {"Error": {"Code": code}}


def failing(*errors: BaseException) -> Callable[[], str]:
    """A call that raises these errors one after the other, and then succeeds."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


@pytest.mark.parametrize(
    "error",
    [
        Answer("SlowDown"),
        Answer("503"),
        Answer("InternalError"),
        Answer("429"),
        ConnectionResetError(104, "reset"),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again_and_said_with_its_reason(error: Exception) -> None:
    said: list[str] = []
    found = patiently(
        failing(error, error, error), what="s3://a/b: can't be uploaded", patience=SHORT, say=said.append
    )
    assert found == "done" and len(said) == 3
    assert all(line.startswith("s3://a/b: can't be uploaded, since ") for line in said)
    assert reason_of(error) in said[0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Answer("403"), "access is refused, 403"),
        (Answer("AccessDenied"), "access is refused, AccessDenied"),
        (Answer("NoSuchBucket"), "not found, NoSuchBucket"),
        (FileNotFoundError("Object s3://a/b not found"), "Object s3://a/b not found"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TypeError("a bug"), "a bug"),
    ],
    ids=repr,
)
def test_what_will_not_pass_is_an_error_at_once(error: Exception, reason: str) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(call, what="x", patience=SHORT)
    assert len(calls) == 1 and is_final(error)
    assert reason_of(error).startswith(reason)


def test_a_refusal_that_a_library_calls_not_found_is_a_refusal() -> None:
    try:
        try:
            raise Answer("403")
        except Answer as error:
            raise FileNotFoundError("Object s3://a/b not found") from error
    except FileNotFoundError as error:
        assert reason_of(error).startswith("access is refused, 403") and is_final(error)


def test_pauses_grow_and_patience_ends_with_the_last_error() -> None:
    said: list[str] = []
    patience = Patience(seconds=0.3, quiet_seconds=1, first_pause=0.02, longest_pause=0.08)
    with pytest.raises(Answer):
        patiently(failing(*[Answer("503")] * 99), what="x", patience=patience, say=said.append)
    assert 4 <= len(said) <= 7


def test_a_store_that_never_answers_is_named_and_then_given_up() -> None:
    said: list[str] = []
    never = threading.Event()
    with pytest.raises(SilentStore, match="gives no answer, since 1 s"):
        patiently(never.wait, what="s3://a: can't be read", patience=SHORT, say=said.append)
    never.set()
    assert said == ["s3://a: can't be read: the store gives no answer, since 0 s"]


def test_a_slow_call_that_comes_further_is_left_alone() -> None:
    said: list[str] = []
    bytes_there = [0]

    def call() -> str:
        for _ in range(30):
            time.sleep(0.05)
            bytes_there[0] += 1
        return "done"

    assert patiently(call, what="x", patience=SHORT, sign=lambda: bytes_there[0], say=said.append) == "done"
    assert said == []


class Store(BaseHTTPRequestHandler):
    """S3 as far as one upload goes, which first answers as its server says."""

    server: Any

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        trouble = self.server.troubles.pop(0) if self.server.troubles else 200
        if trouble == "close":
            self.close_connection = True
            return
        code = "AccessDenied" if trouble == 403 else "SlowDown"
        body = f"<Error><Code>{code}</Code><Message>Reduce your request rate.</Message></Error>".encode()
        self.send_response(trouble)
        self.send_header("Content-Length", str(0 if trouble == 200 else len(body)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        if trouble != 200:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("boto3", reason="needs boto3, which comes with moto")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.troubles = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # boto's own tries, with its own pauses, are over after the first.
    environment |= {"S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_an_upload_survives_a_store_that_is_busy_and_then_closes_connections(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store.troubles = [503, 500, "close", 503]
    uploader("s3://runs/a", SOME)(tmp_path / "file", "file")
    assert store.troubles == []
    printed = capsys.readouterr().out
    assert (
        printed.count("s3://runs/a/file: can't be uploaded, since ") == 4
        and "(SlowDown: Reduce your request rate)" in printed
    )


def test_an_upload_that_is_refused_is_an_error_at_once(store: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store.troubles = [403] * 9
    with pytest.raises(CheckpointError, match=r"can't be uploaded \(access is refused, AccessDenied"):
        uploader("s3://runs/a", SOME)(tmp_path / "file", "file")
