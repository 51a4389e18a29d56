"""Where gradients are taken, cuDNN's attention is left out."""

from collections.abc import Callable, Iterator
from pathlib import Path

import clvq
import pytest
import torch
import torch.nn.functional as F
from clvq.attention import without_cudnn_attention
from clvq.pipeline.source import find_model
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.fit import fit

from .caches import LOWER, UPPER
from .tiny import load

TinyModel = Callable[..., Path]


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether cuDNN's attention was allowed, for each attention from which gradients can be taken."""
    seen: list[bool] = []
    attention = F.scaled_dot_product_attention

    def noting(*args: torch.Tensor, **settings: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    yield seen
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_no_training_step_uses_it(preset: str, small_cache: clvq.Cache, tmp_path: Path, allowed: list[bool]) -> None:
    config = preset_config(preset, lower=LOWER, upper=UPPER, codes=10)
    few = {"fit.epochs": "1", "decoder.heads": "2"} | ({"encoder.epochs": "1"} if preset == "default" else {})
    fit(small_cache, with_overrides(config, few), tmp_path / "run", device=torch.device("cpu"))
    assert allowed
    assert not any(allowed)


def test_no_gradient_of_a_prediction_goes_through_it(tiny_model: TinyModel, allowed: list[bool]) -> None:
    model = load(find_model(str(tiny_model("bert", classes=3))), task="classify")
    ids, mask = model.pad([[5, 6, 7], [8, 9]])
    states, _ = model.read(ids, mask, ["hidden.1"])
    allowed.clear()
    hidden = states["hidden.1"].detach().requires_grad_(True)
    model.logits_from("hidden.1", hidden, ids, mask).sum().backward()
    assert allowed
    assert not any(allowed)


def test_what_was_set_before_is_set_again() -> None:
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        with without_cudnn_attention():
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    with pytest.raises(ValueError, match="stop"), without_cudnn_attention():
        raise ValueError("stop")
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_length_of_64_with_a_mask_has_gradients_that_are_numbers() -> None:
    length, width = 64, 64
    query, key, value = (torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    # Every score is about −120, so that the sum of their exponentials is too small for float32.
    query[..., 0], key[..., 0] = 1, -120 * width**0.5
    query.requires_grad_(True)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda")
    with without_cudnn_attention():
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()
