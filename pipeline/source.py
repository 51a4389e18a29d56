"""A model before its weights are loaded: its folder, configuration, tokenizer and identity."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import JsonValue

from ..cache.files import sha256_of
from ..cache.layout import differences
from ..errors import ConfigError, MissingExtra, ModelError, ModelNotFound
from .prompt import Prompt
from .words import Tokens, kinds_of

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
# Sites of a block; `hidden` has one more, above the last block.
_IN_BLOCKS = ("mlp_in", "mlp_out", "attn_out")
# No tokenizer says "unlimited" with less.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class ModelSource:
    """A model folder, with what can be known without loading weights."""

    name: str
    commit: str | None
    folder: Path
    config: Any
    tokenizer: Any
    gguf: str | None = None
    """Name of the GGUF file that holds all of the model."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether only a part of the model, its encoder, is read."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        # An encoder that was stored alone calls itself none, but transformers builds its decoder all the same.
        return bool(self.config.is_encoder_decoder) or (
            self.config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        )

    @property
    def text_config(self) -> Any:
        """Configuration of the part that is read."""
        encoder = getattr(self.config, "encoder", None) if self.encoder_decoder else None
        return encoder if hasattr(encoder, "num_hidden_layers") else self.config.get_text_config()

    @property
    def gguf_argument(self) -> dict[str, str]:
        """What transformers' `from_pretrained` needs besides the folder."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def depth(self) -> int:
        """Transformer blocks; of an encoder-decoder, the encoder's."""
        return int(self.text_config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return int(self.text_config.hidden_size)

    @cached_property
    def window(self) -> int:
        """Most tokens that the model takes, special ones included."""
        limits = [self.tokenizer.model_max_length]
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            # RoBERTa and its kin number positions from the padding id + 1.
            offset = self.config.pad_token_id + 1 if self.config.model_type in _POSITIONS_AFTER_PADDING else 0
            limits.append(positions - offset)
        limits = [limit for limit in limits if limit < _NO_LIMIT]
        if not limits:
            raise ModelError(f"{self.name} does not say how long its texts may be; give --max-length")
        return int(min(limits))

    @property
    def shortest(self) -> int:
        """Fewest tokens that a text can be cut to: the special ones that the tokenizer always adds."""
        return max(1, int(self.tokenizer.num_special_tokens_to_add()))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of a classification head."""
        names = self.config.id2label
        return [str(names[number]) for number in sorted(names)]

    def identity(self) -> dict[str, JsonValue]:
        """What the model's numbers follow from; no path, no time."""
        files = sorted(self.folder.glob("*.safetensors")) if self.gguf is None else [self.folder / self.gguf]
        weights: dict[str, JsonValue] = {file.name: sha256_of(file) for file in files}
        return {
            "name": self.name,
            "commit": self.commit,
            "type": self.config.model_type,
            # A GGUF file holds the configuration too.
            "config_sha256": sha256_of(self.folder / "config.json") if self.gguf is None else weights[self.gguf],
            "weights": weights,
        }

    def tokenizer_identity(self) -> dict[str, JsonValue]:
        """What the tokens follow from."""
        files = [self.folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
        if self.gguf is None and files[0].is_file():
            return {file.name: sha256_of(file) for file in files if file.is_file()}
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # These two follow the latest call, not the tokenizer.
        del state["truncation"], state["padding"]
        return {"sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}

    def require_identity(self, identity: JsonValue) -> None:
        """Make sure that this is the model whose identity a cache records; its name may differ.

        Raises
        ------
        ModelError
        """
        mine: JsonValue = {key: value for key, value in self.identity().items() if key in ("config_sha256", "weights")}
        made_with = identity if isinstance(identity, dict) else {}
        theirs: JsonValue = {key: made_with.get(key) for key in ("config_sha256", "weights")}
        if mine != theirs:
            raise ModelError(
                f"{self.name} is not the model that the cache was made with ({made_with.get('name')}): "
                f"{'; '.join(differences(theirs, mine)[:3])}"
            )

    def sites(self, names: Sequence[str]) -> list[str]:
        """Full names of sites given as `8`, `hidden.8`, `mlp_in.3`, `mlp_out.3` or `attn_out.3`.

        Raises
        ------
        ConfigError
            Where a name is none, stands twice, or lies beyond the last layer.
        """
        full = []
        for name in names:
            kind, number = name.rsplit(".", 1) if "." in name else ("hidden", name)
            if kind not in ("hidden", *_IN_BLOCKS) or not number.isdecimal():
                blocks = ", ".join(f"{part}.0 … {part}.{self.depth - 1}" for part in _IN_BLOCKS)
                raise ConfigError(
                    f"{name!r} is not a site; sites are hidden.0 … hidden.{self.depth}, or just numbers, and {blocks}"
                )
            full.append(f"{kind}.{int(number)}")
            if kind == "hidden" and int(number) > self.depth:
                raise ConfigError(
                    f"site {full[-1]} is beyond the last layer: {self.name} has {self.depth} blocks, "
                    f"so its sites are hidden.0 (embeddings) … hidden.{self.depth}"
                )
            if kind != "hidden" and int(number) >= self.depth:
                raise ConfigError(
                    f"site {full[-1]} is beyond the last block: {self.name} has {self.depth} blocks, "
                    f"so its sites of that kind are {kind}.0 … {kind}.{self.depth - 1}"
                )
            if full.count(full[-1]) > 1:
                raise ConfigError(f"site {full[-1]} is asked for twice")
        if not full:
            raise ConfigError("no site is asked for; give --sites, such as --sites 8,12")
        return full

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        max_length: int,
        prompt: str | None = None,
        answers: Sequence[str] = (),
        chat: bool = False,
    ) -> list[Tokens]:
        """Tokenise texts with character offsets and special tokens; cut at `max_length` tokens.

        With a prompt, as `Prompt` does.
        """
        if prompt is not None:
            return Prompt(self.tokenizer, prompt, answers, chat=chat).tokenize(texts, max_length=max_length)
        whole = self._encode(texts, max_length=None)
        lengths = [len(ids) for ids in whole["input_ids"]]
        long = [number for number, length in enumerate(lengths) if length > max_length]
        cut = self._encode([texts[number] for number in long], max_length=max_length) if long else None
        place = {number: index for index, number in enumerate(long)}
        result = []
        for number in range(len(texts)):
            ids, offsets, special = _arrays(whole, number)
            end = len(texts[number])
            if cut is not None and number in place:
                ordinary = offsets[~special]
                ids, offsets, special = _arrays(cut, place[number])
                beyond = ordinary[int((~special).sum()) :]
                end = int(beyond[beyond[:, 1] > beyond[:, 0], 0].min(initial=end))
            result.append(Tokens(ids, offsets[:, 0], offsets[:, 1], kinds_of(special), lengths[number] - len(ids), end))
        return result

    def _encode(self, texts: Sequence[str], *, max_length: int | None) -> Any:
        return self.tokenizer(
            list(texts),
            truncation=max_length is not None,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )


def _arrays(
    encoded: Any, index: int
) -> tuple[Int64[np.ndarray, " token"], Int64[np.ndarray, "token 2"], Bool[np.ndarray, " token"]]:
    """Ids, character offsets and special tokens of one text."""
    ids = np.array(encoded["input_ids"][index], dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"][index], dtype=np.int64).reshape(-1, 2)
    special = np.array(encoded["special_tokens_mask"][index], dtype=bool)
    # Some tokenizers give the tokens that they add a place in the text.
    offsets[special] = 0
    return ids, offsets, special


_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip


def find_model(name: str, *, revision: str | None = None) -> ModelSource:
    """Find a model, without loading weights or running its code.

    Parameters
    ----------
    name
        A local folder, a GGUF file or a folder that holds one and no other weights, or a model on the Hub.
    revision
        Of a model on the Hub; its commit is resolved.

    Raises
    ------
    ModelNotFound
        Where there is none of them.
    ModelError
        Where it has no weights that can be read safely, or its tokenizer gives no character offsets.
    MissingExtra
        Where the packages that read GGUF files are not installed.
    """
    path = Path(name).expanduser()
    gguf = None
    if path.is_file() and path.suffix == ".gguf":
        folder, commit, shown, gguf = path.parent, None, path.name, path.name
    elif path.is_dir():
        gguf = _only_gguf(path, name)
        folder, commit, shown = path, None, gguf or path.resolve().name
        if gguf is None and not (folder / "config.json").is_file():
            raise ModelNotFound(f"{name} is not a Hugging Face model folder: it has no config.json")
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"{name} is not a folder: give a Hugging Face model folder, or the name of a Hub model")
    else:
        folder, commit = _from_hub(name, revision)
        shown = name
    if gguf is not None:
        _require_gguf(name)
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name} has no *.safetensors weights; convert them first (other formats can run code)")
    elif not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        # transformers would make up an empty vocabulary.
        raise ModelError(f"{name} has no tokenizer; put its tokenizer.json beside its weights")
    config, tokenizer = _settings(folder, gguf, name)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name} gives no character offsets, which rows need; "
            "use a model with a fast tokenizer (a tokenizer.json file)"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return ModelSource(name=shown, commit=commit, folder=folder, config=config, tokenizer=tokenizer, gguf=gguf)


def _settings(folder: Path, gguf: str | None, name: str) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    where = {} if gguf is None else {"gguf_file": gguf}
    try:
        # Unless told not to, transformers asks on the terminal whether it may run the folder's own code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **where)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **where)
    except Exception as error:  # a damaged tokenizer.json raises Exception itself
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} cannot be read by transformers: {reason}") from error
    return config, tokenizer


def _only_gguf(folder: Path, name: str) -> str | None:
    """The GGUF file of a folder that has no other weights."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelError(f"{name} holds several GGUF files ({', '.join(files)}): name one of them")
    return files[0]


def _require_gguf(name: str) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"{name} is a GGUF file, which needs the package {package}: pip install 'clvq[gguf]'")


def _from_hub(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            # fnmatch's * crosses folders; the second list keeps variants in subfolders out.
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the Hub's client raises some twenty kinds, of several libraries
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise ModelNotFound(
            f"{name!r} is no local folder, and could not be had from the Hub: {type(error).__name__}: {reason}"
        ) from error
    # A snapshot's folder is named by its commit.
    return Path(folder), Path(folder).name
