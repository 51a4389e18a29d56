"""What a model gives for the texts of one shard."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ..cache.encoding import SCALE_ROWS, channel_scale
from ..cache.extraction import Shard
from ..cache.layout import ROW_COLUMNS, SALIENCY_COLUMNS
from ..errors import ClvqError, DataError, ModelError
from ..progress import Progress
from .batches import batches
from .classes import classes_of
from .config import ExtractConfig
from .language_model import LanguageModel
from .saliency import attribute, of_rows
from .source import ModelSource
from .words import TEXT, Rows, Tokens
from .work import Work, all_rows, prompt_of, tokenise

# Of the texts of a shard that the model fails on; one that fails on more fails on all.
_MOST_NAMED = 5


@dataclass(frozen=True)
class Made:
    """A shard, and what it took to make it."""

    shard: Shard
    real: int
    """Token slots computed that were real tokens."""
    slots: int


def load_model(source: ModelSource, config: ExtractConfig, *, device: torch.device) -> LanguageModel:
    """The model that an extraction needs.

    Raises
    ------
    ModelError
        Where it cannot be loaded, or a site cannot be read.
    """
    prompt = prompt_of(source, config)
    answers = prompt.answer_ids if prompt is not None else ()
    model = LanguageModel(source, task=config.task, dtype=config.dtype, device=device, answers=answers)
    with torch.inference_mode():
        # Sites inside blocks are looked for when they are first read: better now than in the middle of the work.
        model.read(*model.pad([[0, 0]]), config.sites)
    return model


def make_shard(work: Work, config: ExtractConfig, model: LanguageModel, progress: Progress) -> Made:
    """Run the model on the texts of a shard.

    Raises
    ------
    DataError
        Where the model fails on a text, or gives a value that is not a number; the text is named.
    Interrupted
        Where a stop was asked for.
    """
    read = _Reading(work, config, model).run(progress)
    columns = {name: np.concatenate([getattr(part, name) for part in read.rows]) for name in Rows.__slots__}
    columns["text"] = np.repeat(work.text_id, work.row_counts)
    typed = {name: columns[name].astype(dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
    shard = Shard(
        number=work.number,
        sites=read.sites,
        rows=typed | read.saliency,
        texts=len(work.texts),
        logits=read.logits,
        convergence=read.convergence,
    )
    return Made(shard=shard, real=read.real, slots=read.slots)


def channel_scales(
    work: Work, config: ExtractConfig, model: LanguageModel, progress: Progress
) -> dict[str, Float32[np.ndarray, " _d"]]:
    """Scales of the channels for int8, from the plan's first texts."""
    read = _Reading(work, config.model_copy(update={"saliency": None}), model).run(progress)
    return {name: channel_scale(values[:SCALE_ROWS]) for name, values in read.sites.items()}


@dataclass(frozen=True)
class Places:
    """Where the rows of a batch stand in it: text, last sub-word, and how many sub-words."""

    owner: Int64[Tensor, " row"]
    position: Int64[Tensor, " row"]
    subwords: Int64[Tensor, " row"]

    @classmethod
    def of(cls, rows: list[Rows], device: torch.device) -> "Places":
        """The places of the rows of a batch's texts."""
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in rows]))
        position = torch.from_numpy(np.concatenate([part.position for part in rows]))
        subwords = torch.from_numpy(np.concatenate([part.subwords for part in rows]))
        return cls(*(part.to(device, non_blocking=True) for part in (owner, position, subwords)))


def pool(states: Float[Tensor, "batch seq d"], places: Places, *, mean: bool) -> Float[Tensor, "row d"]:
    """The vectors of all rows of a batch: at each row's last sub-word, or the float32 mean over its sub-words."""
    owner, position, subwords = places.owner, places.position, places.subwords
    if not mean:
        return states[owner, position]
    total = torch.zeros((len(owner), states.shape[-1]), dtype=torch.float32, device=states.device)
    for back in range(int(subwords.max()) if len(subwords) else 0):
        inside = back < subwords
        total[inside] += states[owner[inside], position[inside] - back].float()
    return total / subwords[:, None]


