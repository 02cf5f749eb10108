"""Functions that several commands share."""

import logging
import sys
import warnings
from typing import NoReturn

from cellmap_lightning.commands.private_run import hide


class Stopped(SystemExit):
    """The end of a command whose reason has been printed."""


#: Messages that were printed.
_printed: set[str] = set()


def stop(message: str | None, code: int = 1) -> NoReturn:
    """Print a message on stderr, an error where the status is 1, and exit; without a message, exit silently.

    Raises:
        Stopped: always.
    """
    if message is not None:
        text = hide(f"Error: {message}" if code == 1 else message)
        if text not in _printed:  # a second Ctrl-C may arrive here
            _printed.add(text)
            sys.stderr.write(f"{text}\n")
    raise Stopped(code)


def quieten() -> None:
    """Leave out what would tell a user nothing, or something wrong."""
    # Lightning's own handler would print each line a second time beside Hydra's.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("torch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # the data reads with threads of its own: processes would be slower
        ".*callbacks used to create the checkpoint need to be provided.*",  # those of training, when predicting
        ".*Experiment logs directory.*",  # the run's folder already holds the log and the configuration
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
