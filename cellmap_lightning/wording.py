"""Counts in messages."""


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun, such as ``1 crop``, ``1,024 voxels`` or ``2 classes``.

    Args:
        count: the count.
        noun: the noun of one thing.
        several: that of several; None for the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def part_of(count: int, total: int, noun: str) -> str:
    """Return some of several things, such as ``3 of the 5 crops``; or ``the only crop``.

    Args:
        count: the count, at least 1.
        total: the count of all.
        noun: the noun of one thing.
    """
    if count == total == 1:
        return f"the only {noun}"
    return f"{count:,} of the {plural(total, noun)}"


def large_count(count: float) -> str:
    """Return a large number: in full below a million, such as ``240,000``, else as ``3.78 million``."""
    return f"{round(count):,}" if count < 10**6 else f"{float(f'{count / 1e6:.3g}'):,.15g} million"


def size_text(count: float) -> str:
    """Return a number of bytes in the unit that suits it, such as ``5.61 MB``, ``35 GB`` or ``1.2 TB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size * (1 - 5e-4):  # rounded to three digits it is at least one
            return f"{float(f'{count / size:.3g}'):,.15g} {unit}"
    return plural(round(count), "byte")


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that suits it, such as ``40 s``, ``12 min`` or ``2 h 30 min``."""
    if seconds < 59.5:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours:,} h {minutes} min" if minutes and hours < 10 else f"{hours:,} h"
