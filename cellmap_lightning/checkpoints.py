"""Which checkpoint a run goes on from."""

import logging
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a run's folder from which training can go on; None where there is none.

    One that cannot be read, as when its job was killed while it was written, is passed over, and that is logged.
    """
    found = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what its readers raise
            log.warning("%s cannot be read and is passed over (%s)", path, str(error).splitlines()[0])
            continue
        if isinstance(content, dict) and {"state_dict", "loops", "optimizer_states"} <= set(content):
            return path
        log.info("%s holds weights alone, with which training cannot go on", path)
    return None
