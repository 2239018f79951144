"""`push`: build, plan, send. The cards depend on the destination, everything else does not."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from smolctl.errors import RENAME, HubError, InputError, SmolError, UsageError
from smolctl.escaping import is_utf8
from smolctl.hub.client import Commit, HubClient, Target
from smolctl.hub.errors import PaymentError
from smolctl.hub.files import README, PlannedFile
from smolctl.hub.identity import Identity
from smolctl.ownership import (
    Record,
    building,
    edited_files,
    put_in_place,
    require_replaceable,
    strange_files,
    write_record,
)
from smolctl.page.folder import update_text
from smolctl.publish.app import MODEL
from smolctl.publish.build import Built, ModelToPublish, build, open_model, require_repository, scanned_files
from smolctl.publish.card import stated_license
from smolctl.publish.licenses import require_license
from smolctl.publish.manifest import KIND, RepoPlan, plan_repo, read_remote
from smolctl.publish.sdk import Sdk
from smolctl.publish.secrets import Finding
from smolctl.publish.space import add_space, require_space, write_card
from smolctl.publish.space_hub import await_space, explained_payment
from smolctl.publish.static_space import page_text
from smolctl.runs.root import latest_run
from smolctl.sources.gguf.write import require_gguf, require_scheme

SPACE = "space"  # the folder next to MODEL, and the Hub's name of such a repository
PAGE_KIND = "page"  # of a folder with only the static page
SOMEBODY = "you"  # before the run's name, as long as the user's name is not known


@dataclass(frozen=True)
class PushOptions:
    """The user's options."""

    model: str | None = None
    repo: str | None = None
    public: bool = False
    license: str | None = None
    schemes: tuple[str, ...] = ()  # of GGUF files
    revision: str = "main"
    create_pr: bool = False
    space: str | None = None
    space_sdk: Sdk = Sdk.STATIC
    page_schemes: tuple[str, ...] = ("int8",)  # variants on a static page, the default first
    allowed_secrets: tuple[str, ...] = ()  # hashes of findings that are not secrets
    accept_guesses: bool = False  # of config values that are in no file

    def __post_init__(self) -> None:
        """Check the values before a model is opened or a token is asked for.

        Raises:
            UsageError: the Hub or GGUF does not know one of them.
        """
        if self.license:
            require_license(self.license, "--license", UsageError)
        for scheme in self.schemes:
            require_scheme(scheme)
        for option, name in (("--repo", self.repo), ("--space", self.space)):
            if name:
                require_repository(name, option)


@dataclass(frozen=True)
class Destination:
    """The destination of a push."""

    target: Target
    decided: str  # how it was chosen, if the user did not name it
    identity: Identity | None  # None: the Hub was not asked
    has_token: bool


@dataclass(frozen=True)
class PushPlan:
    """What would be pushed, and where."""

    options: PushOptions
    destination: Destination
    built: Built
    model: RepoPlan
    card: str
    new_card: bool
    space: RepoPlan | None = None
    allowed: tuple[Finding, ...] = ()  # findings that the user declared not to be secrets

    @property
    def repo(self) -> str:
        return self.destination.target.repo

    @property
    def is_public(self) -> bool:
        """Whether it will be public: an existing repository keeps its visibility."""
        head = self.model.remote.head
        return self.options.public if head is None else not head.private

    @property
    def open_to_all(self) -> tuple[str, ...]:
        """Repositories that are already public although the user did not ask for that."""
        repos = {self.repo: self.model, f"spaces/{self.options.space}": self.space}
        heads = {name: plan.remote.head for name, plan in repos.items() if plan}
        public = (name for name, head in heads.items() if head is not None and not head.private)
        return () if self.options.public else tuple(public)


@dataclass(frozen=True)
class Page:
    """A static page written without a push."""

    built: Built
    files: tuple[PlannedFile, ...]
    allowed: tuple[Finding, ...]


@dataclass(frozen=True)
class PushedRepo:
    """A repository after a push."""

    id: str
    url: str
    commit: Commit
    files: tuple[PlannedFile, ...]
    code: str | None = None  # URL of the repository of the code that made the model


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    repo: PushedRepo
    space: PushedRepo | None = None
    space_stage: str | None = None
    space_error: SmolError | None = None  # the model was pushed, the Space was not


