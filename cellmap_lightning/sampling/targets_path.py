"""The bracket form of a target path: ``.../crop1/[mito,er]``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.volumes.store import StorePath, children, exists, located, missing, parts_of


@dataclass(frozen=True)
class TargetPath:
    """Where the label images of a crop lie.

    Attributes:
        before: path up to the class's name.
        names: the annotated classes.
        after: path below the class's name, mostly empty.
        options: ``storage_options`` of an address.
    """

    before: str
    names: tuple[str, ...]
    after: str
    options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, path: str, options: Mapping[str, Any] | None = None) -> "TargetPath":
        """Read ``.../crop1/[mito,er]``, ``.../crop1/[mito,er]/suffix``, or ``.../crop1/mito`` for one class.

        Raises:
            CellMapValueError: the bracket is malformed, empty, or names a class twice.
        """
        given = tuple(sorted((options or {}).items()))
        if "[" not in path and "]" not in path:
            before, _, name = path.rstrip("/").rpartition("/")
            return cls(before or ".", (name,), "", given)
        before, opened, rest = path.partition("[")
        inside, closed, after = rest.partition("]")
        if not opened or not closed or "[" in rest or "]" in after or (before and not before.endswith("/")):
            raise CellMapValueError(
                f"target path {path!r}: the classes should stand in one bracket, as in .../crop1/[mito,er]"
            )
        names = tuple(name.strip() for name in inside.split(","))
        twice = sorted({n for n in names if names.count(n) > 1})
        if not all(names) or twice:
            raise CellMapValueError(f"target path {path!r}: each class should be named once, got [{inside}]")
        return cls(before.rstrip("/"), names, after.strip("/"), given)

    def __str__(self) -> str:
        return f"{self.before}/[{','.join(self.names)}]" + (f"/{self.after}" if self.after else "")

    @property
    def label(self) -> str:
        """What messages call the crop, such as ``jrc_hela-2/crop1``."""
        crop = parts_of(self.before)
        volume = next((p.stem for p in crop.parents if p.suffix in (".zarr", ".n5")), None)
        return f"{volume}/{crop.name}" if volume else crop.name

    @property
    def crop(self) -> StorePath:
        """Where the crop lies."""
        return located(self.before, dict(self.options))

    def of(self, name: str) -> StorePath:
        """Where the label image of a class lies, whether or not it is there."""
        return self.crop / name / self.after if self.after else self.crop / name

    def found(self, name: str) -> StorePath:
        """The label image of a class.

        Raises:
            CellMapFileNotFoundError: it does not exist; the message lists what does.
        """
        path = self.of(name)
        if exists(path):
            return path
        if not exists(self.crop):
            raise missing(self.crop, f"{self.label}: crop")
        raise CellMapFileNotFoundError(
            f"{self.label}: class {name!r} is in the bracket of the target path, but {path} does not exist; "
            f"{self.crop} has {', '.join(children(self.crop)) or 'no classes'}"
        )
