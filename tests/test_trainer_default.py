"""The `default` preset: a decoder that sees codes only, in centred and scaled coordinates."""

import numpy as np
import pytest
import torch
from clvq.cache.statistics import SiteStatistics
from clvq.errors import ConfigError
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.decoders import sinusoids
from clvq.trainer.network import Batch, Network, build

D, D_UPPER, CODES = 8, 6, 5


def _config(**changes: str) -> TrainConfig:
    small = {"decoder.layers": "2", "decoder.heads": "2", "decoder.hidden": "12", "encoder.weight": "10"}
    return with_overrides(preset_config("default", lower="hidden.1", upper="hidden.2", codes=CODES), small | changes)


def _network(config: TrainConfig) -> Network:
    generator = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config, d_lower=D, d_upper=D_UPPER)
        for parameter in network.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
        network.quantizer.start(torch.randn(CODES, D_UPPER))
    network.place(
        SiteStatistics.of(3 * generator.normal(size=(50, D)) + 20),
        SiteStatistics.of(5 * generator.normal(size=(50, D_UPPER)) - 9),
    )
    return network


def _batch(extra: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths, longest = torch.tensor([4, 2, 3]), 4 + extra
    mask, real = torch.arange(longest) < lengths[:, None], torch.arange(4) < lengths[:, None]
    lower, upper = torch.full((3, longest, D), 7.0), torch.full((3, longest, D_UPPER), -3.0)
    lower[mask] = (3 * torch.randn(3, 4, D, generator=generator) + 20)[real]
    upper[mask] = (5 * torch.randn(3, 4, D_UPPER, generator=generator) - 9)[real]
    position = torch.zeros(3, longest, dtype=torch.int64)
    position[mask] = (2 * torch.arange(4) + 1).expand(3, -1)[real]
    return Batch(lower=lower, upper=upper, mask=mask, position=position)


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
    assert torch.equal(outputs[0].losses["own"], outputs[1].losses["own"])
    from_codes = network.from_codes(outputs[0].index, batch.mask, batch.position)
    assert torch.equal(from_codes, outputs[0].predicted)


def test_another_code_elsewhere_in_the_text_changes_the_prediction_but_not_the_own_part() -> None:
    network = _network(_config()).eval()
    batch = _batch()
    index = torch.arange(9) % CODES
    changed = index.clone()
    changed[0] = (changed[0] + 1) % CODES
    before, after = (network.from_codes(i, batch.mask, batch.position) for i in (index, changed))
    assert not torch.allclose(before[1:4], after[1:4])
    # The other texts do not see it.
    torch.testing.assert_close(before[4:], after[4:], rtol=1e-5, atol=1e-5)
    own = [network.decoder.alone(network.quantizer.codebook[i]) for i in (index, changed)]
    assert torch.equal(own[0][1:], own[1][1:])


def test_positions_are_those_of_the_text_and_not_of_the_slot() -> None:
    network = _network(_config()).eval()
    batch = _batch()
    index = torch.arange(9) % CODES
    before = network.from_codes(index, batch.mask, batch.position)
    after = network.from_codes(index, batch.mask, batch.position + 3)
    assert not torch.allclose(before, after)


def test_losses_are_means_over_real_entries_in_scaled_coordinates() -> None:
    config = _config()
    network = _network(config).eval()
    batch = _batch()
    output = network(batch)
    scale, mean = network.upper_scale.double().numpy(), network.upper_mean.double().numpy()
    target = (batch.upper[batch.mask].double().numpy() - mean) / scale
    z = network.encode(batch.lower[batch.mask]).detach().double().numpy()
    codes = network.quantizer.codebook.double().numpy()
    index = ((z[:, None] - codes[None]) ** 2).sum(axis=2).argmin(axis=1)
    head, bias = (getattr(network.decoder.head, name).detach().double().numpy() for name in ("weight", "bias"))
    predicted = (output.predicted.detach().double().numpy() - mean) / scale
    expected = {
        "own": ((codes[index] @ head.T + bias - target) ** 2).mean(),
        "context": ((predicted - target) ** 2).mean(),
        "commitment": config.quantizer.commitment * ((z - codes[index]) ** 2).mean(),
        "predictor": 10 * ((z - target) ** 2).mean(),
    }
    assert output.losses.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(output.losses[name].item(), value, rtol=1e-4, err_msg=name)
    alone = network.warm_up(batch)
    np.testing.assert_allclose(alone.losses["predictor"].item(), expected["predictor"] / 10, rtol=1e-4)
    np.testing.assert_allclose(alone.predicted.detach().numpy(), z * scale + mean, rtol=1e-4, atol=1e-4)


def test_the_scale_is_the_root_mean_square_of_the_centred_entries() -> None:
    network = build(_config(), d_lower=D, d_upper=D_UPPER)
    rows = 4 * np.random.default_rng(0).normal(size=(100, D)) + 1000
    network.place(SiteStatistics.of(rows), SiteStatistics.of(np.ones((5, D_UPPER))))
    np.testing.assert_allclose(network.lower_mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(network.lower_scale, np.sqrt(((rows - rows.mean(axis=0)) ** 2).mean()), rtol=1e-6)
    assert network.upper_scale == 1


def test_training_starts_at_a_linear_map_a_plain_head_and_no_context() -> None:
    network = build(_config(), d_lower=D, d_upper=D_UPPER).eval()
    network.quantizer.start(torch.randn(CODES, D_UPPER, generator=torch.Generator().manual_seed(0)))
    batch = _batch()
    rows = batch.lower[batch.mask]
    torch.testing.assert_close(network.encode(rows), network.encoder.linear(rows))
    output = network(batch)
    torch.testing.assert_close(output.predicted, network.quantizer.codebook[output.index])


def test_scaling_and_shifting_a_site_changes_no_code() -> None:
    first, second = _network(_config()).eval(), _network(_config()).eval()
    rows = _batch().lower[_batch().mask]
    second.lower_mean.copy_(1000 * first.lower_mean + 5)
    second.lower_scale.copy_(1000 * first.lower_scale)
    torch.testing.assert_close(first.encode(rows), second.encode(1000 * rows + 5), rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder.heads": "4"},
            "decoder.heads = 4 does not divide the codes' 6 channels: set decoder.heads to one of",
        ),
        ({"quantizer.top_k": "6"}, "quantizer.top_k = 6 is more than the 5 codes"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(_config(**changes), d_lower=D, d_upper=D_UPPER)
    assert message in str(caught.value)


def test_the_paper_preset_has_no_warm_up() -> None:
    config = with_overrides(
        preset_config("paper", lower="hidden.1", upper="hidden.2", codes=CODES), {"fit.warmup_epochs": "1"}
    )
    with pytest.raises(ConfigError, match="'paper' has 'adaptive' and no warm-up"):
        build(config, d_lower=8, d_upper=8)
