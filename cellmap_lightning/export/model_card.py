"""The description of an exported model: the file ``cellmap.json`` beside its weights, or a YAML file of the user."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cellmap_lightning.batches.arrays import parse_classes
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.export.reach import Reach
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.transforms.normalization import Normalize
from cellmap_lightning.validation import did_you_mean, int_at_least, one_of, positive_number

#: Name of the description in the folder of an export.
CARD = "cellmap.json"
#: Endings of weights that a description may name.
WEIGHTS = (".ts", ".pt", ".pth", ".torchscript", ".onnx")
_REQUIRED = ("weights", "input_shape", "input_voxel_size", "classes", "normalize")
_ACTIVATIONS = (None, "sigmoid", "softmax")


@dataclass(frozen=True)
class ModelCard:
    """The input and output of an exported model; shapes and voxel sizes are z, y, x (y, x for slices).

    See docs/export.md.

    Attributes:
        weights: file name of the weights, relative to the description.
        input_shape: voxels of the input.
        input_voxel_size: nm.
        classes: names of the classes; the channels of the output, unless ``channels`` describes others.
        normalize: the rule by which stored values become the input, see `Normalize`; None where the crops of the
            training had several.
        invert: True if the rule exchanges dark and bright.
        output_shape: voxels of the output for this input.
        output_voxel_size: nm.
        channels: a description of each channel of the output, see `SegmentationTask.output_channels`.
        activation: the activation that the output still needs; None where the model applies it.
        halo: voxels on either side that an output voxel depends on, see `measure_halo`; None where not measured.
        reach: the fields of `Reach`, by which `cellmap-predict` chooses patches as with the checkpoint; None where not
            measured. ``voxel_bytes`` is 0 where the file takes inputs of ``input_shape`` alone.
        affine: ``{dtype, offset, factor}``: ``(stored - offset) * factor`` is the input; None where it depends on the
            volume.
        about: further facts, which nothing reads: versions, checkpoint, verification.

    Raises:
        CellMapError: a value is invalid.
    """

    weights: str
    input_shape: tuple[int, ...]
    input_voxel_size: tuple[float, ...]
    classes: tuple[str, ...]
    normalize: Any
    invert: bool = False
    output_shape: tuple[int, ...] = ()
    output_voxel_size: tuple[float, ...] = ()
    channels: tuple[Mapping[str, Any], ...] = ()
    activation: str | None = None
    halo: tuple[int, ...] | None = None
    reach: Mapping[str, Any] | None = None
    affine: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.weights, str) or Path(self.weights).suffix not in WEIGHTS:
            raise CellMapValueError(f"weights must be a file that ends in {', '.join(WEIGHTS)}, got {self.weights!r}")
        put("output_shape", self.output_shape or self.input_shape)
        put("output_voxel_size", self.output_voxel_size or self.input_voxel_size)
        for name in ("input_shape", "output_shape"):
            put(name, tuple(int_at_least(name, n, 1) for n in _listed(name, getattr(self, name))))
        for name in ("input_voxel_size", "output_voxel_size"):
            put(name, tuple(positive_number(name, n) for n in _listed(name, getattr(self, name))))
        lengths = [len(getattr(self, f"{a}_{b}")) for a in ("input", "output") for b in ("shape", "voxel_size")]
        if lengths[0] not in (2, 3) or len(set(lengths)) > 1:
            raise CellMapValueError(
                "input_shape, input_voxel_size, output_shape and output_voxel_size must have one number per axis, "
                f"z, y, x or y, x; they have {', '.join(map(str, lengths))}"
            )
        put("classes", parse_classes(self.classes))
        if self.normalize is not None:
            Normalize.parse(self.normalize, self.invert)
        one_of("activation", self.activation, _ACTIVATIONS)
        if self.halo is not None:
            put("halo", tuple(int_at_least("halo", n, 0) for n in _listed("halo", self.halo)))
        if self.reach is not None:
            put("reach", asdict(parse_reach(self.reach)))
        put("channels", tuple(_channels(self.channels)))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The names of the channels of the output."""
        return tuple(channel["name"] for channel in self.channels) or self.classes

    def write(self, folder: Path) -> None:
        """Write ``cellmap.json`` to a folder."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_card(path: Path, setting: str) -> ModelCard:
    """Read a description.

    Args:
        path: ``cellmap.json``, its folder, or a YAML file with the same keys.
        setting: the setting that names it, for messages.

    Raises:
        CellMapFileNotFoundError: it, or the weights that it names, do not exist.
        CellMapKeyError: a key is missing or unknown.
        CellMapValueError: it is not YAML, or a value is invalid.
    """
    path = path / CARD if path.is_dir() else path
    where = f"{setting}={path}"
    if not path.is_file():
        raise CellMapFileNotFoundError(
            f"{where}: there is no such file{similar_path(path)}; give the {CARD} of an export, or a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise CellMapValueError(f"{where} is not valid YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(content, Mapping):
        raise CellMapValueError(f"{where} must be a mapping with {', '.join(_REQUIRED)}, got {type(content).__name__}")
    known = [f.name for f in fields(ModelCard)]
    for key in content:
        if key not in known:
            raise CellMapKeyError(
                f"{where} has the key {key!r}; it may have {', '.join(known)}{did_you_mean(key, known)}"
            )
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise CellMapKeyError(f"{where} lacks {', '.join(missing)}; it must have {', '.join(_REQUIRED)}")
    try:
        card = ModelCard(**content)
    except (CellMapValueError, CellMapTypeError) as e:
        raise type(e)(f"{where}: {e}") from None
    if not (path.parent / card.weights).is_file():
        raise CellMapFileNotFoundError(f"{where}: weights={card.weights} is not a file in {path.parent.absolute()}")
    return card


def parse_reach(value: Any) -> Reach:
    """Return the reach that a description records.

    Raises:
        CellMapTypeError: it is not a mapping with the fields of `Reach`, or one of them is not a list.
        CellMapValueError: a number is invalid.
    """
    names = [f.name for f in fields(Reach)]
    if not isinstance(value, Mapping) or set(value) != set(names):
        got = list(value) if isinstance(value, Mapping) else repr(value)
        raise CellMapTypeError(f"reach must be a mapping with {', '.join(names)}, got {got}")
    halo = tuple(int_at_least("reach.halo", n, 0) for n in _listed("reach.halo", value["halo"]))
    step = tuple(int_at_least("reach.step", n, 1) for n in _listed("reach.step", value["step"]))
    if len(halo) != len(step):
        raise CellMapValueError(f"reach.halo and reach.step must have one number per axis, got {halo} and {step}")
    statistics = tuple(str(name) for name in _listed("reach.statistics", value["statistics"]))
    size = value["voxel_bytes"]
    return Reach(halo, step, positive_number("reach.voxel_bytes", size) if size != 0 else 0.0, statistics)


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise CellMapTypeError(f"{name} must be a list of numbers (z, y, x), got {value!r}")
    return value


def _channels(channels: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(channels, list | tuple) or not all(
        isinstance(channel, Mapping) and isinstance(channel.get("name"), str) for channel in channels
    ):
        raise CellMapTypeError(f"channels must be a list of mappings with a name each, got {channels!r}")
    names = [channel["name"] for channel in channels]
    if len(set(names)) < len(names):
        raise CellMapValueError(f"channels must have different names, got {names}")
    return list(channels)
