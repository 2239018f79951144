"""Builds the model repository as a folder that contains exactly the files to upload."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from smolctl.config import Provenance
from smolctl.config.run import PublishConfig
from smolctl.durable import write_json
from smolctl.errors import InputError, UsageError
from smolctl.hub.files import README, PlannedFile, planned_files
from smolctl.model.weights import parameter_count
from smolctl.outside import read_json
from smolctl.ownership import RECORD, edited_files, own_files, require_inside, strange_files
from smolctl.page.folder import PageModel
from smolctl.publish.card import merge_card, require_valid, stated_license
from smolctl.publish.card_text import CardFacts, card_metadata, card_text
from smolctl.publish.export import Export, export_model
from smolctl.publish.facts import RunFacts, read_facts, write_records
from smolctl.publish.secrets import Finding, scan
from smolctl.publish.smoke import SmokeTest
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import (
    CONFIG,
    ENVIRONMENT,
    LOCK,
    LOSS_CURVE,
    METRICS,
    PREDICTIONS,
    PREDICTIONS_PAGE,
    QUANTIZED,
    REPORT,
    TASKS,
    TOKENIZER,
)
from smolctl.runs.root import latest_run
from smolctl.sources import open_weights
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.huggingface.card import read_metadata, split_card
from smolctl.sources.open import require_own_files
from smolctl.sources.provenance import provenance_of, read_provenance
from smolctl.sources.quantized_folder import DESCRIPTION, FILE, is_quantized_folder, read_description

# Text files next to the model that are copied unchanged.
LICENSE_FILES = re.compile(r"(LICEN[CS]E|NOTICE)([.-].*)?", re.IGNORECASE)
# Files of a run that are uploaded in another form.
USED = {
    README,
    CONFIG,
    ENVIRONMENT,
    TOKENIZER,
    METRICS,
    PREDICTIONS,
    PREDICTIONS_PAGE,
    TASKS,
    LOSS_CURVE,
    REPORT,
}


@dataclass(frozen=True)
class ModelToPublish:
    """An opened model, before anything is written."""

    source: ModelSource
    name: str  # of the repository, if the user does not name one
    folder: Path | None  # the run, or the Hugging Face folder
    is_run: bool

    @property
    def base(self) -> Provenance | None:
        """The origin of the weights: the model itself, if a Hub model is published again or its config was
        partly assumed.
        """
        itself = provenance_of(self.source)
        base = itself if itself.kind == "hub" or itself.assumed else itself.made_from
        return base and base.public()

    @property
    def settings(self) -> PublishConfig:
        """The repository and the license named in the run's config."""
        return self.source.run.publish if self.source.run else PublishConfig()

    @property
    def better_step(self) -> int | None:
        """The step of the run's checkpoint with the best held-out score, if it is a different one."""
        if not self.is_run or self.folder is None:
            return None
        run = RunFolder(self.folder)
        best = run.best_validation({file.step for file in run.checkpoints()})
        return best["step"] if best and best["step"] != self.source.step else None


@dataclass(frozen=True)
class Built:
    """The folders to upload, complete except for the cards, which depend on the destination."""

    model: ModelToPublish
    folder: Path
    export: Export
    facts: RunFacts | None
    left_out: tuple[str, ...]
    quantized: tuple[str, ...] = ()  # schemes of the included quantized folders
    space: Path | None = None  # folder of the Space
    variants: tuple[PageModel, ...] = ()  # for visitors of a static page to choose from
    smoke: SmokeTest | None = None  # result of the Space's page on this machine

    def card_facts(self, repo: str, license: str | None) -> CardFacts:
        network = self.export.network
        return CardFacts(
            repo=repo,
            name=repo.split("/")[-1],
            config=network.config,
            parameters=parameter_count(network),
            dtype=self.export.dtype,
            can_chat=self.export.tokenizer.chat_template is not None,
            license=license or self.model.settings.license,
            base=self.model.base,
            run=self.facts,
            ggufs=self.export.ggufs,
            quantized=self.quantized,
            code=self.model.settings.repository,
        )

    def write_card(self, repo: str, license: str | None, on_hub: str | None, revision: str = "main") -> str:
        """Write README.md, keeping people's text from the card on the Hub, or else from the one next to the
        model.

        Args:
            repo: the destination.
            license: given by the user now; None keeps that of the card or the run's config.
            on_hub: the card there.
            revision: the branch, for links.

        Raises:
            InputError: the metadata of that card is damaged, or the Hub would refuse it.
        """
        existing = self.local_card() if on_hub is None else on_hub
        stated = license or stated_license(existing or "")
        facts = replace(self.card_facts(repo, stated), revision=revision)
        forced = {"license": license} if license else {}
        text = merge_card(card_metadata(facts), card_text(facts), existing, forced)
        require_valid(read_metadata(split_card(text)[0]))
        (self.folder / README).write_text(text, encoding="utf-8", newline="")
        return text

    def local_card(self) -> str | None:
        """The card next to the model, if there is one."""
        path = self.model.folder / README if self.model.folder else None
        if path is None or not path.is_file():
            return None
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read()


def scanned_files(
    folder: Path, allowed: Collection[str]
) -> tuple[tuple[PlannedFile, ...], tuple[Finding, ...]]:
    """The files of a folder to upload, except its record, and the allowed findings of the secret scan.

    Args:
        folder: to upload.
        allowed: hashes of findings that are not secrets.

    Raises:
        InputError: something else looks like a secret; with file, line and hash.
    """
    files = tuple(file for file in planned_files(folder) if file.path != RECORD)
    findings = scan(folder, (file.path for file in files))
    refused = [finding for finding in findings if finding.hash not in allowed]
    if refused:
        shown = "; ".join(map(str, refused[:5]))
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise InputError(
            f"this looks like a secret, so nothing is published: {shown}{more}",
            "Remove it from the run's files; a key that others may have seen must be revoked. "
            f"If it is not a secret: --allow-secret {refused[0].hash}",
        )
    return files, findings


