"""Where words go: results to standard output, narration to standard error.

With ``--json`` a result is one line of JSON and nothing is narrated. No colour and no
moving line where standard error or output is not a terminal, or where NO_COLOR is set. Rich is imported only by a
command that has something to draw.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from fleetmind.cli.exits import document_of, words_of
from fleetmind.core.errors import FleetmindError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_WIDTH = 240
"""Columns for a table that goes into a file or another program: wide, so that nothing is cut."""


class Output:
    """One command's standard output and standard error."""

    def __init__(
        self,
        *,
        is_json: bool = False,
        out: IO[str] | None = None,
        err: IO[str] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.is_json = is_json
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._environ = environ

    @property
    def is_live(self) -> bool:
        """Whether a person watches standard error, so that a moving line makes sense."""
        return not self.is_json and self._err.isatty() and self._environ.get("TERM") != "dumb"

    def result(self, document: object, view: "Callable[[], RenderableType]") -> None:
        """Print a result: ``document`` as JSON, or what ``view`` draws of it."""
        if self.is_json:
            self.write(json.dumps(document, ensure_ascii=False) + "\n")
        else:
            self.console(self._out).print(view())
            self._out.flush()

    def write(self, text: str) -> None:
        """Print ``text`` as it is, at once: a part of an answer, a key, a script."""
        self._out.write(text)
        self._out.flush()

    def say(self, text: str) -> None:
        """Tell a person something that is no result."""
        if not self.is_json:
            self._err.write(text + "\n")
            self._err.flush()

    def fail(self, error: FleetmindError) -> None:
        """Tell what went wrong, for a person or a program."""
        text = json.dumps(document_of(error), ensure_ascii=False) if self.is_json else words_of(error)
        self._err.write(text + "\n")
        self._err.flush()

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what is being waited for. The function given changes the words.

        A moving line on a terminal; elsewhere one line per change of words.
        """
        if self.is_live:
            with self.console(self._err).status(text) as status:
                yield status.update
            return
        said = ""

        def tell(words: str) -> None:
            nonlocal said
            if words != said:
                said = words
                self.say(words)

        tell(text)
        yield tell

    def console(self, file: IO[str] | None = None) -> "Console":
        """A Rich console on ``file``, standard output by default."""
        from rich.console import Console

        file = file or self._out
        width = None if file.isatty() else PIPED_WIDTH
        # Names and reasons come from elsewhere: brackets in them are text, not markup.
        return Console(
            file=file, width=width, markup=False, highlight=False, emoji=False, no_color=self._has_no_color()
        )

    def _has_no_color(self) -> bool:
        return bool(self._environ.get("NO_COLOR"))
