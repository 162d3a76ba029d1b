"""Redact secrets in a configuration, recognized by name, by format, or by origin in the environment.

A config is saved with its run and sent to loggers. Neither needs a secret: a new run gets it from the user's
own file or environment. Text from `${oc.env:NAME}` is never written, only the expression. Other text is
redacted if its key's name is a secret's, or if it looks like a secret. The same names decide which
environment variables no file may read.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from mptfoundry.config.engine.nested import leaves, mapped

REDACTED = "<redacted>"

# A name is split into words at `_`, `-`, `.` and capitals. These words mark a secret, unless the other words
# show that it is a tokenizer's token, or a lookup key.
_SECRET = re.compile(
    r"\b(secrets|passwords|passphrase|pwd|pw|pat|auth|authorization|credentials?|creds|webhooks|bearer|sas|sig"
    r"|signature|dsn|cookies?|jwt|netrc|pgpass|pass$|key$|(api|access|private) keys|conn(ection)? str(ing)?"
    r"|(database|db|redis|mongo|mongodb|postgres|mysql|broker) ur[il]"
    r"|\w*(secret|passwd|password|token|apikey|accesskey|privatekey|webhook|connstr)"
    r"|(api|access|auth) tokens)\b"
)
_TOKENIZERS = re.compile(
    r"\b(add|bos|eos|pad|unk|sep|cls|mask|max|per)\b.*\btoken\b|\btoken (id|ids|types?|encoding|mask)\b"
)
_OTHER_KEY = re.compile(
    r"\b(text|prompt|response|target|label|sort|primary|foreign|index|metric|experiment) key$"
)

# The working directory, which every shell keeps in the environment.
_FOLDERS = ("PWD", "OLDPWD")

_PASSWORD = re.compile(r"(\w[\w+.-]*://[^/\s:@]*:)[^/\s]+(?=@)")
_USER = re.compile(r"(https?://)[^/\s:@]+(?=@)")
_QUERY = re.compile(r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|key)|sig)=)[^&\s]+", re.I)
_FIELD = re.compile(
    r"((?:^|[;\s])(?:--?)?(?:account ?key|shared ?access ?(?:key|signature)|passw(?:or)?d|pwd|secret"
    r"|(?:api|access|auth)[_-]?(?:key|token))\s*=\s*)[^;\s]+",
    re.I,
)
_SCHEME = re.compile(r"\b(bearer\s+|(?:basic|token)\s+(?=\S*[\d=]))[\w+/=.~-]{6,}", re.I)
_HOOK = re.compile(r"(https://(?:hooks\.slack\.com|discord(?:app)?\.com/api/webhooks)/)\S+", re.I)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(-----END [A-Z ]*PRIVATE KEY-----)?")
_FORMS = re.compile(
    r"\b(hf_(?=[A-Za-z]*\d)[A-Za-z0-9]{6,}|hf_[A-Za-z0-9]{20,}|gh[oprsu]_\w{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{8,}|sk-[\w-]{20,}|(AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|dapi[0-9a-f]{32}|npm_\w{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)


class FromEnvironment(str):
    """Text from an environment variable, with the expression to write instead."""

    expression: str

    def __new__(cls, value: str, expression: str) -> FromEnvironment:
        """Create the text with its expression."""
        text = super().__new__(cls, value)
        text.expression = expression
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return FromEnvironment, (str(self), self.expression)


@cache
def names_a_secret(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", " ", name).lower().strip()
    if _TOKENIZERS.search(words) or _OTHER_KEY.search(words):
        return False
    return _SECRET.search(words) is not None


def may_be_read(name: str, value: str) -> bool:
    """Whether a file may read this environment variable with this value."""
    return (name in _FOLDERS or not names_a_secret(name)) and _without_secrets(value) == value


def redacted(value: Any) -> Any:
    """The same plain value with secrets replaced by `<redacted>`, or by their expression."""
    return mapped(value, _redacted_leaf)


def _redacted_leaf(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, FromEnvironment):
        return value.expression
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        return value
    if any(names_a_secret(key) for key in path if isinstance(key, str)):
        return REDACTED
    return _without_secrets(value) if isinstance(value, str) else value


def _without_secrets(text: str) -> str:
    for form in (_PASSWORD, _USER, _QUERY, _FIELD, _SCHEME, _HOOK):
        text = form.sub(rf"\1{REDACTED}", text)
    return _FORMS.sub(REDACTED, _PRIVATE_KEY.sub(REDACTED, text))


def redactions(value: Any) -> list[tuple[Any, ...]]:
    """The paths of a configuration's redacted values."""
    return [path for path, leaf in leaves(value) if isinstance(leaf, str) and REDACTED in leaf]