def push(options: PushOptions, client: HubClient, agree: Callable[[PushPlan], None]) -> Pushed:
    """Publish a model, with its Space if requested.

    Args:
        options: the user's options.
        client: sends the files.
        agree: called with the plan before anything is sent; raises to refuse it.

    Raises:
        HubError: the Hub refuses, or has other content than was sent.
        SmolError: the model or the Space cannot be published; then nothing was sent.
    """
    with tempfile.TemporaryDirectory(prefix="smolctl-push-") as work:
        plan = plan_push(options, Path(work), client)
        agree(plan)
        return send(plan, client)


def plan_push(options: PushOptions, folder: Path, client: HubClient | None = None) -> PushPlan:
    """Build everything to upload into an empty folder; without a client, the Hub is not asked.

    With a Space the folder contains `model/` and `space/`, otherwise the repository itself.

    Raises:
        SmolError: something cannot be published.
    """
    model = open_model(options.model, options.accept_guesses)
    destination = choose_destination(options, model, client)
    return plan_built(options, destination, build_push(options, model, folder), client)


def write_local(options: PushOptions, target: Path) -> PushPlan:
    """Write exactly the files to upload into a folder, without the network, with a record of them.

    Raises:
        UsageError: the folder was not written by an earlier call.
        InputError: it contains another file, or one that was edited since.
        SmolError: something cannot be published.
    """
    model = options.model or str(latest_run())
    _require_ours(target, KIND, "--local-dir", model)
    with building(target) as work:
        plan = plan_push(replace(options, model=model), work)
        if plan.space is not None:  # each has its own record
            write_record(work, Record(KIND, {f"{MODEL}/": None, f"{SPACE}/": None}))
        put_in_place(work, target)
    return plan


def _require_ours(target: Path, kind: str, option: str, model: str) -> None:
    """Check that a folder is new, or unchanged since an earlier call wrote it, and that its path is UTF-8."""
    require_replaceable(target, kind, option, force=True, reads=(model,))
    if not is_utf8(real := str(target.resolve())):
        raise UsageError(f"{option} {real}: not UTF-8", RENAME)
    for found, what in (
        (strange_files(target), "is not part of this"),
        (edited_files(target), "was edited after smolctl wrote it"),
    ):
        if found:
            raise InputError(
                f"{target}: holds {found[0]}, which {what}", f"Move it away, or choose another {option}."
            )


def build_preview(options: PushOptions, folder: Path) -> Path:
    """A Space's folder to try on this machine; nothing is sent, and the Hub is not asked.

    Raises:
        SmolError: the model cannot be exported, or a requirement of the Space is not installed.
    """
    if options.space_sdk is Sdk.GRADIO:
        require_space(options.space_sdk)
    _build_with_space(options, open_model(options.model, options.accept_guesses), folder, tried=False)
    return folder / SPACE


def write_page_alone(options: PushOptions, target: Path) -> Page:
    """Write the static page for any static host, without the network.

    Raises:
        UsageError: the folder was not written by an earlier call.
        InputError: it contains another file, one that was edited since, or something that looks like a
            secret.
        SmolError: the page cannot run the model, or does not answer.
    """
    require_space(Sdk.STATIC)
    model = options.model or str(latest_run())
    _require_ours(target, PAGE_KIND, "--page", model)
    with tempfile.TemporaryDirectory(prefix="smolctl-push-") as work, building(target) as folder:
        opened = open_model(model, options.accept_guesses)
        built = _build_with_space(options, opened, Path(work), tried=True)
        assert built.space is not None
        facts = built.card_facts(options.repo or built.model.name, options.license)
        update_text(built.space, page_text(facts))
        files, allowed = scanned_files(built.space, options.allowed_secrets)
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.local, folder / file.path)
        write_record(folder, Record(PAGE_KIND, {glob.escape(file.path): file.sha256 for file in files}))
        put_in_place(folder, target)
    return Page(built, files, allowed)


def choose_destination(
    options: PushOptions, model: ModelToPublish, client: HubClient | None = None
) -> Destination:
    """Choose the destination, after all checks that are possible before the build.

    Raises:
        SmolError: an option cannot be satisfied, or the token may not write there.
    """
    from huggingface_hub import get_token

    if model.settings.license:
        require_license(model.settings.license, "publish.license")
    for scheme in options.schemes:
        require_gguf(model.source.require_config(), scheme)
    if options.space:
        require_space(options.space_sdk)
    identity = client.identity() if client else None
    repo, decided = options.repo or model.settings.repo, ""
    if repo is None:
        repo = f"{identity.user if identity else SOMEBODY}/{model.name}"
        decided = f"from your name and the {'run' if model.is_run else 'model'}'s"
    elif not options.repo:
        require_repository(repo, "publish.repo")
        decided = "from the run's config (publish.repo)"
    target = Target(repo, revision=options.revision)
    if identity and not options.create_pr:
        identity.require_write(repo)
    if identity and options.space:
        identity.require_write(options.space)
    if client and options.create_pr:
        client.head(target)  # raises if there is nothing to propose a change to
    return Destination(target, decided, identity, get_token() is not None)


