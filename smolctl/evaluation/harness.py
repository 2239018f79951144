"""Makes a model on smolctl's engine available to lm-eval (EleutherAI's lm-evaluation-harness).

Texts are encoded and truncated as in lm-eval's own `--model hf`, so the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from smolctl.data.tokenizer.chat import render_chat
from smolctl.errors import InputError, UsageError
from smolctl.escaping import whole_characters
from smolctl.evaluation.likelihood import Target, likelihoods, sequences_that_fit
from smolctl.evaluation.task_templates import MOST_CHARACTERS
from smolctl.generation.complete import CompletionSettings, Continuation, Generation
from smolctl.generation.load import LoadedModel
from smolctl.generation.prompts import SAMPLING
from smolctl.generation.sampling import SamplingSettings

TRANSFORMERS_TOP_K = 50  # the default of transformers' `generate`
# Settings of `generate` that smolctl's engine supports only with these values.
ALWAYS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0}
_TO_BE_CONTINUED = "<to be continued>"


class EngineLM(TemplateLM):
    """Answers the requests of lm-eval's tasks.

    Args:
        model: to evaluate.
        note: called with each line of progress.
    """

    def __init__(self, model: LoadedModel, note: Callable[[str], None]) -> None:
        super().__init__()
        self.model, self.tokenizer, self._note = model, model.tokenizer, note
        self.truncated = 0  # requests that did not fit the context and were truncated at the start

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ending: int | None = self.tokenizer.eos_token_id
        return self.tokenizer.end_of_text_id if ending is None else ending

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        beginning: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def max_length(self) -> int:
        """Maximum tokens that the model reads."""
        return self.model.context

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes this tokenizer and its template from others in lm-eval's caches."""
        return str(self.tokenizer.sha256)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; None adds the tokenizer's special tokens, except a BOS that is already there."""
        if add_special_tokens is None:
            beginning = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not string.startswith(beginning)
        whole = whole_characters(string)
        ids: list[int] = self.tokenizer.backend.encode(whole, add_special_tokens=add_special_tokens).ids
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Like lm-eval; if a token spans the boundary, which is an error there, each part is encoded
        separately.
        """
        first, then = super()._encode_pair(context, continuation)
        return first, then or self.tok_encode(continuation, add_special_tokens=False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages in the model's template; without a generation prompt, the last message is left open."""
        *before, last = chat_history
        if not add_generation_prompt:
            last = {**last, "content": last["content"] + _TO_BE_CONTINUED}
        try:
            text = self._rendered([*before, last], add_generation_prompt)
        except InputError:  # like lm-eval, for templates that refuse a system message
            others = [message for message in before if message["role"] != "system"]
            text = self._rendered([*others, last], add_generation_prompt)
        return text if add_generation_prompt else text[: text.rindex(_TO_BE_CONTINUED)]

    def _rendered(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template or ""
        named, origin = self.tokenizer.named_tokens, self.model.id
        return render_chat(
            template, messages, named, add_generation_prompt, origin=origin, most=MOST_CHARACTERS
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy continuation) of a text after its context, for each
        request.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._target(context, continuation) for _, context, continuation in requests]
        found = likelihoods(self.model.engine, asked, self._progress("texts scored", len(asked)))
        return [(one.nats, one.is_greedy) for one in found]

    def _target(self, context: list[int], continuation: list[int]) -> Target:
        if not continuation:
            raise InputError("a task asks for the probability of an empty text", "Correct its doc_to_target.")
        if len(continuation) > self.max_length:
            raise InputError(
                f"a task asks for the probability of {len(continuation):,} tokens, "
                f"but the model's context holds {self.max_length:,}",
                "Leave out the task, or choose a model with a longer context.",
            )
        whole = (*context, *continuation)
        self.truncated += len(whole) > self.max_length + 1
        return Target(whole[-self.max_length - 1 : -1], tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of a whole text for each request, in sequences of the context's length."""
        windows = [
            (number, make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        sums = [0.0] * len(requests)
        for (number, _), (nats, _) in zip(windows, scores, strict=True):
            sums[number] += nats
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each request's text, up to one of its stop texts."""
        if not requests:
            return []
        asked = [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        # Requests with a common prefix follow each other in a sequence, which keeps the prefix in its cache.
        order = sorted(range(len(asked)), key=lambda number: tuple(asked[number][0].ids))
        prompts = [asked[number][0] for number in order]
        engine = self.model.engine
        generation = Generation(engine, self.tokenizer, prompts, self.max_length)
        longest = max(len(prompt.ids) + prompt.settings.max_tokens for prompt in prompts)
        scheduler = generation.scheduler(sequences_that_fit(engine, longest))
        progress, done = self._progress("answers written", len(prompts)), 0
        texts = [""] * len(asked)
        for step in generation.run(scheduler):
            for place in step:
                number = order[place]
                (answer,) = generation.completions(place)
                texts[number] = self._text(answer.tokens, asked[number][1])
            progress(done := done + len(step))
        return texts

    def _prompt(
        self, number: int, context: str, settings: Mapping[str, Any]
    ) -> tuple[Continuation, list[str]]:
        """The text to continue, and the texts that end the continuation."""
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), DEFAULT_MAX_GEN_TOKS))
        ending = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        stops: list[str] = handle_stop_sequences(asked.pop("until"), eos=ending)
        most = asked.pop("max_gen_toks")
        if most < 1:
            raise InputError(
                f"a task asks for {most} new tokens", "Ask for more: --gen-kwargs max_gen_toks=N."
            )
        if most >= self.max_length:
            raise InputError(
                f"a task asks for {most:,} new tokens, but the model's context holds {self.max_length:,}",
                "Ask for fewer: --gen-kwargs max_gen_toks=N.",
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - most
        self.truncated += len(ids) > room
        sampling = self._sampling(asked)
        return Continuation(
            ids[-room:], CompletionSettings(most, 1, tuple(stops), 0, sampling), number
        ), stops

    def _sampling(self, asked: dict[str, Any]) -> SamplingSettings:
        """Sampling settings as in transformers' `generate`, with the model's recommendations."""
        sampled = asked.pop("do_sample") and asked.get("temperature") != 0
        taken = {"repetition_penalty": 1.0, **self.model.recommended, **asked}
        if unknown := [
            key for key, value in asked.items() if key not in SAMPLING and ALWAYS.get(key) != value
        ]:
            raise InputError(
                f"a task's generation_kwargs ask for {unknown[0]}={asked[unknown[0]]}, "
                "which is not supported",
                f"Supported: {', '.join(SAMPLING)}, do_sample, until and max_gen_toks.",
            )
        chosen = {"top_k": TRANSFORMERS_TOP_K, **taken}
        if not sampled:
            chosen = {"temperature": 0.0, "repetition_penalty": taken["repetition_penalty"]}
        try:
            return SamplingSettings(**{key: value for key, value in chosen.items() if key in SAMPLING})
        except UsageError as error:
            reason = error.message.removeprefix("--")
            raise InputError(f"a task's generation_kwargs: {reason}", error.hint) from None

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """The text of an answer up to its first stop text, which may be a special token."""
        ends = {self.tokenizer.backend.token_to_id(stop) for stop in stops}
        kept = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        text: str = postprocess_generated_text(self.tokenizer.decode(tokens[:kept]), list(stops), None)
        return text

    def _progress(self, what: str, total: int) -> Callable[[int], None]:
        """Report every tenth of the work."""
        reported = 0

        def report(done: int) -> None:
            nonlocal reported
            if (tenth := done * 10 // max(total, 1)) > reported:
                reported = tenth
                self._note(f"{done:,} of {total:,} {what}")

        return report
