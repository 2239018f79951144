"""The line editor of a session on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from smolctl.durable import cache_folder
from smolctl.escaping import whole_characters

HISTORY = "chat-history"  # in the cache folder
PASTED = "\x1b[201~"  # sent by a terminal after pasted text


def open_editor() -> Callable[[], str]:
    """A function that reads one message from the terminal, with the history of this and earlier sessions.

    Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C. The prompt is written to the terminal even if
    stdout is redirected.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.input import create_input
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.output import create_output
    from prompt_toolkit.renderer import CPR_Support
    from prompt_toolkit.utils import is_dumb_terminal

    class History(FileHistory):
        """A history that does not fail if its file cannot be read or written."""

        def load_history_strings(self) -> Iterable[str]:
            with contextlib.suppress(OSError):
                return list(super().load_history_strings())
            return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                path = cache_folder() / HISTORY
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # readable only by its owner
                super().store_string(whole_characters(string))

    class Keys(Vt100Parser):
        """Ends a paste whose end mark was lost by a terminal or a connection.

        After a pause, Enter accepts the pasted text; Ctrl-C and Ctrl-D discard it and have their usual
        effect.
        """

        paused = False

        def feed(self, data: str) -> None:
            if self._in_bracketed_paste and data.endswith(("\x03", "\x04")):
                self.reset()
                data = data[-1]
            elif self._in_bracketed_paste and self.paused and data in ("\r", "\n"):
                data = PASTED + data
            self.paused = False
            super().feed(data)

        def flush(self) -> None:  # called after half a second without input
            self.paused = True
            super().flush()

    keys = create_input()
    if hasattr(keys, "vt100_parser"):  # not on Windows
        keys.vt100_parser = Keys(keys.vt100_parser.feed_key_callback)
    # Without an explicit output, prompt_toolkit detects a dumb terminal, and writes plain text to it.
    output = None if is_dumb_terminal() else create_output(always_prefer_tty=True)
    session: PromptSession[str] = PromptSession(
        history=History(str(cache_folder() / HISTORY)), input=keys, output=output
    )
    # Do not query the terminal's cursor position: it is not needed for lines, and some terminals never reply.
    session.app.renderer.cpr_support = CPR_Support.NOT_SUPPORTED
    return lambda: session.prompt("> ")
