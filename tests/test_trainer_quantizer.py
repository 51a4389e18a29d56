"""The codebook: distances, draws, running means, revival."""

from itertools import permutations

import numpy as np
import pytest
import torch
from clvq.trainer.config import EmaQuantizer
from clvq.trainer.noise import RowNoise
from clvq.trainer.quantizer import Codebook, EmaCodebook, mean_square
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

CODES, WIDTH = 7, 5


def _settings(**changes: float | bool) -> EmaQuantizer:
    """Nothing drawn and nothing revived, unless asked for."""
    plain = {"decay": 0.99, "epsilon": 1e-5, "smoothed_counts": False, "commitment": 0.1, "temperature": 1.0}
    return EmaQuantizer(**{"kind": "ema", "codes": CODES, "top_k": 1, "revive_after": 0} | plain | changes)


def _quantizer(seed: int = 0, **changes: float | bool) -> EmaCodebook:
    quantizer = EmaCodebook(_settings(**changes), width=WIDTH)
    quantizer.start(torch.randn(CODES, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return quantizer


def _rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def _noise(count: int, key: int = 0) -> RowNoise:
    return RowNoise(key, torch.arange(count))


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


@pytest.mark.parametrize("temperature", [0.2, 0.7, 5.0])
def test_codes_are_drawn_from_the_nearest_ones_with_the_softmax_of_their_distances(temperature: float) -> None:
    quantizer = _quantizer(top_k=3, temperature=temperature)
    row = _rows(1)
    draws = 40_000
    drawn = quantizer.draw(quantizer.distances(row).expand(draws, -1), _noise(draws, key=3))
    exact = ((row.double().numpy() - quantizer.codebook.double().numpy()) ** 2).sum(axis=1)
    near = np.argsort(exact)[:3]
    chances = np.exp(-(exact[near] - exact.min()) / temperature)
    chances /= chances.sum()
    found = np.bincount(drawn.numpy(), minlength=CODES)
    assert set(np.flatnonzero(found)) <= set(near)
    # Five standard deviations of a share counted over so many draws.
    assert (np.abs(found[near] / draws - chances) <= 5 * np.sqrt(chances * (1 - chances) / draws) + 1 / draws).all()


def test_the_same_key_draws_the_same_codes_and_another_key_others() -> None:
    quantizer = _quantizer(top_k=3, temperature=5.0)
    distances = quantizer.distances(_rows(100))
    first, second, third = (quantizer.draw(distances, _noise(100, key=key)) for key in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_row_draws_the_same_code_wherever_it_stands_in_a_batch() -> None:
    quantizer = _quantizer(top_k=3, temperature=5.0)
    distances, order = quantizer.distances(_rows(100)), torch.arange(99, -1, -1)
    assert torch.equal(
        quantizer.draw(distances[order], RowNoise(5, order)).flip(0), quantizer.draw(distances, _noise(100, key=5))
    )


def test_without_noise_the_nearest_code_is_taken_and_none_is_revived() -> None:
    quantizer = _quantizer(top_k=3, temperature=5.0, revive_after=1).train()
    codes = quantizer.codebook.clone()
    codes[2] = 1e3
    quantizer.start(codes)
    rows = _rows(40)
    assert torch.equal(quantizer.forward(rows).index, torch.cdist(rows, codes).argmin(dim=1))
    assert quantizer.codebook[2].min() > 900


def test_the_nearest_code_is_the_same_in_portions_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = Codebook(CODES, width=WIDTH)
    codebook.start(_rows(CODES, seed=0))
    rows = _rows(100)
    expected = ((rows.double()[:, None] - codebook.codebook.double()) ** 2).sum(dim=2).argmin(dim=1)
    assert torch.equal(codebook.nearest(rows), expected)
    # One row at a time even where a row's distances are more than may be held.
    for held in (CODES * 30, CODES * 7 + 1, 1):
        monkeypatch.setattr("clvq.trainer.quantizer._DISTANCES", held)
        assert torch.equal(codebook.nearest(rows), expected)
    assert codebook.nearest(rows[:0]).shape == (0,)


def test_distances_are_float32_where_products_are_bfloat16() -> None:
    quantizer = _quantizer()
    rows = _rows(200)
    with torch.autocast("cpu", torch.bfloat16):
        assert (rows @ rows.T).dtype == torch.bfloat16
        found, index = quantizer.distances(rows), quantizer.nearest(rows)
    exact = torch.cdist(rows.double(), quantizer.codebook.double()).square()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(index, exact.argmin(dim=1))


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
    for step in range(3):
        assert quantizer.idle[2] == step
        rows = _rows(50, seed=step)
        quantizer.forward(rows, noise=_noise(50, key=step))
    distances = torch.cdist(quantizer.codebook[2][None], rows)
    assert distances.min() == 0
    assert torch.equal(quantizer.total[2], quantizer.codebook[2])
    assert quantizer.count[2] == 1
    assert quantizer.idle[2] == 0
    assert 2 in quantizer.nearest(rows)


def _revived(squares: list[float], dead: int, key: int) -> list[int]:
    """The rows on which dead codes are put, where each row's squared distance to its nearest code is given."""
    quantizer = EmaCodebook(_settings(revive_after=1), width=WIDTH).train()
    quantizer.idle[:dead] = 1
    rows = _rows(len(squares))
    quantizer._revive(rows, torch.tensor(squares)[:, None].expand(-1, CODES), _noise(len(squares), key=key))
    assert (quantizer.codebook[dead:] == 0).all()
    assert (quantizer.idle == 0).all()
    return [int((rows == code).all(dim=1).nonzero()[0, 0]) for code in quantizer.codebook[:dead] if code.any()]


def test_dead_codes_are_put_on_rows_in_proportion_to_their_squared_distance_and_never_on_the_same() -> None:
    squares, trials = [1.0, 2.0, 5.0, 0.0], 1_000
    found: dict[tuple[int, ...], int] = {}
    for key in range(trials):
        places = tuple(_revived(squares, 2, key))
        found[places] = found.get(places, 0) + 1
    # A draw without replacement, one row after the other, each in proportion among those that are left.
    for first, second in permutations(range(3), 2):
        chance = squares[first] / 8 * squares[second] / (8 - squares[first])
        deviation = np.sqrt(chance * (1 - chance) / trials)
        assert abs(found.pop((first, second), 0) / trials - chance) < 5 * deviation
    assert not found


def test_where_there_are_fewer_rows_off_their_codes_than_dead_codes_the_others_wait() -> None:
    quantizer = EmaCodebook(_settings(revive_after=1), width=WIDTH).train()
    quantizer.idle[:4] = 1
    distances = torch.tensor([0.0, 3.0, 0.0])[:, None].expand(-1, CODES)
    rows = _rows(3)
    quantizer._revive(rows, distances, _noise(3))
    assert torch.equal(quantizer.codebook[0], rows[1])
    assert quantizer.idle.tolist() == [0, 1, 1, 1, 0, 0, 0]


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


def test_rows_that_lie_on_their_codes_move_nothing() -> None:
    quantizer = _quantizer(top_k=3, revive_after=1).train()
    before = quantizer.codebook.clone()
    output = quantizer.forward(before[:2].clone(), noise=_noise(2))
    assert torch.isfinite(quantizer.codebook).all()
    assert torch.isfinite(output.commitment)
    # No row is off its code, so that no code can be revived.
    torch.testing.assert_close(quantizer.codebook[3:], before[3:], rtol=1e-3, atol=1e-3)


def test_the_mean_square_is_over_all_entries_and_0_where_there_are_none() -> None:
    assert mean_square(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == 7.5
    assert mean_square(torch.empty(0, 4)) == 0
