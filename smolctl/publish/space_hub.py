"""The Space on the Hub: the account that it needs, and whether it runs."""

from __future__ import annotations

import time

from smolctl.errors import HubError
from smolctl.hub.client import HubClient, Target
from smolctl.hub.errors import WRITING, PaymentError, explained, first_line

POLL_SECONDS = 5.0
LONGEST_SECONDS = 30 * 60.0  # the Hub's own limit for starting a Space
RUNNING = "RUNNING"
# Stages that a Space does not leave by itself.
ASLEEP = ("SLEEPING", "PAUSED", "STOPPED")
BROKEN = ("BUILD_ERROR", "CONFIG_ERROR", "NO_APP_FILE", "RUNTIME_ERROR", "DELETING")
LOG_LINES = 30


def explained_payment(error: PaymentError) -> HubError:
    """Explain which account a Gradio Space needs, if the account is the problem."""
    return HubError(
        f"{error.message}; the model itself is published",
        "A Gradio Space on cpu-basic needs a PRO, Team or Enterprise account (hf.co/pricing). A static Space "
        "is free for everybody: leave out --space-sdk gradio.",
    )


def await_space(client: HubClient, target: Target, longest_s: float = LONGEST_SECONDS) -> str:
    """Wait until a Space runs.

    Returns:
        Its stage: running or sleeping.

    Raises:
        HubError: it failed, with the end of its log, or did not start in time.
    """
    deadline = time.monotonic() + longest_s
    last = ""
    while True:
        stage = str(
            client.patiently(
                target.shown, "look at its state", lambda: client.api.get_space_runtime(target.repo)
            ).stage
        )
        if stage != last:
            client.note(f"{target.shown}: {stage}")
            last = stage
        if stage == RUNNING or stage in ASLEEP:
            return stage
        if stage in BROKEN:
            raise _broken(client, target, stage)
        if time.monotonic() > deadline:
            raise HubError(
                f"{target.shown}: still {stage} after {longest_s / 60:.0f} min", f"See {client.url(target)}."
            )
        client.wait(POLL_SECONDS)


def _broken(client: HubClient, target: Target, stage: str) -> HubError:
    build = stage != "RUNTIME_ERROR"
    try:
        with explained(target.shown, WRITING, "read its log"):
            pieces = client.api.fetch_space_logs(target.repo, build=build)
            lines = [line for piece in pieces for line in piece.splitlines()]
        log = "\n".join(lines[-LOG_LINES:])
    except HubError as error:
        log = f"(no log: {first_line(error)})"
    return HubError(
        f"{target.shown}: {stage}; the files were uploaded, but the app does not run",
        f"See {client.url(target)}. The end of its {'build' if build else 'run'} log:\n{log}",
    )
