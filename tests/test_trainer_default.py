"""The `default` preset: codes that predict the upper row, and a decoder that sees codes only."""

import math
from pathlib import Path

import clvq
import numpy as np
import pytest
import safetensors.numpy
import torch
from clvq.cache.statistics import SiteStatistics
from clvq.errors import ConfigError
from clvq.trainer.concepts import Batch
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.decoders import sinusoids
from clvq.trainer.fit import fit
from clvq.trainer.network import DefaultNetwork, build
from clvq.trainer.run import Run

from .caches import LOWER, UPPER

D, D_UPPER, CODES, HEADS = 8, 6, 5, 2
Weights = dict[str, np.ndarray]


def _config(**changes: str) -> TrainConfig:
    small = {"decoder.layers": "2", "decoder.heads": str(HEADS), "decoder.hidden": "12"}
    return with_overrides(preset_config("default", lower=LOWER, upper=UPPER, codes=CODES), small | changes)


def _build(config: TrainConfig) -> DefaultNetwork:
    network = build(config, d_lower=D, d_upper=D_UPPER)
    assert isinstance(network, DefaultNetwork)
    return network


def _network(config: TrainConfig) -> DefaultNetwork:
    generator = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _build(config)
        # Every weight at random, so that none hides at 0 or 1.
        for parameter in network.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
        network.quantizer.start(torch.randn(CODES, D_UPPER))
        network.own.copy_(torch.randn(CODES, D_UPPER))
    network.place(
        SiteStatistics.of(3 * generator.normal(size=(50, D)) + 20),
        SiteStatistics.of(5 * generator.normal(size=(50, D_UPPER)) - 9),
    )
    return network


def _batch(extra: int = 0) -> Batch:
    """Texts of 4, 2 and 3 rows; what lies outside the mask is not zero."""
    generator = torch.Generator().manual_seed(1)
    lengths, longest = torch.tensor([4, 2, 3]), 4 + extra
    mask, real = torch.arange(longest) < lengths[:, None], torch.arange(4) < lengths[:, None]
    lower, upper = torch.full((3, longest, D), 7.0), torch.full((3, longest, D_UPPER), -3.0)
    lower[mask] = (3 * torch.randn(3, 4, D, generator=generator) + 20)[real]
    upper[mask] = (5 * torch.randn(3, 4, D_UPPER, generator=generator) - 9)[real]
    position, row = torch.zeros(3, longest, dtype=torch.int64), torch.full((3, longest), -1)
    position[mask] = (2 * torch.arange(4) + 1).expand(3, -1)[real]
    row[mask] = torch.arange(9)
    return Batch(lower=lower, upper=upper, target=upper, mask=mask, position=position, row=row)


def _weights(network: DefaultNetwork) -> Weights:
    return {name: value.double().numpy() for name, value in network.state_dict().items()}


def _linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _encoded(lower: np.ndarray, w: Weights) -> np.ndarray:
    """The linear map plus an MLP, before which another one is added to the row."""
    x = (lower - w["lower_mean"]) / w["lower_scale"]
    gelu = np.vectorize(lambda value: value * (1 + math.erf(value / math.sqrt(2))) / 2)

    def mlp(rows: np.ndarray, number: int) -> np.ndarray:
        inner = gelu(_linear(_layer_norm(rows, w, f"encoder.blocks.{number}.0"), w, f"encoder.blocks.{number}.1"))
        return _linear(inner, w, f"encoder.blocks.{number}.4")

    return _linear(x, w, "encoder.linear") + mlp(x + mlp(x, 0), 1)


