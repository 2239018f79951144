"""Linear layers that are replaced: by PyTorch's `quantize_dynamic`, by ours, by an adapter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.ao.nn.quantized.dynamic as quantized
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from smolctl.model.cache import KVCache
from smolctl.model.dynamic import PerTokenLinear, silence
from smolctl.model.layers import is_plain
from smolctl.model.network import Transformer
from smolctl.sources.quantized.scaled import ScaledMatrix
from tests.support.instruction_sets import AVX2, answers, computed_with
from tests.support.tiny_models import tiny_network

IDS = torch.arange(24)[None]


def network_of(tied: bool = True) -> Transformer:
    return tiny_network(1, tie_word_embeddings=tied, initializer_range=0.1)


def bytes_of(network: nn.Module) -> int:
    tensors = [value for value in network.state_dict().values() if isinstance(value, Tensor)]
    packed = [layer.weight() for layer in network.modules() if isinstance(layer, quantized.Linear)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *packed))


@pytest.mark.parametrize("tied", [True, False])
def test_stock_quantize_dynamic_quantizes_every_linear_layer_and_the_network_uses_it(tied: bool) -> None:
    network = network_of(tied)
    before = network(IDS)
    with silence():
        changed = quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    layers = {name for name, module in changed.named_modules() if isinstance(module, quantized.Linear)}
    assert len(layers) == 7 * network.config.num_hidden_layers + (not tied)
    assert not any(isinstance(module, nn.Linear) for module in changed.modules())
    calls: Counter[str] = Counter()
    for name in layers:
        changed.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    after = changed(IDS)
    assert calls == Counter(layers)
    assert not torch.equal(before, after)
    assert (before - after).norm() < 0.1 * before.norm()
    matrices = sum(tensor.numel() for name, tensor in network.state_dict().items() if "proj" in name)
    head = 0 if tied else network.head_weight.numel()
    saved = 3 * (matrices + head) - 12 * len(layers)  # each has a scale and a zero point
    assert bytes_of(network) - bytes_of(changed) == saved
    # A tied head is the token table, which is no linear layer and stays as it is.
    assert torch.equal(changed.model.embed_tokens.weight, network.model.embed_tokens.weight)
    cache = KVCache.allocate(network.config, 1, 24, torch.float32, torch.device("cpu"))
    assert (changed.next_token_logits(IDS, cache) - before[:, -1]).norm() < 0.1 * before[:, -1].norm()
    losses = changed.token_losses(IDS[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(losses, network.token_losses(IDS[:, :-1], IDS[:, 1:]), rtol=0.1, atol=0.5)


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition, as fine-tuning libraries put it in a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.down(x))
        frozen: Tensor = self.layer(x)
        return frozen + added


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"])
def test_a_layer_that_was_replaced_is_called_and_trained(name: str) -> None:
    network = network_of(tied=False)
    expected = network(IDS)
    for path, module in list(network.named_modules()):
        if path.endswith(name):
            assert is_plain(module)
            network.set_submodule(path, Adapter(module))
    adapters = [module for module in network.modules() if isinstance(module, Adapter)]
    assert not torch.allclose(network(IDS), expected)
    network(IDS).sum().backward()
    assert all(adapter.down.weight.grad is not None for adapter in adapters)
    for adapter in adapters:
        nn.init.zeros_(adapter.up.weight)
    torch.testing.assert_close(network(IDS), expected)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_of_linear_layers_are_called(training: bool) -> None:
    network = network_of(tied=False)
    expected = network(IDS)
    seen: Counter[tuple[int, ...]] = Counter()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.update([tuple(inputs[0].shape)]))
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(network(IDS), expected)
    layers = network.config.num_hidden_layers
    assert seen == {(1, 24, 32): 6 * layers + 1, (1, 24, 48): layers}


# --- arithmetic -------------------------------------------------------------------------------------


def layer_of(kind: type[quantized.Linear], matrix: ScaledMatrix) -> quantized.Linear:
    rows, columns = matrix.shape
    with silence():
        layer = kind(columns, rows, bias_=False, dtype=torch.qint8)
        layer.set_weight_bias(matrix.quantized(), None)
    return layer


def random_matrix(rows: int, columns: int, seed: int) -> ScaledMatrix:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return ScaledMatrix(values.numpy(), torch.rand(rows, generator=generator).numpy())


def test_activation_scales_per_token_survive_an_outlier() -> None:
    matrix = random_matrix(16, 32, 0)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 3_000.0  # what the first token does to down_proj's input in SmolLM2
    exact = x @ torch.from_numpy(matrix.dequantize()).T
    layers = [layer_of(kind, matrix) for kind in (quantized.Linear, PerTokenLinear)]
    errors = [float((layer(x) - exact)[1:].norm() / exact[1:].norm()) for layer in layers]
    assert errors[0] > 0.9  # everything but the outlier rounds to nothing
    assert errors[1] < 1e-3


@pytest.mark.parametrize("engine", torch.backends.quantized.supported_engines)
@given(st.data())
def test_a_value_moves_by_half_a_second_digit_at_most(engine: str, data: st.DataObject) -> None:
    if engine == "none":
        pytest.skip("no kernels")
    rows, columns, tokens = (data.draw(st.integers(low, high)) for low, high in ((1, 40), (2, 200), (1, 9)))
    matrix = random_matrix(rows, columns, data.draw(st.integers(0, 999)))
    x = torch.randn(1, tokens, columns, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-6, 6, tokens)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.quantized, "engine", engine)
        found = layer_of(PerTokenLinear, matrix)(x)
    weights = torch.from_numpy(matrix.dequantize())
    exact = x.double() @ weights.double().T
    steps = x.abs().amax(-1, keepdim=True) / 63 / 126 / 2
    bound = 1.01 * steps * weights.abs().sum(-1) + 1e-5 * exact.abs()
    assert ((found - exact).abs() <= bound).all()


def test_matrices_of_integers_give_the_same_answers_on_every_cpu() -> None:
    """What a verdict or a card says of a quantized model holds where it is used too, not only where made."""
    ours, theirs = answers(), computed_with(AVX2)
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
        error = (theirs[name] - expected).norm() / expected.norm()
        assert error < (0.03 if "native" in name else 1e-3), name  # one build multiplies in bfloat16
    error = (ours["per-token"] - ours["int8 torch"]).norm() / ours["int8 torch"].norm()
    assert error < 0.05