def build_push(options: PushOptions, model: ModelToPublish, folder: Path) -> Built:
    """All slow work without the network: the files, loaded back, and the Space, tried.

    Raises:
        SmolError: the model cannot be exported, or the Space does not answer.
    """
    if not options.space:
        return build(model, folder, options.schemes)
    return _build_with_space(options, model, folder, tried=True)


def _build_with_space(options: PushOptions, model: ModelToPublish, folder: Path, tried: bool) -> Built:
    for part in (MODEL, SPACE):
        (folder / part).mkdir()
    built = build(model, folder / MODEL, options.schemes)
    return add_space(built, folder / SPACE, options.space_sdk, options.page_schemes, tried)


def plan_built(
    options: PushOptions, destination: Destination, built: Built, client: HubClient | None = None
) -> PushPlan:
    """The plan of what would be sent, with the cards merged with those on the Hub.

    Without a client, the repositories are assumed not to exist.

    Raises:
        SmolError: a card is damaged, or something looks like a secret.
    """
    target = destination.target
    remote = read_remote(client, target)
    on_hub, local = remote.card, built.local_card()
    if client and on_hub is not None and local is not None and local.strip() != on_hub.strip():
        client.note(f"The card on the Hub is kept; {built.model.folder}/{README} is not used.")
    card = built.write_card(target.repo, options.license, on_hub, options.revision)
    files, allowed = scanned_files(built.folder, options.allowed_secrets)
    model = plan_repo(client, target, remote, built.folder, files)
    space = None
    if options.space:
        assert built.space is not None
        facts = built.card_facts(target.repo, stated_license(card))
        of_space = Target(options.space, SPACE)
        remote = read_remote(client, of_space)
        write_card(options.space_sdk, built.space, facts, remote.card)
        files, more = scanned_files(built.space, options.allowed_secrets)
        space, allowed = plan_repo(client, of_space, remote, built.space, files), (*allowed, *more)
    is_new = on_hub is None and local is None
    return PushPlan(options, destination, built, model, card, is_new, space, allowed)


def send(plan: PushPlan, client: HubClient) -> Pushed:
    """Send what was planned, and compare the Hub's checksums.

    Raises:
        HubError: the Hub refuses, or has other content than was sent.
    """
    options, target = plan.options, plan.destination.target
    base, planned = client.ensure(target, options.public), plan.model.remote.head
    if planned is not None and base.sha != planned.sha:
        raise HubError(
            f"{target.repo}: somebody else committed {base.sha[:8]} just now", "Run the same command again."
        )
    step = f" at step {plan.built.facts.step:,}" if plan.built.facts else ""
    message = f"Upload {plan.built.model.name}{step} with smolctl"
    planned_files, removed = plan.model.files, plan.model.removed
    commit = client.push(target, base, planned_files, message, options.create_pr, removed)
    code = plan.built.model.settings.repository
    model = PushedRepo(target.repo, client.url(target), commit, planned_files, code)
    if plan.space is None or options.space is None:
        return Pushed(model)
    return _send_space(Target(options.space, SPACE), plan, plan.space, model, client)


def _send_space(
    target: Target, plan: PushPlan, of_space: RepoPlan, model: PushedRepo, client: HubClient
) -> Pushed:
    """Push the Space after the model. A failure here does not affect the model's push."""
    space = None
    try:
        head = client.ensure(target, plan.options.public, plan.options.space_sdk)
        message = "Update the Space with smolctl"
        commit = client.push(target, head, of_space.files, message, removed=of_space.removed)
        space = PushedRepo(target.repo, client.url(target), commit, of_space.files)
        return Pushed(model, space, await_space(client, target))
    except PaymentError as error:
        return Pushed(model, space, space_error=error if space else explained_payment(error))
    except SmolError as error:
        return Pushed(model, space, space_error=error)
