"""The network that training is measured against computes what the `paper` preset computes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import clvq
import numpy as np
import pytest
import torch
from clvq.trainer.concepts import Batch
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.network import PaperNetwork, build

D, D_UPPER, CODES, LONGEST = 16, 12, 7, 9
LENGTHS = torch.tensor([4, 1, 6, 3])


@pytest.fixture(scope="module")
def published() -> ModuleType:
    file = Path(clvq.__file__).parent / "benchmarks" / "published.py"
    spec = importlib.util.spec_from_file_location("published", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _config() -> TrainConfig:
    # Without draws and dropout nothing is random.
    still = {"quantizer.top_k": "1", "decoder.dropout": "0", "decoder.hidden": "20"}
    return with_overrides(preset_config("paper", lower="hidden.1", upper="hidden.2", codes=CODES), still)


def _paper(config: TrainConfig) -> PaperNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config, d_lower=D, d_upper=D_UPPER)
        # Every weight at random, so that none hides at 0 or 1.
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        network.quantizer.start(2 * torch.randn(CODES, D))
    return network


def _rows(extra: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same texts, padded by zeros to their longest and `extra` more."""
    generator = torch.Generator().manual_seed(1)
    longest = int(LENGTHS.max()) + extra
    mask = torch.arange(longest) < LENGTHS[:, None]
    lower, upper = torch.zeros(len(LENGTHS), longest, D), torch.zeros(len(LENGTHS), longest, D_UPPER)
    lower[mask] = 2 * torch.randn(int(LENGTHS.sum()), D, generator=generator)
    upper[mask] = torch.randn(int(LENGTHS.sum()), D_UPPER, generator=generator)
    return lower, upper, mask


def test_without_draws_the_published_layout_has_the_loss_and_course_of_the_paper_preset(published: ModuleType) -> None:
    config = _config()
    ours = _paper(config).train()
    theirs = published.PublishedNetwork.of(ours, config).train()
    lower, upper, mask = _rows(0)
    everywhere = torch.arange(mask.shape[1]).expand(mask.shape).clone()
    batch = Batch(lower=lower, upper=upper, target=upper, mask=mask, position=everywhere, row=everywhere)
    x, y, _ = _rows(LONGEST - int(LENGTHS.max()))
    settings = {"lr": 1e-3, "weight_decay": config.optimizer.weight_decay}
    optimizers = [torch.optim.Adam(network.parameters(), **settings) for network in (ours, theirs)]
    for _ in range(4):
        output, other = ours(batch), theirs(x, y)
        assert torch.equal(output.index, other["index"])
        torch.testing.assert_close(output.losses["commitment"], other["commitment"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(output.losses["reconstruction"], other["reconstruction"], rtol=1e-4, atol=1e-6)
        losses = sum(output.losses.values()), other["reconstruction"] + other["commitment"]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.quantizer.codebook, theirs.quantizer.codebook, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encoder.adapt.weight, theirs.encoder.adapt.weight, rtol=1e-4, atol=1e-4)


def test_the_loop_over_rows_draws_with_the_published_chances(published: ModuleType) -> None:
    quantizer = published.Quantizer(3, D, top_k=2)
    distances = torch.tensor([[0.5, 9.0, 1.5]]).expand(4000, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shares = np.bincount(quantizer._drawn(distances), minlength=3) / 4000
    # softmax(−0.5, −1.5); the third code is not among the two nearest.
    expected = np.array([np.e / (1 + np.e), 0, 1 / (1 + np.e)])
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_sentences_keep_their_rows_and_are_padded_by_zeros(published: ModuleType, small_cache: clvq.Cache) -> None:
    config = _config()
    texts = small_cache.splits(["dev"])
    words = published.sentences(small_cache, config, texts, "hidden.1")
    tensor = published.padded(words, 20)
    expected = small_cache.vectors("hidden.1", small_cache.rows_of(texts, special="leading"))
    real = np.arange(20) < np.array([len(sentence) for sentence in words])[:, None]
    np.testing.assert_array_equal(tensor.numpy()[real], expected)
    assert not tensor.numpy()[~real].any()
    text_of_row = small_cache.column("text")[small_cache.rows_of(texts, special="leading")]
    np.testing.assert_array_equal([len(sentence) for sentence in words], np.unique_counts(text_of_row).counts)
