"""smolctl push"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli.completion import GGUF_SCHEMES, complete_license, complete_weights, names
from smolctl.cli.options import NEWEST, WEIGHTS, AcceptGuesses, command
from smolctl.errors import UsageError
from smolctl.publish.sdk import PAGE_SCHEMES, Sdk, page_variants
from smolctl.views.output import Output


@command
def push(
    output: Output,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"{WEIGHTS}. {NEWEST}",
            show_default=False,
            autocompletion=complete_weights,
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            metavar="ORG/NAME",
            help="Repository to push to. Default: the run's publish.repo, or YOU/RUN.",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Public repository. Default: private.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Build, check and print the plan, and push nothing; needs no network."
        ),
    ] = False,
    local_dir: Annotated[
        Path | None,
        typer.Option(
            "--local-dir", metavar="FOLDER", help="Write what would be pushed to FOLDER; needs no network."
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            metavar="SCHEMES",
            help=f"Also publish GGUF files in these schemes, separated by commas: {', '.join(GGUF_SCHEMES)}.",
            autocompletion=names(*GGUF_SCHEMES),
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="License of the weights, such as apache-2.0 or mit.",
            autocompletion=complete_license,
        ),
    ] = None,
    revision: Annotated[
        str, typer.Option("--revision", help="Branch to push to; created if missing.")
    ] = "main",
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of pushing to the branch.")
    ] = False,
    allow_secret: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-secret",
            metavar="HASH",
            help="Hash of a finding of the secret scan that is not a secret; repeatable.",
            show_default=False,
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space", metavar="ORG/NAME", help="Also push a Space: a page where visitors can try the model."
        ),
    ] = None,
    space_sdk: Annotated[
        Sdk,
        typer.Option(
            "--space-sdk",
            help="Where the Space runs the model. static: in the visitor's browser; gradio: on a server.",
        ),
    ] = Sdk.STATIC,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page", metavar="FOLDER", help="Write only the static page to FOLDER; needs no network."
        ),
    ] = None,
    page_schemes: Annotated[
        str,
        typer.Option(
            "--page-schemes",
            metavar="SCHEMES",
            help="Quantized models on a static page: int8, int4 or both; the first is the default.",
            autocompletion=names(*PAGE_SCHEMES),
        ),
    ] = "int8",
    accept_guesses: AcceptGuesses = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Serve the Space's page on this machine, and push nothing.")
    ] = False,
) -> None:
    """Publish a model on the Hugging Face Hub.

    Model, card and records are pushed in one commit, which is then verified.

    \b
    smolctl push --dry-run                           # what would be sent
    smolctl push --repo me/my-model --public
    smolctl push runs/nano-001@300 --local-dir out   # the same files, in a folder
    smolctl push --space me/my-demo                  # also a page to try it
    smolctl push --preview                           # that page on this machine
    smolctl push --page site                         # that page as a folder
    """
    from smolctl.runs.root import latest_run

    model = model or str(latest_run())  # checked first, because nothing works without a run

    from smolctl.hub.client import HubClient
    from smolctl.publish import push as publish
    from smolctl.quantization.schemes import split_commas
    from smolctl.views import push as view

    if create_pr and revision != "main":
        raise UsageError("--create-pr and --revision cannot be combined", "Give one of them.")
    if dry_run + (local_dir is not None) + (page is not None) + preview > 1:
        raise UsageError("--dry-run, --local-dir, --page and --preview cannot be combined", "Give one.")
    if (page or page_schemes != "int8") and space_sdk is Sdk.GRADIO:
        raise UsageError("--page and --page-schemes are for the static page", "Leave out --space-sdk gradio.")
    schemes = split_commas([(gguf or "").lower()])
    options = publish.PushOptions(
        model=model,
        repo=repo,
        public=public,
        license=license,
        schemes=schemes,
        revision=revision,
        create_pr=create_pr,
        space=space,
        space_sdk=space_sdk,
        page_schemes=page_variants(split_commas([page_schemes.lower()])),
        allowed_secrets=tuple(allow_secret or ()),
        accept_guesses=accept_guesses,
    )
    if preview:
        with tempfile.TemporaryDirectory(prefix="smolctl-preview-") as work:
            view.serve(output, publish.build_preview(options, Path(work)), space_sdk)
    elif page is not None:
        view.show_page(output, publish.write_page_alone(options, page), page)
    elif dry_run:
        with tempfile.TemporaryDirectory(prefix="smolctl-push-") as work:
            view.show_offline(output, publish.plan_push(options, Path(work)), None)
    elif local_dir is not None:
        view.show_offline(output, publish.write_local(options, local_dir), local_dir)
    else:

        def agree(plan: publish.PushPlan) -> None:
            view.show_plan(output, plan)
            if plan.open_to_all:
                _ask(plan.open_to_all)

        pushed = publish.push(options, HubClient(output.message), agree)
        view.show_pushed(output, pushed)
        if pushed.space_error is not None:
            raise pushed.space_error


def _ask(repos: Sequence[str]) -> None:
    """Ask the user before pushing to a repository that is already public, unless --public was given.

    Raises:
        UsageError: the user declines, or cannot be asked.
    """
    are = f"{' and '.join(repos)} {'is' if len(repos) == 1 else 'are'} public: everybody sees what is pushed"
    if not sys.stdin.isatty():
        raise UsageError(f"{are}, so nothing was sent", "Add --public, or name another --repo.")
    if not typer.confirm(f"{are}. Push?", err=True):
        raise UsageError("nothing was sent", "Name another --repo for a private one.")
