"""Pseudo terminals: what programs write to them, and what is seen there in the end."""

import contextlib
import os
import re

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b.|(\r)|(\n)|(.)", re.DOTALL)


def pseudo_terminal(columns):
    """Open a terminal of some width; return the descriptors of its far end and of the terminal."""
    import fcntl
    import struct
    import termios

    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    return master, terminal


def read_terminal(master):
    """Read what was written to a terminal until all of its ends are closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO: it is closed
        while part := os.read(master, 65536):
            parts.append(part)
    os.close(master)
    return b"".join(parts).decode()


def screen(text, columns):
    """Return the lines that stand on a terminal with unlimited scrollback after a text was written to it."""
    rows, row, column = [""], 0, 0
    for number, code, back, new, character in (match.groups() for match in _TOKEN.finditer(text)):
        count = int(number) if number and number.isdigit() else 1
        if code == "A":
            row = max(0, row - count)
        elif code == "B":
            row += count
        elif code == "K":
            rows[row] = "" if number == "2" else rows[row][:column]
        elif back:
            column = 0
        elif new:
            row += 1
        elif character:
            row, column = (row + 1, 0) if column >= columns else (row, column)
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + character + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [line.rstrip() for line in rows]
