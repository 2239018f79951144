"""`push`: plan, build, check, send, verify; then the Space."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smolctl.errors import HubError, InputError, SmolError
from smolctl.hub.client import README, Commit, Head, HubClient, Identity, Target
from smolctl.hub.files import PlannedFile, planned_files
from smolctl.publish.app import MODEL
from smolctl.publish.build import Built, Model, build, open_model, require_repository
from smolctl.publish.card import stated_license
from smolctl.publish.card_text import CardFacts
from smolctl.publish.smoke import SmokeTest, require_gradio, smoke_test
from smolctl.publish.space import build_space
from smolctl.publish.space_hub import await_space, explained_payment
from smolctl.sources.gguf.write import require_gguf

Note = Callable[[str], None]
SOMEBODY = "you"  # in front of the run's name, while nobody has been asked who that is


@dataclass(frozen=True)
class PushOptions:
    """What the user asks for."""

    model: str | None = None
    repo: str | None = None
    public: bool = False
    license: str | None = None
    schemes: tuple[str, ...] = ()  # of GGUF files
    revision: str = "main"
    create_pr: bool = False
    space: str | None = None


@dataclass(frozen=True)
class Plan:
    """What would go where."""

    repo: str
    decided: str  # how the repository was chosen
    public: bool
    built: Built
    files: tuple[PlannedFile, ...]
    card: str
    new_card: bool
    identity: Identity | None = None  # None: nobody was asked
    has_token: bool = False
    head: Head | None = None  # of the repository, where it is there and was asked for
    space: str | None = None
    space_files: tuple[PlannedFile, ...] = ()
    smoke: SmokeTest | None = None
    url: str = ""

    @property
    def is_public(self) -> bool:
        """What it will be: a repository that is there stays as it is."""
        return self.public if self.head is None else not self.head.private

    @property
    def to_send(self) -> tuple[PlannedFile, ...]:
        return tuple(file for file in self.files if self.head is None or not self.head.has(file))


@dataclass(frozen=True)
class PushedRepo:
    """A repository that holds what was planned."""

    id: str
    url: str
    commit: Commit
    files: tuple[PlannedFile, ...]


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    repo: PushedRepo
    space: PushedRepo | None = None
    space_stage: str | None = None
    space_error: SmolError | None = None  # the model is up, the Space is not


def plan_offline(options: PushOptions, folder: Path) -> Plan:
    """Build everything in a folder without the network.

    Args:
        options: what is asked for.
        folder: empty; with a Space it gets `model/` and `space/`, else the repository itself.

    Raises:
        SmolError: something cannot be published.
    """
    from huggingface_hub import get_token

    model = open_model(options.model)
    _check(options, model)
    repo, decided = _repository(options, model, None)
    built, space_folder = _build(options, model, folder)
    card = built.write_card(repo, options.license, None)
    files = built.files()
    space_files: tuple[PlannedFile, ...] = ()
    smoke = None
    if options.space and space_folder:
        smoke = _make_space(built.card_facts(repo, stated_license(card)), built, space_folder, None)
        space_files = planned_files(space_folder)
    return Plan(
        repo,
        decided,
        options.public,
        built,
        files,
        card,
        new_card=built.local_card() is None,
        has_token=get_token() is not None,
        space=options.space,
        space_files=space_files,
        smoke=smoke,
    )


def write_local(options: PushOptions, target: Path) -> Plan:
    """Write exactly what would go up into a folder.

    Raises:
        InputError: the folder holds something that is not a part of it.
        SmolError: something cannot be published.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(target.absolute().parent) as work:
        plan = plan_offline(options, work)
        fresh = {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
        if target.exists() and not target.is_dir():
            raise InputError(f"{target}: not a folder", "Choose another --local-dir.")
        for path in sorted(target.rglob("*")) if target.exists() else ():
            if path.is_file() and path.relative_to(target) not in fresh:
                raise InputError(
                    f"{target}: holds {path.relative_to(target)}, which is no part of this",
                    "Choose an empty --local-dir, or delete what is there.",
                )
        for relative in sorted(fresh):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(work / relative, target / relative)
    return plan


def push(
    options: PushOptions, note: Note, show_plan: Callable[[Plan], None], client: HubClient | None = None
) -> Pushed:
    """Publish a model, and its Space when one is asked for.

    Args:
        options: what is asked for.
        note: told what was decided and what takes time.
        show_plan: told what will go up, before anything is sent.
        client: of the Hub; None makes one.

    Raises:
        HubError: the Hub refuses, or does not hold what was sent.
        SmolError: the model or the Space cannot be published; nothing was sent then.
    """
    client = client or HubClient(note)
    model = open_model(options.model)
    _check(options, model)
    identity = client.identity()
    repo, decided = _repository(options, model, identity)
    if not options.create_pr:
        identity.require_write(repo)
    if options.space:
        identity.require_write(options.space)
    target = Target(repo, revision=options.revision)
    if options.create_pr:
        client.head(target)  # says what is wrong when there is nothing to propose a change to
    with _workplace() as work:
        built, space_folder = _build(options, model, work)
        head = _existing(client, target)
        on_hub = client.card(target, head) if head else None
        _say_which_card(built, on_hub, note)
        card = built.write_card(repo, options.license, on_hub)
        files = built.files()
        smoke = None
        space_target = Target(options.space, "space") if options.space else None
        if space_target and space_folder:
            space_head = _existing(client, space_target)
            space_card = client.card(space_target, space_head) if space_head else None
            facts = built.card_facts(repo, stated_license(card))
            smoke = _make_space(facts, built, space_folder, space_card)
        space_files = planned_files(space_folder) if space_folder else ()
        show_plan(
            Plan(
                repo,
                decided,
                options.public,
                built,
                files,
                card,
                new_card=on_hub is None and built.local_card() is None,
                identity=identity,
                has_token=True,
                head=head,
                space=options.space,
                space_files=space_files,
                smoke=smoke,
                url=client.url(target),
            )
        )
        base = client.ensure(target, options.public)
        if head is not None and base.sha != head.sha:
            raise HubError(
                f"{repo}: somebody else committed {base.sha[:8]} just now", "Run the same command again."
            )
        commit = client.push(target, base, files, _message(built), options.create_pr)
        pushed = PushedRepo(repo, client.url(target), commit, files)
        if space_target is None:
            return Pushed(pushed)
        return _push_space(client, space_target, options.public, space_files, pushed, note)


def _push_space(
    client: HubClient,
    target: Target,
    public: bool,
    files: Sequence[PlannedFile],
    model: PushedRepo,
    note: Note,
) -> Pushed:
    """The Space after the model. What goes wrong here leaves the model's push done."""
    try:
        with explained_payment(target):
            head = client.ensure(target, public)
            commit = client.push(target, head, files, "Update the Space with smolctl")
        space = PushedRepo(target.repo, client.url(target), commit, tuple(files))
    except SmolError as error:
        return Pushed(model, space_error=error)
    try:
        stage = await_space(client, target, note)
    except SmolError as error:
        return Pushed(model, space, space_error=error)
    return Pushed(model, space, stage)


def build_preview(options: PushOptions, folder: Path) -> Path:
    """A Space's folder to try on this machine; nothing is sent and nobody is asked.

    Raises:
        SmolError: the model cannot be exported, or Gradio is not installed.
    """
    require_gradio()
    model = open_model(options.model)
    repo, _ = _repository(options, model, None)
    (folder / MODEL).mkdir()
    space = folder / "space"
    space.mkdir()
    built = build(model, folder / MODEL, ())
    license = options.license or stated_license(built.local_card() or "")
    build_space(built, space, built.card_facts(repo, license))
    return space


@contextlib.contextmanager
def _workplace(parent: Path | None = None) -> Iterator[Path]:
    """A folder for the time of one push."""
    with tempfile.TemporaryDirectory(prefix=".smolctl-push-", dir=parent) as work:
        yield Path(work)


def _check(options: PushOptions, model: Model) -> None:
    """Everything that can be refused before anything is written."""
    for scheme in options.schemes:
        require_gguf(model.source.require_config(), scheme)
    if options.repo:
        require_repository(options.repo, "--repo")
    if options.space:
        require_repository(options.space, "--space")
        require_gradio()


def _repository(options: PushOptions, model: Model, identity: Identity | None) -> tuple[str, str]:
    """Where it goes, and why there."""
    if options.repo:
        return options.repo, ""
    if model.own_repo:
        require_repository(model.own_repo, "publish.repo")
        return model.own_repo, "from the run's config (publish.repo)"
    user = identity.user if identity else SOMEBODY
    return f"{user}/{model.name}", "from your name and the run's"


def _build(options: PushOptions, model: Model, folder: Path) -> tuple[Built, Path | None]:
    if not options.space:
        return build(model, folder, options.schemes), None
    for part in (MODEL, "space"):
        (folder / part).mkdir()
    return build(model, folder / MODEL, options.schemes), folder / "space"


def _make_space(facts: CardFacts, built: Built, folder: Path, on_hub: str | None) -> SmokeTest:
    build_space(built, folder, facts, on_hub)
    return smoke_test(folder)


def _existing(client: HubClient, target: Target) -> Head | None:
    """The head of a branch, or of main, from which a branch that is not there is made.

    Returns:
        None when there is no such repository.
    """
    from smolctl.hub.errors import MissingError

    try:
        return client.head(target)
    except MissingError:
        main = replace(target, revision="main")
        return None if target == main else _existing(client, main)


def _say_which_card(built: Built, on_hub: str | None, note: Note) -> None:
    local = built.local_card()
    if on_hub is not None and local is not None and local.strip() != on_hub.strip():
        note(f"The card on the Hub is kept; {built.model.folder}/{README} is not used.")


def _message(built: Built) -> str:
    step = f" at step {built.facts.step:,}" if built.facts else ""
    return f"Upload {built.model.name}{step} with smolctl"
