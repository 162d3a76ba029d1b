"""Tokenizers: load one, name its identity, and check what the model relies on.

Words used here: an *id* is an integer that the model reads, a *special token* stands for no text
(EOS, padding), the *fingerprint* of a tokenizer is equal for two tokenizers that give the same ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mptfoundry.architecture.hub import why_out_of_reach
from mptfoundry.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
UNLIMITED = int(1e30)
AS_TEXT = "as_text"
# These read tokenizer.json and no more; importing transformers' AutoTokenizer to learn that takes a second.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
# These follow add_bos_token and add_eos_token, whatever tokenizer.json says.
CLASSES_WITH_SWITCHES = ("Llama", "CodeLlama", "Gemma", "GPTNeoX", "Cohere")


class Borders(NamedTuple):
    """Special tokens around a text, as ids or as they are spelled: those before it and those after it."""

    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


def load_tokenizer(
    name: str, kwargs: Mapping[str, Any] | None = None, *, max_seq_len: int | None = None
) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or by its name on the Hugging Face hub; none of its code is run.

    Args:
        name: A folder with a `tokenizer.json` (or what transformers converts to one), or a name on the hub,
            perhaps `NAME@REVISION` with a branch, tag or commit.
        kwargs: Passed on to transformers' `from_pretrained`.
        max_seq_len: Becomes `model_max_length`, in tokens, unless `kwargs` gives another one.

    Raises:
        ConfigError: Nothing of that name can be read, or it has no fast (Rust) form.
    """
    options = {"model_max_length": max_seq_len or UNLIMITED, **(kwargs or {})}
    if options.pop("trust_remote_code", False):
        raise ConfigError("tokenizer.kwargs.trust_remote_code: no tokenizer's code is run. Remove the key.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if "revision" in options:
            raise ConfigError(
                f"tokenizer.kwargs.revision: {name} is a folder, which has none. Remove the key."
            )
        tokenizer = _load_from_folder(folder, options)
    elif name.startswith(("/", "./", "../", "~")) or folder.exists():
        raise ConfigError(f"tokenizer.name: {name} is not a folder. Give a folder that holds tokenizer.json.")
    else:
        name, at, revision = name.partition("@")
        tokenizer = _load_from_hub(name, {**options, "revision": revision} if at else options)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer.name: {name} has no tokenizer.json and transformers can't convert it to one. "
            f"Use a tokenizer with a fast (tokenizers library) form."
        )
    return tokenizer


def fingerprint(tokenizer: Any, *, with_special_tokens: bool = False) -> str:
    """Name the mapping from text to ids: 64 hex digits, sha256.

    Equal for equal vocabulary, merges, added tokens, normaliser and pre-tokeniser; independent of the
    path, of the library's version, of truncation and padding, and of which token plays EOS or padding.

    Args:
        tokenizer: transformers' fast tokenizer or a `tokenizers.Tokenizer`.
        with_special_tokens: Name also which tokens are BOS, EOS and padding, and what is added to a text; of
            transformers' tokenizers alone.
    """
    parts = backend_parts(tokenizer)
    if not with_special_tokens:
        return fingerprint_of_parts(parts)
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    return fingerprint_of_parts(
        parts, post_processor=_without_defaults(parts["post_processor"]), special=special
    )


