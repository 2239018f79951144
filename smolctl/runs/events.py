"""Events of a run as plain data: for the display, the JSON stream and the run's records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from smolctl.arithmetic import TrainingMemory


@dataclass(frozen=True)
class Note:
    """A decision or a finding, in one sentence for people."""

    event: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class ScheduleOutline:
    """The learning-rate schedule of the remaining steps. Each step counts in at most one part; the rest is at
    the peak.
    """

    name: str
    peak: float  # highest rate of these steps
    end: float  # rate of the last one
    warmup_steps: int  # with a rising rate
    decay_steps: int  # with a falling rate
    floor_steps: int  # after the decay, at a constant rate
    curve: tuple[float, ...]  # rates at evenly spaced steps from the first to the last


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run's plan. Times are measured on this machine with one real forward and backward
    pass.
    """

    parameters: int
    steps: int  # remaining
    batch_size: int
    sequence_length: int
    tokens_per_step: int
    tokens: int
    corpus_tokens: int  # for training
    held_out_tokens: int
    documents: int  # in both
    duplicates: int  # of these, equal to an earlier one
    epochs: float  # over the corpus
    tokens_per_parameter: float
    schedule: ScheduleOutline
    memory: TrainingMemory
    memory_bytes: int  # expected peak of the process or the GPU: `memory`, libraries, gaps
    framework_bytes: int  # used by the process before the run: Python and its libraries; 0 on a GPU
    gap_bytes: int  # lost to fragmentation; 0 on a GPU
    checkpoint_bytes: int  # of a single one
    checkpoints_kept: int
    disk_bytes: int  # of all that are kept
    disk_free_bytes: int
    device: str
    tokens_per_second: float
    eta_s: float
    compiles: bool = False  # the blocks, after this measurement: the run is faster than its plan
    read: tuple[str, ...] = ()  # sentences on which data was read and skipped
    conversations: dict[str, Any] | None = None  # their statistics, as in `ConversationFacts`


@dataclass(frozen=True)
class Start:
    """The first step is about to start."""

    event: ClassVar[str] = "start"
    run: str  # folder
    step: int  # finished steps
    until: int  # last step
    plan: RunPlan


@dataclass(frozen=True)
class Step:
    """One optimizer step has finished."""

    event: ClassVar[str] = "step"
    step: int  # counted from 1
    # Cross-entropy in nats per token, mean over the step's tokens, before the update; None: float16 overflow.
    loss: float | None
    learning_rate: float
    gradient_norm: float | None  # before clipping
    tokens: int  # used by the run so far
    seconds: float  # of this step
    tokens_per_second: float  # over the last steps
    eta_s: float  # remaining seconds at that rate
    memory_bytes: int | None  # peak so far; None if the system does not report it
    mfu: float | None  # share of the devices' peak FLOP/s; None if not known
    skipped: int = 0  # steps so far whose updates were skipped because float16 gradients overflowed
    phase: str = ""  # of the schedule: "warmup", "stable", "decay" or "floor"
    z_loss: float | None = None  # nats per token that train.z_loss adds to the loss; None if it is off
    until: int | None = None  # current last step of a run with train.minutes; None: unchanged


@dataclass(frozen=True)
class Candidate:
    """A possible next token."""

    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The model's continuation of a fixed prompt at this step."""

    event: ClassVar[str] = "prediction"
    step: int
    prompt: str
    text: str
    loss: float | None  # nats per token on the prompt itself; None for a prompt of one token
    top: tuple[Candidate, ...]  # most likely tokens after the prompt


@dataclass(frozen=True)
class Validation:
    """Bits per byte on the held-out documents."""

    event: ClassVar[str] = "validation"
    step: int
    bits_per_byte: float
    standard_error: float | None  # over documents; None: a single document has none
    loss: float  # nats per token
    margin: float | None = None  # bits_per_byte ± margin is the 95 % interval over documents
    tokens: int | None = None  # number scored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint was written and read back."""

    event: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class End:
    """The run has ended, as planned or by a signal; with its result."""

    event: ClassVar[str] = "end"
    step: int
    run: str
    reason: str  # "done", "patience" (see train.patience), or the name of the signal
    seconds: float  # since training began or was resumed
    loss: float | None = None  # of the last step, as in `Step`; None: this session took no step
    # On the held-out documents after `step`, as in `Validation`; None: not scored there.
    bits_per_byte: float | None = None
    standard_error: float | None = None
    margin: float | None = None
    best_step: int | None = None  # of the run's validation with the lowest bits per byte
    best_bits_per_byte: float | None = None
    best_is_kept: bool = False  # whether the checkpoint of that step exists
    tokens: int = 0  # used by the run
    memory_bytes: int | None = None  # peak; None if the system does not report it
    config_sha256: str = ""  # of the run's config.yaml: equal for equal settings


Event = Note | Start | Step | Prediction | Validation | Checkpoint | End
Listener = Callable[[Event], None]


def to_json(event: Event) -> dict[str, Any]:
    """The event as one flat JSON object that starts with its name."""
    return {"event": event.event, **asdict(event)}
