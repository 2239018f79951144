"""All settings of a training run, by section of its YAML file."""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from smolctl.config.data import DataConfig
from smolctl.config.model import ModelConfig, Name, Section
from smolctl.config.provenance import Provenance


def _steps_or_share(value: int | float) -> int | float:
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("give a whole number of steps, or a share of train.steps below 1")
    return int(value)


# A number of steps, or, below 1, a share of train.steps. Shares become numbers of steps in the resolved
# config, so that a resumed run keeps the schedule with which it started.
StepsOrShare = Annotated[int | float, Field(ge=0), AfterValidator(_steps_or_share)]
# A step, the run's position in the schedule after it, and the advance per further step.
Pace = tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
# More is a typing error: the largest published step had 16 million tokens.
MOST_STEPS, MOST_SEQUENCES, MOST_DEVICES = 1 << 40, 1 << 20, 1 << 20
Decay = Annotated[float, Field(ge=0, lt=1)]  # decay rate of a moment in AdamW


class TrainConfig(Section):
    """How much is trained, in steps of how many tokens."""

    steps: int = Field(5_000, gt=0, le=MOST_STEPS, description="total optimizer steps")
    epochs: float | None = Field(
        None,
        gt=0,
        description="epochs to train instead of steps; null: train.steps applies",
    )
    minutes: float | None = Field(
        None, gt=0, le=10_000_000, description="minutes to train instead of steps; null: train.steps applies"
    )
    patience: int = Field(
        0, ge=0, description="end the run after this many validations without improvement; 0: never"
    )
    batch_size: int = Field(8, gt=0, le=MOST_SEQUENCES, description="sequences per step, over all devices")
    micro_batch_size: int = Field(
        0, ge=0, le=MOST_SEQUENCES, description="sequences in memory at once; 0: batch_size"
    )
    gradient_clip: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    z_loss: float = Field(0.0, ge=0, description="weight of logsumexp² in the loss; PaLM uses 1e-4")
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"] = Field(
        "auto", description="auto: bf16-mixed on a GPU with bfloat16, else 32-true"
    )
    compile: Literal[True, False, "auto"] = Field(
        "auto", description="torch.compile each block; auto: on a GPU, if the run is long enough to save time"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute each block in the backward pass: slower, but needs less memory"
    )
    # The limit of NumPy's generator, which is seeded with it, is 32 bits.
    seed: int = Field(8, ge=0, lt=2**32, description="seed of the initial weights and of dropout")


class OptimizerConfig(Section):
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest; only matrices decay."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the blocks, AdamW for the rest"
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="decay rates of AdamW's two moments")
    eps: float = Field(1e-8, gt=0, description="added to the square root of the second moment")
    weight_decay: float = Field(
        0.01, ge=0, description="multiplied by the learning rate; applied to matrices only"
    )
    decay_embeddings: bool = Field(
        True, description="whether weight decay applies to the token and position tables"
    )
    embedding_lr_multiplier: float = Field(
        1.0, gt=0, description="multiplies the learning rate for the token and position tables"
    )
    momentum_warmup: StepsOrShare = Field(
        0, description="Muon: steps, or share of train.steps, over which its momentum rises from 0.85 to 0.95"
    )


