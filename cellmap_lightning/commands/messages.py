"""Error messages of commands, and filters of the messages of libraries."""

import logging
import sys
import warnings
from typing import NoReturn

from cellmap_lightning.commands.private_run import hide


class Stopped(SystemExit):
    """Exit of a command whose error has been printed."""


#: Printed messages.
_printed: set[str] = set()


def stop(message: str | None, code: int = 1) -> NoReturn:
    """Print a message on stderr and exit.

    Args:
        message: the message, printed as an error if ``code`` is 1; None to exit silently.
        code: the exit status.

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
    """Filter log records and warnings of libraries that do not apply to this package."""
    # Lightning's handler would print each line a second time, beside Hydra's.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("torch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # patches are read in threads
        ".*callbacks used to create the checkpoint need to be provided.*",  # in a prediction
        ".*Experiment logs directory.*",  # it contains log and configuration already
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
