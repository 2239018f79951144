"""Chat fine-tuning with smolctl and TRL: which tokens each trains on, and a step on the same packed data.

    pip install trl==1.16.0
    python benchmarks/chat_step.py masks SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/chat_step.py steps SmolLM2-135M-Instruct.Q4_1.gguf --rounds 3

`masks` prepares rows with TRL's SFTTrainer and compares the labels that it keeps with smolctl's, for several
chat templates. `steps` takes optimizer steps in turns, every program in its own process. All use
micro-batches of one sequence, so that TRL's mask over a whole batch is no disadvantage. The learning rate is
zero, so all the work is done, and the losses must agree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolctl.benchmark.workload import Measurement
from smolctl.config.data import DataConfig
from smolctl.data.batches import sequences_of
from smolctl.data.text.conversations import read_conversation
from smolctl.data.text.library_questions import library_questions
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.data.tokenizer.turns import TurnEncoder, Turns
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.data.tokens.marks import CONTEXT, FIRST, IDS
from smolctl.timing import in_turns, peak_memory
from smolctl.worker import Worker

LENGTH, SEQUENCES = 1_024, 2  # of a step
PADDED = 16  # conversations in a micro-batch without packing
ENGINES = ("smolctl", "trl", "smolctl with a mask", "smolctl without packing")


# --- what is trained on -------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
CONVERSATION = [
    {"role": "user", "content": "Who wrote «Faust»? 🎭"},
    {"role": "assistant", "content": "Goethe."},
    {"role": "user", "content": "When?\n"},
    {"role": "assistant", "content": "From 1772 to 1832:\n\n- an *Urfaust*\n- two parts\n"},
]
CALLS = [
    {"role": "user", "content": "Will it rain in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Yes, it will."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
# SmolLM2-Instruct's own template, with blocks for the answers.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def compare_masks(model: str) -> None:
    """Print, for templates and rows, how many tokens each of the two trains on, and on which they differ."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    conversations = [
        [dict(one) for one in row["messages"]] for _, row in islice(library_questions(lambda _: None), 200)
    ]
    conversations += [CONVERSATION, [SYSTEM, *CONVERSATION]]
    messages: list[dict[str, Any]] = [{"messages": conversation} for conversation in conversations]
    tools = [{"messages": CALLS, "tools": [TOOL]}, *messages]  # Dataset.from_list takes the first row's keys
    shared = [
        {"conversations": [{"from": one["role"], "value": one["content"]} for one in conversation]}
        for conversation in conversations
    ]
    prompts = [
        {"prompt": conversation[:-1], "completion": conversation[-1:]} for conversation in conversations
    ]
    own = load_tokenizer(model).chat_template or ""
    cases = [
        ("messages", "SmolLM2 with blocks", SMOLLM2, messages, "assistant"),
        ("messages", "SmolLM2 (TRL: with blocks)", own, messages, "assistant"),
        ("ShareGPT", "SmolLM2 with blocks", SMOLLM2, shared, "assistant"),
        ("prompt, completion", "SmolLM2", own, prompts, "completion"),
    ]
    for name in ("qwen2_5", "qwen3", "llama3", "phi3"):
        template = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
        rows = tools if name.startswith("qwen") else messages
        cases.append(("messages", f"TRL's {name}_training", template, rows, "assistant"))
    print_row("rows", "template", "conversations", "smolctl trains on", "TRL trains on", "differ")
    print("|---" * 6 + "|")
    for shape, name, template, rows, loss in cases:
        ours = [
            (turns.ids.tolist(), turns.is_trained.tolist())
            for turns in our_masks(model, template, rows, loss)
        ]
        theirs = their_masks(model, SMOLLM2 if "(TRL" in name else template, rows, loss)
        differ = sum(
            sum(a != b for a, b in zip(mask, other, strict=True)) if ids == read else len(ids)
            for (ids, mask), (read, other) in zip(ours, theirs, strict=True)
        )
        counts = (f"{sum(sum(mask) for _, mask in side):,}" for side in (ours, theirs))
        print_row(shape, name, len(rows), *counts, differ)


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def with_turn_ends(tokenizer: Any, template: str) -> Any:
    """A tokenizer of transformers with the tokens at which answers of a template end."""
    ends = [token for token in ("<|eot_id|>", "<|end|>", "<|im_end|>") if token in template]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.chat_template = template
    return tokenizer


