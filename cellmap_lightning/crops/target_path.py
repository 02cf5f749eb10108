"""Target paths in bracket form: ``.../crop1/[mito,er]``."""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cellmap_lightning.crops.crop_name import CropName, container_of
from cellmap_lightning.crops.spelling import other_spellings
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.io.images import image_children, image_exists, read_image
from cellmap_lightning.io.label_ids import class_names, ids_of, parse_label_map
from cellmap_lightning.io.local_paths import dead_link
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.ngff import NO_OVERRIDES, Multiscale, NoImageError, Overrides
from cellmap_lightning.io.store import Remote, StorePath, parse_location, parts_of
from cellmap_lightning.validation import other_form, with_form

#: Classes that a suggested bracket has at most.
_LISTED = 12
#: A part of a path that is a bracket of classes.
_BRACKET = re.compile(r"\[[^\[\]]*\]")
#: A label map in braces at the end of a path.
_MAP = re.compile(r"/?\{([^{}]*:[^{}]*)\}$")
#: The place of a slash between a container and its bracket of classes.
_NO_SLASH = re.compile(r"(?:(?<=\.zarr)|(?<=\.n5))(?=\[[^\[\]/]*\](?:/|$))")


@dataclass(frozen=True)
class TargetPath:
    """The path of the label images of a crop.

    Attributes:
        before: path before the bracket.
        names: the annotated classes.
        after: path after the bracket, usually empty.
        options: ``storage_options`` of an address.
        label_map: ids and names of a label map, in which all classes share one array; else empty.
        bracketed: whether the classes were written in a bracket; without one, the last part of the path is the class.

    Example:
        >>> TargetPath.parse("jrc_a.zarr/crop1/[mito,er]").names
        ('mito', 'er')
    """

    before: str
    names: tuple[str, ...]
    after: str
    options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    label_map: tuple[tuple[int, str], ...] = ()
    bracketed: bool = field(default=True, repr=False, compare=False)

    @classmethod
    def parse(cls, path: str, options: Mapping[str, Any] | None = None) -> "TargetPath":
        """Parse ``.../crop1/[mito,er]``, ``.../crop1/[mito,er]/suffix``, or ``.../crop1/mito`` for one class.

        A label map is the path of its array and its ids, as in ``.../crop1/labels/{1:mito,2:er,255:unknown}``.

        The classes are the last part of the path that consists of a bracket; other brackets belong to names of folders,
        as in ``[2024] mito/jrc_a.zarr/crop1/[mito,er]``, and so do those before a Zarr container.

        Raises:
            CellMapValueError: the bracket is malformed, empty, or names a class twice.
        """
        items = tuple(sorted((options or {}).items()))
        head, chain, archive = path.partition("::") if "://" in path else (path, "", "")  # zip://inside::/data/vol.zip
        in_braces = _MAP.search(head)
        if in_braces is not None:
            pairs = [part.partition(":") for part in in_braces[1].split(",")]
            label_map = parse_label_map({key.strip(): name.strip() for key, _, name in pairs})
            before = head[: in_braces.start()].rstrip("/")
            return cls(before + chain + archive, class_names(label_map), "", items, label_map)
        before, inside, after = _split(head)
        if inside is None:
            before, _, name = head.rstrip("/").rpartition("/")
            return cls((before or ".") + chain + archive, (name,), "", items, bracketed=False)
        names = tuple(name.strip() for name in inside.split(","))
        if not any(names):
            raise CellMapValueError(
                f"target path {path!r}: the bracket is empty; name the classes in it, as in [mito,er]"
            )
        if not all(names):
            raise CellMapValueError(
                f"target path {path!r}: name {names.index('') + 1} of {len(names)} in the bracket [{inside}] is empty; "
                "remove the comma too many or add the class"
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CellMapValueError(
                f"target path {path!r}: the bracket [{inside}] names {twice!r} twice; each class should be named once"
            )
        return cls(before.rstrip("/") + chain + archive, names, after.strip("/"), items)

    def __str__(self) -> str:
        head, chain, archive = self.before.partition("::")
        if self.label_map:
            return f"{head}/{{{','.join(f'{i}:{name}' for i, name in self.label_map)}}}{chain}{archive}"
        return f"{head}/[{','.join(self.names)}]{f'/{self.after}' if self.after else ''}{chain}{archive}"

    @property
    def label(self) -> str:
        """Name of the crop in messages, such as ``jrc_hela-2/crop1``."""
        crop = parts_of(self.before)
        container = container_of(crop.parents)
        # In the working directory, a target has no folder.
        return str(CropName(container.stem, crop.name)) if container else crop.name or self.crop.name

    @property
    def crop(self) -> StorePath:
        """Location of the crop."""
        return parse_location(self.before, dict(self.options))

    def of(self, name: str) -> StorePath:
        """Return the location of the label image of a class, which may not exist."""
        if self.label_map:
            return self.crop
        return self.crop / name / self.after if self.after else self.crop / name

    def read(self, name: str, overrides: Overrides = NO_OVERRIDES) -> Multiscale:
        """Read the metadata of the label image of a class.

        Args:
            name: the class.
            overrides: settings that override the metadata.

        Raises:
            CellMapError: it cannot be read; see `read_image`.
        """
        try:
            image = read_image(self.of(name), overrides, allow_turned=True)
        except NoImageError as e:
            inside = image_children(self.of(name))
            if inside and not self.after and len(self.names) == 1:
                classes = ",".join(inside[:_LISTED])
                e.args = (f"{e} Name the classes of a crop in a bracket, as in {self.of(name)}/[{classes}]",)
            raise
        return image.with_ids(ids_of(self.label_map, name)) if self.label_map else image

    def without(self, names: Collection[str]) -> "TargetPath":
        """Return the same path without some of the classes."""
        return replace(self, names=tuple(name for name in self.names if name not in names))

    def unknown_names(self, known: Collection[str]) -> list[str]:
        """Return the names in the bracket that are neither known nor those of label images in the crop.

        Args:
            known: the classes that are read.
        """
        unread = [name for name in self.names if name not in known]
        stored = image_children(self.crop) if unread else []
        return [n for n in unread if n not in stored and not image_exists(self.of(n)) and image_exists(self.crop)]

    def check_names(self, known: Collection[str]) -> None:
        """Check that the names in the bracket are those of classes.

        Args:
            known: the classes that are read.

        Raises:
            CellMapFileNotFoundError: a name is neither among them nor that of a label image in the crop.
        """
        for name in self.unknown_names(known):
            stored = image_children(self.crop)
            close = difflib.get_close_matches(name.lower(), [*known, *stored], 1, 0.5)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(stored) or 'no classes'}"
            raise CellMapFileNotFoundError(
                f"{self.label} has no {name!r}, which the bracket [{','.join(self.names)}] names{hint}"
            )

    def check_spelling(self, classes: Collection[str], known: Collection[str]) -> None:
        """Check that the bracket does not name a class in another spelling, which would leave it unannotated.

        Args:
            classes: the requested classes.
            known: the classes that are read.

        Raises:
            CellMapValueError: it does.
        """
        for name, stored in other_spellings(classes, self.names, known).items():
            shown = with_form(stored, name)
            if self.label_map:
                listed = ", ".join(f"{number}: {of_map}" for number, of_map in self.label_map)
                raise CellMapValueError(
                    f"{self.label}: the label map {{{listed}}} names {shown}, and classes has {name!r}, which would "
                    f"be unannotated here; write {name!r} in the label map, or list {stored!r} in classes too if it is "
                    "another class"
                )
            raise CellMapValueError(
                f"{self.label}: the bracket [{','.join(self.names)}] names {shown}, and classes has {name!r}, which "
                f"would be unannotated here; rename the folder {self.crop}/{stored} and the name in the bracket, or "
                f"list {stored!r} in classes too if it is another class"
            )

    def check_single(self, names: Collection[str]) -> None:
        """Check that the crop has one image of each class in a bracket.

        Args:
            names: the classes that are read.

        Raises:
            CellMapValueError: it has several, such as a folder and a file of the same name.
        """
        crop = self.crop
        if not self.bracketed or self.label_map or self.after or isinstance(crop, Remote):
            return
        from cellmap_lightning.io.formats.registry import images_named

        for name, images in images_named(crop, names).items():
            raise CellMapValueError(
                f"{self.label}: {crop} has {' and '.join(images)}, each of which may be the class {name!r}; move all "
                "but one elsewhere, or rename them"
            )

    def existing(self, name: str) -> StorePath:
        """Return the location of the label image of a class, after a check that it exists.

        Raises:
            CellMapFileNotFoundError: it does not exist; the message lists the existing ones.
        """
        path = self.of(name)
        if image_exists(path):
            return path
        if not image_exists(self.crop):
            raise missing(self.crop, f"{self.label}: crop")
        link = dead_link(path) if isinstance(path, Path) else ""
        if link:
            raise CellMapFileNotFoundError(f"{self.label}: class {name!r} cannot be read: {link}")
        names = image_children(self.crop)
        same = other_form(name, names)
        raise CellMapFileNotFoundError(
            f"{self.label}: class {name!r} is in the bracket of the target path, but {path} does not exist; "
            f"{self.crop} has {', '.join(names) or 'no classes'}{same and f'; {same}'}"
        )


