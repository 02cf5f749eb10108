"""Export as a package of bioimage.io: weights, test tensors and their description in one zip file.

The description follows version 0.5 of the model specification,
https://github.com/bioimage-io/spec-bioimage-io, and its axes, shapes and voxel sizes are those of the checkpoint.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapTypeError, CellMapValueError
from cellmap_lightning.export.model_card import ModelCard
from cellmap_lightning.export.trained_model import TrainedModel
from cellmap_lightning.io.missing_paths import similar_path

#: The description in a package.
RDF = "rdf.yaml"
_FORMAT_VERSION = "0.5.4"


@dataclass(frozen=True)
class PackageOptions:
    """The description of a model in its package, beside its tensors; see docs/export.md.

    Attributes:
        name: name of the model; None for its network and classes.
        description: one sentence; None for one that names network, classes and voxel size.
        authors: names, or mappings with ``name`` and such as ``affiliation``, ``orcid``, ``github_user``.
        license: identifier of SPDX, such as ``CC-BY-4.0``; None without one.
        cite: mappings with ``text`` and ``doi`` or ``url``.
        cover: a picture; None without one.

    Raises:
        CellMapError: a value is invalid.
    """

    name: str | None = None
    description: str | None = None
    authors: Sequence[Any] = ()
    license: str | None = None
    cite: Sequence[Mapping[str, str]] = ()
    cover: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.authors, str) or not all(
            isinstance(a, str) or (isinstance(a, Mapping) and isinstance(a.get("name"), str)) for a in self.authors
        ):
            raise CellMapTypeError(f"authors must be a list of names, as in ['Jane Doe'], got {self.authors!r}")
        if not all(isinstance(c, Mapping) and "text" in c and ({"doi", "url"} & set(c)) for c in self.cite):
            raise CellMapTypeError(f"cite must be a list of {{text: ..., doi: ...}} or url, got {self.cite!r}")
        if self.cover is not None and not Path(self.cover).is_file():
            raise CellMapFileNotFoundError(
                f"cover={self.cover}: there is no such file{similar_path(self.cover)}; give a picture, or null"
            )


def write_package(model: TrainedModel, card: ModelCard, folder: Path, name: str, options: PackageOptions) -> None:
    """Write a package with the files of an export.

    Args:
        model: the model.
        card: its description, with the name of its TorchScript file.
        folder: the folder with the files of the export, to which the package is written.
        name: name of the package, which ends in ``.zip``.
        options: see `PackageOptions`.

    Raises:
        CellMapValueError: there are no authors.
    """
    if not options.authors:
        raise CellMapValueError("to=bioimageio needs authors, as in authors=['Jane Doe']")
    example, expected = _stored_tensors(model, card)
    np.save(folder / "test_input.npy", example)
    np.save(folder / "test_output.npy", expected.numpy())
    (folder / "README.md").write_text(_readme(card, options))
    files = ["cellmap.json", "test_input.npy", "test_output.npy", "README.md", card.weights]
    cover = None
    if options.cover is not None:
        cover = f"cover{Path(options.cover).suffix}"
        (folder / cover).write_bytes(Path(options.cover).read_bytes())
        files.append(cover)
    (folder / RDF).write_text(yaml.safe_dump(_description(card, options, folder, example, cover), sort_keys=False))
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as package:
        for file in [RDF, *files]:
            package.write(folder / file, file)


def _stored_tensors(model: TrainedModel, card: ModelCard) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Return a test input as it is stored, and the output for it; the normalized one where no affine map is known."""
    if card.affine is None:
        return model.example.numpy(), model.expected
    offset, factor = card.affine["offset"], card.affine["factor"]
    dtype = np.dtype(card.affine["dtype"])
    stored = model.example.double().numpy() / factor + offset
    stored = (np.rint(stored) if dtype.kind in "iu" else stored).astype(dtype)
    x = torch.from_numpy((stored.astype(np.float64) - offset) * factor).float()
    with torch.no_grad():
        return stored, model.module(x)


