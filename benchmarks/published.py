"""The published layout and a corpus of the published size, made anew from their description, for `training.py`.

CLVQ-VAE, arXiv 2506.20040, as the authors' code spends its time and memory: activations as lists of Python numbers,
put into tensors of [sentences, longest sentence, d]; padding told by a norm of zero; batches of 128 sentences as long
as the longest of the corpus; one draw per row in a Python loop; K × K similarities by scikit-learn in every forward
pass; a template layer registered beside its six copies. Like their later runs it has no causal mask. What their code
does besides, such as collecting the members of each code token by token, is left out, and so is reading JSON.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from clvq import Cache
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter
from clvq.trainer.config import TrainConfig
from clvq.trainer.network import PaperNetwork
from jaxtyping import Bool, Float, Int64
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

TEXTS, ROWS, LONGEST, SINGLE = 13_878, 81_456, 61, 1_126
"""Of the published training data: sentences, rows, rows of the longest sentence, sentences of a single row."""
# Parts of the training texts of a synthetic cache: a quarter, a half and all of them.
PARTS = ("quarter", "second", "rest")
NOTHING = 1e-6
Words = list[tuple[str, list[float]]]


def lengths_of(texts: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of each sentence in file order: the published figures, or their share for another number of sentences."""
    total, single = round(ROWS * texts / TEXTS), round(SINGLE * texts / TEXTS)
    # The first tenth has 11 rows a sentence, the last 3.7.
    mean = 3.65 + 8.88 * np.exp(-np.arange(texts) / texts / 0.255)
    words = generator.negative_binomial(2.5, 2.5 / (2.5 + mean - 1))
    lengths = np.clip(1 + words, 2, LONGEST)
    lengths[np.argsort(words + generator.random(texts))[:single]] = 1
    lengths[0] = LONGEST
    while (missing := total - int(lengths.sum())) != 0:
        free = np.flatnonzero((lengths > 2 - (missing > 0)) & (lengths < LONGEST - 1) & (lengths > 1))
        lengths[generator.permutation(free)[: abs(missing)]] += np.sign(missing)
    return lengths


def make_cache(folder: Path, *, texts: int, width: int, seed: int = 0, kinds: int = 600) -> None:
    """Rows like those of an encoder's upper middle: norms of about 24, cosines of about 0.85, in kinds."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(texts)
    counts = lengths_of(texts, generator)[order]
    placement = place(counts, row_bytes=2 * width)
    geometry = placement.geometry
    size = np.sqrt(width)
    common = 22 / size * generator.normal(size=width)
    centres = 7 / size * generator.normal(size=(kinds, width))
    mix, context = (generator.normal(size=(width, width)) / size for _ in range(2))
    frequency = 1 / (np.arange(kinds) + 10)
    sites = {name: SiteLayout(width=width, encoding="bf16") for name in ("hidden.8", "hidden.12")}
    identity = {"model": {"name": "synthetic"}, "seed": seed}
    with CacheWriter(folder, Extraction(identity, geometry, sites, None)) as writer:
        for shard in range(geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2]
            own = counts[first:end]
            starts = np.r_[0, np.cumsum(own)[:-1]]
            kind = generator.choice(kinds, int(own.sum()), p=frequency / frequency.sum())
            kind[starts] = 0
            deviation = centres[kind] + 5.9 / size * generator.normal(size=(len(kind), width))
            sentence = np.add.reduceat(deviation, starts) / own[:, None]
            seen = 4 * (deviation @ mix) + 2 * np.repeat(sentence @ context, own, axis=0)
            upper = 0.6 * np.tanh(seen) + common[::-1] + 0.1 * generator.normal(size=seen.shape)
            columns = {name: np.zeros(len(kind), dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            columns["text"][:] = np.repeat(placement.text_id[first:end], own)
            columns["position"][:] = np.arange(len(kind)) - np.repeat(starts, own)
            columns["special"][starts] = 1
            vectors = {"hidden.8": (common + deviation).astype(np.float32), "hidden.12": upper.astype(np.float32)}
            writer.commit(Shard(shard, vectors, columns, len(own)))
        names = np.array([*PARTS, "dev"])
        part = generator.choice(4, texts, p=[0.225, 0.225, 0.45, 0.1])
        table = {
            "text_id": pa.array(placement.text_id, pa.int64()),
            "source_row": order,
            "split": names[part],
            "label": pa.nulls(texts, pa.int32()),
            "first_row": placement.first_row,
            "row_count": counts,
        }
        writer.finish(pa.table(table), class_names=None, counts={"texts": texts})


def sentences(cache: Cache, config: TrainConfig, texts: Bool[np.ndarray, " text"], site: str) -> list[Words]:
    """The chosen rows of one site as the JSON of the published pipeline becomes them: [name, numbers] for each word."""
    rows = cache.rows_of(texts, special=config.special)
    numbers = [vector for _, found in cache.blocks([site], rows) for vector in found[site].tolist()]
    lengths = cache.chosen(texts, special=config.special).length.tolist()
    places = iter(range(len(numbers)))
    return [
        [(f"word|||0|||{number}|||{position}", numbers[next(places)]) for position in range(length)]
        for number, length in enumerate(lengths)
    ]


def padded(words: list[Words], longest: int) -> Float[Tensor, "batch seq d"]:
    """All sentences, zero where there is no word."""
    tensor = torch.zeros(len(words), longest, len(words[0][0][1]))
    for number, sentence in enumerate(words):
        tensor[number, : len(sentence)] = torch.tensor([vector for _, vector in sentence])
    return tensor


class Encoder(nn.Module):
    """z = (1 − mix)·x + mix·LayerNorm(W x + b), mix = 0.5·sigmoid(a)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adapt = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(torch.tensor(0.2))
        nn.init.eye_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        mix = 0.5 * torch.sigmoid(self.mix)
        z = (1 - mix) * x + mix * self.norm(self.adapt(x))
        return z.masked_fill((x.norm(dim=-1) <= NOTHING)[..., None], 0.0)


