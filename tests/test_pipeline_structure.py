"""Sites inside blocks: what hooks on the modules' own names give, for every family, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from clvq.errors import ModelError
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.source import find_model
from clvq.pipeline.structure import TEXTS, TOKENS, Parts, find_parts
from torch import Tensor, nn

from .tiny import DEPTH, WIDTH, load

TinyModel = Callable[..., Path]

ROWS = [[12, 9, 31, 17, 22, 9, 14], [25, 11, 30]]
KINDS = ("attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Named:
    """Where transformers keeps the three linear maps of a family."""

    blocks: str
    attn_out: str
    mlp_in: str
    mlp_out: str
    adds: bool = True
    """Whether a block gives the sum of what it is given and of its two parts."""
    changes: dict[str, Any] = field(default_factory=dict)


_BERT = Named("encoder.layer", "attention.output.dense", "intermediate.dense", "output.dense", adds=False)
_LLAMA = Named("layers", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
_GEMMA = Named("layers", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", adds=False)
_NEOX = ("layers", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_T5 = ("encoder.block", "layer.0.SelfAttention.o")
NAMED = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _BERT,
    "distilbert": Named("transformer.layer", "attention.out_lin", "ffn.lin1", "ffn.lin2", adds=False),
    "modernbert": Named("layers", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    "gpt2": Named("h", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": Named(*_NEOX, changes={"use_parallel_residual": True}),
    "gpt_neox sequential": Named(*_NEOX, changes={"use_parallel_residual": False}),
    "opt": Named("decoder.layers", "self_attn.out_proj", "fc1", "fc2"),
    "phi": Named("layers", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "falcon": Named("h", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "t5": Named(*_T5, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
    "t5 gated": Named(
        *_T5,
        "layer.1.DenseReluDense.wi_0",
        "layer.1.DenseReluDense.wo",
        changes={"feed_forward_proj": "gated-gelu"},
    ),
    "bart": Named("encoder.layers", "self_attn.out_proj", "fc1", "fc2", adds=False),
}


def folder_of(family: str, tiny_model: TinyModel) -> Path:
    return tiny_model(family.split(" ")[0], **NAMED[family].changes)


def by_name(folder: Path, named: Named, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The sites inside blocks, from transformers' own model with hooks on its modules by name."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    found: dict[str, Tensor] = {}
    for number in range(DEPTH):
        block = model.get_submodule(f"{named.blocks}.{number}")

        def keep(_: Any, args: Any, output: Any, *, site: str) -> None:
            found[site] = (args[0] if site.startswith("mlp_in") else output).clone().reshape(2, 7, WIDTH)

        for kind in KINDS:
            module = block.get_submodule(getattr(named, kind))
            module.register_forward_hook(lambda *call, site=f"{kind}.{number}": keep(*call, site=site))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask.long(), **decoder)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", NAMED)
def test_sites_inside_blocks_are_what_hooks_on_the_named_modules_give(
    family: str, dtype: Any, tiny_model: TinyModel
) -> None:
    folder = folder_of(family, tiny_model)
    model = LanguageModel(find_model(str(folder)), task="none", dtype=dtype, device=torch.device("cpu"))
    ids, mask = model.pad(ROWS)
    expected = by_name(folder, NAMED[family], ids, mask, getattr(torch, dtype))
    assert len(expected) == 3 * DEPTH
    with torch.inference_mode():
        states, _ = model.read(ids, mask, list(expected))
        for site, values in expected.items():
            assert states[site].shape == (2, 7, WIDTH)
            assert values[mask].abs().max() > 1e-3
            torch.testing.assert_close(states[site][mask], values[mask])
            # Asked for alone, the forward pass ends there.
            assert torch.equal(model.read(ids, mask, [site])[0][site], states[site])


@pytest.mark.parametrize("family", [family for family, named in NAMED.items() if named.adds])
def test_a_block_adds_its_two_parts_to_what_it_is_given(family: str, tiny_model: TinyModel) -> None:
    model = load(find_model(str(folder_of(family, tiny_model))))
    ids, mask = model.pad(ROWS)
    sites = [f"{kind}.{number}" for number in range(DEPTH) for kind in ("hidden", "attn_out", "mlp_out")]
    with torch.inference_mode():
        states, _ = model.read(ids, mask, sites)
    for number in range(DEPTH - 1):
        whole = sum(states[f"{kind}.{number}"] for kind in ("hidden", "attn_out", "mlp_out"))
        torch.testing.assert_close(states[f"hidden.{number + 1}"][mask], whole[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "last"), [("attn_out.1", "attention.output.dense"), ("mlp_in.1", None), ("mlp_out.1", "output.dense")]
)
def test_nothing_after_a_site_is_computed(site: str, last: str | None, tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model("bert"))))
    ids, mask = model.pad(ROWS)
    model.read(ids, mask, ["mlp_in.1", site])
    ended: list[str] = []
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ended.append(name))
    states, logits = model.read(ids, mask, [site])
    assert (list(states), logits) == ([site], None)
    assert ended[-1] == ("encoder.layer.1.attention" if last is None else f"encoder.layer.1.{last}")


def test_the_structure_of_a_block_is_found_once(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    def counted(block: nn.Module, *args: Any, **kwargs: Any) -> Parts:
        asked.append(block)
        return find_parts(block, *args, **kwargs)

    monkeypatch.setattr("clvq.pipeline.language_model.find_parts", counted)
    model = load(find_model(str(tiny_model("gpt2"))))
    ids, mask = model.pad(ROWS)
    model.read(ids, mask, ["hidden.1"])
    assert asked == []
    for _ in range(2):
        model.read(ids, mask, ["mlp_in.2", "attn_out.0", "mlp_out.2"])
    assert len(asked) == 2


_ATTENTION = "self_attn.q_proj 32→32, self_attn.k_proj 32→16, self_attn.v_proj 32→16, self_attn.o_proj 32→32"
_EXPERTS = {
    "mixtral": (
        "mlp.gate is the only linear map called after attention: the feed-forward part cannot be told, as in a mixture "
        f"of experts. Linear maps of block 1, as they are called: {_ATTENTION}, mlp.gate 32→?. "
    ),
    "qwen2_moe": (
        "with what mlp.shared_expert_gate gives held fixed, the other linear maps of its feed-forward part still "
        "change the block's output: a part goes round it, as in a mixture of experts. "
        f"Linear maps of block 1, as they are called: {_ATTENTION}, mlp.shared_expert.gate_proj 32→64, "
        "mlp.shared_expert.up_proj 32→64, mlp.shared_expert.down_proj 64→32, mlp.gate 32→?, "
        "mlp.shared_expert_gate 32→1. "
    ),
}


@pytest.mark.parametrize("family", _EXPERTS)
def test_a_mixture_of_experts_has_no_mlp_sites(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family, kind="bytes")
    model = load(find_model(str(folder)))
    ids, mask = model.pad(ROWS)
    for site in ("mlp_in.1", "mlp_out.1"):
        with pytest.raises(ModelError) as caught:
            model.read(ids, mask, ["hidden.1", site])
        assert str(caught.value) == (
            f"{site} of {folder.name} ({family}) cannot be read: {_EXPERTS[family]}hidden.0 … hidden.3 can be read"
        )
    # Nothing is left behind, and the rest can be read.
    states, _ = model.read(ids, mask, ["hidden.1", "attn_out.1", "hidden.3"])
    assert len(states) == 3


class Block(nn.Module):
    """Attention and a feed-forward part, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out, self.side = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        between = hidden + self.attend(hidden)
        return between + self.feed(between, hidden)

    def attend(self, hidden: Tensor) -> Tensor:
        value = self.value(hidden)
        return self.out((hidden @ hidden.mT).softmax(dim=-1) @ value)

    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.down(self.up(between).relu())


