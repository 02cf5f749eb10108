"""Slip and misalignment: random displacements of the sections of a sample."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.geometry.sections import Sections
from cellmap_lightning.runtime.rng import MISALIGN, SLIP, hashes
from cellmap_lightning.transforms.spatial_options import keys_of, number_between
from cellmap_lightning.validation import one_of, positive_number


class SectionShifts:
    """Random displacements of sections in their plane; see docs/transforms.md.

    ``slip`` displaces single sections. ``misalign`` displaces all sections from one on, away from the centre of the
    patch, up to the next one that is displaced. These are the two kinds of misalignment of PyTorch Connectomics,
    each at a rate per section.

    Args:
        name: ``slip`` or ``misalign``.
        config: ``thickness`` of a section (nm), usually the voxel size along the axis; ``probability`` of each section;
            ``max_shift`` (nm) along each of the two other axes; ``axis`` across the sections, by default z; for
            ``misalign`` also ``rotate``, the largest angle in degrees, by default 0.

    Raises:
        CellMapKeyError: an option is missing or unknown, or there is no such axis.
        CellMapValueError: an option is out of range.

    Example:
        >>> SectionShifts("slip", {"thickness": 40, "probability": 0.1, "max_shift": 30}).axis
        0
    """

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.lasting = name == "misalign"
        optional = ("axis", "rotate") if self.lasting else ("axis",)
        config = keys_of(name, config, ("probability", "max_shift", "thickness"), optional)
        where = f"spatial_transforms.{name}"
        self.axis = AXES.index(one_of(f"{where}.axis", config.get("axis") or "z", AXES, CellMapKeyError))
        self.probability = number_between(f"{name}.probability", config["probability"], 0, 1)
        self.thickness = positive_number(f"{where}.thickness (nm)", config["thickness"])
        self.max_angle = number_between(f"{name}.rotate", config.get("rotate") or 0, 0, 180, " degrees")
        self.max_shift = number_between(f"{name}.max_shift", config["max_shift"], 0, math.inf, " nm")

    def __repr__(self) -> str:
        turned = f", rotate {self.max_angle}" if self.lasting else ""
        return (
            f"{self.name} along {AXES[self.axis]}: probability {self.probability}, max_shift {self.max_shift}"
            f"{turned}, thickness {self.thickness}"
        )

    def check(self, windows: Mapping[str, Window]) -> None:
        """Check that a single slice stays in its plane, and that there are sections to displace.

        Raises:
            CellMapValueError: content would be moved along the axis of a single slice, or a patch is a single section.
        """
        for name, window in windows.items():
            for thin in (i for i, n in enumerate(window.shape) if n == 1):
                what = (
                    f"the single slice of {name!r} (shape {list(window.shape)}) is one section; leave {self.name} out"
                    if thin == self.axis
                    else f"sections across {AXES[self.axis]} would move out of the single slice of {name!r} (shape "
                    f"{list(window.shape)}); leave {self.name} out"
                )
                raise CellMapValueError(f"spatial_transforms.{self.name}: {what}, or use patches of several slices")

    def draw(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[Sections]:
        """Return the displaced sections of each sample, a function of (seed, sample) alone."""
        numbers = hashes(seed, MISALIGN if self.lasting else SLIP, samples, 2)
        phases = ((numbers[:, 1] >> np.uint64(11)).astype(np.float64) / (1 << 53)).tolist()
        return [
            Sections(
                key, self.axis, self.thickness, phase, self.probability, self.max_shift, self.max_angle, self.lasting
            )
            for key, phase in zip(numbers[:, 0].tolist(), phases, strict=True)
        ]

    def extended(self, half: FloatArray) -> FloatArray:
        """Return half the edge lengths (nm) of the box that a box can show."""
        return self._bounds.extended(half)

    @property
    def _bounds(self) -> Sections:
        return Sections(0, self.axis, self.thickness, 0.0, self.probability, self.max_shift, self.max_angle)
