"""Empty sections inside the objects of converted masks, which a warning names."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.crops.section_gaps import fits_memory, gaps_text, section_facts, unknown_setting
from cellmap_lightning.io.label_ids import BACKGROUND, UNANNOTATED
from cellmap_lightning.io.ngff import Encoding, read_multiscale

log = logging.getLogger(__name__)

#: Values of a converted mask.
_ENCODING = Encoding(absent=0, unknown=UNANNOTATED)


def report_empty_sections(output: Path, names: Sequence[str], options: ConversionOptions) -> None:
    """Log the sections of masks without a voxel of a class whose objects continue on both sides, a line for each place.

    Args:
        output: the group that holds the masks.
        names: their classes.
        options: options of the conversion.

    Raises:
        CellMapError: a mask cannot be read.
    """
    classes: dict[str, list[str]] = {}  # by the text of the sections
    for name in names:
        level = read_multiscale(output / name).finest
        if not fits_memory(level):
            log.info("%s: not searched for empty sections; cellmap-inspect deep=true does", output / name)
            continue
        gaps = section_facts(level, _ENCODING, f"{output.name}, {name}").gaps
        if gaps:
            text = gaps_text(gaps, level.lattice.box.lower[0], level.lattice.step[0])
            classes.setdefault(text, []).append(name)
    code, setting = unknown_setting({i: name for i, name in options.label_map if name != BACKGROUND})
    for text, of_text in classes.items():
        log.warning(
            "%s: no voxel of %s in section %s, counted from 0, though objects continue on both sides: there they are "
            "background for a training, and cut; annotate these sections, or fill them with %s in %s and convert again "
            "with %s overwrite=True, which makes them unknown",
            options.output, ", ".join(of_text), text, code, options.input, setting,
        )  # fmt: skip
