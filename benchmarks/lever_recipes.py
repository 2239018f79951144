"""The changes to nano's recipe that `levers.py` tries, called levers, and where each comes from.

A lever is a dictionary. Keys with a dot are settings of the run's config; the others are fields of `Extras`,
which are not (yet) part of smolctl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolctl.config import RunConfig, load_run_config
from smolctl.data.order import starts_of_samples
from smolctl.training.optim.muon import MOMENTUM, muon_momentum
from smolctl.training.optim.schedule import learning_rate, phase

NANO_STEPS = 450  # train.steps of configs/nano.yaml
# What `base` means stays what it meant in the runs that were recorded, whatever nano's defaults become.
BASE: Mapping[str, Any] = {"optimizer.embedding_lr_multiplier": 1.0}


@dataclass(frozen=True)
class Extras:
    """What the config of a run cannot say. The defaults change nothing; a share is one of the run's steps.

    Attributes:
        momentum_end: Muon's momentum falls linearly to it over `momentum_fall`, the last share.
        normuon: decay of the mean square of each row of Muon's updates, by whose root the row is divided.
        cautious: weights decay only where the step makes them smaller too.
        fading_decay: the weight decay falls linearly to 0.
        power: exponent of the learning rate's linear decay.
        average: time constant of the moving average of the weights, a share; it is what is scored.
        lookahead: factor of EMA-Nesterov's step along the mean movement, times rate / peak, 0.16 to 0.76 of
            the way.
        norm_rate: factor of the learning rate of the norms.
        polar: Polar Express instead of Jordan's coefficients.
        order: `windows` as smolctl reads; `documents`: shuffled again for each pass; `aligned`: every
            sequence lies in one document, the first at its beginning, the last at its end.
        ramp: sequences of a step in equal parts of the run; (): the config's batch_size.
        corpus: share of the documents that are trained on.
        bfloat16: matmuls by autocast.
    """

    momentum_end: float = MOMENTUM[1]
    momentum_fall: float = 0.0
    normuon: float = 0.0
    cautious: bool = False
    fading_decay: bool = False
    power: float = 1.0
    average: float = 0.0
    lookahead: float = 0.0
    norm_rate: float = 1.0
    polar: bool = False
    order: str = "windows"
    ramp: tuple[int, ...] = ()
    corpus: float = 1.0
    bfloat16: bool = False


LEVERS: Mapping[str, Mapping[str, Any]] = {
    "base": {},  # configs/nano.yaml
    # The recipe of the best ten minutes so far, muon-8-1e-2 of `time_to_loss.py` with 730 steps.
    "ten-minutes": {"optimizer.learning_rate": 1e-2, "schedule.min_learning_rate": 0.0},
    # modded-nanogpt and nanochat: 0.85 to 0.95 over the first 300 steps, there 0.1 to 0.2 of a run.
    "momentum": {"optimizer.momentum_warmup": 0.133},
    "momentum-long": {"optimizer.momentum_warmup": 0.3},
    "momentum-fall": {"momentum_end": 0.85, "momentum_fall": 0.1},
    "normuon": {"normuon": 0.95},  # Li et al., 2025, arXiv 2510.05491
    "polar": {"polar": True},  # Amsel et al., 2025, arXiv 2505.16932
    # modded-nanogpt, track 3: 0.025 times a rate four times as large as Muon's here.
    "decay-0.1": {"optimizer.weight_decay": 0.1},
    "decay-0.3": {"optimizer.weight_decay": 0.3},
    "cautious": {"optimizer.weight_decay": 0.1, "cautious": True},  # Chen et al., 2025, arXiv 2510.12402
    "cautious-0.3": {"optimizer.weight_decay": 0.3, "cautious": True},
    "fading": {"optimizer.weight_decay": 0.1, "fading_decay": True},  # nanochat
    "fading-0.3": {"optimizer.weight_decay": 0.3, "fading_decay": True},
    "cooldown-35": {"schedule.decay_steps": 0.35},
    "cooldown-65": {"schedule.decay_steps": 0.65},  # nanochat
    "cooldown-80": {"schedule.decay_steps": 0.8},
    "cooldown-95": {"schedule.decay_steps": 0.95},
    "power-1.2": {"power": 1.2},  # modded-nanogpt, track 3, number 24
    "power-0.8": {"power": 0.8},
    "floor-0": {"schedule.min_learning_rate": 0.0},
    "floor-10": {"schedule.min_learning_rate": 6e-4},
    "warmup-0": {"schedule.warmup_steps": 0},
    "warmup-10": {"schedule.warmup_steps": 0.1},
    "average": {"average": 0.02},  # modded-nanogpt, track 3, number 45: a time constant of 4 % of the steps
    "average-5": {"average": 0.05},
    "average-high": {"average": 0.05, "schedule.min_learning_rate": 1.2e-3},
    "lookahead": {"lookahead": 0.6},  # modded-nanogpt, track 3, number 39; arXiv 2605.25395
    "lookahead-0.3": {"lookahead": 0.3},
    "table-0.5": {"optimizer.embedding_lr_multiplier": 0.5},
    "table-2": {"optimizer.embedding_lr_multiplier": 2.0},
    "table-3": {"optimizer.embedding_lr_multiplier": 3.0},
    "table-4": {"optimizer.embedding_lr_multiplier": 4.0},
    "table-6": {"optimizer.embedding_lr_multiplier": 6.0},
    "table-8": {"optimizer.embedding_lr_multiplier": 8.0},
    "table-12": {"optimizer.embedding_lr_multiplier": 12.0},
    "norms-0.5": {"norm_rate": 0.5},
    "norms-3": {"norm_rate": 3.0},
    "betas-0.8": {"optimizer.betas": [0.8, 0.95]},  # modded-nanogpt's for tables
    "rate-4e-3": {"optimizer.learning_rate": 4e-3, "schedule.min_learning_rate": 2e-4},
    "rate-8e-3": {"optimizer.learning_rate": 8e-3, "schedule.min_learning_rate": 4e-4},
    "rate-1e-2": {"optimizer.learning_rate": 1e-2, "schedule.min_learning_rate": 5e-4},
    "std-0.02": {"model.initializer_range": 0.02},
    "std-0.03": {"model.initializer_range": 0.03},
    "clip-0": {"train.gradient_clip": 0},
    "documents": {"order": "documents"},  # slowrun: a new order of the documents in every epoch
    "aligned": {"order": "aligned"},  # modded-nanogpt's track 1, number 26; nanochat
    "ramp": {"ramp": (4, 8, 12)},
    "bfloat16": {"bfloat16": True},
    "eighth": {"corpus": 0.125},  # so few documents that they are read 2.3 times: for +documents
}


@dataclass(frozen=True)
class Recipe:
    """Levers pulled together, and the steps of the run: `momentum+cooldown-65@600`.

    Raises:
        ValueError: there is no such lever, or two set the same thing.
    """

    levers: tuple[str, ...]
    steps: int = NANO_STEPS

    @staticmethod
    def parse(name: str) -> Recipe:
        levers, _, steps = name.partition("@")
        recipe = Recipe(tuple(levers.split("+")), int(steps or NANO_STEPS))
        if unknown := set(recipe.levers) - set(LEVERS):
            raise ValueError(f"no lever {', '.join(unknown)}; there are {', '.join(LEVERS)}")
        keys = [key for lever in recipe.levers for key in LEVERS[lever]]
        if double := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{name}: two levers set {', '.join(double)}")
        return recipe

    @property
    def name(self) -> str:
        return "+".join(self.levers) + (f"@{self.steps}" if self.steps != NANO_STEPS else "")

    @property
    def reference(self) -> Recipe:
        """What it is compared with: the preset, with as many steps on the same corpus."""
        return Recipe(("eighth" if "eighth" in self.levers else "base",), self.steps)

    @property
    def _changes(self) -> dict[str, Any]:
        return {key: value for lever in self.levers for key, value in LEVERS[lever].items()}

    @property
    def extras(self) -> Extras:
        known = {field.name for field in fields(Extras)}
        return Extras(**{key: value for key, value in self._changes.items() if key in known})

    def config(self, seed: int) -> RunConfig:
        """The config of a run, with whole steps."""
        values = {**BASE, **self._changes, "train.steps": self.steps, "train.seed": seed, "data.seed": seed}
        return load_run_config("nano", [f"{k}={v}" for k, v in values.items() if "." in k]).with_whole_steps()

    def batch_sizes(self, config: RunConfig) -> list[int]:
        """Sequences of every step."""
        ramp = self.extras.ramp or (config.train.batch_size,)
        return [ramp[step * len(ramp) // self.steps] for step in range(self.steps)]


@dataclass(frozen=True)
class StepValues:
    """What the step number decides."""

    rate: float
    momentum: float
    weight_decay: float
    lookahead: float

    @staticmethod
    def of(step: int, config: RunConfig, extras: Extras) -> StepValues:
        """The values of step `step`, counted from 1."""
        peak, floor = config.optimizer.learning_rate, config.schedule.min_learning_rate
        steps, rate = config.train.steps, learning_rate(step, peak, config.schedule)
        if phase(step, config.schedule) == "decay":
            rate = floor + (peak - floor) * ((rate - floor) / (peak - floor)) ** extras.power
        done = step / steps
        fallen = max(0.0, 1 - (1 - done) / extras.momentum_fall) if extras.momentum_fall else 0.0
        momentum = muon_momentum(step, config.optimizer.momentum_warmup)
        return StepValues(
            rate,
            momentum + fallen * (extras.momentum_end - MOMENTUM[1]),
            config.optimizer.weight_decay * (1 - (step - 1) / steps if extras.fading_decay else 1),
            extras.lookahead * rate / peak if 0.16 <= done < 0.76 else 0.0,
        )


def sequences(
    tokens: NDArray[np.unsignedinteger], end: int, extras: Extras, count: int, length: int, seed: int
) -> NDArray[np.int64]:
    """The sequences that a run reads, one after another: (count, length + 1).

    Args:
        tokens: of all documents.
        end: the token after each of them.
        extras: order and share of the documents.
        count: of sequences.
        length: of a sequence.
        seed: of the order.
    """
    ends = np.flatnonzero(tokens == end)
    ends = ends[: max(1, round(extras.corpus * len(ends)))]
    tokens = tokens[: ends[-1] + 1]
    places = np.arange(length + 1)
    if extras.order == "aligned":
        starts = _starts_in_documents(ends, length)
        passes = -(-count // len(starts))
        shuffled = [np.random.default_rng([seed, number]).permutation(starts) for number in range(passes)]
        starts = np.concatenate(shuffled)[:count]
    else:
        starts = starts_of_samples(np.arange(count), len(tokens), length, seed)
    if extras.order != "documents":
        return np.asarray(tokens[(starts[:, None] + places) % len(tokens)], np.int64)
    documents, windows = np.split(tokens, ends[:-1] + 1), -(-len(tokens) // length)  # of a pass
    found = []
    for number in range(-(-count // windows)):
        order = np.random.default_rng([seed, number]).permutation(len(documents))
        stream = np.concatenate([documents[index] for index in order])
        own = starts[number * windows : (number + 1) * windows]
        found.append(stream[(own[:, None] + places) % len(stream)])
    return np.concatenate(found).astype(np.int64)


def _starts_in_documents(ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """First tokens of sequences of which each lies in one document, after the end of the one before.

    A document shorter than a sequence is followed by the next one.
    """
    found = []
    before = -1
    for end in ends.tolist():
        whole = np.arange(before, end, length)
        found.append(np.maximum(before, np.minimum(whole, end - length)))
        before = end
    return np.concatenate(found)
