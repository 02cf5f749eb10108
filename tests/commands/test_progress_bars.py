"""Log lines and progress bars on one terminal."""

import logging
import os
import re
import sys
import warnings

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from cellmap_lightning.commands.messages import TerminalFormatter, TerminalHandler, quieten
from tests.commands.terminals import pseudo_terminal, read_terminal, screen
from tests.commands.test_cli import run_forked, small

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")

#: A line of a log, which begins with the time in cellmap-train.
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")


@pytest.fixture
def terminal(monkeypatch):
    """Make a terminal ``sys.stdout``; return it, and a function that closes it and returns the lines on it.

    Called in the test, since pytest replaces ``sys.stdout`` after fixtures.
    """

    def start():
        master, slave = pseudo_terminal(60)
        stream = os.fdopen(slave, "w")
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("TERM", "xterm")

        def lines():
            monkeypatch.undo()
            stream.close()
            return [line for line in screen(read_terminal(master), 60) if line]

        return stream, lines

    return start


@pytest.fixture
def logger():
    handler = TerminalHandler()
    handler.setFormatter(TerminalFormatter("%(message)s"))
    log = logging.getLogger("bars")
    log.propagate = False
    log.addHandler(handler)
    yield log
    log.removeHandler(handler)


def test_lines_stand_above_bars_of_tqdm(terminal, logger):
    stream, lines = terminal()
    with tqdm(total=2, desc="upper", file=stream, position=0) as one, tqdm(total=2, file=stream, position=1) as two:
        for number in range(2):
            logger.warning("line %d", number)
            one.update()
            two.update()
    assert lines()[:2] == ["line 0", "line 1"]


def test_lines_stand_above_bars_of_rich(terminal, logger):
    stream, lines = terminal()
    with Progress(console=Console(file=stream, force_terminal=True, width=60)) as progress:
        bar = progress.add_task("upper", total=2)
        for number in range(2):
            logger.warning("line %d", number)
            progress.update(bar, advance=1, refresh=True)
    shown = lines()
    assert shown[:2] == ["line 0", "line 1"]
    assert shown[2].startswith("upper")


def test_bars_that_are_not_shown_yet_stay_away(terminal, logger):
    """Bars with a delay that is not over have drawn nothing, and remove nothing in the end."""
    stream, lines = terminal()
    with tqdm(total=2, desc="late", file=stream, delay=1000, leave=False) as bar:
        logger.warning("line")
        bar.update()
    logger.warning("last")
    assert lines() == ["line", "last"]


def test_lines_without_bars(terminal, logger):
    _, lines = terminal()
    logger.warning("word " * 20)
    assert [len(line) <= 60 for line in lines()] == [True, True]


def test_warnings_are_lines_of_the_log(monkeypatch, caplog):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored in the end
    with warnings.catch_warnings():
        quieten()
        warnings.simplefilter("always")
        warnings.warn("something is odd", UserWarning, stacklevel=1)
    assert "something is odd (UserWarning, " in caplog.text


@pytest.mark.parametrize("columns", [80, 120])
def test_a_training_on_a_terminal(volume, tmp_path, columns):
    more = ["hydra.run.dir=out", "trainer.max_epochs=3", "compare_untrained=true"]
    code, text = run_forked(*small(volume, *more), cwd=tmp_path, columns=columns)
    assert code == 0, text
    assert "Epoch 0/2" in text, "there are bars"
    lines = screen(text, columns)
    assert not [line for line in lines if LINE.search(line, 1)], "a line of the log begins a line of the terminal"
    logged = (tmp_path / "out" / "train.log").read_text()
    assert len([line for line in lines if LINE.match(line)]) == len(LINE.findall(logged)) > 4
    for word in ("litlogger", "litmodels", "LeafSpec", "exists and is not empty", "logging interval"):
        assert word not in text
