"""What happens during a run, as plain data: for the display, the JSON stream and the run's records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from smolctl.arithmetic import TrainingMemory


@dataclass(frozen=True)
class Note:
    """Something that was decided or found out, in one sentence for a person."""

    event: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class ScheduleOutline:
    """What the steps to come see of the learning-rate schedule. Each step counts in one part at most;
    what is left is spent at the peak.
    """

    name: str
    peak: float  # highest rate of these steps
    end: float  # rate of the last one
    warmup_steps: int  # on the way up
    decay_steps: int  # on the way down
    floor_steps: int  # at the end of the decay, where the rate does not change any more
    curve: tuple[float, ...]  # rates of steps evenly spread from the first to the last


@dataclass(frozen=True)
class RunPlan:
    """The run in numbers. Times are measured on this machine with one real forward and backward."""

    parameters: int
    steps: int  # still to do
    batch_size: int
    sequence_length: int
    tokens_per_step: int
    tokens: int
    corpus_tokens: int  # to train on
    held_out_tokens: int
    documents: int  # in both
    duplicates: int  # of these, equal to an earlier one
    epochs: float  # over the corpus
    tokens_per_parameter: float
    schedule: ScheduleOutline
    memory: TrainingMemory
    memory_bytes: int  # expected peak of the process or of the GPU's memory: `memory`, libraries, gaps
    framework_bytes: int  # held by the process before the run: Python and its libraries; 0 on a GPU
    gap_bytes: int  # lost in the allocator's gaps; 0 on a GPU
    checkpoint_bytes: int  # of one
    checkpoints_kept: int
    disk_bytes: int  # of all that stay
    disk_free_bytes: int
    device: str
    tokens_per_second: float
    eta_s: float
    compiles: bool = False  # the blocks, after this was measured: the run is faster than its plan
    read: tuple[str, ...] = ()  # which data was read and what was not, in sentences
    conversations: dict[str, Any] | None = None  # what became of them, as `ConversationFacts` says


@dataclass(frozen=True)
class Start:
    """The first step is about to run."""

    event: ClassVar[str] = "start"
    run: str  # folder
    step: int  # steps already behind this run
    until: int  # step at which it ends
    plan: RunPlan


@dataclass(frozen=True)
class Step:
    """One optimizer step is done."""

    event: ClassVar[str] = "step"
    step: int  # counted from 1
    # Cross-entropy in nats per token, mean over the step's tokens, before the update; None: float16 overflow.
    loss: float | None
    learning_rate: float
    gradient_norm: float | None  # before clipping
    tokens: int  # seen by the run so far
    seconds: float  # of this step
    tokens_per_second: float  # over the last steps
    eta_s: float  # left at that rate
    memory_bytes: int | None  # most held so far; None where the system does not say
    mfu: float | None  # share of the devices' peak arithmetic; None where that is not known
    skipped: int = 0  # steps so far whose float16 gradients overflowed; their updates were not made
    phase: str = ""  # of the schedule: "warmup", "stable", "decay" or "floor"
    z_loss: float | None = None  # nats per token that train.z_loss adds to the loss; None where it is off
    until: int | None = None  # step at which the run ends, as train.minutes has it now; None: as it started


@dataclass(frozen=True)
class Candidate:
    """A token that could come next."""

    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """How the model continues a fixed prompt at this step."""

    event: ClassVar[str] = "prediction"
    step: int
    prompt: str
    text: str
    loss: float | None  # nats per token on the prompt itself; None for a prompt of one token
    top: tuple[Candidate, ...]  # most likely tokens right after the prompt


@dataclass(frozen=True)
class Validation:
    """Bits per byte on the held-out documents."""

    event: ClassVar[str] = "validation"
    step: int
    bits_per_byte: float
    standard_error: float | None  # over documents; None: one document has none
    loss: float  # nats per token
    margin: float | None = None  # bits_per_byte ± margin is the 95 % interval over documents
    tokens: int | None = None  # that were scored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint is on disk and was read back."""

    event: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class End:
    """The run has ended, as planned or by a signal: where, and with what result."""

    event: ClassVar[str] = "end"
    step: int
    run: str
    reason: str  # "done", "patience" (as train.patience says), or the name of the signal
    seconds: float  # since training began, or went on
    loss: float | None = None  # of the last step, as `Step` has it; None: this session took no step
    # On the held-out documents after `step`, as `Validation` has them; None: they were not scored there.
    bits_per_byte: float | None = None
    standard_error: float | None = None
    margin: float | None = None
    best_step: int | None = None  # of the run's validation with the fewest bits per byte
    best_bits_per_byte: float | None = None
    best_is_kept: bool = False  # whether the checkpoint of that step is there
    tokens: int = 0  # seen by the run
    memory_bytes: int | None = None  # most held; None where the system does not say
    config_sha256: str = ""  # of the run's config.yaml: equal for equal settings


Event = Note | Start | Step | Prediction | Validation | Checkpoint | End
Listener = Callable[[Event], None]


def to_json(event: Event) -> dict[str, Any]:
    """The event as one flat JSON object that begins with its name."""
    return {"event": event.event, **asdict(event)}
