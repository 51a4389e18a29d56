"""Tiny random models with real architectures and tokenizers, for the tests of `clvq.pipeline`; as a script, it
extracts again and again, in processes to be killed: `tiny.py MODEL DATA WHOLE OUT`."""

import json
import os
import random
import string
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import Texts, read_texts
from clvq.pipeline.extract import ExtractResult, extract
from clvq.pipeline.forward import load_model
from clvq.pipeline.language_model import LanguageModel, Task
from clvq.pipeline.plan import Plan, make_plan
from clvq.pipeline.source import ModelSource, find_model
from clvq.progress import SILENT, Progress

DEPTH, WIDTH, WINDOW = 3, 32, 64
LETTERS = string.ascii_lowercase
# Families whose states must equal transformers' own, and the kind of tokenizer that each has in real life.
FAMILIES = {
    "bert": "wordpiece",
    "roberta": "bytes",
    "distilbert": "wordpiece",
    "electra": "wordpiece",
    "gpt2": "bytes",
    "llama": "metaspace",
    "qwen2": "bytes",
    "gpt_neox": "bytes",
    "opt": "bytes",
    "gemma2": "metaspace",
    "gemma3_text": "metaspace",
    "mistral": "metaspace",
    "modernbert": "bytes",
    "deberta-v2": "metaspace",
    "qwen3": "bytes",
    "phi": "bytes",
    "falcon": "bytes",
}
# Encoder-decoders, of which the encoder is read.
ENCODERS = {"t5": "metaspace", "bart": "bytes"}


def _wordpiece() -> tuple[Any, dict[str, str]]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *string.digits, *string.punctuation, "中", "文", "the"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, "well", "known"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return tokenizer, names


def _bytes() -> tuple[Any, dict[str, str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("ð", "Ł")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|pad|>", "<|endoftext|>", *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {"pad": "<|pad|>", "eos": "<|endoftext|>"}


def _metaspace() -> tuple[Any, dict[str, str]]:
    from tokenizers import Tokenizer, models, normalizers, processors

    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "n"), ("d", "on")]
    base = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, *".,'-"]
    vocabulary = [*base, *("".join(merge) for merge in merges)]
    numbers = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}


_TOKENIZERS: dict[str, Callable[[], tuple[Any, dict[str, str]]]] = {
    "wordpiece": _wordpiece,
    "bytes": _bytes,
    "metaspace": _metaspace,
}
KINDS = tuple(_TOKENIZERS)


def make_tokenizer(kind: str, *, window: int = WINDOW) -> Any:
    """A tokenizer of one of the `KINDS`; the byte-level one adds no special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, names = _TOKENIZERS[kind]()
    special = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=window, **special)


def make_config(family: str, tokenizer: Any, **changes: Any) -> Any:
    """A configuration of 3 blocks of 32 channels, with weights large enough that the blocks do something."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "max_position_embeddings": WINDOW + (1 if family == "roberta" else 0),
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    if family == "distilbert":
        common |= {"hidden_dim": 64}
        del common["intermediate_size"]
    if family == "opt":
        common |= {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}
    if family in ("electra", "albert"):
        common |= {"embedding_size": 16}
    if family in ("t5", "bart"):
        del common["intermediate_size"], common["num_attention_heads"], common["hidden_size"]
        del common["num_hidden_layers"]
    if family == "t5":
        del common["max_position_embeddings"], common["initializer_range"]
        common |= {
            "d_model": WIDTH,
            "num_layers": DEPTH,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "d_ff": 64,
            "d_kv": 8,
        }
    if family == "bart":
        common |= {"d_model": WIDTH, "encoder_layers": DEPTH, "decoder_layers": 2, "init_std": 0.2}
        common |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        common |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
        del common["initializer_range"]
    if family == "falcon":
        del common["intermediate_size"]
        common |= {"ffn_hidden_size": 64, "alibi": False}
    if family in ("mixtral", "qwen2_moe"):
        common |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    if family == "mixtral":
        common |= {"num_local_experts": 4}
    if family == "qwen2_moe":
        common |= {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 64}
    if family in ("qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"):
        common |= {"num_key_value_heads": 2, "head_dim": 8}
    if family == "deberta-v2":
        common |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return AutoConfig.for_model(family, **(common | changes))


