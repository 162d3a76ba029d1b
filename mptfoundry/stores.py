"""Calls to object stores, which may fail for a while: calls are retried, with messages.

A short failure of a store (5xx, SlowDown, a closed connection) must not end a run. A call is retried after
growing pauses, for as long as its `Patience` lasts; meanwhile we print the reason, and since when it fails.
An error that a retry won't change (no permission, not found) is raised at once. A call that shows no progress
is reported, too, and given up when the patience is over.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mptfoundry.errors import CheckpointError, MPTFoundryError, first_line
from mptfoundry.files import Upload
from mptfoundry.places import path_in_store

T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 1.0
_SLOWEST_BYTES_PER_SECOND = 1e6


@dataclass(frozen=True)
class Patience:
    """How long a store may fail.

    Attributes:
        seconds: From the first failure, or the last progress, until the call is given up.
        quiet_seconds: Without progress until the call is reported.
        first_pause: Seconds before the second try; each further pause is twice as long ...
        longest_pause: ... up to this.
    """

    seconds: float = 600.0
    quiet_seconds: float = 60.0
    first_pause: float = 1.0
    longest_pause: float = 60.0


# While training continues; while ranks wait for data; while they wait for a start; for optional calls.
IN_BACKGROUND = Patience()
FOR_DATA = Patience(seconds=300.0)
AT_START = Patience(seconds=60.0, longest_pause=10.0)
ONCE = Patience(seconds=0.0, quiet_seconds=20.0)

# HTTP: request timeout, too early, too many requests.
_PASSING_CODES = {"408", "425", "429"}
_REFUSED_CODES = {
    "401",
    "403",
    "AccessDenied",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
}
_MISSING_CODES = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_FINAL = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)
_FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURI"}


class SilentStore(Exception):
    """A store accepted a call and never answered."""


def patiently(
    call: Callable[[], T],
    *,
    what: str,
    patience: Patience = IN_BACKGROUND,
    sign: Callable[[], Any] = lambda: None,
    seconds_of_work: float = 0.0,
    say: Callable[[str], None] = print,
) -> T:
    """Call a store, and retry while the call fails for a reason that may pass.

    Args:
        call: Runs in its own thread.
        what: The call in words, such as `s3://runs/a/ep0-ba10-rank0.pt: can't be uploaded`.
        patience: How long it may fail.
        sign: Returns a value that changes whenever the call makes progress, such as bytes.
        seconds_of_work: How much longer it may be silent, because not every store reports progress.
        say: Called with messages about what fails, and for how long.

    Returns:
        The call's result.

    Raises:
        Exception: The call's own error, if it is final or the patience is over.
        SilentStore: It made no progress for as long as the patience lasts.
    """
    failing_since: float | None = None
    pause = patience.first_pause
    while True:
        began_at = time.monotonic()
        try:
            return _watched(call, what, patience, sign, seconds_of_work, say)
        except Exception as error:
            failing_since = began_at if failing_since is None else failing_since
            seconds = time.monotonic() - failing_since
            if is_final(error) or seconds + pause > patience.seconds:
                raise
            say(f"{what}, since {seconds:.0f} s ({reason_of(error)}); tried again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, patience.longest_pause)


def is_final(error: BaseException) -> bool:
    """Whether a retry would fail the same way."""
    if isinstance(error, (SilentStore, MPTFoundryError)):
        return True
    codes = [code for each in _chain(error) for code in _codes(each)]
    if codes:
        return any(code in _REFUSED_CODES | _MISSING_CODES or _is_final_code(code) for code in codes)
    raised = [each for each in (error, error.__cause__) if each is not None]
    return any(
        isinstance(each, _FINAL)
        or type(each).__name__ in _FINAL_NAMES
        or getattr(each, "errno", None) in _FULL_DISK
        for each in raised
    )


def reason_of(error: BaseException) -> str:
    """Say in a few words why a call failed, with missing permission distinct from a missing object."""
    codes = [code for each in _chain(error) for code in _codes(each)]
    for code in codes:
        if code in _REFUSED_CODES:
            return f"access is refused, {code}: look at the credentials and their rights"
        if code in _MISSING_CODES:
            return f"not found, {code}"
    for each in _chain(error):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict) and isinstance(answer.get("Error"), dict):
            said = answer["Error"]
            return f"{said.get('Code')}: {said.get('Message', '')}".rstrip(". :")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def size_of(path: Path) -> int | None:
    """Return a file's size in bytes, or None if it is gone: another process may remove it at any time."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return None


def uploader(url: str, patience: Patience = IN_BACKGROUND) -> Upload:
    """Return a function that uploads files to an object store, below a URL; each upload is atomic.

    The function raises CheckpointError if a file can't be uploaded after all retries.
    """
    from composer.utils import S3ObjectStore, maybe_create_object_store_from_uri

    store, root = maybe_create_object_store_from_uri(url), path_in_store(url)
    assert store is not None

    def upload(file: Path, name: str) -> None:
        what, key = f"{url}/{name}: can't be uploaded", f"{root}/{name}".lstrip("/")
        sent = [0]

        def note(done: int, total: int) -> None:
            sent[0] += 1

        def send() -> None:
            # Other stores don't report progress; Google's raises an error if asked to.
            options = {"callback": note} if isinstance(store, S3ObjectStore) else {}
            store.upload_object(key, str(file), **options)

        try:
            work = file.stat().st_size / _SLOWEST_BYTES_PER_SECOND
            patiently(send, what=what, patience=patience, sign=lambda: sent[0], seconds_of_work=work)
        except Exception as error:  # each store raises its own kind
            raise CheckpointError(f"{what} ({reason_of(error)}).") from error

    return upload


def _watched(
    call: Callable[[], T],
    what: str,
    patience: Patience,
    sign: Callable[[], Any],
    seconds_of_work: float,
    say: Callable[[str], None],
) -> T:
    """Run a call in a thread; report it when it makes no progress, and later raise."""
    results: list[T] = []
    errors: list[BaseException] = []
    is_done = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            is_done.set()

    threading.Thread(target=run, name="store", daemon=True).start()
    last, heard_at, has_said = sign(), time.monotonic(), False
    while not is_done.wait(min(_SECONDS_BETWEEN_LOOKS, patience.quiet_seconds / 4)):
        if (now := sign()) != last:
            last, heard_at, has_said = now, time.monotonic(), False
        quiet = time.monotonic() - heard_at
        if quiet > max(patience.seconds, patience.quiet_seconds) + seconds_of_work:
            raise SilentStore(f"the store gives no answer, since {quiet:.0f} s")
        if quiet > patience.quiet_seconds and not has_said:
            has_said = True
            say(f"{what}: the store gives no answer, since {quiet:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and the errors that caused it, the outermost first."""
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found


def _codes(error: BaseException) -> list[str]:
    """Return a store's error codes: boto's code, or the HTTP status that other libraries keep."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        answer = response.get("Error")
        return [str(answer["Code"])] if isinstance(answer, dict) and "Code" in answer else []
    for holder in (error, response):
        for name in ("status_code", "status", "code"):
            code = getattr(holder, name, None)
            if isinstance(code, int) and 100 <= code < 600:
                return [str(code)]
    return []


def _is_final_code(code: str) -> bool:
    return code.isdigit() and 400 <= int(code) < 500 and code not in _PASSING_CODES
