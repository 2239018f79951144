"""The clients that people have, as they come from the package index."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolctl.data.tokenizer.chatml import CHATML
from tests.support.serving import PATIENCE_S, Served, serving
from tests.support.tiny_models import write_folder

pytestmark = pytest.mark.slow

CONTEXT = 400
ASK: list[Any] = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clients") / "tiny", template=CHATML, context=CONTEXT)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model) as server:
        yield server


def test_openai_whole_streamed_and_asynchronous(served: Served) -> None:
    import openai

    options: dict[str, Any] = {"model": "tiny", "seed": 1, "max_tokens": 9}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(messages=ASK, n=2, **options)
        stream = client.chat.completions.create(messages=ASK, n=2, stream=True, **options)
        parts = ["", ""]
        for chunk in stream:
            for choice in chunk.choices:
                parts[choice.index] += choice.delta.content or ""
        assert parts == [choice.message.content for choice in whole.choices]
        assert whole.usage is not None
        completion = client.completions.create(prompt="the cat", echo=True, logprobs=1, **options)
        assert completion.choices[0].text.startswith("the cat")
        with pytest.raises(openai.BadRequestError, match="presence_penalty"):
            client.chat.completions.create(messages=ASK, presence_penalty=1, **options)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(messages=ASK, **{**options, "model": "gpt-4"})

    async def many() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            asked = [client.chat.completions.create(messages=ASK, **options) for _ in range(12)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(many()) == [whole.choices[0].message.content] * 12


def test_openai_parses_an_answer_by_its_class(served: Served) -> None:
    import openai
    from pydantic import BaseModel

    class Animal(BaseModel):
        name: str
        legs: int
        is_tame: bool

    schema: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": Animal.model_json_schema()}}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for seed in range(20):  # a random model's strings and numbers have no end, mostly
            answer = client.chat.completions.create(
                model="tiny",
                messages=ASK,
                response_format=schema,
                seed=seed,
                temperature=1.5,
                max_tokens=200,
            ).choices[0]
            if answer.finish_reason == "stop":
                Animal.model_validate_json(answer.message.content or "")
                return
    pytest.fail("no answer ended")


def test_openai_gets_an_error_in_a_stream(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    with serving(model) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        stream = client.completions.create(model="tiny", prompt="the", stream=True, max_tokens=300)
        next(iter(stream))
        engine = served.server.service.model.engine
        monkeypatch.setattr(engine, "forward", lambda *_arguments, **_options: 1 / 0)
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(stream)


def test_curl_sees_an_answer_grow_and_an_error(served: Served) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl: apt-get install -y curl")

    def post(**body: Any) -> str:
        sent = ("--data", json.dumps({"messages": ASK, "max_tokens": 3, **body}))
        kind = ("--header", "Content-Type: application/json")
        called = [curl, "-sS", "-N", *kind, *sent, f"{served.url}/v1/chat/completions"]
        return subprocess.run(called, check=True, capture_output=True, text=True).stdout

    assert json.loads(post())["usage"]["completion_tokens"] <= 3
    assert post(stream=True).endswith("data: [DONE]\n\n")
    assert "tools" in json.loads(post(tools=[1]))["error"]["message"]


def test_llm_answers_with_a_model_of_its_file(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: tiny\n  api_base: {served.url}/v1\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    asked = ("-m", "mine", "the cat sat", "-s", "be brief", "-o", "max_tokens", "9", "-o", "seed", "1")

    def say(*more: str) -> bytes:
        called = [sys.executable, "-m", "llm", "prompt", *asked, "--no-log", *more]
        return subprocess.run(called, env=environment, check=True, capture_output=True).stdout

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat sat"}]
    answer = served.post("chat/completions", messages=messages, max_tokens=9, seed=1).json()
    expected = answer["choices"][0]["message"]["content"]
    assert say().decode() == say("--no-stream").decode() == f"{expected}\n"


def test_litellm_whole_streamed_and_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a site for prices
    litellm = pytest.importorskip("litellm", reason="too large to be among the tests' requirements")
    options = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": "none", "max_tokens": 9}
    whole = litellm.completion(messages=ASK, seed=1, **options).choices[0].message.content
    chunks = litellm.completion(messages=ASK, seed=1, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    long = [{"role": "user", "content": "the cat " * CONTEXT}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, **options)


def test_lm_eval_scores_through_the_server_as_with_the_engine(served: Served, model: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from smolctl.evaluation.harness import EngineLM

    loaded = served.server.service.model
    loaded.tokenizer.save(model)  # lm-eval reads it with transformers
    remote = LocalCompletionsAPI(
        model="tiny", base_url=f"{served.url}/v1/completions", tokenizer=str(model), max_length=CONTEXT - 1
    )
    pairs = [("the cat", " sat on the mat"), ("the dog", " saw"), ("Größe", " 界面 the cat")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = remote.loglikelihood(asked)
    expected = EngineLM(loaded, print).loglikelihood(asked)
    for (score, greedy), (own_score, own_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(own_score, rel=1e-3)
        assert greedy == own_greedy


@pytest.mark.cold
def test_a_stopped_server_ends_the_answers_under_way(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "smolctl",
        "serve",
        str(model),
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["context"] == CONTEXT
        assert "<html" in httpx.get(ready["page"]).text
        body = {"prompt": "the", "max_tokens": 350, "stream": True, "seed": 3, "temperature": 3, "n": 4}
        with httpx.stream("POST", f"{ready['url']}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
