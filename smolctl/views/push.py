"""What `push` plans and has done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smolctl.hub.files import PlannedFile
from smolctl.publish.push import Plan, Pushed, PushedRepo
from smolctl.views.numbers import size
from smolctl.views.output import Output

SHOWN_SHA = 12
SHOWN_SPACE_FOLDERS = ("smolctl/",)  # many small files, shown as one line


def show_plan(out: Output, plan: Plan) -> None:
    """The plan of a push that is about to happen; beside the data, as the result is still to come."""
    if out.json or out.quiet:
        return
    out.stderr.print(*_plan(plan, out.verbose > 0), sep="\n")


def show_offline(out: Output, plan: Plan, target: Path | None) -> None:
    """The plan of a dry run, or what was written into a folder."""
    if target is None or not out.quiet:
        out.show(*_plan(plan, out.verbose > 0))
    if target is not None:
        out.line(f"Written to {target}; nothing was sent.")
    else:
        out.line("Nothing was sent. Without --dry-run this goes up in one commit.")
    out.document(_document(plan))


def _plan(plan: Plan, whole: bool) -> Sequence[Any]:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(plan):
        facts.add_row(Text(f" {name}", style="bold"), Text(value, overflow="fold"))
    shown: list[Any] = [
        Text("Plan", style="bold"),
        facts,
        Text("Files", style="bold"),
        _files(plan.files, (), plan.to_send),
    ]
    if plan.space:
        folded = () if whole else SHOWN_SPACE_FOLDERS
        shown += [
            Text(f"Files of the Space {plan.space}", style="bold"),
            _files(plan.space_files, folded, None),
        ]
    if whole:
        shown += [Text("Card", style="bold"), Text(plan.card)]
    return shown


def _facts(plan: Plan) -> list[tuple[str, str]]:
    built = plan.built
    source = built.model.source
    step = f" at step {source.step:,}" if source.step is not None else ""
    export = built.export
    how = "trust_remote_code=True" if export.needs_remote_code else "no code of its own"
    card = "new" if plan.new_card else "what people wrote stays, the generated part is new"
    licence = "" if "\nlicense:" in plan.card else "; no licence stated (--license)"
    rows = [
        ("model", f"{source.id}{step}, {plan.built.card_facts(plan.repo, None).parameters:,} parameters"),
        (
            "goes to",
            f"{plan.url or plan.repo}, {_visibility(plan)}" + (f" ({plan.decided})" if plan.decided else ""),
        ),
        ("as", _identity(plan)),
        ("loads in", f"transformers with {how}; logits differ by {export.largest_difference:.2g} at most"),
        ("card", f"{card}, {len(plan.card.splitlines())} lines{licence}"),
        ("secrets", f"none found in {len(plan.files) + len(plan.space_files)} files"),
    ]
    if built.left_out:
        rows.append(("stays here", ", ".join(built.left_out)))
    if plan.smoke:
        smoke = plan.smoke
        rows.append(
            (
                "Space",
                f"tried here: up after {smoke.start_s:.0f} s, {smoke.prompt!r} answered in "
                f"{smoke.outputs} pieces and {smoke.answer_s:.1f} s by {smoke.engine}",
            )
        )
    return rows


def _visibility(plan: Plan) -> str:
    shown = "public" if plan.is_public else "private"
    return shown if plan.head is None else f"{shown} already"


def _identity(plan: Plan) -> str:
    if plan.identity is None:
        return "not asked: a token is there" if plan.has_token else "no token: `hf auth login` before a push"
    identity = plan.identity
    token = f"token {identity.token_name!r}, " if identity.token_name else ""
    organizations = f"; member of {', '.join(identity.organizations)}" if identity.organizations else ""
    return f"{identity.user} ({token}role {identity.role}){organizations}"


def _files(files: Sequence[PlannedFile], folded: Sequence[str], to_send: Sequence[PlannedFile] | None) -> Any:
    """A table of files; `to_send` are those that the Hub does not have yet, None when that is not known."""
    from rich.table import Table
    from rich.text import Text

    there = set() if to_send is None else {file.path for file in files} - {file.path for file in to_send}
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for file in files:
        if not file.path.startswith(tuple(folded)):
            note = "there already" if file.path in there else ""
            sha = Text(file.sha256[:SHOWN_SHA], style="dim")
            table.add_row(Text(f" {file.path}"), size(file.bytes), sha, note)
    for folder in folded:
        inside = [file for file in files if file.path.startswith(folder)]
        if inside:
            table.add_row(Text(f" {folder}"), size(_bytes(inside)), f"{len(inside)} files")
    table.add_row(Text(f" {len(files)} files", style="bold"), size(_bytes(files)))
    if there:
        sent = [file for file in files if file.path not in there]
        table.add_row(Text(f" {len(sent)} to send", style="bold"), size(_bytes(sent)))
    return table


def _bytes(files: Sequence[PlannedFile]) -> int:
    return sum(file.bytes for file in files)


def show_pushed(out: Output, pushed: Pushed) -> None:
    """What stands on the Hub now."""
    for repo in (pushed.repo, pushed.space):
        if repo is not None:
            out.line(_pushed_line(repo))
    if pushed.space_stage and pushed.space:
        out.line(f"{pushed.space.url}: {pushed.space_stage.lower()}")
    out.document(
        {
            "repo": _repo_document(pushed.repo),
            "space": _repo_document(pushed.space) | {"stage": pushed.space_stage} if pushed.space else None,
        }
    )


def _pushed_line(repo: PushedRepo) -> str:
    commit = repo.commit
    place = commit.pull_request or repo.url
    if not commit.sent:
        return f"{place}: everything was there already at {commit.sha[:8]}; nothing sent."
    return (
        f"{place}: {len(commit.sent)} of {len(repo.files)} files sent in commit {commit.sha[:8]}; "
        "the checksums of all were compared on the server."
    )


def _repo_document(repo: PushedRepo) -> dict[str, Any]:
    return {
        "id": repo.id,
        "url": repo.url,
        "commit": repo.commit.sha,
        "pull_request": repo.commit.pull_request,
        "files": _file_documents(repo.files),
        "sent": list(repo.commit.sent),
        "verified": True,
    }


def _file_documents(files: Sequence[PlannedFile]) -> list[dict[str, Any]]:
    return [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files]


def _document(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: nothing is on the Hub yet."""
    repo = {
        "id": plan.repo,
        "url": None,
        "commit": None,
        "files": _file_documents(plan.files),
        "verified": False,
        "public": plan.public,
        "largest_logit_difference": plan.built.export.largest_difference,
    }
    space = {"id": plan.space, "files": _file_documents(plan.space_files)} if plan.space else None
    return {"repo": repo, "space": space}


@contextlib.contextmanager
def progress_bars(out: Output) -> Iterator[None]:
    """The Hub client's own bars while files are sent, on a terminal only."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if out.json or out.quiet or not out.stderr.is_terminal:
        were_off = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            yield
        finally:
            if not were_off:
                enable_progress_bars()
    else:
        yield


def serve(out: Output, folder: Path) -> None:
    """The page of a Space's folder until Ctrl-C."""
    from smolctl.publish.app import main

    main(folder, lambda url: out.talk(f"{url} shows the page of the Space; Ctrl-C ends it."))