def fingerprint_of_parts(parts: Mapping[str, Any], **more: Any) -> str:
    """The fingerprint of a tokenizer from the content of its `tokenizer.json`, and of what else tells it."""
    model = dict(parts["model"])
    vocab = model.pop("vocab", {})
    merges = model.pop("merges", [])
    identity = {
        "vocab": sorted(vocab.items(), key=lambda item: item[1]) if isinstance(vocab, dict) else vocab,
        "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
        "model": _without_defaults(model),
        "added": [_without_defaults(token) for token in parts["added_tokens"]],
        "normalizer": _without_defaults(parts["normalizer"]),
        "pre_tokenizer": _without_defaults(parts["pre_tokenizer"]),
    } | more
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def backend_parts(tokenizer: Any) -> dict[str, Any]:
    """The content of the tokenizer's `tokenizer.json`.

    Args:
        tokenizer: transformers' fast tokenizer or a `tokenizers.Tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    parts: dict[str, Any] = json.loads(backend.to_str())
    return parts


def default_template(tokenizer: Any) -> str | None:
    """The chat template that transformers uses unless told otherwise; None if the tokenizer has none.

    Raises:
        ConfigError: It has several by name, and none of them is the default.
    """
    template = tokenizer.chat_template
    if not isinstance(template, Mapping):
        return template or None
    if "default" not in template:
        raise ConfigError(
            f"tokenizer: it has the chat templates {', '.join(template)}, and none is called default. Give "
            "the one to use the name default in the tokenizer's folder."
        )
    return str(template["default"])


def count_ids(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can give (gaps in the numbering count)."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def own_borders(tokenizer: Any) -> Borders:
    """The ids that a tokenizer puts around each text by itself: Llama's BOS before it, T5's EOS after it.

    Args:
        tokenizer: transformers' fast tokenizer or a `tokenizers.Tokenizer`.
    """
    from tokenizers import Tokenizer, models

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    processor = getattr(backend, "post_processor", None)
    if processor is None:
        return Borders()
    # A text of one token, whatever the tokenizer's own vocabulary, truncation and padding are.
    text = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    encoding = processor.process(text, None, True)
    place = encoding.special_tokens_mask.index(0)
    return Borders(tuple(encoding.ids[:place]), tuple(encoding.ids[place + 1 :]))


def document_borders(
    tokenizer: Any, *, add_bos: bool | Literal["auto"] = "auto", add_eos: bool | Literal["auto"] = "auto"
) -> Borders:
    """The ids around a document: the tokenizer's own, unless the user wants them or does not; never twice.

    Args:
        tokenizer: transformers' fast tokenizer.
        add_bos: Begin with BOS, or with nothing; `auto`: as the tokenizer does by itself.
        add_eos: The same for the end.

    Raises:
        DataError: The tokenizer does not have the token that is wanted.
    """
    sides = []
    for name, ids, wants in zip(("bos", "eos"), own_borders(tokenizer), (add_bos, add_eos), strict=True):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if wants is True and token_id is None and not ids:
            raise DataError(
                f"tokenizer: {tokenizer.name_or_path} has no {name.upper()} token for the borders of "
                f"documents. Use another tokenizer, or add_{name}=false."
            )
        if not wants:
            ids = ()
        elif wants is True and token_id is not None and token_id not in ids:
            ids = (token_id, *ids) if name == "bos" else (*ids, token_id)
        sides.append(ids)
    return Borders(*sides)


def borders_of_folder(folder: str | Path, kwargs: Mapping[str, Any] | None = None) -> Borders | None:
    """What a tokenizer on this machine puts around each text by itself, as it is spelled; without
    transformers, so at once. None where that can't be told.

    Args:
        folder: With `tokenizer.json`.
        kwargs: As for `load_tokenizer`.
    """
    from tokenizers import Tokenizer

    folder = Path(folder).expanduser()
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config = {**config, **(kwargs or {})}
        borders = Borders(*(tuple(map(backend.id_to_token, side)) for side in own_borders(backend)))
        if str(config.get("tokenizer_class")).startswith(CLASSES_WITH_SWITCHES):
            for name, side in (("bos", "before"), ("eos", "after")):
                token = config.get(f"{name}_token")
                token = token["content"] if isinstance(token, dict) else token
                if (switch := config.get(f"add_{name}_token")) is not None:
                    borders = borders._replace(**{side: (token,) if switch and token else ()})
    except Exception:  # the tokenizers library raises nothing else
        return None
    return borders


def spelled(borders: Borders, tokenizer: Any) -> Borders:
    """Borders of ids as they are spelled."""
    return Borders(*(tuple(tokenizer.convert_ids_to_tokens(list(side))) for side in borders))


def adds_in_words(borders: Borders) -> str:
    """What a tokenizer adds by itself: `adds <s> before each text by itself`."""
    sides = zip(("before", "after"), borders, strict=True)
    parts = [f"{' '.join(tokens)} {place}" for place, tokens in sides if tokens]
    return f"adds {' and '.join(parts)} each text by itself" if parts else "adds no special tokens by itself"


def documents_in_words(borders: Borders, own: Borders) -> str:
    """What stands around each document of shards, and where that differs from what the tokenizer does.

    Args:
        borders: Of the documents, as they are spelled.
        own: What the tokenizer puts around a text by itself.
    """
    verbs = zip(("begins with", "ends with"), borders, strict=True)
    parts = [f"{verb} {' '.join(tokens)}" for verb, tokens in verbs if tokens]
    text = f"each document {' and '.join(parts)}" if parts else "documents are joined without special tokens"
    if not any(own):
        return text
    sides = zip(own, borders, strict=True)
    missing = [token for tokens, given in sides for token in tokens if token not in given]
    text += f"; the tokenizer {adds_in_words(own)}"
    return f"{text}, but these documents are without {' and '.join(missing)}" if missing else text


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that can give ids for which the model has no embedding.

    Raises:
        ConfigError: It has more than `vocab_size` ids.
    """
    if (needed := count_ids(tokenizer)) > vocab_size:
        raise ConfigError(
            f"tokenizer: it has {needed} ids, and the model has rows for {vocab_size}. Name the tokenizer "
            "that the model was trained with."
        )