class ScheduleConfig(Section):
    """The learning rate as a pure function of the step."""

    name: Literal["wsd", "cosine", "linear", "constant"] = Field(
        "wsd", description="wsd: warmup, stable, decay"
    )
    warmup_steps: StepsOrShare = Field(0.02, description="steps of the warmup; below 1: share of train.steps")
    decay_start: int | None = Field(
        None, ge=0, description="last step before wsd's decay; null: steps - decay_steps"
    )
    decay_steps: StepsOrShare = Field(0, description="steps of the decay; below 1: share of train.steps")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate after the decay")
    begin: int = Field(
        0, ge=0, description="steps before this schedule starts; set by resume --lr-policy rewarm"
    )
    begin_learning_rate: float = Field(0.0, ge=0, description="learning rate at which the warmup starts")
    pace: tuple[Pace, ...] = Field(
        (), description="record that train.minutes writes: [step, position in the schedule, advance per step]"
    )

    def planned(self, step: int) -> float:
        """The position of a step in the schedule: the step itself, unless train.minutes has changed the
        pace.
        """
        for begin, place, stride in reversed(self.pace):
            if step > begin:
                return place + (step - begin) * stride
        return step

    def step_at(self, place: float) -> int:
        """The first step of the run that is at least at this position of the schedule."""
        return bisect_left(range(MOST_STEPS), place, key=self.planned)

    def in_steps(self) -> ScheduleConfig:
        """The same schedule in steps of the run."""
        if not self.pace:
            return self
        ends = (self.begin + self.warmup_steps, self.decay_start or 0)
        begin, risen, start = (self.step_at(place) for place in (self.begin, *ends))
        length = self.step_at((self.decay_start or 0) + self.decay_steps) - start
        return self.model_copy(
            update={
                "pace": (),
                "begin": begin,
                "warmup_steps": risen - begin,
                "decay_start": start,
                "decay_steps": length,
            }
        )


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(500, gt=0, description="steps between checkpoints")
    keep_last: int = Field(3, ge=0, description="newest checkpoints to keep; 0: all")
    keep_every: int = Field(0, ge=0, description="also keep checkpoints at multiples of this step; 0: none")
    keep_best: bool = Field(True, description="also save and keep the step with the best validation score")


class PredictionsConfig(Section):
    """The model's continuations of fixed prompts during training."""

    every: int = Field(500, ge=0, description="steps between predictions; 0: none")
    prompts: tuple[str, ...] = Field(
        ("The capital of France is", "Once upon a time", "def fibonacci(n):"),
        description="prompts that the model continues",
    )
    max_tokens: int = Field(32, gt=0, description="tokens per prediction")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy")


class ValidationConfig(Section):
    """Bits per byte on the held-out documents."""

    every: int = Field(500, ge=0, description="steps between validations; 0: none")
    sequences: int = Field(160, gt=0, description="held-out sequences to score, the same ones each time")