def reference_tokenizer(model: str, template: str) -> Any:
    from transformers import AutoTokenizer

    path = Path(model)
    return with_turn_ends(AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name), template)


def our_masks(model: str, template: str, rows: Iterable[Mapping[str, Any]], loss: Any) -> Iterable[Turns]:
    theirs = reference_tokenizer(model, template)
    named = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer = Tokenizer(
        theirs.backend_tokenizer, template, eos_token_id=theirs.eos_token_id, named_tokens=named
    )
    conversations = [read_conversation(row, "auto", f"row {number}") for number, row in enumerate(rows)]
    for turns in TurnEncoder(tokenizer, loss).encode(conversations):
        if not isinstance(turns, Turns):
            raise SystemExit(f"a row was left out: {turns}")
        yield turns


def their_masks(
    model: str, template: str, rows: list[dict[str, Any]], loss: str
) -> list[tuple[list[int], list[bool]]]:
    """Ids and what is trained on, as SFTTrainer prepares them."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import maybe_convert_to_chatml

    rows = [maybe_convert_to_chatml(row) for row in rows]  # ShareGPT's, which assistant_only_loss refuses
    tokenizer = reference_tokenizer(model, template)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    trainer = sft_trainer(
        LlamaForCausalLM(tiny),
        tokenizer,
        Dataset.from_list(rows, on_mixed_types="use_json"),
        max_length=None,
        assistant_only_loss=loss == "assistant",
        completion_only_loss=loss == "completion",
    )
    return [(row["input_ids"], [label >= 0 for label in row["labels"]]) for row in trainer.train_dataset]


def sft_trainer(network: Any, tokenizer: Any, dataset: Any, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=mkdtemp(), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **options
    )
    return SFTTrainer(network, settings, train_dataset=dataset, processing_class=tokenizer)


# --- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is measured."""

    engine: str  # one of ENGINES
    model: str