def _decoded(codes: np.ndarray, position: np.ndarray, w: Weights) -> np.ndarray:
    """Codes of one text, to which a transformer with its norms in front adds what the others say."""
    half = D_UPPER // 2
    angles = position[:, None] / 10_000 ** (np.arange(half) / half)
    hidden = codes + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    size = D_UPPER // HEADS
    for number in range(2):
        name = f"decoder.layers.{number}"
        normed, heads = _layer_norm(hidden, w, f"{name}.norm1"), []
        parts = zip(
            np.split(w[f"{name}.self_attn.in_proj_weight"], 3),
            np.split(w[f"{name}.self_attn.in_proj_bias"], 3),
            strict=True,
        )
        q, k, v = (normed @ matrix.T + bias for matrix, bias in parts)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
        hidden = hidden + _linear(np.concatenate(heads, axis=1), w, f"{name}.self_attn.out_proj")
        inner = np.maximum(_linear(_layer_norm(hidden, w, f"{name}.norm2"), w, f"{name}.linear1"), 0)
        hidden = hidden + _linear(inner, w, f"{name}.linear2")
    return codes + _linear(_layer_norm(hidden, w, "decoder.norm"), w, "decoder.out")


def test_encoder_codes_decoder_and_losses_are_what_numpy_finds() -> None:
    network = _network(_config()).eval()
    batch, w = _batch(), _weights(network)
    lower, upper = (side[batch.mask].double().numpy() for side in (batch.lower, batch.upper))
    target = (upper - w["upper_mean"]) / w["upper_scale"]
    z = _encoded(lower, w)
    np.testing.assert_allclose(network.encode(batch.lower[batch.mask]).detach().numpy(), z, rtol=1e-4, atol=1e-4)
    rows = batch.lower[batch.mask], batch.upper[batch.mask]
    loss = network.row_losses(*rows, total=len(rows[0]))["predictor"]
    assert loss.item() == pytest.approx(((z - target) ** 2).mean(), rel=1e-5)
    index = ((z[:, None] - w["quantizer.codebook"]) ** 2).sum(axis=2).argmin(axis=1)
    ends = np.cumsum(batch.mask.sum(dim=1).numpy())[:-1]
    texts = zip(np.split(w["own"][index], ends), np.split(batch.position[batch.mask].numpy(), ends), strict=True)
    predicted = np.concatenate([_decoded(codes, position, w) for codes, position in texts])
    output = network(batch)
    np.testing.assert_array_equal(output.index.numpy(), index)
    assert output.losses.keys() == {"decoder"}
    assert output.losses["decoder"].item() == pytest.approx(((predicted - target) ** 2).mean(), rel=1e-4)
    raw = predicted * w["upper_scale"] + w["upper_mean"]
    np.testing.assert_allclose(output.predicted.detach().numpy(), raw, rtol=1e-4, atol=1e-3)


def test_what_the_decoder_says_depends_on_the_codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network(_config()).eval()
    batch = _batch()
    codes = network.quantizer.codebook[torch.arange(9) % CODES]
    noise = 0.01 * torch.randn(9, D_UPPER, generator=torch.Generator().manual_seed(0))
    outputs = []
    for rows in (codes, codes + noise):
        monkeypatch.setattr(network, "encode", lambda lower, rows=rows: rows)
        outputs.append(network(batch))
    assert torch.equal(outputs[0].index, outputs[1].index)
    assert torch.equal(outputs[0].predicted, outputs[1].predicted)
    from_codes = network.from_codes(outputs[0].index, batch.mask, batch.position)
    assert torch.equal(from_codes, outputs[0].predicted)


def test_neither_encoder_nor_codes_learn_from_the_decoder() -> None:
    network = _network(_config()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sum(network(_batch()).losses.values()).backward()
    learning = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in network.named_parameters() if name.startswith("decoder.")}
    trained = network.trained_with_codes()
    assert {id(tensor) for tensor in trained} == {id(p) for p in network.decoder.parameters()}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_code_elsewhere_in_the_text_changes_the_prediction_and_other_texts_do_not_see_it() -> None:
    network = _network(_config()).eval()
    batch = _batch()
    index = torch.arange(9) % CODES
    changed = index.clone()
    changed[0] = (changed[0] + 1) % CODES
    before, after = (network.from_codes(i, batch.mask, batch.position) for i in (index, changed))
    assert ((before - after).abs().amax(dim=1)[:4] > 1e-4).all()
    torch.testing.assert_close(before[4:], after[4:], rtol=1e-5, atol=1e-5)


