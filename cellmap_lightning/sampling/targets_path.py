"""The bracket form of a target path: ``.../crop1/[mito,er]``."""

from dataclasses import dataclass
from pathlib import Path

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.volumes.store import children, local, missing


@dataclass(frozen=True)
class TargetPath:
    """Where the label images of a crop lie.

    Attributes:
        before: path up to the class's name.
        names: the annotated classes.
        after: path below the class's name, mostly empty.
    """

    before: str
    names: tuple[str, ...]
    after: str

    @classmethod
    def parse(cls, path: str) -> "TargetPath":
        """Read ``.../crop1/[mito,er]``, ``.../crop1/[mito,er]/suffix``, or ``.../crop1/mito`` for one class.

        Raises:
            CellMapValueError: the bracket is malformed, empty, or names a class twice.
        """
        if "[" not in path and "]" not in path:
            whole = Path(path)
            return cls(str(whole.parent), (whole.name,), "")
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
        return cls(before.rstrip("/"), names, after.strip("/"))

    def __str__(self) -> str:
        return f"{self.before}/[{','.join(self.names)}]" + (f"/{self.after}" if self.after else "")

    @property
    def label(self) -> str:
        """What messages call the crop, such as ``jrc_hela-2/crop1``."""
        crop = Path(self.before)
        volume = next((p.stem for p in crop.parents if p.suffix in (".zarr", ".n5")), None)
        return f"{volume}/{crop.name}" if volume else crop.name

    def of(self, name: str) -> Path:
        """The label image of a class.

        Raises:
            CellMapFileNotFoundError: it does not exist; the message lists what does.
        """
        crop = local(self.before)
        path = crop / name / self.after if self.after else crop / name
        if not crop.exists():
            raise missing(crop, f"{self.label}: crop")
        if not path.exists():
            raise CellMapFileNotFoundError(
                f"{self.label}: class {name!r} is in the bracket of the target path, but {path} does not exist; "
                f"{crop} has {', '.join(children(crop)) or 'no classes'}"
            )
        return path