@cache
def packed_rows(model: str) -> Tensor:
    """The first sequences of the embedded conversations with their marks: (SEQUENCES, LENGTH + 1)."""
    data = DataConfig(format="chat", sequence_length=LENGTH)
    stream = tokenize_corpus(data, load_tokenizer(model)).train.parts[0].tokens
    every = max(1, len(stream) // LENGTH // SEQUENCES)  # long and short conversations
    rows = [stream.read(number * every * LENGTH, LENGTH + 1) for number in range(SEQUENCES)]
    return torch.stack([torch.from_numpy(row) for row in rows])


def conversations_of(row: Tensor) -> list[Tensor]:
    """The conversations of a sequence, without its filler."""
    begins = [*(row[:-1] & FIRST).nonzero()[:, 0].tolist(), len(row) - 1]
    parts = [row[begin:end] for begin, end in pairwise(begins)]
    return [part for part in parts if bool(((part & CONTEXT) == 0).any())]


def take_step(case: Case) -> Measurement:
    """One more step of a case in this process."""
    step = prepared_step(case)
    start = time.perf_counter()
    loss = step()
    return Measurement(
        (time.perf_counter() - start,), torch.tensor([loss]), peak_bytes=peak_memory(torch.device("cpu"))
    )


@cache
def prepared_step(case: Case) -> Callable[[], float]:
    """The step of a case; it returns the loss."""
    torch.set_float32_matmul_precision("high")  # as `smolctl train` does
    return trl_step(case.model) if case.engine == "trl" else smolctl_step(case)


def smolctl_step(case: Case) -> Callable[[], float]:
    from smolctl.config.run import OptimizerConfig
    from smolctl.model.weights import load_network
    from smolctl.sources import open_source
    from smolctl.training.optim.optimizers import make_optimizer
    from smolctl.training.process import keep_freed_memory

    keep_freed_memory()
    network = load_network(open_source(case.model), dtype=torch.float32).train()
    network.model.masks_documents = case.engine.endswith("mask")  # one mask instead of lengths
    optimizer = make_optimizer(network, OptimizerConfig().model_copy(update={"learning_rate": 0.0}))
    rows = packed_rows(case.model)
    micro_batches = list(rows.split(1))
    if case.engine.endswith("packing"):
        alone = [one for row in rows for one in conversations_of(row)]
        groups = [alone[first : first + PADDED] for first in range(0, len(alone), PADDED)]
        micro_batches = [padded(group) for group in groups]
    asked = [sequences_of(batch) for batch in micro_batches]
    count = sum(int(one.trained_tokens) for one in asked)

    def step() -> float:
        total = 0.0
        for one in asked:
            loss, _ = network.training_loss(one.inputs, one.targets, 0.0, one.documents, one.trained)
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / count

    return step


def padded(group: list[Tensor]) -> Tensor:
    """Conversations in rows of their own, with a token more than the longest."""
    size = 1 + max(map(len, group))
    return torch.stack([F.pad(one, (0, size - len(one)), value=CONTEXT) for one in group])


def trl_step(model: str) -> Callable[[], float]:
    """A step of SFTTrainer as its training loop takes it, on packed rows in its own form."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    path = Path(model)
    network = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    vars(network).update(is_quantized=False, hf_quantizer=None)  # its weights were, and are float32 now
    features = []
    for row in packed_rows(model):
        parts = conversations_of(row)
        words = torch.cat(parts)
        ids = words & IDS
        labels = ids.where((words & CONTEXT) == 0, -100)
        features.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "seq_lengths": [len(part) for part in parts],
            }
        )
    trainer = sft_trainer(
        network,
        reference_tokenizer(model, SMOLLM2),
        Dataset.from_list(features),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=SEQUENCES,
        learning_rate=0.0,
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    batches = [trainer.data_collator([feature]) for feature in features]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = SEQUENCES
    network.train()

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = trainer.training_step(network, dict(batch), num_items_in_batch=count)
            total += float(loss)
        trainer.accelerator.clip_grad_norm_(network.parameters(), 1.0)
        trainer.optimizer.step()
        network.zero_grad()
        return total

    return step


def compare_steps(model: str, rounds: int, engines: list[str]) -> None:
    """Print seconds, trained tokens a second and peak memory of each engine."""
    rows = packed_rows(model)
    asked = sequences_of(rows)
    trained = int(asked.trained_tokens)
    filled = sum(len(one) for row in rows for one in conversations_of(row))
    count = sum(len(conversations_of(row)) for row in rows)
    print(
        f"{count} conversations in {SEQUENCES} x {LENGTH} tokens, {1 - filled / rows[:, 1:].numel():.1%} "
        f"padding, {trained:,} trained on; {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    cases = [Case(engine, model) for engine in engines]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(case.engine, torch.get_num_threads())) for case in cases]
        works = [partial(worker.call, take_step, case) for worker, case in zip(workers, cases, strict=True)]
        measured = in_turns(works, rounds, 1, lambda number: print(f"round {number}", file=sys.stderr))
    print_row("engine", "seconds a step", "trained tokens/s", "smolctl's speed", "peak GB", "loss")
    print("|---" * 6 + "|")
    for case, steps in zip(cases, measured, strict=True):
        seconds = [step.seconds[0] for step in steps]
        ratios = sorted(time_ / own.seconds[0] for time_, own in zip(seconds, measured[0], strict=True))
        loss = steps[0].output.item()
        if abs(loss / measured[0][0].output.item() - 1) > 1e-4:
            print(f"the losses differ: {loss}", file=sys.stderr)
        middle, peak = median(seconds), max(step.peak_bytes or 0 for step in steps)
        speed = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        times = f"{middle:.2f}", f"{trained / middle:,.0f}"
        print_row(case.engine, *times, speed, f"{peak / 1e9:.2f}", f"{loss:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("masks", "steps"))
    parser.add_argument("model", help="a GGUF of SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    options = parser.parse_args()
    if options.what == "masks":
        compare_masks(options.model)
    else:
        compare_steps(options.model, options.rounds, list(options.engines))


if __name__ == "__main__":
    import chat_step  # functions that other processes run must not be of __main__

    chat_step.main()