def _description(
    card: ModelCard, options: PackageOptions, folder: Path, example: np.ndarray[Any, Any], cover: str | None
) -> dict[str, Any]:
    """Return the content of ``rdf.yaml``."""

    def file(name: str) -> dict[str, str]:
        return {"source": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}

    preprocessing = []
    if card.affine is not None:
        offset, factor = card.affine["offset"], card.affine["factor"]
        preprocessing = [
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
            {"id": "scale_linear", "kwargs": {"gain": factor, "offset": -offset * factor}},
        ]
    title = _title(card, options)
    description: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "type": "model",
        "name": title,
        "description": options.description or _summary(card),
        "authors": [{"name": a} if isinstance(a, str) else dict(a) for a in options.authors],
        "cite": [dict(entry) for entry in options.cite],
        "license": options.license,
        "documentation": "README.md",
        "covers": [cover] if cover else [],
        "tags": ["electron-microscopy", "segmentation", *card.classes],
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "attachments": [file("cellmap.json")],
        "inputs": [
            {
                "id": "raw", "axes": _axes(card.input_shape, card.input_voxel_size, ["raw"]),
                "test_tensor": file("test_input.npy"), "data": {"type": example.dtype.name},
                "preprocessing": preprocessing,
            }
        ],
        "outputs": [
            {
                "id": "prediction", "axes": _axes(card.output_shape, card.output_voxel_size, card.channel_names),
                "test_tensor": file("test_output.npy"), "data": {"type": "float32"},
            }
        ],
        "weights": {"torchscript": {**file(card.weights), "pytorch_version": torch.__version__.partition("+")[0]}},
    }  # fmt: skip
    return {key: value for key, value in description.items() if value not in (None, [])}


def _axes(shape: Sequence[int], voxel_size: Sequence[float], channels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the axes of a tensor, of a fixed size; an axis of length 1 is not in it."""
    names = "zyx"[-len(shape) :]
    space = [
        {"type": "space", "id": name, "size": n, "unit": "nanometer", "scale": float(size)}
        for name, n, size in zip(names, shape, voxel_size, strict=True)
        if n != 1
    ]
    return [{"type": "batch"}, {"type": "channel", "channel_names": [_identifier(c) for c in channels]}, *space]


def _identifier(name: str) -> str:
    """Return a name of a channel as the specification allows it: letters, digits and underscores, no digit first."""
    letters = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    return letters if letters[:1].isalpha() else f"c_{letters}"


def _title(card: ModelCard, options: PackageOptions) -> str:
    return options.name or f"{card.about.get('network')} for {', '.join(card.classes)}"[:64]


def _summary(card: ModelCard) -> str:
    size = " x ".join(f"{s:g}" for s in card.input_voxel_size)
    return f"{card.about.get('network')} that predicts {', '.join(card.classes)} in electron microscopy at {size} nm."


def _readme(card: ModelCard, options: PackageOptions) -> str:
    """Return the documentation of a package."""
    if card.affine is not None:
        affine = card.affine
        values = (
            f"Stored {affine['dtype']} values; the preprocessing computes (stored - {affine['offset']:g}) * "
            f"{affine['factor']:.6g}."
        )
    else:
        values = (
            f"Normalized float32 values (normalize: {card.normalize}, invert: {card.invert}): the map from stored "
            "values depends on the volume, and is not a part of this package."
        )
    shape, size = (" x ".join(f"{n:g}" for n in numbers) for numbers in (card.input_shape, card.input_voxel_size))
    verified = card.about.get("verified", {})
    checkpoint = card.about.get("checkpoint", {})
    return f"""# {_title(card, options)}

{options.description or _summary(card)}

- Input: {shape} voxels of {size} nm. {values}
- Output: {", ".join(card.channel_names)}; {" x ".join(map(str, card.output_shape))} voxels, activated.
- Halo: {" x ".join(map(str, card.halo or ()))} voxels on either side.
- Checkpoint: {checkpoint.get("file")}, sha256 {checkpoint.get("sha256")}.

`cellmap.json` holds the same as JSON.

## Validation

The output of the weights differs from that of the checkpoint by at most {verified.get("max_difference", 0):.2g} on the
test input. Scores on annotated crops are not a part of this package.
"""
