"""Answers, streams and refusals of the server, as a plain HTTP client sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from smolctl.data.tokenizer.chatml import CHATML
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.prompts import COUNTS, SAMPLING, UNSUPPORTED
from smolctl.generation.sampling import SamplingSettings
from tests.support.serving import Served, serving
from tests.support.tiny_models import write_folder

CONTEXT = 300
ASK = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_folder(tmp_path_factory.mktemp("served") / "tiny", template=CHATML, context=CONTEXT)
    with serving(model) as server:
        yield server


def events(text: str) -> list[Any]:
    """What a stream says, which must end with [DONE]."""
    *chunks, last = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ASK, "n": 3, "temperature": 1.5},
        {"messages": ASK, "logprobs": True, "top_logprobs": 3},
        {"messages": ASK, "stop": ["a", "he"], "n": 2},
        {"prompt": ["the cat", "Größe 界面"], "n": 2, "logprobs": 2},
        {"prompt": "the cat 🎉", "echo": True, "logprobs": 1},
        {"prompt": "the cat", "echo": True},
    ],
)
def test_a_stream_says_what_a_whole_answer_says(served: Served, body: dict[str, Any]) -> None:
    chat = "messages" in body
    path = "chat/completions" if chat else "completions"
    body = {"seed": 5, "max_tokens": 20, **body}
    whole = served.post(path, **body).json()
    streamed = served.post(path, **body, stream=True, stream_options={"include_usage": True})
    *chunks, usage = events(streamed.text)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["usage"]["completion_tokens"] <= 20 * len(whole["choices"])
    alone = served.post(path, **{**body, "n": 1}).json()["usage"]
    assert usage["usage"]["prompt_tokens"] == alone["prompt_tokens"]
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        parts = [one["delta"] if chat else one["text"] for one in own]
        if chat:
            assert parts[0] == {"role": "assistant", "content": ""}
            assert parts[-1] == {}
            assert "".join(part.get("content", "") for part in parts) == choice["message"]["content"]
        else:
            assert "".join(parts) == choice["text"]
        found: dict[str, list[Any]] = {}
        for one in own:
            for key, values in (one["logprobs"] or {}).items():
                found.setdefault(key, []).extend(values)
        assert (found or None) == choice["logprobs"]


def test_the_bytes_of_tokens_are_those_of_the_text_whole_characters_or_not(served: Served) -> None:
    body = {"messages": ASK, "n": 8, "temperature": 3, "seed": 2, "max_tokens": 40, "logprobs": True}
    torn = 0
    for choice in served.post("chat/completions", **body).json()["choices"]:
        spelled = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
        if choice["finish_reason"] == "stop":
            spelled = spelled.removesuffix(b"<|im_end|>").removesuffix(b"<|endoftext|>")
        text = choice["message"]["content"]
        assert spelled.decode("utf-8", "replace") == text
        torn += "\ufffd" in text
    assert torn


def test_an_answer_that_is_cut_ends_for_its_length_one_with_a_schema_too(served: Served) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "string"}}}
    endless = {"temperature": 3, "seed": 1, "messages": ASK}
    for body in (
        {"max_tokens": 1},
        {"max_completion_tokens": 1},
        {"max_tokens": 3, "response_format": wanted},
    ):
        (choice,) = served.post("chat/completions", **endless, **body).json()["choices"]
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_null_is_the_default_of_every_field(served: Served, path: str) -> None:
    text = {"messages": ASK} if path.startswith("chat") else {"prompt": "the cat"}
    nothing = dict.fromkeys(
        (
            *SAMPLING,
            *COUNTS,
            *UNSUPPORTED,
            "stop",
            "stream",
            "stream_options",
            "echo",
            "logprobs",
            "model",
            "user",
        )
    )
    answer = served.post(path, **{**nothing, **text, "response_format": None})
    assert answer.status_code == 200
    nested = {"stream_options": {"include_usage": None}, "response_format": {"type": None}}
    assert served.post(path, **text, max_tokens=1, **nested).status_code == 200


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_that_of_sample(served: Served, temperature: float) -> None:
    model = served.server.service.model
    settings = CompletionSettings(12, 3, seed=9, sampling=SamplingSettings(temperature))
    expected = complete(model.engine, model.tokenizer, model.prompt("the cat"), settings).completions
    options = {"max_tokens": 12, "n": 3, "seed": 9, "temperature": temperature, "top_p": 1}
    found = served.post("completions", prompt="the cat", **options).json()["choices"]
    assert [one["text"] for one in found] == [one.text for one in expected]
    assert [one["index"] for one in found] == [0, 1, 2]
    assert len({one.text for one in expected}) == (3 if temperature else 1)


def test_an_echo_gives_every_token_of_the_prompt_with_its_probability(served: Served) -> None:
    tokenizer = served.server.service.model.tokenizer
    text = "the cat saw 🎉 the dog"
    ids = list(tokenizer.prompt(text).ids)
    for prompt, most in ((text, 1), (ids, 1), (text, 0)):
        answer = served.post(
            "completions", prompt=prompt, max_tokens=most, echo=True, logprobs=1, temperature=0
        ).json()
        (choice,) = answer["choices"]
        logprobs = choice["logprobs"]
        assert len({len(values) for values in logprobs.values()}) == 1
        assert len(logprobs["tokens"]) == len(ids) + most
        assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        assert choice["text"].startswith(text)
        assert answer["usage"]["completion_tokens"] == most
        pairs = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
        assert all(choice["text"].startswith(token, at) for token, at in pairs if "\\x" not in token)
        for value, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]:
            assert value in top.values()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("best_of", 2),
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", 1e30),
        ("top_p", 0),
        ("n", 0),
        ("n", 10_000),
        ("max_tokens", -1),
        ("stop", [1]),
        ("stop", ["a"] * 99),
        ("stream", "yes"),
        ("stream_options", 5),
        ("top_logprobs", 21),
        ("logprobs", 3),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {}}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "5"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(served: Served, field: str, value: object) -> None:
    answer = served.post("chat/completions", **{"messages": ASK, "max_tokens": 2, field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert error["message"].endswith(".")
    assert "line" not in error["message"]  # of a file of prompts, which shares the check


@pytest.mark.parametrize(
    ("path", "mistyped", "meant"),
    [
        ("chat/completions", "max_tokns", "max_tokens"),
        ("chat/completions", "maxTokens", "max_tokens"),
        ("chat/completions", "temprature", "temperature"),
        ("chat/completions", "strem", "stream"),
        ("chat/completions", "responseFormat", "response_format"),
        ("completions", "top-p", "top_p"),
        ("completions", "stops", "stop"),
        ("completions", "presense_penalty", "presence_penalty"),
    ],
)
def test_a_mistyped_parameter_is_refused_with_the_one_that_was_meant(
    served: Served, path: str, mistyped: str, meant: str
) -> None:
    asked = {"messages": ASK} if path.startswith("chat") else {"prompt": "the"}
    answer = served.post(path, **asked, max_completion_tokens=2, **{mistyped: 1})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["message"] == f'There is no parameter "{mistyped}". Did you mean "{meant}"?'
    assert (error["param"], error["code"]) == (mistyped, "unknown_parameter")


# Parameters that clients send to OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI, OpenRouter and
# text-generation-webui, and that have no effect here.
OF_OTHER_SERVERS = """
add_generation_prompt add_special_tokens allowed_token_ids auto_max_new_tokens background bad_words
banned_tokens cache_prompt cache_salt chat_template chat_template_kwargs continue_final_message
custom_params debug detokenize details documents dry_base dry_multiplier dry_sequence_breakers
dynamic_temperature dynatemp_range early_stopping ebnf enable_thinking encoder_repetition_penalty
epsilon_cutoff extra_body format frequency_penalty_range grammar greeting guidance_scale guided_choice
guided_json guided_regex id_slot include_reasoning include_stop_str_in_output instructions json_schema
keep_alive kv_transfer_params length_penalty logits_processors lora max_length max_output_tokens
max_tool_calls metadata min_keep min_new_tokens mirostat mirostat_tau mode models n_keep n_probs
no_repeat_ngram_size num_ctx num_predict options parallel_tool_calls penalty_alpha plugins
presence_penalty_range priority prompt_cache_key prompt_logprobs prompt_lookup_num_tokens prompt_template
provider random_seed raw reasoning reasoning_effort regex rep_pen repeat_last_n repetition_context_size
repetition_penalty_range request_id response_fields return_full_text return_logprob return_token_ids
route safe_prompt safety_identifier samplers seed service_tier session_id skip_special_tokens
smoothing_factor spaces_between_special_tokens stop_regex store stream_options stream_reasoning
structured_outputs temperature_last tfs_z think thinking thinking_budget timings_per_token tool_resources
top_a top_logprobs_num top_n_sigma top_n_tokens trace transforms trim_stop truncate
truncate_prompt_tokens ttl typical usage user verbosity watermark xtc_probability xtc_threshold
"""


def test_the_parameters_of_other_servers_are_accepted(served: Served) -> None:
    own = {"seed": 1, "stream_options": {"include_usage": True}}
    extra = {**dict.fromkeys(OF_OTHER_SERVERS.split(), "x"), **own}
    for path, asked in (("chat/completions", {"messages": ASK}), ("completions", {"prompt": "the"})):
        answer = served.post(path, **asked, max_tokens=2, **extra)
        assert answer.status_code == 200, answer.text


def test_what_changes_nothing_and_what_nobody_knows_is_accepted(served: Served) -> None:
    harmless = {"tools": [], "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "tool_choice": "auto"}
    unset = dict.fromkeys(("temperature", "n", "stop", "stream", "seed", "max_tokens", "response_format"))
    messages = [
        {"role": "developer", "content": "be brief", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "the dog", "whatever": 1},
    ]
    body = {"messages": messages, **harmless, **unset, "user": "me", "nobody_knows": {}}
    answer = served.post("chat/completions", **body, max_completion_tokens=3)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_before_the_answer_begins(served: Served, stream: bool) -> None:
    for prompt in ("the cat " * CONTEXT, [5] * CONTEXT, "x" * 100_000, [], [5, 999]):
        answer = served.post("completions", prompt=prompt, stream=stream)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_every_answer_keeps_to_its_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"enum": ["x", "yy"]},
            "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    body = {"messages": ASK, "n": 4, "temperature": 2, "seed": 1, "response_format": wanted}
    for choice in served.post("chat/completions", **body).json()["choices"]:
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), schema)
        assert text == json.dumps(json.loads(text))  # white space in its places only


def test_models_health_and_what_is_not_there(served: Served) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert served.client.get(f"/v1/models/{model['id']}").json() == model
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.post("completions", model=model["id"], prompt="a", max_tokens=1).status_code == 200
    missing = {
        404: [served.client.get("/v1/engines"), served.post("completions", model="gpt-4", prompt="a")],
        405: [served.client.get("/v1/completions"), served.client.options("/v1/completions")],
        400: [
            served.client.post("/v1/completions", content=text)
            for text in (b"{", b"[]", b"\xff", b'{"a": NaN}')
        ],
    }
    for status, answers in missing.items():
        for answer in answers:
            assert answer.status_code == status
            assert answer.json()["error"]["message"].endswith(".")
    said = missing[405][0].json()["error"]["message"]
    assert said == "/v1/completions does not take GET."
