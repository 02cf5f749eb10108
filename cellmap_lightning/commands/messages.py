"""Error messages of commands, and filters of the messages of libraries."""

import logging
import re
import shutil
import sys
import textwrap
import warnings
from typing import NoReturn

from cellmap_lightning.commands.private_run import hide


class Stopped(SystemExit):
    """Exit of a command whose error has been printed."""


class TerminalFormatter(logging.Formatter):
    """A formatter that wraps long lines at the width of the terminal, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        text = super().format(record)
        if not sys.stdout.isatty():
            return text
        width = shutil.get_terminal_size().columns
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )


#: Values of Python and of the command line.
_VALUES = {"True": "true", "False": "false", "None": "null"}


def as_overrides(text: str) -> str:
    """Return a message with arguments of Python, such as ``overwrite=True``, as overrides of a command."""
    return re.sub(r"\b(\w+)=(True|False|None)\b", lambda match: f"{match[1]}={_VALUES[match[2]]}", text)


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
    # It logs the default of an argument with each checkpoint that is saved.
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)
    logging.getLogger("torch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # patches are read in threads
        ".*callbacks used to create the checkpoint need to be provided.*",  # in a prediction
        ".*Experiment logs directory.*",  # it contains log and configuration already
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def permission_message(error: PermissionError) -> str:
    """Return one line with the path that may not be read or written."""
    return f"{error.filename or error}: permission denied; choose another folder, or change the permissions of this one"
