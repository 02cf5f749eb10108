"""The proposal to cut crops for a training without crops for validation."""

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.datasplit import CellMapDataSplit


def proposed_blocks(splits: CellMapDataSplit) -> tuple[str, str]:
    """Return the setting that cuts the crops for training, as on a command line, and how it cuts them.

    The defaults are tried first, then each axis.

    Args:
        splits: crops for training, and none for validation.

    Returns:
        The override, and one line per crop; an empty override and the reason where the crops cannot be cut.
    """
    choices = {"data.split=blocks": BlockOptions()}
    choices |= {f"'data.split={{blocks: {{axis: {axis}}}}}'": BlockOptions(axis=axis) for axis in AXES}
    reason = ""
    for override, options in choices.items():
        rule = splits.inside(options)
        try:
            rule.divide(splits.entries)
        except CellMapError as e:
            reason = reason or str(e)
        else:
            return override, "\n".join(rule.cuts.values())
    return "", reason
