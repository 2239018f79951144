"""The plan and the result of `push`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolctl.hub.connection import endpoint
from smolctl.hub.files import PlannedFile
from smolctl.page.folder import PageModel
from smolctl.page.serve import preview_server
from smolctl.publish.build import Built
from smolctl.publish.manifest import RepoPlan
from smolctl.publish.push import SPACE, Page, Pushed, PushedRepo, PushPlan
from smolctl.publish.sdk import Sdk
from smolctl.publish.smoke import SmokeTest
from smolctl.runs.layout import QUANTIZED
from smolctl.views.numbers import counted, size
from smolctl.views.output import Output
from smolctl.views.tables import facts, first_lines

SHOWN_SHA = 12
SHOWN_NAMES = 8
WHOSE = {"replaces": ", of which no record says that smolctl put them there", "others' files": " stay there"}
SHOWN_SPACE_FOLDERS = ("smolctl/",)  # many small files, shown as one line


def show_plan(out: Output, plan: PushPlan) -> None:
    """The plan of a push that is about to happen; on stderr, because the result follows."""
    if out.json or out.quiet:
        return
    out.stderr.print(*_plan(plan, out.verbose > 0), sep="\n")


def show_offline(out: Output, plan: PushPlan, target: Path | None) -> None:
    """The plan of a dry run, or the files written into a folder."""
    if target is None or not out.quiet:
        out.show(*_plan(plan, out.verbose > 0))
    if target is not None:
        out.line(f"Written to {target}; nothing was sent.")
        if plan.space is not None and plan.options.space_sdk is Sdk.STATIC:
            out.message(_any_host(target / SPACE))
    else:
        out.line("Nothing was sent. Without --dry-run this is pushed in one commit.")
    out.document(_document(plan))


def _plan(plan: PushPlan, whole: bool) -> Sequence[Any]:
    from rich.text import Text

    shown: dict[str, Any] = {
        "Plan": facts(((f" {name}", Text(value)) for name, value in _facts(plan).items()), style="bold"),
        "Files": _files(plan.model, ()),
    }
    if plan.space is not None:
        folded = () if whole else SHOWN_SPACE_FOLDERS
        shown[f"Files of the Space {plan.options.space}"] = _files(plan.space, folded)
    if whole:
        shown["Card"] = Text(plan.card)
    return [line for title, body in shown.items() for line in (Text(title, style="bold"), body)]


def _facts(plan: PushPlan) -> dict[str, str]:
    built = plan.built
    source = built.model.source
    step = f" at step {source.step:,}" if source.step is not None else ""
    export = built.export
    how = "no code of its own" if not export.network.config.needs_own_code else "trust_remote_code=True"
    card = "new" if plan.new_card else "text written by people is kept, the generated part is new"
    license = "" if "\nlicense:" in plan.card else "; no license stated (--license)"
    decided = f" ({plan.destination.decided})" if plan.destination.decided else ""
    place = plan.repo if plan.destination.identity is None else f"{endpoint()}/{plan.repo}"
    rows = {
        "model": f"{source.id}{step}, {built.card_facts(plan.repo, None).parameters:,} parameters",
        "repository": f"{place}, {_visibility(plan)}{decided}",
        "account": _identity(plan),
        "loads in": f"transformers with {how}; logits differ by {export.largest_difference:.2g} at most",
        "card": f"{card}, {len(plan.card.splitlines())} lines{license}",
        "secrets": f"none found in {sum(len(repo.files) for repo in _repos(plan))} files",
    }
    rows |= _exceptions(plan)
    if smoke := built.smoke:
        rows["Space"] = _tried(smoke)
    rows |= {f"page, {one.scheme}": _variant(one, built) for one in built.variants}
    return rows


def _exceptions(plan: PushPlan) -> dict[str, str]:
    """Unusual facts: allowed findings, files that are replaced, kept or left out."""
    rows: dict[str, str] = {}
    if better := plan.built.model.better_step:
        rows["better"] = f"step {better:,} has the run's best held-out score: {plan.built.model.folder}@best"
    hashes = {finding.hash for finding in plan.allowed}
    nowhere = [f"{hash} matches no finding" for hash in plan.options.allowed_secrets if hash not in hashes]
    if allowed := [*map(str, plan.allowed), *nowhere]:
        rows["allowed"] = "; ".join(allowed)
    for row, names in (
        ("replaces", [name for repo in _repos(plan) for name in repo.replaced]),
        ("others' files", [name for repo in _repos(plan) for name in repo.stays]),
    ):
        if names:
            rows[row] = f"{', '.join(first_lines(names, SHOWN_NAMES))}{WHOSE[row]}"
    if wider := [f"{one.path.name}: {line}" for one in plan.built.export.ggufs for line in one.wider]:
        rows["stored wider"] = "; ".join(wider)
    if plan.built.left_out:
        older = " (not made from this step)" if plan.built.model.is_run else ""
        rows["not pushed"] = ", ".join(
            name + older * (name.startswith(f"{QUANTIZED}/") and name.endswith("/"))
            for name in plan.built.left_out
        )
    return rows


def _variant(one: PageModel, built: Built) -> str:
    measure = f"not measured: `smolctl quantize {built.model.source.id} --to {one.scheme}` does that"
    verdict = one.verdict or (measure if built.model.is_run else "")
    return "; ".join(filter(None, (size(one.bytes), verdict)))


def _tried(smoke: SmokeTest) -> str:
    return (
        f"tried here: up after {smoke.start_s:.0f} s, {smoke.prompt!r} answered "
        f"in {smoke.answer_s:.1f} s by {smoke.engine}"
    )


def _visibility(plan: PushPlan) -> str:
    shown = "public" if plan.is_public else "private"
    return shown if plan.model.remote.head is None else f"{shown} already"


def _identity(plan: PushPlan) -> str:
    identity = plan.destination.identity
    if identity is None and plan.destination.has_token:
        return "not asked: a token was found"
    if identity is None:
        return "no token: `hf auth login` before a push"
    token = f"token {identity.token_name!r}, " if identity.token_name else ""
    organizations = f"; member of {', '.join(identity.organizations)}" if identity.organizations else ""
    return f"{identity.user} ({token}role {identity.role}){organizations}"


def _repos(plan: PushPlan) -> Sequence[RepoPlan]:
    return [repo for repo in (plan.model, plan.space) if repo is not None]


def _files(plan: RepoPlan, folded: Sequence[str]) -> Any:
    """A table of files, with those that the repository on the Hub already has, or has from an earlier
    push.
    """
    from rich.table import Column, Table
    from rich.text import Text

    files, head = plan.files, plan.remote.head
    to_send = [file for file in files if head is None or not head.has(file)]
    table = Table.grid("", Column(justify="right"), padding=(0, 2))
    for file in files:
        if not file.path.startswith(tuple(folded)):
            note = "" if file in to_send else "there already"
            sha = Text(file.sha256[:SHOWN_SHA], style="dim")
            table.add_row(Text(f" {file.path}"), size(file.bytes), sha, note)
    for folder in folded:
        inside = [file for file in files if file.path.startswith(folder)]
        if inside:
            table.add_row(Text(f" {folder}"), size(_bytes(inside)), f"{len(inside)} files")
    for path in plan.removed:
        table.add_row(Text(f" {path}"), "", "", "removed: left from an earlier push")
    table.add_row(Text(f" {len(files)} files", style="bold"), size(_bytes(files)))
    if len(to_send) < len(files):
        table.add_row(Text(f" {len(to_send)} to send", style="bold"), size(_bytes(to_send)))
    return table


def _bytes(files: Sequence[PlannedFile]) -> int:
    return sum(file.bytes for file in files)


def show_pushed(out: Output, pushed: Pushed) -> None:
    """Show the result on the Hub."""
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
    if not commit.sent and not commit.removed:
        return f"{place}: everything was there already at {commit.sha[:8]}; nothing sent."
    removed = f" and {len(commit.removed)} of an earlier push removed" if commit.removed else ""
    return (
        f"{place}: {len(commit.sent)} of {counted(len(repo.files), 'file')} sent{removed} in commit "
        f"{commit.sha[:8]}; the checksums of all were compared on the server."
    )


def _repo_document(repo: PushedRepo) -> dict[str, Any]:
    return {
        "id": repo.id,
        "url": repo.url,
        "commit": repo.commit.sha,
        "pull_request": repo.commit.pull_request,
        "files": _file_documents(repo.files),
        "sent": list(repo.commit.sent),
        "removed": list(repo.commit.removed),
        "verified": True,
        "code": repo.code,
    }


def _file_documents(files: Sequence[PlannedFile]) -> list[dict[str, Any]]:
    return [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files]


def _document(plan: PushPlan) -> dict[str, Any]:
    """A plan as JSON: nothing is on the Hub yet."""
    repo = {
        "id": plan.repo,
        "url": None,
        "commit": None,
        "files": _file_documents(plan.model.files),
        "removed": list(plan.model.removed),
        "not_ours": list(plan.model.stays),
        "verified": False,
        "code": plan.built.model.settings.repository,
        "public": plan.options.public,
        "largest_logit_difference": plan.built.export.largest_difference,
    }
    space = plan.space and {"id": plan.options.space, "files": _file_documents(plan.space.files)}
    return {"repo": repo, "space": space, "allowed_secrets": list(map(str, plan.allowed))}


def serve(out: Output, folder: Path, sdk: Sdk) -> None:
    """Serve the page of a Space's folder until Ctrl-C."""

    def say(url: str) -> None:
        out.message(f"{url} shows the page of the Space; Ctrl-C ends it.")

    if sdk is Sdk.STATIC:
        server = preview_server(folder)
        say(server.url)
        with server:
            server.serve_forever()
    else:
        from smolctl.publish.app import main

        main(folder, say)


def _any_host(folder: Path) -> str:
    return f"Any static host serves the page; on this machine: python -m http.server -d {folder}"


def show_page(out: Output, page: Page, target: Path) -> None:
    """Show that a static page was written into a folder."""
    smoke, files = page.built.smoke, page.files
    assert smoke is not None
    out.line(f"Written to {target}: {len(files)} files, {size(_bytes(files))}.")
    out.line(f"The page was {_tried(smoke)}.")
    for one in page.built.variants:
        out.line(f"{one.scheme}: {_variant(one, page.built)}")
    for finding in page.allowed:
        out.line(f"allowed: {finding}")
    out.message(_any_host(target))
    out.document(
        {
            "page": {
                "path": str(target),
                "files": _file_documents(files),
                "tried": {"prompt": smoke.prompt, "text": smoke.text, "engine": smoke.engine},
            },
            "allowed_secrets": list(map(str, page.allowed)),
        }
    )