class Quantizer(nn.Module):
    """Codes with running means, g = 0.99, ε = 1e-5, β = 0.1, drawn at temperature 1 from the `top_k` nearest."""

    def __init__(self, codes: int, width: int, *, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.register_buffer("codebook", torch.randn(codes, width))
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", self.codebook.clone())

    def forward(self, z: Float[Tensor, "batch seq d"]) -> dict[str, Any]:
        flat = z.reshape(-1, z.shape[-1])
        valid = flat.norm(dim=-1) > NOTHING
        rows = flat[valid]
        squares = rows.pow(2).sum(dim=1, keepdim=True) + self.codebook.pow(2).sum(dim=1)
        distances = (squares - 2 * rows @ self.codebook.t()).detach()
        index = self._drawn(distances) if self.training else distances.argmin(dim=1)
        onehot = torch.zeros_like(distances).scatter_(1, index[:, None], 1)
        if self.training:
            self._follow(rows.detach(), onehot)
        vectors = self.codebook[index]
        straight = torch.zeros_like(flat)
        straight[valid] = rows + (vectors - rows).detach()
        shares = onehot.mean(dim=0)
        return {
            "quantized": straight.view_as(z),
            "index": index,
            "commitment": 0.1 * F.mse_loss(rows, vectors),
            "perplexity": torch.exp(-(shares * (shares + 1e-10).log()).sum()),
            **self._similarities(),
        }

    def _drawn(self, distances: Float[Tensor, "row code"]) -> Int64[Tensor, " row"]:
        near, codes = distances.topk(self.top_k, dim=1, largest=False)
        chances = torch.softmax(-near, dim=1)
        index = torch.zeros(len(near), dtype=torch.int64)
        for row in range(len(near)):
            index[row] = codes[row, torch.multinomial(chances[row], 1).item()]
        return index

    @torch.no_grad()
    def _follow(self, rows: Float[Tensor, "row d"], onehot: Float[Tensor, "row code"]) -> None:
        count = 0.99 * self.count + 0.01 * onehot.sum(dim=0)
        everything = count.sum()
        self.count = (count + 1e-5) / (everything + len(count) * 1e-5) * everything
        self.total = 0.99 * self.total + 0.01 * onehot.t() @ rows
        self.codebook = self.total / self.count[:, None]

    def _similarities(self) -> dict[str, float]:
        codes = self.codebook.cpu().numpy()
        pairs = ~np.eye(len(codes), dtype=bool)
        return {
            "cosine": float(cosine_similarity(codes)[pairs].mean()),
            "euclid": float(euclidean_distances(codes)[pairs].mean()),
        }


class PublishedNetwork(nn.Module):
    """Encoder, quantiser, and a decoder of six layers that attends to the unquantised vectors too."""

    def __init__(self, config: TrainConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__()
        decoder = config.decoder
        self.encoder = Encoder(d_lower)
        self.quantizer = Quantizer(config.quantizer.codes, d_lower, top_k=config.quantizer.top_k)
        self.decoder_layer = nn.TransformerDecoderLayer(
            d_lower, decoder.heads, dim_feedforward=decoder.hidden, dropout=decoder.dropout
        )
        self.decoder = nn.TransformerDecoder(self.decoder_layer, decoder.layers)
        self.out = nn.Linear(d_lower, d_upper)

    def forward(self, x: Float[Tensor, "batch seq d_lower"], y: Float[Tensor, "batch seq d_upper"]) -> dict[str, Any]:
        padding = x.norm(dim=-1) <= NOTHING
        z = self.encoder(x)
        quantized = self.quantizer(z)
        hidden = self.decoder(
            quantized["quantized"].transpose(0, 1),
            z.transpose(0, 1),
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        predicted = self.out(hidden).transpose(0, 1)
        real = y.norm(dim=-1) > NOTHING
        reconstruction = F.mse_loss(predicted[real], y[real])
        return {"predicted": predicted, "reconstruction": reconstruction, **quantized}

    def take(self, state: dict[str, Tensor]) -> None:
        """Start from the weights and codes of a `PaperNetwork` of the same settings."""
        wanted = {name for name in self.state_dict() if not name.startswith("decoder_layer.")}
        # There the last linear map is the decoder's own.
        named = {name.replace("decoder.out.", "out."): value for name, value in state.items()}
        self.load_state_dict({name: named[name].clone() for name in wanted}, strict=False)

    @classmethod
    def of(cls, paper: PaperNetwork, config: TrainConfig) -> "PublishedNetwork":
        """The same network in the published layout."""
        network = cls(config, d_lower=len(paper.lower_mean), d_upper=len(paper.upper_mean))
        network.take(paper.state_dict())
        return network


class Training:
    """Adam over everything that is registered, in batches of whole sentences."""

    def __init__(
        self,
        network: PublishedNetwork,
        config: TrainConfig,
        x: Float[Tensor, "batch seq d_lower"],
        y: Float[Tensor, "batch seq d_upper"],
        sentences: Int64[np.ndarray, " sentence"],
    ) -> None:
        self.network = network
        data = Subset(TensorDataset(x, y), sentences.tolist())
        self.batches = DataLoader(data, batch_size=config.fit.texts_per_batch, shuffle=True)
        settings = config.optimizer
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)

    def steps(self) -> Iterator[float]:
        """The steps of an epoch; gives the loss of each."""
        self.network.train()
        for x, y in self.batches:
            output = self.network(x, y)
            loss = output["reconstruction"] + output["commitment"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def held_out_reconstruction(
        self, x: Float[Tensor, "batch seq d_lower"], y: Float[Tensor, "batch seq d_upper"]
    ) -> float:
        """Mean squared error per entry over all rows."""
        self.network.eval()
        total, rows = 0.0, 0
        for part_x, part_y in DataLoader(TensorDataset(x, y), batch_size=self.batches.batch_size):
            output = self.network(part_x, part_y)
            total += output["reconstruction"].item() * len(output["index"])
            rows += len(output["index"])
        return total / rows

    def weight_bytes(self) -> int:
        """Weights, and gradients with Adam's two moments of those that take part; after a step."""
        return sum(p.numel() * (16 if p.grad is not None else 4) for p in self.network.parameters())
