"""A model on the Hub: what is fetched, and what every refusal says. The client is the real one."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from smolctl.errors import ExitCode, HubError, InputError
from smolctl.model.weights import initialize
from smolctl.sources import SourceKind, open_source
from smolctl.sources.huggingface.config import to_huggingface_config
from tests.support.hub_server import COMMIT, TOKEN, HubRepository, HubServer
from tests.support.tiny_hub_model import CONFIG, CONFIG_JSON


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in initialize(CONFIG, seed=1).state_dict().items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def add_model(hub: HubServer, state: dict[str, torch.Tensor], name: str = "org/tiny") -> HubRepository:
    hub.repositories[name] = HubRepository(
        {
            "config.json": CONFIG_JSON,
            "model.safetensors": save(state, {"format": "pt"}),
            "README.md": b"# tiny",
        }
    )
    return hub.repositories[name]


def test_opening_a_hub_model_fetches_headers_and_no_weights(
    hub: HubServer, state: dict[str, torch.Tensor]
) -> None:
    # Large enough that the first Range request cannot hold it all.
    big = {**state, "model.embed_tokens.weight": torch.zeros(40_960, 64)}
    config = CONFIG.model_copy(update={"vocab_size": 40_960})
    repository = add_model(hub, big)
    repository.files["config.json"] = json.dumps(to_huggingface_config(config)).encode()
    source = open_source("org/tiny")
    assert source.kind is SourceKind.HUB
    assert source.revision == COMMIT
    assert source.config == config
    assert source.problems == ()
    assert {tensor.name: tensor.shape for tensor in source.tensors or ()} == {
        name: tuple(tensor.shape) for name, tensor in big.items()
    }
    weight_requests = [request for request in hub.log if request.path.endswith(".safetensors")]
    assert all(request.range is not None for request in weight_requests)
    assert hub.bytes_sent("model.safetensors") <= 100_000 < len(repository.files["model.safetensors"])
    assert source.bytes_fetched == hub.bytes_sent()


def test_a_header_longer_than_the_first_request_takes_a_second(hub: HubServer) -> None:
    many = {f"tensor.{index:05}.weight": torch.zeros(1) for index in range(2_000)}
    hub.repositories["org/many"] = HubRepository(
        {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": save(many)}
    )
    source = open_source("org/many")
    assert len(source.tensors or ()) == 2_000
    assert [request.range is not None for request in hub.log if request.path.endswith(".safetensors")] == [
        True
    ] * 2


def test_a_server_that_ignores_range_is_not_read_to_the_end(hub: HubServer) -> None:
    hub.ignores_range = True
    weights = save({"model.embed_tokens.weight": torch.zeros(40_000, 512)})
    hub.repositories["org/big"] = HubRepository(
        {"config.json": b'{"model_type": "x"}', "model.safetensors": weights}
    )
    assert open_source("org/big").bytes_fetched < len(weights) / 4


def test_a_part_of_a_file_of_unknown_size_is_not_taken_for_the_whole(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.knows_sizes = False
    add_model(hub, {"model.embed_tokens.weight": torch.zeros(200, 256)})
    assert open_source("org/tiny").tensors


def test_sharded_headers_are_all_read(hub: HubServer, state: dict[str, torch.Tensor]) -> None:
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    index = {"metadata": {}, "weight_map": {name: path for path, some in parts.items() for name in some}}
    hub.repositories["org/sharded"] = HubRepository(
        {
            "config.json": CONFIG_JSON,
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{path: save({name: state[name] for name in some}) for path, some in parts.items()},
        }
    )
    source = open_source("org/sharded")
    assert source.problems == ()
    assert sorted(tensor.name for tensor in source.tensors or ()) == names
    assert source.bytes_fetched == hub.bytes_sent()
    loaded = dict(source.require_weights().tensors())
    assert all(torch.equal(loaded[name], state[name]) for name in names)


@pytest.mark.parametrize("moved", [1, -1])
def test_shards_that_contradict_their_index_are_refused_before_a_download(
    moved: int, hub: HubServer, state: dict[str, torch.Tensor]
) -> None:
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    index = {"weight_map": {name: path for path, some in parts.items() for name in some}}
    parts["b.safetensors"] = names[5 - moved :] if moved > 0 else names[5:-1]
    hub.repositories["org/sharded"] = HubRepository(
        {
            "config.json": CONFIG_JSON,
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{path: save({name: state[name] for name in some}) for path, some in parts.items()},
        }
    )
    with pytest.raises(InputError, match=r"b\.safetensors: (holds|has no) model\."):
        open_source("org/sharded")


def test_a_commit_that_the_client_refuses_is_the_servers_fault(
    hub: HubServer, state: dict[str, torch.Tensor]
) -> None:
    add_model(hub, state)
    hub.repositories["org/tiny"].commit = ""
    source = open_source("org/tiny")
    with pytest.raises(HubError, match="did not answer like a Hub"):
        dict(source.require_weights().tensors())


def test_weights_are_downloaded_when_asked_and_cached(
    hub: HubServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    add_model(hub, state)
    loaded = dict(open_source("org/tiny").require_weights().tensors())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    sent = hub.bytes_sent("model.safetensors")
    assert dict(open_source("org/tiny").require_weights().tensors()).keys() == state.keys()
    assert hub.bytes_sent("model.safetensors") == sent  # the same commit comes from the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_source("org/tiny")
    assert offline.revision == COMMIT
    assert offline.config == CONFIG
    assert "HF_HUB_OFFLINE is set: the cached revision" in offline.problems[0]
    assert dict(offline.require_weights().tensors()).keys() == state.keys()


def test_a_cached_model_is_used_when_the_hub_is_gone(
    hub: HubServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(hub, state)
    dict(open_source("org/tiny").require_weights().tensors())
    hub.fails_with = 503
    assert open_source("org/tiny").config == CONFIG
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    source = open_source("org/tiny")
    assert "cannot be reached" in source.problems[0]
    assert source.config == CONFIG


def test_a_named_revision_is_taken(hub: HubServer, state: dict[str, torch.Tensor]) -> None:
    add_model(hub, state)
    assert open_source(f"org/tiny@{COMMIT}").revision == COMMIT
    with pytest.raises(HubError, match="no such revision"):
        open_source("org/tiny@v9")


def test_tokenizer_of_a_hub_model_is_fetched_when_asked(
    hub: HubServer, state: dict[str, torch.Tensor]
) -> None:
    repository = add_model(hub, state)
    repository.files["tokenizer.json"] = json.dumps({"model": {"vocab": {"<s>": 0}}}).encode()
    repository.files["tokenizer_config.json"] = b'{"bos_token": "<s>", "chat_template": "{{ messages }}"}'
    source = open_source("org/tiny")
    assert hub.bytes_sent("tokenizer.json") == 0
    files = source.read_tokenizer()
    assert files is not None
    assert (files.bos_token_id, files.chat_template) == (0, "{{ messages }}")
    assert hub.bytes_sent("tokenizer.json") > 0


def test_a_repository_with_a_tokenizer_only_still_gives_it(hub: HubServer) -> None:
    hub.repositories["org/words"] = HubRepository({"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}'})
    source = open_source("org/words")
    assert source.config is None
    assert source.read_tokenizer() is not None


def test_another_architecture_is_counted_and_named(hub: HubServer) -> None:
    hub.repositories["openai/gpt2"] = HubRepository(
        {
            "config.json": b'{"model_type": "gpt2"}',
            "model.safetensors": save({"wte.weight": torch.zeros(10, 4)}),
        }
    )
    source = open_source("openai/gpt2")
    assert source.config is None
    assert "gpt2" in source.unsupported
    assert [tensor.parameters for tensor in source.tensors or ()] == [40]


def test_a_quantized_repository_says_so(hub: HubServer, state: dict[str, torch.Tensor]) -> None:
    repository = add_model(hub, state)
    quantized = {**json.loads(CONFIG_JSON), "quantization_config": {"quant_method": "bitsandbytes"}}
    repository.files["config.json"] = json.dumps(quantized).encode()
    source = open_source("org/tiny")
    assert "quantization_config" in source.unsupported
    assert "bitsandbytes" in source.unsupported


def test_missing_repository_is_named(hub: HubServer) -> None:
    with pytest.raises(HubError, match="org/nothing: not on the Hub, or private") as caught:
        open_source("org/nothing")
    assert caught.value.exit_code == ExitCode.HUB
    assert "HF_TOKEN" in caught.value.hint


def test_private_repository_opens_with_a_token_only(
    hub: HubServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(hub, state).private = True
    with pytest.raises(HubError, match="private"):
        open_source("org/tiny")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_source("org/tiny").config == CONFIG


def test_gated_repository_names_its_license_page(hub: HubServer, state: dict[str, torch.Tensor]) -> None:
    add_model(hub, state).gated = True
    with pytest.raises(HubError, match="gated") as caught:
        open_source("org/tiny")
    assert f"{hub.url}/org/tiny" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint


def test_bad_token_is_named(
    hub: HubServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(hub, state)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept the token"):
        open_source("org/tiny")


@pytest.mark.parametrize(("status", "cause"), [(500, "500"), (503, "503"), (403, "403"), (429, "429")])
def test_refusals_are_named_without_retries(hub: HubServer, status: int, cause: str) -> None:
    hub.fails_with = status
    with pytest.raises(HubError, match=cause) as caught:
        open_source("org/tiny")
    assert caught.value.hint
    assert len(hub.log) == 1


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_refused_connection_is_named_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        open_source("org/tiny")
    assert "HF_ENDPOINT" in caught.value.hint
    assert waits == []


def test_hanging_hub_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.hangs_for = 2
    with pytest.raises(HubError, match="did not answer in time"):
        open_source("org/tiny")


def test_a_hub_that_hangs_once_the_weights_are_asked_for_is_given_up(
    hub: HubServer, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(hub, state)
    source = open_source("org/tiny")
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", "0.2")
    hub.hangs_for = 2
    with pytest.raises(HubError, match="did not answer in time"):
        list(source.require_weights().tensors())


def test_offline_without_a_cached_copy_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the model is not in the cache"):
        open_source("org/tiny")
    assert hub.log == []


def test_repository_without_safetensors_says_what_it_has(hub: HubServer) -> None:
    hub.repositories["org/old"] = HubRepository({"config.json": CONFIG_JSON, "pytorch_model.bin": b"old"})
    source = open_source("org/old")
    assert source.config == CONFIG
    with pytest.raises(HubError, match=r"no safetensors in the repository; it has pytorch_model\.bin"):
        list(source.require_weights().tensors())
    hub.repositories["org/gguf"] = HubRepository({"model.gguf": b"GGUF"})
    with pytest.raises(HubError, match="contains no model") as caught:
        open_source("org/gguf")
    assert "model.gguf" in caught.value.hint


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{", (5).to_bytes(8, "little") + b"{zzzz"]
)
def test_damaged_header_on_the_hub_is_named(hub: HubServer, damage: bytes) -> None:
    hub.repositories["org/bad"] = HubRepository({"config.json": CONFIG_JSON, "model.safetensors": damage})
    with pytest.raises(InputError, match=r"org/bad/model\.safetensors"):
        open_source("org/bad")
