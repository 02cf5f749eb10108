"""Records: small JSON files with a checksum inside, so that damage is noticed when they are read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cellmap_lightning.errors import CellMapValueError

_HEAD, _MIDDLE, _END = '{"checksum": "', '", "content": ', "}"
_DIGITS = 64


class DamagedRecordError(CellMapValueError):
    """The text of a record that is cut, changed or something else altogether."""


def sealed(content: Mapping[str, Any]) -> str:
    """Return the JSON text of a mapping, with the SHA-256 checksum of its own content before it.

    Args:
        content: what `json` can write; its keys are texts.
    """
    body = json.dumps(dict(content))
    return f"{_HEAD}{_checksum(body)}{_MIDDLE}{body}{_END}"


def unsealed(text: str) -> dict[str, Any]:
    """Return the content of a text that `sealed` made. White space around it does not matter.

    Raises:
        DamagedRecordError: any character of it was changed, added or lost.
    """
    text = text.strip()
    body_at = len(_HEAD) + _DIGITS + len(_MIDDLE)
    checksum, body = text[len(_HEAD) : len(_HEAD) + _DIGITS], text[body_at : -len(_END)]
    if text != f"{_HEAD}{checksum}{_MIDDLE}{body}{_END}":
        raise DamagedRecordError(f"not a sealed record, it begins with {text[:20]!r}; expected {_HEAD!r}")
    if checksum != _checksum(body):
        raise DamagedRecordError(f"its checksum is {_checksum(body)[:12]}..., and {checksum[:12]}... is noted in it")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise DamagedRecordError(f"its content is not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise DamagedRecordError(f"its content is {type(content).__name__}; expected an object")
    return content


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()