class _Reading:
    """Runs the texts of a shard in batches and puts each row where it belongs."""

    def __init__(self, work: Work, config: ExtractConfig, model: LanguageModel) -> None:
        self._work, self._config, self._model = work, config, model
        self._tokens: list[Tokens] = tokenise(model.source, config, work.texts)
        self.rows = [self._rows_of(text) for text in range(len(work.texts))]
        self._starts = np.cumsum(work.row_counts) - work.row_counts
        self.sites = {name: np.empty((work.rows, model.source.width), dtype=np.float32) for name in config.sites}
        self._predicts = config.task != "none"
        classes = len(classes_of(model.source, config) or ())
        self.logits = np.full((len(work.texts), classes), np.nan, dtype=np.float32) if self._predicts else None
        self.saliency = {
            name: np.full(work.rows, np.nan, dtype=np.float32) for name in SALIENCY_COLUMNS if name in config.columns
        }
        self.convergence = np.full(len(work.texts), np.nan, dtype=np.float32) if self.saliency else None
        self._copies = _Copies(model.device)
        self._failures: dict[int, Exception] = {}
        self.real = self.slots = 0

    def _rows_of(self, text: int) -> Rows:
        rows, _ = all_rows(self._config, self._work.texts[text], self._tokens[text])
        return rows if self._work.kept is None else rows.take(self._work.kept[text])

    def run(self, progress: Progress) -> "_Reading":
        """Compute everything."""
        lengths = np.array([len(part.ids) for part in self._tokens])
        if not self._predicts:
            # Nothing is wanted of a text without rows.
            lengths[self._work.row_counts == 0] = 0
        for batch in batches(lengths, slots=self._config.batch_tokens):
            progress.check()
            try:
                self._batch(batch.tolist())
            except ClvqError:
                raise
            except Exception as error:  # the model's own code may raise anything
                self._explain(batch.tolist(), error)
        self._copies.finish()
        if self._failures:
            raise self._failed() from next(iter(self._failures.values()))
        self._check_finite()
        return self

    def _batch(self, batch: list[int]) -> None:
        ids, mask = self._model.pad([self._tokens[text].ids.tolist() for text in batch])
        with torch.inference_mode():
            states, scores = self._read(batch, ids, mask)
        if self.saliency and scores is not None:
            # Gradients need tensors that inference mode did not make.
            hidden = states[str(self._config.saliency_site)].clone()
            self._attribute(batch, ids, mask, hidden, scores.argmax(dim=-1).clone())

    def _read(
        self, batch: list[int], ids: Int64[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> tuple[dict[str, Float[Tensor, "batch seq d"]], Float[Tensor, "batch class"] | None]:
        model, config = self._model, self._config
        wanted = dict.fromkeys((*config.sites, *([str(config.saliency_site)] if self.saliency else [])))
        states, scores = model.read(ids, mask, list(wanted), logits=self._predicts)
        places = Places.of([self.rows[text] for text in batch], model.device)
        target = np.concatenate([np.arange(len(self.rows[text])) + self._starts[text] for text in batch])
        for name, values in self.sites.items():
            self._copies.put(pool(states[name], places, mean=config.pool == "mean"), values, target)
        if self.logits is not None and scores is not None:
            self._copies.put(scores, self.logits, np.array(batch))
        self._copies.turn()
        self.real += sum(len(self._tokens[text].ids) for text in batch)
        self.slots += mask.numel()
        return states, scores

    def _attribute(
        self,
        batch: list[int],
        ids: Int64[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        hidden: Float[Tensor, "batch seq d"],
        target: Int64[Tensor, " batch"],
    ) -> None:
        added = np.ones(mask.shape, dtype=bool)
        for number, text in enumerate(batch):
            kinds = self._tokens[text].kind
            added[number, : len(kinds)] = kinds != TEXT
        kept = torch.from_numpy(added).to(mask.device)
        found = attribute(self._model, self._config, hidden, ids, mask, kept=kept, target=target)
        for number, text in enumerate(batch):
            rows = slice(self._starts[text], self._starts[text] + self._work.row_counts[text])
            values = of_rows(found.positions[number], self.rows[text])
            for name, part in zip(SALIENCY_COLUMNS, values, strict=True):
                self.saliency[name][rows] = part
        if self.convergence is not None:
            self.convergence[np.array(batch)] = found.delta

    def _explain(self, batch: list[int], error: Exception) -> None:
        """Find the texts that the model fails on, by running them one by one."""
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(
                f"the device's memory is too small for batches of {self._config.batch_tokens} token slots: "
                "give a smaller --batch-tokens"
            ) from error
        before = len(self._failures)
        for text in batch:
            try:
                self._batch([text])
            except Exception as own:  # as above
                self._failures[text] = own
            if len(self._failures) > _MOST_NAMED:
                raise self._failed() from error
        if len(self._failures) == before:
            raise ModelError(
                f"{self._model.source.name} fails on a batch of {len(batch)} texts: {_in_short(error)}"
            ) from error

    def _failed(self) -> DataError:
        reason = _in_short(next(iter(self._failures.values())))
        return DataError(
            f"{self._model.source.name} fails on {self._called(sorted(self._failures))} ({reason}): "
            "drop or mend the text"
        )

    def _called(self, texts: Iterable[int]) -> str:
        names = [self._work.where[text] for text in texts]
        return ", ".join(names[:_MOST_NAMED]) + (" and more" if len(names) > _MOST_NAMED else "")

    def _check_finite(self) -> None:
        columns = {name: values[:, None] for name, values in self.saliency.items()}
        for name, values in (self.sites | columns).items():
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad):
                texts = np.unique(np.searchsorted(self._starts, bad, side="right") - 1).tolist()
                raise DataError(
                    f"{self._model.source.name} gives values at {name} that are not finite numbers, for "
                    f"{self._called(texts)}: try --dtype float32, or drop the text"
                )


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"


class _Copies:
    """Brings results to the host one batch behind the device, so that neither waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self._asynchronous = device.type == "cuda"
        self._open: list[tuple[Tensor, Float32[np.ndarray, "place _d"], Int64[np.ndarray, " _row"]]] = []
        self._behind: deque[tuple[torch.cuda.Event | None, list[tuple[Tensor, np.ndarray, np.ndarray]]]] = deque()

    def put(
        self, values: Float[Tensor, "row _d"], target: Float32[np.ndarray, "place _d"], rows: Int64[np.ndarray, " row"]
    ) -> None:
        """`target[rows] = values`, once the values are there."""
        if self._asynchronous:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        self._open.append((values, target, rows))

    def turn(self) -> None:
        """A batch is complete."""
        event = None
        if self._asynchronous:
            event = torch.cuda.Event()
            event.record()
        self._behind.append((event, self._open))
        self._open = []
        while len(self._behind) > (1 if self._asynchronous else 0):
            self._settle()

    def finish(self) -> None:
        """Everything is at its place."""
        while self._behind:
            self._settle()

    def _settle(self) -> None:
        event, parts = self._behind.popleft()
        if event is not None:
            event.synchronize()
        for values, target, rows in parts:
            target[rows] = values.float().numpy()