def make_model(
    folder: Path,
    family: str,
    *,
    kind: str | None = None,
    classes: int | None = None,
    continues: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a random model with its tokenizer: with a classification head where `classes` is given, with a
    language-model head where it `continues` texts."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = make_tokenizer(kind or (FAMILIES | ENCODERS)[family])
    # Hashable in the call, so that a fixture can remember it.
    if "id2label" in changes:
        changes["id2label"] = dict(changes["id2label"])
    config = make_config(
        family, tokenizer, **({"num_labels": classes} if classes and "id2label" not in changes else {}), **changes
    )
    torch.manual_seed(seed)
    headed = AutoModelForCausalLM if continues else AutoModel
    factory = AutoModelForSequenceClassification if classes else headed
    factory.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(folder: Path, *, texts: int = 300, seed: int = 0) -> Path:
    """A folder with the splits dev and train: words of very different frequency, odd texts, labels, some unknown."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(LETTERS, k=generator.randint(1, 5))) for _ in range(60)]
    weights = [1 / rank for rank in range(1, 61)]
    odd = ["", " \n", "don't  well-known", "👩\u200d⚕\ufe0f cafe\u0301s", "中文 नमस्ते", "a" * 70]
    lines: dict[str, list[str]] = {"dev": [], "train": []}
    for number in range(texts):
        plain = " ".join(generator.choices(words, weights, k=generator.randint(1, 12)))
        text = odd[number // 7 % len(odd)] if number % 7 == 3 else plain
        label = generator.choice(["joy", "anger", "fear", None])
        record = {"text": text, "label": label, "doc": f"d{number}"}
        lines["dev" if number % 4 == 0 else "train"].append(json.dumps(record))
    folder.mkdir()
    for split, own in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    return folder


def load(source: ModelSource, *, task: Task = "none", answers: Sequence[int] = ()) -> LanguageModel:
    """The model in float32 on the CPU."""
    return LanguageModel(source, task=task, dtype="float32", device=torch.device("cpu"), answers=answers)


def plan_of(model: Path, data: Path, **settings: Any) -> Plan:
    """A plan with small batches; `settings` are those of `ExtractConfig`."""
    source, texts = find_model(str(model)), read_texts(str(data))
    return make_plan(source, texts, _config(texts, **settings))


def _config(texts: Texts, **settings: Any) -> ExtractConfig:
    return ExtractConfig(**({"sites": ("hidden.1", "hidden.3"), "max_length": 32, "batch_tokens": 256} | settings))


def run(plan: Plan, out: Path, *, progress: Progress = SILENT, force: bool = False) -> ExtractResult:
    """Extract a plan."""
    model = partial(load_model, plan.source, plan.config, device=torch.device("cpu"))
    return extract(plan, out, model, progress=progress, force=force)


def _serve(plan: Plan, whole: Path, out: Path) -> None:
    """Extract `whole`, and say how long that took; then extract `out` in a child process for each line of the input.

    The children are forked, since importing torch takes longer than the extraction; that is safe with one thread. The
    child's number is printed when it starts, and how it ended when it has.
    """
    # fork without exec: nothing of torch or the tokenizer may have started threads before.
    model = load(plan.source, task=plan.config.task)
    started = time.perf_counter()
    extract(plan, whole, lambda: model)
    print(time.perf_counter() - started, flush=True)  # noqa: T201
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            extract(plan, out, lambda: model)
            os._exit(0)
        print(child, flush=True)  # noqa: T201
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _serve(plan_of(Path(sys.argv[1]), Path(sys.argv[2]), task="classify"), Path(sys.argv[3]), Path(sys.argv[4]))
