"""Errors that Hydra itself prints: withheld, so that a better message can replace them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from hydra.errors import ConfigCompositionException

from cellmap_lightning.commands.file_errors import is_file_error


class HydraErrors:
    """A stand-in for ``sys.stderr`` that withholds what Hydra prints of some errors; other text passes.

    Hydra prints an error while it handles it, and exits.

    Attributes:
        error: the error whose text is withheld: of a configuration that cannot be composed, or of a file system.
        text: that text.

    Example:
        >>> with HydraErrors().installed() as errors:
        ...     main()
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self.error: BaseException | None = None
        self.text = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write or withhold a text, and return its length."""
        error = sys.exc_info()[1]
        if isinstance(error, ConfigCompositionException) or is_file_error(error):
            self.error = error
            self.text += text
            return len(text)
        return self._stream.write(text)

    @contextmanager
    def installed(self) -> Iterator["HydraErrors"]:
        """Replace ``sys.stderr`` in the body."""
        previous = sys.stderr
        sys.stderr = cast("TextIO", self)
        try:
            yield self
        finally:
            sys.stderr = previous

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore ``sys.stderr`` in the body, which is the job."""
        sys.stderr = self._stream
        try:
            yield
        finally:
            sys.stderr = cast("TextIO", self)
