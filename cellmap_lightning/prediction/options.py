"""The options that define the output of a prediction, grouped by idea."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Box, Shape
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.blending import Blend
from cellmap_lightning.prediction.blocks import parse_region
from cellmap_lightning.prediction.model_output import Activation
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, OutputType, Threshold
from cellmap_lightning.validation import one_of, positive_number


@dataclass(frozen=True)
class BlendOptions:
    """The patches of a prediction, and the way to one value per voxel; see docs/prediction.md.

    Example:
        >>> BlendOptions("gaussian", tta_flips="xy").flips
        'yx'

    Args:
        blend: ``trim`` uses the centres of patches; ``average`` and ``gaussian`` take the weighted mean of overlapping
            patches (sliding window). See `blending`.
        overlap: part of a patch that it shares with the next one, per axis or for all.
        context: for ``trim``, output voxels (halo) on either side that are discarded, instead of ``overlap``.
        tta_flips: test-time augmentation: axes of the patch, such as ``yx``. The output is the mean over all mirrored
            versions of the input, each mirrored back, after the activation; `predict_step` is called for each of them.
        check_context: with ``trim``, measure in the first batch how much the border of the input changes the part of
            the output that is used, and warn if that is visible: the receptive field is then larger than the context.

    Raises:
        CellMapValueError: an option is invalid.
    """

    blend: Blend = "trim"
    overlap: float | Sequence[float] | None = None
    context: int | Sequence[int] | None = None
    tta_flips: str | Sequence[str] = ""
    check_context: bool = True

    def __post_init__(self) -> None:
        one_of("blend", self.blend, get_args(Blend))
        parse_flips(self.tta_flips)

    @property
    def flips(self) -> str:
        """The axes of test-time augmentation, in the order z, y, x."""
        return parse_flips(self.tta_flips)


@dataclass(frozen=True)
class ChannelOptions:
    """The channels of the model's output; see docs/prediction.md.

    Example:
        >>> ChannelOptions(classes=["mito", "er"], only=["mito"], activation="sigmoid").only
        ['mito']

    Args:
        classes: names of the channels; by default those that the module's ``output_channels`` gives, else the
            datamodule's classes.
        only: those of them to write; None for all.
        key: key of the tensor in a mapping; by default its only entry.
        activation: ``sigmoid`` or ``softmax`` (over channels), for models that return logits.

    Raises:
        CellMapTypeError: names of classes are no list.
        CellMapValueError: ``activation`` is unknown.
    """

    classes: Sequence[str] | None = None
    only: Sequence[str] | None = None
    key: str | None = None
    activation: Activation | None = None

    def __post_init__(self) -> None:
        if self.activation is not None:
            one_of("activation", self.activation, get_args(Activation))
        for name, value in (("classes", self.classes), ("only", self.only)):
            if isinstance(value, str):
                raise CellMapTypeError(f"{name} must be a list of names, got {value!r}; give [{value}]")


@dataclass(frozen=True)
class OutputOptions:
    """The form in which a prediction is stored; see docs/prediction.md.

    Example:
        >>> OutputOptions(3, "float16", chunks=(64, 64, 64), shards=(128, 128, 128)).unit
        (128, 128, 128)

    Args:
        zarr_format: 2 writes OME-NGFF 0.4, 3 writes OME-NGFF 0.5, with checksums.
        dtype: ``uint8`` stores probabilities as ``round(255 p)``, and values v from -1 to 1, such as signed distances,
            as ``round(255 (v + 1) / 2)``; ``float16`` and ``float32`` the output of the model; ``labels`` 1 from
            ``threshold`` on, else 0.
        threshold: see ``dtype``; also the threshold of foreground in the summary. One for all channels, or
            ``{channel: threshold}`` with 0.5 for the others.
        chunks: voxels of a chunk.
        shards: voxels of a shard; Zarr v3 only.
        levels: levels of the pyramid; by default as many as leave the longest axis 32 voxels. They have the voxel sizes
            of raw's levels, and beyond those the finest axes are halved first; see `plan_pyramid`.

    Raises:
        CellMapValueError: an option is invalid.
    """

    zarr_format: ZarrFormat = 2
    dtype: OutputType = "uint8"
    threshold: Threshold = DEFAULT_THRESHOLD
    chunks: Sequence[int] = (64, 64, 64)
    shards: Sequence[int] | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, get_args(OutputType))
        if self.zarr_format not in (2, 3):
            raise CellMapValueError(
                f"zarr_format must be 2 (OME-NGFF 0.4) or 3 (OME-NGFF 0.5), got {self.zarr_format!r}"
            )
        thresholds = self.threshold if isinstance(self.threshold, Mapping) else {"": self.threshold}
        for name, value in thresholds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CellMapValueError(f"threshold{name and f' of {name}'} must be a finite number, got {value!r}")
        chunk, shard = self.chunk, self.shard
        if shard and (self.zarr_format == 2 or any(s % c for s, c in zip(shard, chunk, strict=True))):
            raise CellMapValueError(
                f"shards need zarr_format=3, and must be multiples of the chunks {list(chunk)}, got "
                f"zarr_format={self.zarr_format} and {list(shard)}"
            )

    @property
    def chunk(self) -> Shape:
        """The voxels of a chunk."""
        return parse_lengths("chunks", self.chunks)

    @property
    def shard(self) -> Shape | None:
        """The voxels of a shard; None without shards."""
        return None if self.shards is None else parse_lengths("shards", self.shards)

    @property
    def unit(self) -> Shape:
        """The voxels of the smallest file that is written as a whole: a shard, or a chunk."""
        return self.shard or self.chunk


@dataclass(frozen=True)
class RegionOptions:
    """The part of a volume that is predicted; see docs/prediction.md.

    Example:
        >>> RegionOptions({"z": [0, 800], "y": [0, 1600], "x": [0, 1600]}, skip_empty=True).skip_empty
        True

    Args:
        region: the box to predict, ``{z: [lower, upper], y: .., x: ..}`` in nm; None for the whole volume. Patches
            include the raw around it.
        mask: a multiscale group; blocks in which it has no voxel above 0 are not computed, and left 0.
        skip_empty: skip blocks in which all voxels of raw have one value, as around the imaged volume.

    Raises:
        CellMapValueError: ``region`` is no box.
    """

    region: Mapping[str, Sequence[float]] | None = None
    mask: str | None = None
    skip_empty: bool = False

    def __post_init__(self) -> None:
        _ = self.box

    @property
    def box(self) -> Box | None:
        """The box in nm; None for the whole volume."""
        if self.region is None:
            return None
        return parse_region({axis: list(ends) for axis, ends in self.region.items()})


@dataclass(frozen=True)
class ResumeOptions:
    """The treatment of an output that exists; see docs/prediction.md.

    Example:
        >>> ResumeOptions(overwrite=True).accept_changed_raw
        False

    Args:
        overwrite: replace another prediction in the output. Anything else at that path is an error.
        check_space: raise an error if the disk has less free space than the rest takes without compression.
        model_id: identity of the model; by default a hash of its weights.
        accept_changed_raw: resume, or accept as finished, although files of raw or of the mask were written, replaced
            or touched since, as when they were copied back. Otherwise that is an error.
    """

    overwrite: bool = False
    check_space: bool = True
    model_id: str | None = None
    accept_changed_raw: bool = False


@dataclass(frozen=True)
class PredictionOptions:
    """The options of `PredictionWriter`, the same for all volumes of a run.

    Example:
        >>> PredictionOptions(storage=OutputOptions(dtype="float32")).blending.blend
        'trim'

    Args:
        blending: patches and blending.
        channels: the channels of the model.
        storage: dtype, chunks and levels of the output.
        region: the part of the volume.
        resume: outputs that exist.
        block_size_mb: memory in MiB for two blocks (one is written while the other is computed), with the sums
            of overlapping patches. Blocks are whole chunks. Small blocks compute patches twice: a warning names the
            size that would help.

    Raises:
        CellMapValueError: ``block_size_mb`` is not a positive number.
    """

    blending: BlendOptions = field(default_factory=BlendOptions)
    channels: ChannelOptions = field(default_factory=ChannelOptions)
    storage: OutputOptions = field(default_factory=OutputOptions)
    region: RegionOptions = field(default_factory=RegionOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    block_size_mb: float = 256

    def __post_init__(self) -> None:
        positive_number("block_size_mb", self.block_size_mb)


def parse_lengths(name: str, value: Sequence[int]) -> Shape:
    """Return the three lengths of a chunk or shard.

    Raises:
        CellMapValueError: they are not three positive whole numbers.
    """
    lengths = list(value)
    if len(lengths) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths):
        raise CellMapValueError(f"{name} must be three positive numbers of voxels (z, y, x), got {value!r}")
    return lengths[0], lengths[1], lengths[2]


def parse_flips(axes: str | Sequence[str]) -> str:
    """Return the axes of test-time augmentation, in the order z, y, x.

    Raises:
        CellMapValueError: they are not axes, or one of them is given twice.
    """
    flips = "".join(axis for axis in AXES if axis in axes)
    if sorted(flips) != sorted(axes):
        raise CellMapValueError(f"tta_flips must be axes of the patch, each of z, y and x at most once, got {axes!r}")
    return flips
