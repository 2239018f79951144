"""Models whose files hold what no model has: each is one error that names the key, before memory is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl.data.tokenizer.tokenizer import Tokenizer, choose_tokenizer, load_tokenizer
from smolctl.errors import HubError, InputError
from smolctl.hub.identity import read_identity
from smolctl.inspection import inspect
from smolctl.model.weights import initialize
from smolctl.quantization.build import read_tensors
from smolctl.sources import open_source
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.huggingface.config import from_huggingface_config, to_huggingface_config
from smolctl.sources.huggingface.safetensors_file import read_weight_map
from smolctl.sources.huggingface.tokenizer import read_backend
from tests.support.checkpoints import checkpoint_content
from tests.support.gguf_files import write_gguf
from tests.support.model_folders import llama_folder
from tests.support.tiny_models import tiny_network, tiny_tokenizer, write_folder

CONFIG = to_huggingface_config(tiny_network(position_embedding="rope", residual_scale=1.0).config)


def each(*values: Any) -> tuple[Any, ...]:
    return values


def at(content: Any, path: str, value: Any) -> Any:
    """A copy of nested values with another one at a dotted path."""
    content = json.loads(json.dumps(content))
    *above, last = path.split(".")
    holder = content
    for key in above:
        holder = holder[int(key) if isinstance(holder, list) else key]
    holder[int(last) if isinstance(holder, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("architectures", "rope_scaling") for value in each(5, "x", True)),
        *(("architectures", value) for value in each({"a": 1}, [5], [["LlamaForCausalLM"]])),
        *(("model_type", value) for value in each(5, ["llama"], {})),
        *((key, 2**62) for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")),
        *((key, 2**62) for key in ("max_position_embeddings", "num_attention_heads", "num_hidden_layers")),
        *((key, 10**9) for key in ("vocab_size", "bos_token_id", "num_hidden_layers")),
        *((key, 0) for key in ("head_dim", "num_key_value_heads", "max_position_embeddings")),
        *((key, 10**99) for key in ("intermediate_size", "eos_token_id")),
        *((key, [[1]]) for key in ("eos_token_id", "bos_token_id")),
    ],
    ids=str,
)
def test_a_config_that_no_model_has_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"config\.json: {key}") as caught:
        from_huggingface_config(at(CONFIG, key, value), "config.json")
    assert len(caught.value.message) < 200
    assert caught.value.hint


def test_a_base_of_zero_is_not_taken_for_one_that_is_left_out() -> None:
    with pytest.raises(InputError, match=r"config\.json: rope_theta: .* greater than 0"):
        from_huggingface_config(at(CONFIG, "rope_parameters.rope_theta", 0), "config.json")


def test_an_empty_kind_of_rope_is_not_taken_for_one_that_is_left_out() -> None:
    reason = from_huggingface_config(at(CONFIG, "rope_parameters.rope_type", ""), "config.json")[1]
    assert "rope scaling" in reason


def test_weights_that_no_machine_holds_are_refused_before_memory_is_taken() -> None:
    sizes = {"hidden_size": 2**20, "intermediate_size": 2**20, "vocab_size": 2**24}
    config = from_huggingface_config({**CONFIG, **sizes, "head_dim": 2}, "here")[0]
    assert config is not None
    with pytest.raises(InputError, match="this machine has"):
        initialize(config, 0)


TOKENIZER = json.loads(tiny_tokenizer().backend.to_str())


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        *(("added_tokens", value, "added_tokens") for value in each(5, True, {"id": 1}, "x", [5])),
        *(
            ("added_tokens.0.id", value, r"added_tokens\.0\.id")
            for value in (10**9, 2**62, "1", -1, None, True)
        ),
        *(("added_tokens.0.content", value, r"added_tokens\.0\.content") for value in each(5, None)),
        *(("model", value, "model") for value in each(5, [], "x")),
        *(
            ("model.vocab", value, r"model\.vocab")
            for value in (5, "x", [5], {"a": "b"}, {"a": 10**9}, {"a": -1})
        ),
    ],
    ids=str,
)
def test_a_tokenizer_that_is_none_names_its_key(path: str, value: Any, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(at(TOKENIZER, path, value)))
    with pytest.raises(InputError, match=rf"tokenizer\.json: {key}"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("value", ["2", [[1]], 2**62, 1.5, {"a": 1}])
def test_special_ids_that_are_none_name_their_key(value: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id") as caught:
        load_tokenizer(str(folder))
    assert caught.value.hint


def test_the_old_spelling_of_no_token_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "pad_token_id": -1}))
    (folder / "generation_config.json").write_text('{"pad_token_id": -1, "eos_token_id": [2, -1]}')
    files = open_source(str(folder)).require_tokenizer()
    assert files.pad_token_id is None
    assert files.end_token_ids == (2,)


PANICS: dict[str, tuple[str, Any]] = {
    "while it is read": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "while it divides": ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "at an unknown word": ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}),
    "while it ends": (
        "post_processor",
        {
            **{"type": "TemplateProcessing", "pair": [], "special_tokens": {}},
            "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
        },
    ),
}


@pytest.mark.parametrize("when", PANICS)
def test_a_panic_of_the_tokenizers_library_is_an_error_of_ours(
    when: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"here: not a tokenizer\.json"):
        read_backend(json.dumps(at(TOKENIZER, *PANICS[when])), "here")
    assert capfd.readouterr().err == ""


def test_dropout_of_merges_is_left_to_the_training_of_the_tokenizer() -> None:
    backend = read_backend(json.dumps(at(TOKENIZER, "model.dropout", 0.9)), "here")
    assert len({tuple(backend.encode("the cat sat on the mat").ids) for _ in range(9)}) == 1


def test_an_id_that_no_table_has_is_refused() -> None:
    with pytest.raises(InputError, match="has the token id 4,294,967,295"):
        read_backend(json.dumps(at(TOKENIZER, "model.vocab.a", 2**32 - 1)), "here")


@pytest.mark.parametrize(
    "content",
    [
        *(
            {"weight_map": {"a": name}}
            for name in ("x" * 300, "ß" * 200, "nul\0", "line\n", "", 5, None, ["a"])
        ),
        *({"weight_map": value} for value in each(5, [], None)),
        *({}, {"weight_map": {"a": "b"}, "metadata": 10**200}),
    ],
    ids=lambda content: str(content)[:40],
)
def test_an_index_that_is_none_names_its_key(content: Any) -> None:
    with pytest.raises(
        InputError, match=r"index\.json: (weight_map|metadata|names a file outside)"
    ) as caught:
        read_weight_map(json.dumps(content).encode(), "index.json")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "name", ["tokenizer.ggml.eos_token_id", "tokenizer.chat_template", "tokenizer.ggml.merges"]
)
def test_gguf_metadata_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    network = tiny_network(vocab_size=tokenizer.vocab_size, position_embedding="rope", residual_scale=1.0)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [str(tokenizer.token(i)) for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.merges": ["a b"],
        name: 3.5,
    }
    config = network.config.model_copy(update={"eos_token_id": None})
    path = write_gguf(tmp_path / "x.gguf", config, network.state_dict(), metadata=metadata)
    with pytest.raises(InputError, match=r"x\.gguf"):
        open_source(str(path)).require_tokenizer()


STRANGE: dict[str, Callable[[], Any]] = {
    "without content": lambda: torch.empty(96, 64, device="meta"),
    "one number repeated": lambda: torch.zeros(1).expand(2**30, 64),
    "sparse": lambda: torch.zeros(96, 64).to_sparse(),
    "complex": lambda: torch.zeros(96, 64, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_checkpoint_of_strange_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    content = checkpoint_content()
    content["state_dict"]["network.model.embed_tokens.weight"] = STRANGE[kind]()
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"embed_tokens\.weight is not a tensor"):
        open_source(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("change", [{"tokenizer_json": 5}, {"eos_token_id": "x"}, {"end_token_ids": [2**40]}])
def test_a_damaged_tokenizer_in_a_checkpoint_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    inside = {"tokenizer_json": json.dumps(TOKENIZER), **change}
    torch.save(checkpoint_content(tokenizer=inside), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=f"tokenizer in it is damaged.*{next(iter(change))}"):
        open_source(str(tmp_path / "x.ckpt")).require_tokenizer()
    later = {"tokenizer_json": json.dumps(TOKENIZER), "a_later_key": 1}
    torch.save(checkpoint_content(tokenizer=later), tmp_path / "x.ckpt")
    files = open_source(str(tmp_path / "x.ckpt")).require_tokenizer()
    assert Tokenizer.from_files(files).vocab_size
    assert isinstance(files, TokenizerFiles)


def test_a_tensor_that_is_missing_is_named_by_whoever_needs_it_and_by_whoever_only_looks(
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    folder = llama_folder(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")
    source = open_source(str(folder))
    assert "missing model.layers.0.mlp.up_proj.weight" in inspect(source).problems
    with pytest.raises(InputError, match=r"missing model\.layers\.0\.mlp\.up_proj\.weight"):
        read_tensors(source)


@pytest.mark.parametrize(
    "answer",
    [
        {"siblings": 5},
        {"siblings": [5]},
        {"siblings": [{"rfilename": 5}]},
        {"sha": 5},
        {"sha": "../../etc"},
        [],
        "x",
    ],
    ids=str,
)
def test_an_answer_that_is_not_a_hubs_is_named(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolctl.hub.connection import Fetched
    from smolctl.sources import hub

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    content = json.dumps(answer).encode()
    monkeypatch.setattr(hub, "fetch", lambda *_: Fetched(content, 0, len(content)))
    with pytest.raises(HubError, match=r"127\.0\.0\.1") as caught:
        hub.Repository("me/x", None).info()
    assert "Hub" in caught.value.hint


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"name": 5}, {"name": "me", "orgs": 5}, {"name": "me", "auth": 5}]
)
def test_an_answer_about_a_token_that_is_not_a_hubs_is_named(answer: Any) -> None:
    with pytest.raises(HubError, match="the answer about the token"):
        read_identity(answer)


@pytest.mark.parametrize(
    "held_out", [{"tokens": 5}, {"loss": "1"}, {"document_end": "x"}, {"tokens": torch.zeros(3)}]
)
def test_a_recorded_loss_that_is_none_is_refused(held_out: dict[str, Any], tmp_path: Path) -> None:
    recorded = {"tokens": torch.zeros(1, 3, dtype=torch.int32), "loss": 1.0, "document_end": None}
    torch.save(checkpoint_content(smolctl={"held_out": recorded | held_out}), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="the loss that it records is damaged"):
        open_source(str(tmp_path / "x.ckpt"))


def test_a_tokenizer_of_thousands_of_digits_is_none() -> None:
    with pytest.raises(InputError, match="expected train:N"):
        choose_tokenizer(f"train:{'9' * 5_000}", lambda: iter(()), 300, print)