def open_model(model: str | None, accept_guesses: bool = False) -> ModelToPublish:
    """Open the model to publish, by default the newest run.

    Args:
        model: any MODEL with weights; None: the newest run.
        accept_guesses: accept assumed values in its config.

    Raises:
        SmolError: there is no such model, it has no weights, or values of its config are assumed.
    """
    reference = model or str(latest_run())
    source = open_weights(reference)
    source.require_certainty(accept_guesses)
    require_own_files(source)
    if run := source.run_folder:
        folder = run.path
        _require_texts_inside(folder)
        return ModelToPublish(source, repository_name(folder.resolve().name), folder, is_run=True)
    path = Path(reference)
    folder = path if path.is_dir() else path.parent
    name = path.stem if path.is_file() else path.resolve().name if path.is_dir() else reference.split("@")[0]
    beside = folder if source.kind == SourceKind.FOLDER else None
    _require_texts_inside(beside)
    return ModelToPublish(source, repository_name(name.split("/")[-1]), beside, is_run=False)


def _require_texts_inside(folder: Path | None) -> None:
    if folder is not None:
        require_inside(folder, (README, *(path.name for path in _license_files(folder))))


def repository_name(name: str) -> str:
    """A name that the Hub accepts: letters, digits, dots, hyphens, underscores, at most 96."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return re.sub(r"[-.]{2,}", "-", text).strip("-.")[:96] or "model"


def build(model: ModelToPublish, folder: Path, schemes: Sequence[str]) -> Built:
    """Write everything except the card into an empty folder, with GGUF files of some schemes, and load it
    back.

    Raises:
        SmolError: the model cannot be exported, or differs after loading it back.
    """
    export = export_model(model.source, folder, model.name, schemes)
    facts = None
    quantized: tuple[str, ...] = ()
    taken: set[str] = set(USED) if model.is_run else {path.name for path in folder.iterdir()} | {README}
    if model.is_run and model.folder is not None:
        facts = read_facts(model.source, model.folder)
        write_records(facts, model.folder, folder)
        quantized = add_quantized(model.folder, folder / QUANTIZED, facts.step)
        taken |= {QUANTIZED} if quantized else set()
    for path in _license_files(model.folder):
        shutil.copyfile(path, folder / path.name)
        taken.add(path.name)
    stays = left_out(model.folder, taken, quantized) if model.folder else ()
    return Built(model, folder, export, facts, stays, quantized)


def _license_files(folder: Path | None) -> tuple[Path, ...]:
    """The license files next to a model."""
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder else ()
    return tuple(path for path in found if LICENSE_FILES.fullmatch(path.name))


def add_quantized(run: Path, target: Path, step: int) -> tuple[str, ...]:
    """Copy the quantized folders of the published step: the files that `quantize` wrote.

    A .ckpt in such a folder is redundant, and GGUF files are written again.

    Raises:
        InputError: a file was edited, or is a link that leads out of the run.
    """
    taken = []
    for folder in sorted((run / QUANTIZED).iterdir()) if (run / QUANTIZED).is_dir() else ():
        if is_quantized_folder(folder) and read_description(folder).get("source", {}).get("step") == step:
            names = [name for name in own_files(folder) if name != RECORD and not name.endswith(".ckpt")]
            if not {DESCRIPTION, FILE} <= set(names):
                continue  # it has no record of smolctl's
            require_inside(run, (f"{QUANTIZED}/{folder.name}/{name}" for name in names))
            if edited := edited_files(folder):
                raise InputError(
                    f"{folder / edited[0]}: was edited after smolctl wrote it",
                    f"Run `smolctl quantize` again, or move {folder} away.",
                )
            (target / folder.name).mkdir(parents=True)
            for name in names:
                shutil.copyfile(folder / name, target / folder.name / name)
            _forget_path(target / folder.name / DESCRIPTION)
            taken.append(folder.name)
    return tuple(taken)


def _forget_path(path: Path) -> None:
    """Name the source of a quantized folder without paths of this machine."""
    description = read_json(path)
    source = description["source"]
    source["id"] = PurePath(str(source.get("id"))).name
    provenance = read_provenance(source.get("provenance"))
    source["provenance"] = provenance and provenance.public().model_dump(mode="json", exclude_none=True)
    write_json(path, description)


def left_out(folder: Path, taken: Collection[str], quantized: Sequence[str]) -> tuple[str, ...]:
    """Files next to a model and in its quantized folders that are not uploaded.

    Args:
        folder: of the model.
        taken: names of files that are uploaded, in this or another form.
        quantized: names of the uploaded quantized folders.
    """
    names = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir())]
    if quantized:
        for path in sorted((folder / QUANTIZED).iterdir()):
            inside = f"{QUANTIZED}/{path.name}"
            if path.name in quantized:
                names += [f"{inside}/{name}" for name in strange_files(path)]
            elif path.is_dir():
                names.append(f"{inside}/")
    return tuple(name for name in names if name.rstrip("/") not in {*taken, LOCK, RECORD})


def require_repository(name: str, option: str) -> None:
    """Check that a name is `org/name`.

    Raises:
        UsageError: it is not.
    """
    namespace, _, rest = name.partition("/")
    if not namespace or repository_name(rest) != rest or repository_name(namespace) != namespace:
        raise UsageError(
            f"{option} {name}: not a repository name", "Write it as org/name, such as me/my-model."
        )
