"""Failures that a user can correct: one line of cause, one line of remedy, one exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    HUB = 4
    GATE_NOT_MET = 5
    # A run was stopped by a signal, after it was saved.
    HUNG_UP = 129  # 128 + SIGHUP
    INTERRUPTED = 130  # 128 + SIGINT
    USER_SIGNAL = 138  # 128 + SIGUSR1, as Linux numbers it
    TERMINATED = 143  # 128 + SIGTERM


RENAME = "Use a name in UTF-8, which libraries expect; if it is one, set PYTHONUTF8=1."
LONGEST = 1_000  # characters of a cause


class SmolError(Exception):
    """A failure with its cause and its remedy.

    Args:
        message: what is wrong, naming the file, key or value. It is reduced to one line of at most `LONGEST`
            characters, whatever names and values contain.
        hint: what the user can do about it, on one line; may be empty.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        message = " ".join(message.splitlines())
        self.message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        super().__init__(self.message)
        self.hint = hint


class UsageError(SmolError):
    """The command line is not valid."""

    exit_code = ExitCode.USAGE


class InputError(SmolError):
    """A config, checkpoint, model file or corpus is missing, damaged or not supported."""

    exit_code = ExitCode.BAD_INPUT


class SettingError(InputError):
    """A setting of a config has a value that is not valid.

    Args:
        origin: the file or preset.
        key: the setting, such as `train.steps`.
        reason: what is wrong with the value.
        hint: what the user can do about it.
    """

    def __init__(self, origin: str, key: str, reason: str, hint: str) -> None:
        super().__init__(f"{origin}: {key}: {reason}", hint)
        self.key, self.reason = key, reason


class MissingPackageError(SmolError):
    """An optional package is not installed."""


class PromptTooLongError(InputError):
    """A prompt does not fit the model's context."""


class HubError(SmolError):
    """The Hub refused, could not be reached, or needs credentials."""

    exit_code = ExitCode.HUB


class GateError(SmolError):
    """A limit that the user set was not met."""

    exit_code = ExitCode.GATE_NOT_MET
