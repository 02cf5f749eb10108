"""Attributes whose names are nearly those of the names of axes, such as ``dims`` for ``axes``.

They are not read, so that a volume with them could be transposed without an error.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.ngff.limits import MOST_AXES
from cellmap_lightning.io.ngff.near_keys import CLOSE
from cellmap_lightning.io.ngff.notes import FOR_ENTRY
from cellmap_lightning.io.store import StorePath

#: Names of an order of axes, in lower case without punctuation.
_NAMES = frozenset(
    ("axes", "axis", "axisnames", "axesnames", "axisname", "axislabels", "axeslabels", "axisorder", "axesorder", "dims",
     "dim", "dimnames", "dimsnames", "dimlabels", "dimorder", "dimsorder", "dimensions", "dimensionnames",
     "dimensionlabels", "dimensionorder", "arraydimensions", "order", "ordering", "layout", "arrayorder",
     "storageorder", "memoryorder", "dataorder", "voxelorder", "indexorder", "orientation", "coords", "coordinates")
)  # fmt: skip
#: Axes that may stand beside z, y and x.
_OTHERS = {"c", "t", "ch", "channel", "channels", "time"}
#: The order of axes of OME-XML, which begins with the fastest axis.
_OME_ORDER = re.compile("XY(ZCT|ZTC|CTZ|TCZ|CZT|TZC)")


def check_axes(
    path: StorePath,
    attributes: Mapping[str, Any],
    axes: tuple[int, int, int],
    ndim: int,
    right: str = "the right key is axes, with a letter for each of the {ndim} stored axes",
) -> None:
    """Check that no attribute with nearly the name of the names of axes has another order than the one that is read.

    Args:
        path: the array, for messages.
        attributes: its attributes.
        axes: the stored axes that are read as z, y, x.
        ndim: number of stored axes.
        right: where the order is read from, for messages.

    Raises:
        MetadataError: one has another order.
    """
    order = tuple(AXES[axes.index(axis)] for axis in sorted(axes))
    for name, value in _near(attributes):
        names = named_axes(value)
        if names is None:
            continue
        if isinstance(value, str) and _OME_ORDER.fullmatch(value):
            names = names[::-1]
        places = tuple(names.index(axis) for axis in AXES)
        same = places == axes if len(names) == ndim else tuple(n for n in names if n in AXES) == order
        if not same:
            letters = "".join(n[:1] for n in names) if len(names) == ndim else "..."
            raise MetadataError(
                f"{path}: the attribute {name}={value!r} is not read, and contradicts the order that is, "
                f"{', '.join(order)}; {right.format(ndim=ndim)}: rename or remove {name}, or set "
                f"axes={letters}{FOR_ENTRY}"
            )


def named_axes(value: Any) -> tuple[str, ...] | None:
    """Return the names, in lower case, in a value that names z, y and x once each; None for any other value.

    Args:
        value: a text such as ``XYZ`` or ``z, y, x``, or a list of names or of objects with a name; other axes may be
            channels and time.

    Example:
        >>> named_axes("CXYZ"), named_axes(["z", "y"])
        (('c', 'x', 'y', 'z'), None)
    """
    if isinstance(value, str):
        parts = re.split(r"[\s,;/|]+", value.strip(" ()[]"))
        value = list(parts[0]) if len(parts) == 1 else parts
    if not isinstance(value, list | tuple) or len(value) > MOST_AXES:
        return None
    names = [part.get("name") if isinstance(part, Mapping) else part for part in value]
    plain = tuple(name.strip().rstrip("^").lower() for name in names if isinstance(name, str))
    known = len(plain) == len(names) and all(name in AXES or name in _OTHERS for name in plain)
    return plain if known and all(plain.count(axis) == 1 for axis in AXES) else None


def _near(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes, and those in a ``transform``, that may be the names of axes."""
    transform = attributes.get("transform")
    inside = transform if isinstance(transform, Mapping) else {}
    for name, value in (*attributes.items(), *((f"transform.{key}", value) for key, value in inside.items())):
        plain = re.sub(r"[^a-z0-9]", "", str(name).rpartition(".")[2].lower())
        if plain in _NAMES or difflib.get_close_matches(plain, _NAMES, 1, CLOSE):
            yield str(name), value
