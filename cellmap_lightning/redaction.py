"""Redaction of credentials in texts and configurations.

Secrets are values of ``storage_options`` with telling names, users and passwords in addresses, and signed queries.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

#: Text that replaces a secret.
HIDDEN = "***"

_NAME = re.compile(
    r"key|secret|token|passw|passphrase|pwd|credential|auth|cookie|signature(?!_version)|connection_string|\bsas|\bsig\b",
    re.IGNORECASE,
)
_USER = re.compile(r"((?:https?|s3a?|gc?s|ftp|abfss?|az|hdfs)://)[^/\s'\"]*@", re.IGNORECASE)
_QUERY = re.compile(r"\?([^\s'\"?]*=[^\s'\"]*)")
#: An override of options, except those of public stores: all text after it is hidden.
_OPEN = r"(?!(?:null|\{\s*(?:anon:\s*\w+)?\s*\})(?:$|[\s,'\"]))"
_OVERRIDE = re.compile(
    rf"(storage_options(?!\.anon=)[\w.\[\]]*={_OPEN}|storage_options['\"]?\s*:\s*(?=\{{){_OPEN}).*", re.DOTALL
)
#: Length of the shortest secret that is searched for in texts, and in values of other settings: shorter ones would
#: match ordinary words.
_IN_TEXTS, _IN_SETTINGS = 4, 8


def hidden(text: str, secrets: Collection[str] = ()) -> str:
    """Return a text without credentials in addresses and without ``secrets``.

    Args:
        text: a message or a path.
        secrets: further texts to hide; see `secrets_of`.
    """
    text = hide_address(text)
    for secret in sorted(secrets, key=len, reverse=True):  # a secret may contain a shorter one
        if len(secret) >= _IN_TEXTS:
            text = text.replace(secret, HIDDEN)
    return text


def hide_overrides(text: str) -> str:
    """Return a text without the values of ``storage_options=``, as in the overrides of a command line."""
    return _OVERRIDE.sub(rf"\g<1>{HIDDEN}", hide_address(text))


def hide_address(text: str) -> str:
    """Return a text whose addresses have no user and password, and no query with a secret."""
    if "://" not in text and "?" not in text:
        return text
    return _QUERY.sub(_hide_query, _USER.sub(rf"\g<1>{HIDDEN}@", text))


def _hide_query(match: re.Match[str]) -> str:
    names = [part.partition("=")[0] for part in re.split(r"[&;]", match[1])]
    return f"?{HIDDEN}" if any(_NAME.search(name) for name in names) else match[0]


def redacted(value: Any, secrets: Collection[str] = ()) -> Any:
    """Return a configuration, as plain containers, without its secrets.

    Args:
        value: the configuration.
        secrets: values that are hidden at any place; see `secrets_of`.
    """
    return _redacted(value, {secret for secret in secrets if len(secret) >= _IN_SETTINGS}, False)


def _redacted(value: Any, secrets: Collection[str], inside: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if _is_secret(name, item, inside) else _redacted(item, secrets, inside or _has_options(name))
            for name, item in value.items()
        }
    if _is_sequence(value):
        items = [_redacted(item, secrets, inside) for item in value]
        return tuple(items) if type(value) is tuple else items
    if isinstance(value, str):
        return hide_overrides(hidden(value, secrets))
    return HIDDEN if secrets and not isinstance(value, bool) and str(value) in secrets else value


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return True for lists and tuples, also those of configurations of OmegaConf."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _has_options(name: Any) -> bool:
    return "storage_options" in str(name)


def _is_secret(name: Any, value: Any, inside: bool) -> bool:
    """Return True if a setting is a secret, by its name ``inside`` the options of a store, or by its dotted name."""
    if value is None or isinstance(value, bool):
        return False
    if _has_options(name) and isinstance(value, str) and not value.startswith("${"):
        return True  # options as one string
    below = str(name).rpartition("storage_options")[2] if _has_options(name) else str(name) if inside else ""
    return bool(_NAME.search(below))


def secrets_of(config: Any) -> set[str]:
    """Return the secrets below every ``storage_options`` of a configuration, as texts."""
    return set(_secrets(config, False, False))


def option_secrets(options: Any) -> set[str]:
    """Return the secrets of one store's options, as texts."""
    return set(_secrets(options, True, False))


def _secrets(value: Any, inside: bool, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            below = inside or _has_options(name)
            yield from _secrets(item, below, secret or _is_secret(name, item, inside))
    elif _is_sequence(value):
        for item in value:
            yield from _secrets(item, inside, secret)
    elif secret and value is not None and not isinstance(value, bool):
        yield str(value)


def holds_credentials(config: Any) -> bool:
    """Return True if a configuration contains credentials, or options of a store other than ``anon=True``."""
    if isinstance(config, Mapping):
        return any(
            (_has_options(name) and bool(item) and item != {"anon": True}) or holds_credentials(item)
            for name, item in config.items()
        )
    if _is_sequence(config):
        return any(holds_credentials(item) for item in config)
    return isinstance(config, str) and hide_address(config) != config