class NothingMixes(Block):
    def attend(self, hidden: Tensor) -> Tensor:
        return self.out(self.value(hidden))


class ValueGoesRound(Block):
    def attend(self, hidden: Tensor) -> Tensor:
        return super().attend(hidden) + self.value(hidden)


class AdapterGoesRound(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.side(between) + super().feed(between, hidden)


class SecondInput(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.down(self.up(between).relu() + torch.cat([hidden, hidden], dim=-1))


class AttentionInside(Block):
    """Parallel: both parts are given the same, and the feed-forward part is given attention's output too."""

    def forward(self, hidden: Tensor) -> Tensor:
        attention = self.attend(hidden)
        return hidden + attention + self.down(self.up(hidden).relu() + torch.cat([attention, attention], dim=-1))


class OneMap(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.side(between)


class Narrow(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.up(between)[..., :8] + self.down(self.up(between))


class WideIn(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.side(self.down(torch.cat([between, between], dim=-1)))


class WideOut(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.up(self.side(between))[..., :8]


class Twice(Block):
    def feed(self, between: Tensor, hidden: Tensor) -> Tensor:
        return self.down(self.up(self.down(self.up(between))))


class WideAttention(Block):
    def attend(self, hidden: Tensor) -> Tensor:
        return self.up((hidden @ hidden.mT).softmax(dim=-1) @ self.value(hidden))[..., :8]


class AttentionTwice(Block):
    def attend(self, hidden: Tensor) -> Tensor:
        return self.out(super().attend(hidden))


class TextsTogether(Block):
    def attend(self, hidden: Tensor) -> Tensor:
        return self.out(self.value(hidden) + hidden.mean(dim=(0, 1)))


def parts_of(kind: type[Block]) -> tuple[Block, Parts]:
    torch.manual_seed(0)
    block = kind().requires_grad_(False)
    return block, find_parts(block, (torch.randn(TEXTS, TOKENS, 8),), {}, width=8)


def test_the_parts_of_a_plain_block_are_found() -> None:
    block, parts = parts_of(Block)
    assert parts.attn_out is block.out
    assert parts.mlp == (block.up, block.down)
    assert parts.maps == "value 8→8, out 8→8, up 8→16, down 16→8"


@pytest.mark.parametrize(
    ("kind", "part", "reason"),
    [
        (NothingMixes, "attn_out", "nothing in the block brings positions together before a linear map"),
        (NothingMixes, "mlp", "nothing in the block brings positions together before a linear map"),
        (TextsTogether, "attn_out", "nothing in the block brings positions together before a linear map"),
        (
            ValueGoesRound,
            "attn_out",
            "with what out gives held fixed, the linear maps before it still change the block",
        ),
        (AdapterGoesRound, "mlp", "with what down gives held fixed, the other linear maps of its feed-forward part"),
        (SecondInput, "mlp", "what down gives does not follow from what up is given alone"),
        (AttentionInside, "mlp", "what down gives does not follow from what up is given alone"),
        (OneMap, "mlp", "side is the only linear map called after attention: the feed-forward part cannot be told"),
        (WideIn, "mlp", "down, its first linear map, is not given 8 channels a position"),
        (WideOut, "mlp", "up, its last linear map, does not give 8 channels a position"),
        (Twice, "mlp", "up or down, its first and last linear map, is called more than once"),
        (WideAttention, "attn_out", "up, the first linear map after attention, does not give 8 channels a position"),
        (AttentionTwice, "attn_out", "out, the first linear map after attention, is called more than once"),
        (Narrow, "mlp", "with what down gives held fixed, the other linear maps of its feed-forward part"),
    ],
)
def test_what_cannot_be_proved_is_refused(kind: type[Block], part: str, reason: str) -> None:
    _, parts = parts_of(kind)
    assert str(getattr(parts, part)).startswith(reason)
