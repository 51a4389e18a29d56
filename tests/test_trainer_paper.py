"""The `paper` preset against the equations written out by hand, in float64 and without torch."""

import numpy as np
import pytest
import torch
from clvq.trainer.concepts import Batch
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.network import Network, build
from clvq.trainer.noise import RowNoise

D, D_UPPER, CODES, HEADS = 8, 6, 5, 2
Weights = dict[str, np.ndarray]


def _config(**changes: str) -> TrainConfig:
    small = {"decoder.layers": "2", "decoder.heads": str(HEADS), "decoder.hidden": "12"}
    still = {"decoder.dropout": "0", "quantizer.top_k": "1"}
    return with_overrides(
        preset_config("paper", lower="hidden.1", upper="hidden.2", codes=CODES), small | still | changes
    )


def _network(config: TrainConfig) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config, d_lower=D, d_upper=D_UPPER)
        # Every weight at random, so that none hides at 0 or 1.
        for parameter in network.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
        network.quantizer.start(2 * torch.randn(CODES, D))
    return network


def _batch(extra: int = 0) -> Batch:
    """Texts of 4, 2 and 3 rows; what lies outside the mask is not zero."""
    generator = torch.Generator().manual_seed(1)
    lengths, longest = torch.tensor([4, 2, 3]), 4 + extra
    mask = torch.arange(longest) < lengths[:, None]
    real = torch.arange(4) < lengths[:, None]
    lower, upper = torch.full((3, longest, D), 7.0), torch.full((3, longest, D_UPPER), -3.0)
    lower[mask] = 2 * torch.randn(3, 4, D, generator=generator)[real]
    upper[mask] = torch.randn(3, 4, D_UPPER, generator=generator)[real]
    row = torch.full(mask.shape, -1)
    row[mask] = torch.arange(9)
    return Batch(
        lower=lower,
        upper=upper,
        target=upper,
        mask=mask,
        position=torch.arange(longest).expand(3, -1).clone(),
        row=row,
    )


def _layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(query: np.ndarray, memory: np.ndarray, w: Weights, name: str) -> np.ndarray:
    """Multi-head attention of one text, all of whose rows are real."""
    matrices = np.split(w[f"{name}.in_proj_weight"], 3)
    biases = np.split(w[f"{name}.in_proj_bias"], 3)
    q, k, v = (x @ m.T + b for x, m, b in zip((query, memory, memory), matrices, biases, strict=True))
    size, heads = D // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / np.sqrt(size)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
    return np.concatenate(heads, axis=1) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def _decoded(codes: np.ndarray, memory: np.ndarray, w: Weights, layers: int) -> np.ndarray:
    hidden = codes
    for number in range(layers):
        name = f"decoder.layers.{number}"
        hidden = _layer_norm(hidden + _attention(hidden, hidden, w, f"{name}.self_attn"), w, f"{name}.norm1")
        hidden = _layer_norm(hidden + _attention(hidden, memory, w, f"{name}.multihead_attn"), w, f"{name}.norm2")
        inner = np.maximum(hidden @ w[f"{name}.linear1.weight"].T + w[f"{name}.linear1.bias"], 0)
        outer = inner @ w[f"{name}.linear2.weight"].T + w[f"{name}.linear2.bias"]
        hidden = _layer_norm(hidden + outer, w, f"{name}.norm3")
    return hidden @ w["decoder.out.weight"].T + w["decoder.out.bias"]


def _encoded(x: np.ndarray, w: Weights) -> np.ndarray:
    mix = 0.5 / (1 + np.exp(-w["encoder.mix"]))
    adapted = x @ w["encoder.adapt.weight"].T + w["encoder.adapt.bias"]
    return (1 - mix) * x + mix * _layer_norm(adapted, w, "encoder.norm")


def _encoded_rows(network: Network, batch: Batch) -> np.ndarray:
    weights = {name: value.double().numpy() for name, value in network.state_dict().items()}
    return _encoded(batch.lower[batch.mask].double().numpy(), weights)