def vocabulary_problem(needed: int, vocab_size: int) -> str | None:
    """Why a model that is to be trained has too few rows for a tokenizer, and what to do; None if it fits."""
    if needed <= vocab_size:
        return None
    return (
        f"{vocab_size} is smaller than the tokenizer's {needed} ids. "
        f"Use {needed} or more; {-(-needed // 128) * 128} is a multiple of 128, which is fastest."
    )


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say, read without transformers.

    Attributes:
        parts: The content of `tokenizer.json`.
        ids: One more than the largest id that the tokenizer can give.
        is_plain: Whether `tokenizer.json` alone makes the ids; a class of its own may change them.
    """

    parts: Mapping[str, Any]
    ids: int
    is_plain: bool


def find_tokenizer(name: str) -> Path | None:
    """The folder of a tokenizer on this machine: the one that is named, or that of the hub's cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repository, _, revision = name.partition("@")
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repository.replace('/', '--')}"
    with contextlib.suppress(OSError, ValueError):
        reference = cache / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        if commit and (cache / "snapshots" / commit).is_dir():
            return cache / "snapshots" / commit
    return None


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """What the files of a tokenizer say; None where there is no `tokenizer.json`, which transformers makes.

    Raises:
        ConfigError: A file is damaged, or there is none of a tokenizer.
    """
    file, options = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() and not options.is_file():
        raise ConfigError(f"tokenizer.name: {folder} holds neither tokenizer.json nor tokenizer_config.json.")
    try:
        given = json.loads(options.read_text(encoding="utf-8")) if options.is_file() else {}
        if not file.is_file():
            return None
        parts = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = parts["model"].get("vocab", {})
        known = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in parts.get("added_tokens") or ()]
        added += [int(number) for number in given.get("added_tokens_decoder") or ()]
        ids = max([*known, *added], default=-1) + 1
        return TokenizerFiles(parts, ids, is_plain=given.get("tokenizer_class") in PLAIN_CLASSES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"tokenizer.name: {folder} can't be read: {first_line(error)}.") from error


def token_byte_lengths(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """How many bytes of UTF-8 text each id stands for; 0 for special tokens and for ids without a token.

    Exact for byte-level BPE (MPT's, GPT-2's) and for byte fallback. For WordPiece the spaces between
    words, which it does not keep, are not counted.

    Args:
        tokenizer: transformers' fast tokenizer or a `tokenizers.Tokenizer`.
        vocab_size: Length of the result; ids past it are left out.

    Returns:
        (vocab_size,) int64, bytes.
    """
    import numpy as np

    parts = backend_parts(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    byte_level = any('"ByteLevel"' in json.dumps(parts[key]) for key in ("pre_tokenizer", "decoder"))
    added = {token["content"]: token["special"] for token in parts["added_tokens"]}
    lengths = np.zeros(vocab_size, np.int64)
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size or added.get(token, False):
            continue
        if token in added:
            lengths[token_id] = len(token.encode())
        elif byte_level:
            lengths[token_id] = len(token)
        else:
            lengths[token_id] = _bytes_of_piece(token)
    return lengths


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like MPT's on `texts` and save it, whole or not at all.

    Ids 0 and 1 are `<|endoftext|>` (EOS, BOS and unknown in one, as in GPT-NeoX) and `<|padding|>`; the
    256 bytes follow, so every text has ids and comes back exactly.

    Args:
        texts: Documents; read once.
        vocab_size: Number of ids wanted, at least 258. Little text may give fewer.
        folder: Where `tokenizer.json` and `tokenizer_config.json` go; a folder there is replaced.

    Raises:
        ConfigError: `vocab_size` is below 258.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise ConfigError(f"vocab_size: {vocab_size} can't hold 256 bytes and 2 special tokens. Use 258.")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    tokenizer.save_pretrained(staging)
    staging.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    return load_tokenizer(str(folder))


def _load_from_folder(folder: Path, options: dict[str, Any]) -> Any:
    has_ids, config = (folder / "tokenizer.json").is_file(), folder / "tokenizer_config.json"
    if not has_ids and not config.is_file():
        raise ConfigError(f"tokenizer.name: {folder} holds neither tokenizer.json nor tokenizer_config.json.")
    try:
        named = (
            json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") if config.is_file() else ""
        )
        if not (has_ids and named in PLAIN_CLASSES):
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True, **options
                )
            except Exception:
                if not has_ids:
                    raise
        # tokenizer.json alone defines the ids, where the class adds nothing, is unknown here, or needs code.
        return _load_plain(folder, options)
    except Exception as error:
        raise ConfigError(f"tokenizer.name: {folder} can't be read: {first_line(error)}.") from error


def _load_plain(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **options)
    finally:
        logging.set_verbosity(verbosity)


def _load_from_hub(name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with contextlib.suppress(Exception):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True, **options)
    why = why_out_of_reach()
    if not why:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:
            why = first_line(error)
    raise ConfigError(
        f"tokenizer.name: {name} is neither a folder nor in the Hugging Face cache, and can't be fetched: "
        f"{why}. Give a folder that holds tokenizer.json, or fetch it once while online."
    )


def _without_defaults(part: Any) -> Any:
    """Drop what changes no ids or only spells out a default, since versions of the library differ in that."""
    if isinstance(part, dict):
        kept = {key: _without_defaults(value) for key, value in part.items() if key != "trim_offsets"}
        return {
            key: value
            for key, value in kept.items()
            if value not in (None, False, "") and not (key == "use_regex" and value is True)
        }
    if isinstance(part, list):
        return [_without_defaults(value) for value in part]
    return part


def _bytes_of_piece(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("▁", " ").encode())
