"""GGUF files of Llama's near kin: read back as they were, and as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolctl.errors import InputError
from smolctl.model.network import Transformer
from smolctl.model.weights import load_network
from smolctl.sources import open_source
from smolctl.sources.gguf.header import read_header
from smolctl.sources.gguf.model import ROPE_FACTORS
from smolctl.sources.gguf.write import NOT_IN_THE_FILE, require_gguf, write_gguf
from tests.support.kin import CLASSES, KINDS, SCALING, kin_config, kin_network
from tests.support.tokenizer_kinds import trained


def written(kind: str, folder: Path, scheme: str = "f32", **changes: Any) -> tuple[Transformer, Path]:
    network = kin_network(kin_config(kind, vocab_size=300, **changes))
    path = folder / f"{kind}.gguf"
    write_gguf(network.config, network.state_dict().items(), trained(), scheme, path, "tiny")
    return network, path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_reads_back_as_the_model(kind: str, tmp_path: Path) -> None:
    network, path = written(kind, tmp_path)
    source = open_source(str(path))
    assert source.problems == ()
    back = load_network(source)
    ours, theirs = (one.model_dump(exclude=NOT_IN_THE_FILE) for one in (network.config, back.config))
    assert theirs == ours
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        torch.testing.assert_close(back(ids), network(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "head_dim"), [("qwen2", 16), ("qwen3", 128)])  # the sizes that it assumes
def test_transformers_reads_the_same_logits(kind: str, head_dim: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    network, path = written(kind, tmp_path, head_dim=head_dim)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    assert type(theirs).__name__ == CLASSES[kind]
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, network(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_the_same_logits(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    network, path = written(kind, tmp_path)
    theirs = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
    theirs.eval(list(range(100)))
    with torch.inference_mode():
        ours = network(torch.arange(100)[None])[0].numpy()
    assert np.abs(theirs.scores[:100] - ours).max() < 2e-2  # it keeps keys and values in float16


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("smollm3", {"no_rope_layers": (1, 0, 1, 0)}, "every 4th layer"),
        ("scaled llama", {"rope_scaling": {**SCALING, "low_freq_factor": 2.0}}, "low_freq_factor"),
        ("scaled llama", {"rope_theta": 10.0}, "factor"),  # no rotation is slow
    ],
)
def test_what_a_file_cannot_say_is_refused(kind: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        require_gguf(kin_config(kind, **changes), "f32")


def test_factors_that_are_not_llama_3s_are_no_config(tmp_path: Path) -> None:
    _, path = written("scaled llama", tmp_path)
    tensor = next(one for one in read_header(path).tensors if one.name == ROPE_FACTORS)
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 4] = np.float32(3).tobytes()
    path.write_bytes(content)
    assert ROPE_FACTORS in open_source(str(path)).unsupported