def test_forward_losses_and_codebook_equal_the_published_equations_over_several_steps() -> None:
    config = _config()
    network = _network(config).train()
    batch = _batch()
    w = {name: value.double().numpy().copy() for name, value in network.state_dict().items()}
    codebook, count, total = w["quantizer.codebook"], w["quantizer.count"], w["quantizer.total"]
    texts = [batch.lower[i][batch.mask[i]].double().numpy() for i in range(3)]
    upper = batch.upper[batch.mask].double().numpy()
    for _ in range(4):
        output = network(batch, noise=RowNoise(0, batch.row[batch.mask]))
        rows = [_encoded(text, w) for text in texts]
        z = np.concatenate(rows)
        index = ((z[:, None] - codebook[None]) ** 2).sum(axis=2).argmin(axis=1)
        onehot = np.eye(CODES)[index]
        count = 0.99 * count + 0.01 * onehot.sum(axis=0)
        count = (count + 1e-5) / (count.sum() + CODES * 1e-5) * count.sum()
        total = 0.99 * total + 0.01 * onehot.T @ z
        codebook = total / count[:, None]
        q = codebook[index]
        commitment = 0.1 * ((z - q) ** 2).mean()
        parts = np.split(q, np.cumsum([len(text) for text in texts])[:-1])
        predicted = np.concatenate([_decoded(a, b, w, config.decoder.layers) for a, b in zip(parts, rows, strict=True)])
        np.testing.assert_array_equal(output.index.numpy(), index)
        np.testing.assert_allclose(output.predicted.detach().numpy(), predicted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(output.losses["commitment"].item(), commitment, rtol=1e-5)
        np.testing.assert_allclose(output.losses["reconstruction"].item(), ((predicted - upper) ** 2).mean(), rtol=1e-4)
        np.testing.assert_allclose(network.quantizer.codebook.numpy(), codebook, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(network.quantizer.count.numpy(), count, rtol=1e-5)


def test_codes_are_drawn_among_the_nearest_and_differ_from_step_to_step() -> None:
    network = _network(_config(**{"quantizer.top_k": "3", "quantizer.temperature": "10"})).train()
    batch = _batch()
    drawn = []
    for step in range(20):
        z = _encoded_rows(network, batch)
        distances = ((z[:, None] - network.quantizer.codebook.double().numpy()[None]) ** 2).sum(axis=2)
        near = np.argsort(distances, axis=1)[:, :3]
        index = network(batch, noise=RowNoise(step, batch.row[batch.mask])).index.numpy()
        assert (near == index[:, None]).any(axis=1).all()
        drawn.append(tuple(index))
    assert len(set(drawn)) > 1


def test_the_encoder_starts_as_published() -> None:
    network = build(_config(), d_lower=D, d_upper=D_UPPER)
    row = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    x = row.double().numpy()
    mix = 0.5 / (1 + np.exp(-0.2))
    assert mix == pytest.approx(0.2749, abs=1e-4)
    centred = x - x.mean(axis=1, keepdims=True)
    expected = (1 - mix) * x + mix * centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(network.encode(row).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_decoder_layers_do_not_start_as_copies_of_one() -> None:
    first, second = build(_config(), d_lower=D, d_upper=D_UPPER).decoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_the_gradient_skips_the_codebook_and_reaches_the_encoder() -> None:
    network = _network(_config()).train()
    sum(network(_batch()).losses.values()).backward()
    assert network.encoder.adapt.weight.grad.abs().max() > 0
    assert not network.quantizer.codebook.requires_grad


def test_the_published_decoder_sees_the_unquantised_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published bypass: the same codes, other vectors, another reconstruction."""
    network = _network(_config()).eval()
    batch = _batch()
    codes = network.quantizer.codebook[torch.arange(9) % CODES]
    noise = 0.01 * torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    outputs = []
    for rows in (codes, codes + noise):
        monkeypatch.setattr(network, "encode", lambda lower, rows=rows: rows)
        outputs.append(network(batch))
    assert torch.equal(outputs[0].index, outputs[1].index)
    assert not torch.allclose(outputs[0].predicted, outputs[1].predicted)


def test_padding_changes_nothing() -> None:
    network = _network(_config()).eval()
    short, padded = network(_batch()), network(_batch(extra=5))
    assert torch.equal(short.index, padded.index)
    torch.testing.assert_close(short.predicted, padded.predicted, rtol=1e-5, atol=1e-5)
    for name, value in short.losses.items():
        torch.testing.assert_close(value, padded.losses[name], rtol=1e-5, atol=1e-6)


def test_a_row_sees_the_rows_after_it_as_well_as_those_before() -> None:
    """No causal mask, as in the authors' later runs."""
    network = _network(_config()).eval()
    index, mask = torch.arange(4) % CODES, torch.ones(1, 4, dtype=torch.bool)
    before = network.from_codes(index, mask, torch.arange(4)[None])
    for changed in (0, 3):
        other = index.clone()
        other[changed] = 4
        after = network.from_codes(other, mask, torch.arange(4)[None])
        assert ((before - after).abs().amax(dim=1) > 1e-6).all()


def test_order_means_nothing_without_positions() -> None:
    network = _network(_config()).eval()
    index, mask = torch.arange(4), torch.ones(1, 4, dtype=torch.bool)
    order = torch.tensor([2, 0, 3, 1])
    plain, mixed = (network.from_codes(i, mask, torch.arange(4)[None]) for i in (index, index[order]))
    torch.testing.assert_close(plain[order], mixed, rtol=1e-5, atol=1e-5)


def test_a_real_row_of_zeros_is_a_row() -> None:
    """The published code took every zero vector for padding."""
    network = _network(_config()).eval()
    batch = _batch()
    batch.lower[0, 1] = 0
    assert len(network(batch).index) == 9
