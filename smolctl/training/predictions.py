"""The model's continuations of fixed prompts, generated without affecting training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smolctl.config.run import PredictionsConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import spell
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.sampling import SamplingSettings
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.runs.events import Candidate, Prediction
from smolctl.training.rng import keeping_rng

TOP_TOKENS = 5


@contextmanager
def observing(network: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards, even after a failure, the network's mode and all random
    states are restored.
    """
    was_training = network.training
    network.eval()
    try:
        with keeping_rng(), torch.inference_mode():
            yield
    finally:
        network.train(was_training)


def predict(
    network: Transformer,
    tokenizer: Tokenizer,
    config: PredictionsConfig,
    prompt: str,
    step: int,
    chat: bool = False,
) -> Prediction:
    """The model's continuation of a prompt, or its answer in a chat.

    Randomness comes from a separate generator, seeded with the step.

    Raises:
        InputError: the prompt does not fit the context.
    """
    settings = CompletionSettings(
        max_tokens=config.max_tokens, seed=step, sampling=SamplingSettings(temperature=config.temperature)
    )
    turn = {"role": "user", "content": prompt}
    given = tokenizer.chat_prompt([turn]) if chat else tokenizer.prompt(prompt)
    with observing(network), network.not_compiled():
        completion = complete(TorchEngine(network), tokenizer, given, settings).completions[0]
        ids = torch.tensor([given.ids], device=network.head_weight.device)
        logits = network.next_token_logits(ids)[0].float()
        top = logits.softmax(-1).topk(min(TOP_TOKENS, len(logits)))
        losses = network.token_losses(ids[:, :-1], ids[:, 1:]) if ids.shape[1] > 1 else None
    return Prediction(
        step=step,
        prompt=prompt,
        text=completion.text,
        loss=losses.mean().item() if losses is not None else None,
        top=tuple(
            Candidate(spell(tokenizer, token), probability)
            for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
    )
