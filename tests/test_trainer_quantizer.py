"""The codebook: distances, draws, running means, revival."""

import numpy as np
import pytest
import torch
from clvq.trainer.config import QuantizerConfig, preset_config
from clvq.trainer.quantizer import Quantizer
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

CODES, WIDTH = 7, 5


def _settings(**changes: float | bool) -> QuantizerConfig:
    """Nothing drawn and nothing revived, unless asked for."""
    plain = preset_config("default", lower="hidden.1", upper="hidden.2", codes=CODES).quantizer.model_dump()
    return QuantizerConfig(**plain | {"top_k": 1, "revive_after": 0} | changes)


def _quantizer(seed: int = 0, **changes: float | bool) -> Quantizer:
    quantizer = Quantizer(_settings(**changes), width=WIDTH)
    quantizer.start(torch.randn(CODES, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return quantizer


def _rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_the_codebook_follows_as_vector_quantize_pytorch_does() -> None:
    ours = _quantizer(decay=0.9)
    theirs = VectorQuantize(dim=WIDTH, codebook_size=CODES, decay=0.9, eps=1e-5, threshold_ema_dead_code=0)
    theirs._codebook.embed.data.copy_(ours.codebook[None])
    theirs._codebook.embed_avg.data.copy_(ours.codebook[None])
    theirs._codebook.cluster_size.data.fill_(1)
    ours.train()
    theirs.train()
    for step in range(8):
        rows = _rows(50, seed=step)
        mine = ours.forward(rows)
        _, index, _ = theirs(rows[None])
        assert torch.equal(mine.index, index[0])
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.count, theirs._codebook.cluster_size[0], rtol=1e-5, atol=1e-6)


def test_distances_keep_their_digits_under_a_large_common_mean() -> None:
    quantizer = _quantizer()
    shift = torch.full((WIDTH,), 20_000.0)
    rows = _rows(30) + shift
    quantizer.start(quantizer.codebook + shift)
    exact = torch.cdist(rows.double(), quantizer.codebook.double()).square()
    torch.testing.assert_close(quantizer.distances(rows).double(), exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(quantizer.nearest(rows), exact.argmin(dim=1))


@pytest.mark.parametrize("relative", [False, True])
def test_codes_are_drawn_from_the_nearest_ones_with_the_softmax_of_their_distances(relative: bool) -> None:
    quantizer = _quantizer(top_k=3, temperature=0.7, relative_temperature=relative)
    row = _rows(1)
    distances = quantizer.distances(row)
    draws = 40_000
    generator = torch.Generator().manual_seed(3)
    drawn = quantizer.draw(distances.expand(draws, -1), generator=generator)
    exact = distances[0].double().numpy()
    near = np.argsort(exact)[:3]
    unit = exact.min() if relative else 1.0
    chances = np.exp(-(exact[near] - exact.min()) / (0.7 * unit))
    chances /= chances.sum()
    found = np.bincount(drawn.numpy(), minlength=CODES) / draws
    assert set(np.flatnonzero(found)) <= set(near)
    # Five standard deviations of a share counted over so many draws.
    assert np.abs(found[near] - chances).max() < 5 * 0.5 / np.sqrt(draws)


def test_the_same_generator_draws_the_same_codes() -> None:
    distances = _quantizer(top_k=3).distances(_rows(100))
    first, second = (_quantizer(top_k=3).draw(distances, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_in_evaluation_the_nearest_code_is_taken_and_nothing_moves() -> None:
    quantizer = _quantizer(top_k=3, revive_after=1).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    rows = _rows(40)
    output = quantizer.forward(rows)
    assert torch.equal(output.index, torch.cdist(rows, before["codebook"]).argmin(dim=1))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_leaves_the_quantiser_is_the_code_exactly_and_the_gradient_goes_to_the_row() -> None:
    quantizer = _quantizer().train()
    rows = (1e4 * _rows(20)).requires_grad_()
    output = quantizer.forward(rows)
    assert torch.equal(output.straight, quantizer.codebook[output.index])
    output.straight.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_a_code_unused_for_long_is_put_on_a_row_and_its_running_means_are_reset() -> None:
    quantizer = _quantizer(revive_after=3).train()
    far = quantizer.codebook.clone()
    far[2] = 1e3
    quantizer.start(far)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        assert quantizer.idle[2] == step
        rows = _rows(50, seed=step)
        quantizer.forward(rows, generator=generator)
    distances = torch.cdist(quantizer.codebook[2][None], rows)
    assert distances.min() == 0
    assert torch.equal(quantizer.total[2], quantizer.codebook[2])
    assert quantizer.count[2] == 1
    assert quantizer.idle[2] == 0
    assert 2 in quantizer.nearest(rows)


def test_without_revival_an_unused_code_keeps_its_direction() -> None:
    quantizer = _quantizer().train()
    far = quantizer.codebook.clone()
    far[2] = 1e3
    quantizer.start(far)
    for step in range(20):
        quantizer.forward(_rows(50, seed=step))
    torch.testing.assert_close(quantizer.codebook[2], far[2], rtol=1e-3, atol=0)


def test_as_published_the_smoothed_counts_are_stored_and_unused_codes_shrink() -> None:
    raw, published = (_quantizer(smoothed_counts=smoothed, epsilon=0.01).train() for smoothed in (False, True))
    far = raw.codebook.clone()
    far[2] = 1e3
    for quantizer in (raw, published):
        quantizer.start(far)
        for step in range(600):
            quantizer.forward(_rows(50, seed=step))
    assert published.count[2] > 10 * raw.count[2]


def test_rows_that_lie_on_their_codes_are_drawn_without_dividing_by_zero() -> None:
    quantizer = _quantizer(top_k=3, relative_temperature=True, revive_after=1).train()
    rows = quantizer.codebook[:2].clone()
    output = quantizer.forward(rows, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(quantizer.codebook).all()
    assert torch.isfinite(output.commitment)
