"""What the generated part of a model card says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolctl import __version__
from smolctl.config import ModelConfig
from smolctl.data.text.hub import DatasetName
from smolctl.escaping import code_span, fenced
from smolctl.publish.card import table
from smolctl.publish.facts import EMBEDDED, RECORDS, RunFacts
from smolctl.runs.folder import LOSS_CURVE, STORY
from smolctl.runs.story import selection
from smolctl.sources.gguf.write import GGUFResult
from smolctl.timing import with_error

SHOWN_PREDICTIONS = 4  # of each prompt
SHOWN_PROMPTS = 3
# Of a quantized model: heading, key in its record, format.
MEASURED = (
    ("bits a weight", "bits_per_weight", ".2f"),
    ("bits per byte", "bits_per_byte", ".4f"),
    ("change", "bits_per_byte_delta", "+.4f"),
    ("same first choice", "top1_agreement", ".1%"),
    ("tokens/s", "decode_tokens_per_s", ".1f"),
    ("speed-up", "speedup", ".2f"),
)
UNKNOWN_LICENCE = "Not stated. Until it is, nobody has permission to use the weights."


@dataclass(frozen=True)
class CardFacts:
    """All that the card is made of."""

    repo: str  # org/name, as the examples spell it
    name: str
    config: ModelConfig
    parameters: int
    dtype: str
    can_chat: bool
    license: str | None = None
    run: RunFacts | None = None
    ggufs: tuple[GGUFResult, ...] = ()
    quantized: tuple[str, ...] = ()  # names of folders in quantized/


def card_metadata(facts: CardFacts) -> dict[str, Any]:
    """The front matter."""
    tags = ["smolctl", "small-language-model"]
    if not facts.config.is_llama:
        tags.append("custom_code")
    if facts.can_chat:
        tags.append("conversational")
    if facts.ggufs:
        tags.append("gguf")
    metadata: dict[str, Any] = {"license": facts.license} if facts.license else {}
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if facts.run and facts.run.datasets:
        metadata["datasets"] = list(facts.run.datasets)
    return metadata


def card_text(facts: CardFacts) -> str:
    """The generated Markdown."""
    sections = [
        [f"# {facts.name}", "", _summary(facts)],
        ["## How to use it", "", *_usage(facts)],
        ["## The model", "", *_model(facts)],
    ]
    if facts.run:
        sections.append(["## Training", "", *_training(facts.run)])
        if facts.run.validations:
            sections.append(["## Evaluation", "", *_evaluation(facts.run)])
        if facts.run.histories:
            sections.append(["## Predictions while it learned", "", *_predictions(facts.run)])
    if facts.ggufs or facts.quantized or (facts.run and facts.run.variants):
        sections.append(["## Smaller versions", "", *_variants(facts)])
    sections += [["## Data and licence", "", *_data(facts)], ["## Limits", "", *_limits(facts)]]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _summary(facts: CardFacts) -> str:
    kind = "a chat model" if facts.can_chat else "a base model: it continues text"
    shape = "Llama-shaped" if facts.config.is_llama else "a Llama with " + _differences(facts.config)
    made = ""
    if facts.run:
        made = f" Trained for {facts.run.step:,} steps on {facts.run.tokens:,} tokens"
        if facts.run.validations:
            made += f", {_bits(facts.run.validations[-1])} on held-out text"
        made += "."
    return f"{facts.parameters:,} parameters, {shape}; {kind}.{made}"


def _differences(config: ModelConfig) -> str:
    parts = ["learned positions"] if config.position_embedding == "learned" else []
    if config.residual_scale != 1.0:
        parts.append(f"residual branches times {config.residual_scale:.4g}")
    return " and ".join(parts)


def _usage(facts: CardFacts) -> list[str]:
    remote = "" if facts.config.is_llama else ", trust_remote_code=True"
    lines = [
        "With transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}"{remote})',
        f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}"{remote})',
    ]
    if facts.can_chat:
        lines += [
            'messages = [{"role": "user", "content": "What is the capital of France?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append(f'inputs = tokenizer({_prompt(facts)!r}, return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0]))",
        "```",
    ]
    if not facts.config.is_llama:
        lines += [
            "",
            "`trust_remote_code=True` runs `modeling_smolctl.py` of this repository: eighty lines on top of "
            "transformers' Llama.",
        ]
    chat = " --chat" if facts.can_chat else ""
    lines += ["", "With smolctl:", "", "```bash", f"smolctl sample {facts.repo}{chat}", "```"]
    if facts.ggufs:
        lines += ["", "With llama.cpp:", "", "```bash"]
        lines += [f"llama-cli -hf {facts.repo}:{gguf.scheme.upper()}" for gguf in facts.ggufs]
        lines.append("```")
    return lines


def _prompt(facts: CardFacts) -> str:
    prompts = facts.run.config.predictions.prompts if facts.run else ()
    return prompts[0] if prompts else "Once upon a time"


def _model(facts: CardFacts) -> list[str]:
    config = facts.config
    positions = (
        f"a learned table of {config.max_position_embeddings:,}"
        if config.position_embedding == "learned"
        else f"RoPE, θ = {config.rope_theta:,.0f}"
    )
    head = "tied to the token table" if config.tie_word_embeddings else "of its own"
    rows = [
        ("parameters", f"{facts.parameters:,}, stored as {facts.dtype}"),
        (
            "layers, width, FFN",
            f"{config.num_hidden_layers}, {config.hidden_size:,}, {config.intermediate_size:,} (SwiGLU)",
        ),
        (
            "heads",
            f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
            f"of {config.head_dim}",
        ),
        ("vocabulary, head", f"{config.vocab_size:,}, {head}"),
        ("positions", positions),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("residual branches", f"× {config.residual_scale:.6g}"),
        ("norm", f"RMSNorm, ε = {config.rms_norm_eps:g}"),
    ]
    return table(("", ""), rows)


def _training(run: RunFacts) -> list[str]:
    config = run.config
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    sequence = config.data.sequence_length
    loss = [] if run.loss is None else [("last training loss", f"{run.loss:.4f} nats a token")]
    time = [] if not run.seconds else [("time", f"{run.seconds / 60:,.1f} min of steps")]
    rows = [
        ("tokens seen", f"{run.tokens:,} ({run.step:,} steps × {train.batch_size} × {sequence:,})"),
        (
            "optimizer",
            f"{optimizer.name}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
            f"weight decay {optimizer.weight_decay:g}",
        ),
        (
            "learning rate",
            f"{optimizer.learning_rate:g}, {schedule.name}, "
            f"warmup {schedule.warmup_steps:g} steps, least {schedule.min_learning_rate:g}",
        ),
        ("gradient clipping", f"{train.gradient_clip:g}"),
        ("precision", f"{train.precision}, blocks {'compiled' if train.compile is True else 'not compiled'}"),
        ("seeds", f"{train.seed} (weights), {config.data.seed} (order of the data)"),
        *loss,
        ("hardware", run.hardware),
        *time,
        ("software", f"smolctl {run.environment.get('smolctl', __version__)}"),
    ]
    curve = ["", f"![Training and held-out loss]({LOSS_CURVE})"] if run.curve else []
    records = f"The whole recipe and every step's numbers are in [`{RECORDS}/`](./tree/main/{RECORDS})."
    return [*table(("", ""), rows), *curve, "", records]


def _bits(record: Mapping[str, Any]) -> str:
    return f"{with_error(record['bits_per_byte'], record['standard_error'])} bits per byte"


def _evaluation(run: RunFacts) -> list[str]:
    chosen = list(run.validations)
    if len(chosen) > 6:
        chosen = [chosen[round(i * (len(chosen) - 1) / 5)] for i in range(6)]
    rows = [
        (
            f"{record['step']:,}",
            with_error(record["bits_per_byte"], record["standard_error"]),
            f"{record['loss']:.4f}",
        )
        for record in chosen
    ]
    note = (
        "On documents that were held out of training; ± is one standard error. Bits per byte of text can be "
        "compared between tokenizers; the loss, in nats a token, cannot."
    )
    return [note, "", *table(("step", "bits per byte", "loss"), rows)]


def _predictions(run: RunFacts) -> list[str]:
    lines: list[str] = []
    for prompt, history in list(run.histories.items())[:SHOWN_PROMPTS]:
        lines += [*([""] if lines else []), f"{code_span(prompt)} continues with"]
        for prediction in selection(history, SHOWN_PREDICTIONS):
            lines += ["", f"at step {prediction.step:,}", "", *fenced(prediction.text)]
    return [*lines, "", f"All of them: [`{RECORDS}/{STORY}`](./blob/main/{RECORDS}/{STORY})."]


def _variants(facts: CardFacts) -> list[str]:
    lines: list[str] = []
    if facts.ggufs:
        rows = [
            (f"`{gguf.path.name}`", f"{gguf.bytes / 1e6:,.1f} MB", f"{gguf.bits_per_weight:.2f}")
            for gguf in facts.ggufs
        ]
        lines += table(("file", "size", "bits a weight"), rows)
    variants = facts.run.variants if facts.run else ()
    if variants:
        lines += [*([""] if lines else []), "Measured against the model itself on held-out text:", ""]
        head = ("scheme", "size", *(name for name, _, _ in MEASURED))
        lines += table(head, [_variant(variant) for variant in variants])
    for name in facts.quantized:
        lines += [
            *([""] if lines else []),
            f"`quantized/{name}/` is for smolctl: `hf download {facts.repo} --include 'quantized/{name}/*' "
            f"--local-dir D`, then `smolctl sample D/quantized/{name}`.",
        ]
    return lines


def _variant(variant: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        value = variant.get(key)
        return format(value, form) if isinstance(value, int | float) else "–"

    size = variant.get("bytes")
    megabytes = f"{size / 1e6:,.1f} MB" if isinstance(size, int | float) else "–"
    measured = (shown(key, form) for _, key, form in MEASURED)
    return str(variant.get("scheme", "–")), megabytes, *measured


def _data(facts: CardFacts) -> list[str]:
    lines = []
    if facts.run:
        data = facts.run.public_data()
        held = "Nothing was"
        if data.validation:
            held = f"{data.validation} was"
        elif data.validation_fraction:
            held = f"{data.validation_fraction:.0%} of the documents were"
        lines = [*(f"- {_source(source)}" for source in data.source), "", f"{held} held out.", ""]
    return [*lines, f"Licence: {facts.license or UNKNOWN_LICENCE}"]


def _source(source: str) -> str:
    if source == EMBEDDED:
        return "the source and documentation of Python's standard library (PSF licence)"
    name = DatasetName.parse(source)
    return f"[{source}](https://huggingface.co/datasets/{name.repository})" if name else source


def _limits(facts: CardFacts) -> Sequence[str]:
    lines = [
        f"- A model of {facts.parameters:,} parameters makes things up, repeats itself, and knows little. "
        "Do not rely on what it says.",
        f"- It sees at most {facts.config.max_position_embeddings:,} tokens at once.",
        "- It repeats what was in its data, prejudice and mistakes included; nothing was filtered.",
    ]
    if not facts.can_chat:
        lines.append("- It was not taught to follow instructions or to chat.")
    if facts.run and facts.run.tokens < 20 * facts.parameters:
        ratio = facts.run.tokens / facts.parameters
        lines.append(f"- It has seen {ratio:.2g} tokens a parameter, where about 20 and more are usual.")
    return lines