def _split(path: str) -> tuple[str, str | None, str]:
    """Return the parts of a target path before, in and after its bracket of classes; the middle is None without one.

    Raises:
        CellMapValueError: the bracket of classes is not closed, or not a part of the path by itself.
    """
    path = _NO_SLASH.sub("/", path)
    parts = path.rstrip("/").split("/")
    # A container cannot lie inside a class, so that brackets before the last container are not brackets of classes.
    first = max((i for i, part in enumerate(parts) if part.endswith((".zarr", ".n5"))), default=-1) + 1
    brackets = [i for i in range(first, len(parts)) if _BRACKET.fullmatch(parts[i])]
    last = parts[-1]
    if "\\" in last and os.sep == "/" and "[" in last.rpartition("\\")[2]:
        raise CellMapValueError(
            f"target path {path!r}: a backslash separates no folders on this system; write {path.replace(chr(92), '/')}"
        )
    if ("[" in last or "]" in last) and brackets[-1:] != [len(parts) - 1]:
        raise CellMapValueError(
            f"target path {path!r}: the classes should stand in one bracket that is the last part of the path, as in "
            ".../crop1/[mito,er]"
        )
    if not brackets:
        return path, None, ""
    number = brackets[-1]
    return "/".join(parts[:number]), parts[number][1:-1], "/".join(parts[number + 1 :])