class TrainerConfig(Section):
    """Lightning's Trainer."""

    accelerator: str = Field("auto", description="cpu, gpu, mps or auto")
    devices: Annotated[int, Field(gt=0, le=MOST_DEVICES)] | Literal["auto"] = Field(
        1, description="devices per machine; auto: all"
    )
    num_nodes: int = Field(1, gt=0, le=MOST_DEVICES, description="number of machines")
    strategy: Literal["auto", "ddp"] = Field("auto", description="auto: ddp with several devices")
    deterministic: bool = Field(
        True, description="use deterministic GPU kernels, which an exact resume needs"
    )
    loggers: tuple[Literal["csv", "tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="loggers to use in addition to metrics.jsonl"
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_fsdp(cls, strategy: object) -> object:
        """Under fsdp a device has only a part of every matrix, so norms and weight decay would be wrong."""
        if isinstance(strategy, str) and strategy.startswith("fsdp"):
            raise ValueError(
                "fsdp is not supported: it would clip each device's part of the gradient by itself and "
                "decay no weight; ddp trains models that fit on one device"
            )
        return strategy


class PublishConfig(Section):
    """The repository for `push`, and the license on the card."""

    repo: str | None = Field(None, description="repository on the Hub, org/name; null: YOU/RUN")
    license: str | None = Field(
        None, description="license of the weights, by its identifier on the Hub, such as apache-2.0 or mit"
    )
    repository: str | None = Field(
        None, pattern=r"^https?://[^\s<>\"']+$", description="URL of the code that made the model"
    )


class RunConfig(Section):
    """One training run: the model and all settings of its training."""

    model: ModelConfig = ModelConfig()
    tokenizer: Name | None = Field(
        None,
        description="Hub id, folder, tokenizer.json, GGUF, or train:N; null: SmolLM2's, or a new one offline",
    )
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    predictions: PredictionsConfig = PredictionsConfig()
    validation: ValidationConfig = ValidationConfig()
    trainer: TrainerConfig = TrainerConfig()
    publish: PublishConfig = PublishConfig()
    init_from: Provenance | None = Field(
        None, description="record of the model whose weights train --init-from loaded; null: new weights"
    )

    @model_validator(mode="before")
    @classmethod
    def _batches_are_sequences(cls, values: Any) -> Any:
        """Configs of smolctl 0.1 counted held-out batches of train.batch_size sequences."""
        section = values.get("validation") if isinstance(values, dict) else None
        if not isinstance(section, dict) or "sequences" in section or type(section.get("batches")) is not int:
            return values
        train = values.get("train")
        size = (train if isinstance(train, dict) else {}).get("batch_size", TrainConfig().batch_size)
        kept = {key: value for key, value in section.items() if key != "batches"}
        return {**values, "validation": {**kept, "sequences": section["batches"] * size}}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        model, data, train = self.model, self.data, self.train
        if data.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {data.sequence_length} exceeds "
                f"model.max_position_embeddings {model.max_position_embeddings}"
            )
        if train.micro_batch_size and train.batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.batch_size {train.batch_size} is not divisible by "
                f"train.micro_batch_size {train.micro_batch_size}"
            )
        if train.epochs is not None and train.minutes is not None:
            raise ValueError("train.epochs and train.minutes both say how long the run is; set one to null")
        if train.patience and not self.validation.every:
            raise ValueError(f"train.patience {train.patience} needs validations, but validation.every is 0")
        return self

    @property
    def micro_batch_size(self) -> int:
        """Sequences in memory at once, with 0 resolved to the whole batch."""
        return self.train.micro_batch_size or self.train.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens an optimizer step sees over all devices."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def samples(self) -> int:
        """Sequences that the whole run reads."""
        return self.train.steps * self.train.batch_size

    def settings(self) -> dict[str, Any]:
        """Every setting by the dotted name that `--set` takes."""
        flat: dict[str, Any] = {}
        for name, section in self.model_dump().items():
            values = (
                {f"{name}.{key}": value for key, value in section.items()}
                if isinstance(section, dict)
                else {}
            )
            flat |= values or {name: section}
        return flat

    def schedule_contradictions(self) -> tuple[str, ...]:
        """Contradictions in the schedule, one line each; for a run with steps as whole numbers."""
        schedule, peak = self.schedule, self.optimizer.learning_rate
        found = []
        rises = schedule.begin + int(schedule.warmup_steps)
        if schedule.decay_steps and schedule.decay_start is not None and schedule.decay_start < rises:
            found.append(
                f"schedule.decay_start {schedule.decay_start:,} comes before the end of the warmup, {rises:,}"
            )
        if schedule.min_learning_rate > peak:
            found.append(
                f"schedule.min_learning_rate {schedule.min_learning_rate:g} is above "
                f"optimizer.learning_rate {peak:g}"
            )
        return tuple(found)

    def with_end(self, step: int, until: int) -> RunConfig:
        """This run with another last step, after `step` was done; the rest of the schedule is spread
        evenly.
        """
        place, end = self.schedule.planned(step), round(self.schedule.planned(self.train.steps))
        stride = max(0.0, end - place) / max(1, until - step)
        schedule = {"pace": (*self.schedule.pace, (step, place, stride))}
        return self.model_copy(
            update={
                "train": self.train.model_copy(update={"steps": until}),
                "schedule": self.schedule.model_copy(update=schedule),
            }
        )

    def with_whole_steps(self) -> RunConfig:
        """This run with every share of `train.steps` converted to a number of steps."""
        steps, schedule = self.train.steps, self.schedule

        def whole(value: int | float) -> int:
            return round(value * steps) if 0 < value < 1 else int(value)

        warmup, decay = whole(schedule.warmup_steps), whole(schedule.decay_steps)
        start = schedule.decay_start
        if schedule.name in ("cosine", "linear"):  # these decay from the end of the warmup to the last step
            start = warmup if start is None else start
            decay = decay or max(1, steps - start)
        elif start is None:
            start = max(warmup, steps - decay)
        resolved = schedule.model_copy(
            update={"warmup_steps": warmup, "decay_steps": decay, "decay_start": start}
        )
        optimizer = self.optimizer.model_copy(
            update={"momentum_warmup": whole(self.optimizer.momentum_warmup)}
        )
        return self.model_copy(update={"schedule": resolved, "optimizer": optimizer})
