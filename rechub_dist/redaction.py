"""What is a secret: which names have one as their value, and where one may stand in an address or in a message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

HIDDEN: Final = "***"

# Words of names, as of options: secret_key, sas_token, SharedAccessSignature, X-Amz-Signature
_WORDS = {
    "secret",
    "password",
    "passwd",
    "passphrase",
    "pass",
    "pwd",
    "token",
    "credential",
    "credentials",
    "sas",
    "sig",
}
_WORDS |= {"signature", "auth", "authorization", "key", "apikey", "pkey"}
_HARMLESS_LAST = {"file", "filename", "path", "id", "name", "arn", "endpoint", "uri", "url", "type", "provider"}
_HARMLESS_VALUES = {
    "anon",
    "google_default",
    "cloud",
    "cache",
    "browser",
    "true",
    "false",
    "",
}  # gcsfs: ways to sign in
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-_.]+")

_USER = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^/\s:@'\"]*:)[^/\s@'\"]+(?=@)", re.IGNORECASE)
_QUERY = re.compile(r"(?P<before>[?&;](?P<name>[\w.-]+)=)(?P<value>[^&;\s'\"]+?)(?=[.:,)]*([&;\s'\"]|$))")
# In prose, where `key: ...` is seldom a secret, only what can be nothing else.
_PROSE = re.compile(
    r"(?P<before>\b\w*(secret(_access)?_key|access_key|account_key|api_key|password|passphrase|(sas|session|access|"
    r"security)_token|connection_string|secret)\b['\"]?\s*[=:]\s*['\"]?)(?!\{)[^\s'\",;&})]+",
    re.IGNORECASE,
)


def is_secret(name: str, value: object) -> bool:
    """Whether an option's value is a secret, rather than where it is found: a path, say, or `{env: NAME}`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | bytes):
        return False
    text = str(value)
    if text.lower() in _HARMLESS_VALUES or text.startswith(("/", "~", "file:")):
        return False
    words = [word.lower() for word in _CAPITAL.split(name) if word]
    if not words or words[-1] in _HARMLESS_LAST:
        return False
    return not _WORDS.isdisjoint(words) or words[-2:] == ["connection", "string"]


def redacted(text: str) -> str:
    """A message with the secrets of its addresses and of what looks like options replaced by `***`."""
    text = _USER.sub(rf"\g<before>{HIDDEN}", text)
    text = _QUERY.sub(lambda m: m["before"] + (HIDDEN if is_secret(m["name"], m["value"]) else m["value"]), text)
    return _PROSE.sub(rf"\g<before>{HIDDEN}", text)


def has_secret(address: str) -> bool:
    """Whether an address holds a password or an option that is a secret."""
    return "://" in address and redacted(address) != address


def secrets_in(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each secret in a tree of settings, and what it is.

    Secrets are options of a storage, by their names, and parts of addresses anywhere.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            inner = f"{key}.{name}" if key else str(name)
            if "options" in key.split(".") and is_secret(str(name), value):
                yield inner, "a secret"
            else:
                yield from secrets_in(value, inner)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from secrets_in(value, f"{key}.{number}" if key else str(number))
    elif isinstance(tree, str) and has_secret(tree):
        yield key, "an address with a secret"


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """A storage's options without those that are secrets, at any depth."""
    return {
        name: without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if not is_secret(name, value)
    }