def test_positions_are_those_of_the_text_and_not_of_the_slot() -> None:
    network = _network(_config()).eval()
    batch = _batch()
    index = torch.arange(9) % CODES
    before = network.from_codes(index, batch.mask, batch.position)
    after = network.from_codes(index, batch.mask, batch.position + 3)
    assert not torch.allclose(before, after)


def test_the_lower_site_is_scaled_channel_by_channel_and_the_upper_one_by_one_number() -> None:
    network = _build(_config())
    generator = np.random.default_rng(0)
    spread = np.array([1e-3, 1, 1, 1, 1, 1, 1e2, 1e4])
    lower = spread * generator.normal(size=(100, D)) + 10 * spread
    lower[:, 3] = 7
    upper = spread[:D_UPPER] * generator.normal(size=(100, D_UPPER)) + 1000
    network.place(SiteStatistics.of(lower), SiteStatistics.of(upper))
    deviation = lower.std(axis=0)
    # What does not vary is left as it is.
    deviation[3] = 1
    np.testing.assert_allclose(network.lower_mean, lower.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(network.lower_scale, deviation, rtol=1e-4)
    np.testing.assert_allclose(network.upper_mean, upper.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(network.upper_scale, np.sqrt(((upper - upper.mean(axis=0)) ** 2).mean()), rtol=1e-5)
    network.place(SiteStatistics.of(lower), SiteStatistics.of(np.ones((5, D_UPPER))))
    assert network.upper_scale == 1


def test_scaling_and_shifting_each_channel_of_the_lower_site_changes_no_code() -> None:
    generator = np.random.default_rng(0)
    lower, upper = 3 * generator.normal(size=(200, D)) + 20, 5 * generator.normal(size=(200, D_UPPER)) - 9
    factor, shift = np.array([1e-3, 1e-2, 0.1, 1, 10, 100, 1e3, 1e4]), generator.normal(size=D)
    codes = []
    for rows in (lower, factor * (lower + shift)):
        network = _network(_config()).eval()
        network.place(SiteStatistics.of(rows), SiteStatistics.of(upper))
        with torch.no_grad():
            encoded = network.encode(torch.from_numpy(rows.astype(np.float32)))
        codes.append((encoded, network.quantizer.nearest(encoded)))
    torch.testing.assert_close(codes[0][0], codes[1][0], rtol=1e-3, atol=1e-3)
    assert torch.equal(codes[0][1], codes[1][1])
    assert len(codes[0][1].unique()) > 1


def test_training_starts_at_a_linear_map_and_a_decoder_that_adds_nothing() -> None:
    network = _build(_config()).eval()
    generator = torch.Generator().manual_seed(0)
    network.quantizer.start(torch.randn(CODES, D_UPPER, generator=generator))
    network.own.copy_(torch.randn(CODES, D_UPPER, generator=generator))
    batch = _batch()
    rows = batch.lower[batch.mask]
    linear = network.encoder.linear
    torch.testing.assert_close(network.encode(rows), rows @ linear.weight.T + linear.bias)
    output = network(batch)
    torch.testing.assert_close(output.predicted, network.own[output.index])


def test_the_encoder_drops_units_in_training_only() -> None:
    network = _network(_config())
    rows = _batch().lower[_batch().mask]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (network.train().encode(rows) for _ in range(2))
        assert not torch.equal(first, second)
        network.eval()
        assert torch.equal(network.encode(rows), network.encode(rows))
    still = _network(_config(**{"encoder.dropout": "0"}))
    torch.testing.assert_close(still.train().encode(rows), network.encode(rows))


def test_the_rows_of_a_text_get_their_codes_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are those that are assigned later; a decoder trained on others would be trained on noise."""
    network = _network(_config(**{"encoder.dropout": "0.5"}))
    batch = _batch()
    codes = network.eval()(batch).index
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(10):
            assert torch.equal(network.train()(batch).index, codes)


def test_padding_changes_nothing() -> None:
    network = _network(_config()).eval()
    short, padded = network(_batch()), network(_batch(extra=5))
    assert torch.equal(short.index, padded.index)
    torch.testing.assert_close(short.predicted, padded.predicted, rtol=1e-4, atol=1e-4)
    for name, value in short.losses.items():
        torch.testing.assert_close(value, padded.losses[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_those_of_the_transformer(width: int) -> None:
    position = torch.tensor([[0, 3, 11]])
    half = (width + 1) // 2
    angles = position[0].double().numpy()[:, None] / 10_000 ** (np.arange(half) / half)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
    np.testing.assert_allclose(sinusoids(position, width)[0], expected, rtol=1e-5, atol=1e-6)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build(_config(**{"decoder.heads": "4"}), d_lower=D, d_upper=D_UPPER)
    assert "decoder.heads = 4 does not divide the codes' 6 channels: set decoder.heads to one of 1, 2, 3, 6" in str(
        caught.value
    )


def _trained(cache: clvq.Cache, out: Path, **changes: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    config = _config(**{"fit.epochs": "1", "encoder.epochs": "3", "encoder.rows_per_batch": "32"} | changes)
    report = fit(cache, config, out, device=torch.device("cpu")).report
    return safetensors.numpy.load_file(out / "model.safetensors"), report


def test_what_a_code_says_by_itself_is_the_mean_upper_row_of_its_training_rows(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    tensors, _ = _trained(small_cache, tmp_path, held_out="dev")
    rows = small_cache.rows_of(small_cache.splits(["train"]), special="leading")
    upper = small_cache.vectors(UPPER, rows).astype(np.float64)
    code = Run.from_pretrained(tmp_path).assign(small_cache.vectors(LOWER, rows))
    scale = np.sqrt(((upper - upper.mean(axis=0)) ** 2).mean())
    used = np.unique(code)
    assert len(used) > 2
    for number in used:
        expected = (upper[code == number].mean(axis=0) - upper.mean(axis=0)) / scale
        np.testing.assert_allclose(tensors["network.own"][number], expected, rtol=1e-4, atol=1e-5)


def test_codes_and_encoder_are_the_same_however_long_the_decoder_is_trained(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    short, long = (
        _trained(small_cache, tmp_path / epochs, **{"fit.epochs": epochs, "fit.patience": "9"})[0]
        for epochs in ("1", "4")
    )
    changed = {name for name in short if not np.array_equal(short[name], long[name])}
    assert changed
    assert all(name.startswith("network.decoder.") for name in changed)


def test_in_bfloat16_it_learns_as_much_and_keeps_weights_and_codes_in_float32(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    found = {
        precision: _trained(small_cache, tmp_path / precision, **{"fit.precision": precision, "encoder.epochs": "8"})
        for precision in ("float32", "bfloat16")
    }
    tensors, report = found["bfloat16"]
    assert {str(tensor.dtype) for tensor in tensors.values()} <= {"float32", "int64"}
    # Weights of 8 significant bits would all end in zeros.
    assert (tensors["network.encoder.linear.weight"].view(np.uint32) & 0xFFFF).any()
    assert not np.array_equal(
        tensors["network.encoder.linear.weight"], found["float32"][0]["network.encoder.linear.weight"]
    )
    assert report["own_code_fvu"] == pytest.approx(found["float32"][1]["own_code_fvu"], rel=0.1)
    assert report["decoder_fvu_codes_only"] == pytest.approx(found["float32"][1]["decoder_fvu_codes_only"], rel=0.1)
