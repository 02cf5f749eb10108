"""Error messages of commands, and filters of the messages of libraries."""

import logging
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from cellmap_lightning.commands.private_run import hide

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Exit of a command whose error has been printed."""


class TerminalFormatter(logging.Formatter):
    """A formatter that wraps long lines at the width of the terminal, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        text = super().format(record)
        if not sys.stdout.isatty():
            return text
        return wrapped(text, shutil.get_terminal_size().columns)


#: What is copied from a message, and so is not broken at its blanks: text in quotes, and commands.
_QUOTED = r"""(?<!\w)(?:'[^'\n]*'|"[^"\n]*")(?!\w)"""
_COPIED = re.compile(rf"{_QUOTED}|(?:cellmap-\w+|pip install)(?: (?:{_QUOTED}|-{{1,2}}[\w-]+|[^\s=]+=\S*))+")
_BLANK = "\0"


def wrapped(text: str, width: int) -> str:
    """Return a text with lines of at most a width; words, paths, quoted text and commands are not broken.

    Args:
        text: one or more lines.
        width: characters of a line.
    """
    return "\n".join(
        textwrap.fill(
            _COPIED.sub(lambda match: match[0].replace(" ", _BLANK), line),
            width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False,
        ).replace(_BLANK, " ")
        for line in text.split("\n")
    )  # fmt: skip


class TerminalHandler(logging.StreamHandler[TextIO]):
    """A handler that writes each record on lines of its own, above progress bars.

    Bars of tqdm are removed from the terminal while a record is written. Those of rich replace ``sys.stdout`` while
    they are shown, and write above themselves what is written to it.

    Args:
        stream: ignored, as records are written to ``sys.stdout``; the key of Hydra's handlers.

    Example:
        >>> logging.getLogger().addHandler(TerminalHandler())
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stdout
        with without_bars():
            super().emit(record)


@contextmanager
def without_bars() -> Iterator[None]:
    """Remove the progress bars of tqdm from the terminal, and draw them again below what was written meanwhile.

    ``tqdm.external_write_mode`` would also draw bars whose ``delay`` is not over, and which are not removed at the end.
    """
    bars_of = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if not getattr(bars_of, "_instances", None):  # its lock is made for the first bar
        yield
        return
    with bars_of.get_lock():  # type: ignore[union-attr]
        bars = [bar for bar in getattr(bars_of, "_instances", ()) if _is_shown(bar)]
        for bar in bars:
            bar.clear(nolock=True)
        try:
            yield
        finally:
            for bar in bars:
                bar.refresh(nolock=True)


def _is_shown(bar: Any) -> bool:
    """Return True if a bar of tqdm is on the terminal."""
    return hasattr(bar, "start_t") and not bar.disable and bar.last_print_t >= bar.start_t + bar.delay


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
            shown = wrapped(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text
            sys.stderr.write(f"{shown}\n")
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
        ".*could not find the monitored key.*",  # without validation, where no epoch has it; see `MonitorCheck`
        ".*Experiment logs directory.*",  # it contains log and configuration already
        ".*Checkpoint directory .* exists and is not empty.*",  # of a run that is resumed
        ".*smaller than the logging interval.*",  # which counts the steps of all epochs
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.showwarning = _log_warning  # type: ignore[assignment]


def _log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Log a warning, so that it is wrapped, stands above progress bars, and is in the log of a run."""
    log.warning("%s (%s, %s, line %d)", message, category.__name__, filename, lineno)
