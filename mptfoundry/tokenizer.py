"""Load tokenizers, fingerprint them, and check that they fit the model.

A function that takes "a tokenizer" takes a transformers fast tokenizer or a `tokenizers.Tokenizer`.

Words used here: an *id* is an integer the model reads; a *special token* does not represent text (EOS,
padding); two tokenizers that produce the same ids have the same *fingerprint*.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
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
# These only read tokenizer.json. Listing them here avoids a one-second import of AutoTokenizer.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
# For these, transformers 4 lets add_bos_token and add_eos_token override tokenizer.json. With transformers 5
# the file wins for some, and the others write their own.
CLASSES_WITH_SWITCHES = ("Llama", "CodeLlama", "Gemma", "GPTNeoX", "Cohere")
CLASSES_OF_THE_FILE = ("Llama", "Gemma", "Cohere")


class Borders(NamedTuple):
    """Special tokens before and after a text, as ids or as strings."""

    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


def load_tokenizer(
    name: str, kwargs: Mapping[str, Any] | None = None, *, max_seq_len: int | None = None
) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or from the Hugging Face Hub, without running its code.

    Args:
        name: A folder with a `tokenizer.json` (or files transformers can convert to one), or a name on the
            Hub, optionally `NAME@REVISION` with a branch, tag or commit.
        kwargs: Passed to transformers' `from_pretrained`.
        max_seq_len: Sets `model_max_length`, in tokens, unless `kwargs` does.

    Raises:
        ConfigError: The tokenizer can't be read, or it has no fast (Rust) version.
    """
    options = {"model_max_length": max_seq_len or UNLIMITED, **(kwargs or {})}
    if options.pop("trust_remote_code", False):
        raise ConfigError("tokenizer.kwargs.trust_remote_code: no tokenizer's code is run. Remove the key.")
    folder = Path(name).expanduser()
    tokenizer = _load_from_folder(folder, options) if folder.is_dir() else _load_from_hub(name, options)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer.name: {name} has no tokenizer.json and transformers can't convert it to one. "
            f"Use a tokenizer with a fast (tokenizers library) form."
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files so that transformers 4 reads what transformers 5 writes, too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(tokenizer: Any, *, with_special_tokens: bool = False) -> str:
    """Hash the mapping from text to ids: sha256, 64 hex digits.

    The hash covers the vocabulary, merges, added tokens, normalizer and pre-tokenizer. It does not depend on
    the path, the library version, truncation, padding, or which token is EOS or padding.

    With `with_special_tokens`, for transformers tokenizers, it also covers which tokens are BOS, EOS and
    padding, and which tokens are added to a text.
    """
    parts = backend_parts(tokenizer)
    if not with_special_tokens:
        return fingerprint_of_parts(parts)
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    return fingerprint_of_parts(
        parts, post_processor=_without_defaults(parts["post_processor"]), special=special
    )


def fingerprint_of_parts(parts: Mapping[str, Any], **more: Any) -> str:
    """Fingerprint a tokenizer from the content of its `tokenizer.json` and any extra values."""
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
    """Return the content of the tokenizer's `tokenizer.json`."""
    parts: dict[str, Any] = json.loads(_backend_of(tokenizer).to_str())
    return parts


def _backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` in a transformers fast tokenizer; one without the other is also taken."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def default_template(tokenizer: Any) -> str | None:
    """Return the tokenizer's default chat template, or None if it has no template.

    Raises:
        ConfigError: The tokenizer has several named templates, and none is called default.
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
    """Return the tokenizer's largest id plus one, so gaps in the ids count."""
    return max(_backend_of(tokenizer).get_vocab(with_added_tokens=True).values(), default=-1) + 1


def own_borders(tokenizer: Any) -> Borders:
    """Return the ids a tokenizer adds to every text by default: Llama adds BOS, T5 adds EOS."""
    from tokenizers import Tokenizer, models

    processor = getattr(_backend_of(tokenizer), "post_processor", None)
    if processor is None:
        return Borders()
    # A one-token text that does not depend on the tokenizer's vocabulary, truncation or padding.
    text = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    encoding = processor.process(text, None, True)
    place = encoding.special_tokens_mask.index(0)
    return Borders(tuple(encoding.ids[:place]), tuple(encoding.ids[place + 1 :]))


def document_borders(
    tokenizer: Any, *, add_bos: bool | Literal["auto"] = "auto", add_eos: bool | Literal["auto"] = "auto"
) -> Borders:
    """Return the ids to put around each document, without duplicates.

    Args:
        tokenizer: A transformers fast tokenizer.
        add_bos: Whether to start with BOS. `auto` does what the tokenizer does by default.
        add_eos: Whether to end with EOS, likewise.

    Raises:
        DataError: The tokenizer does not have the requested token.
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
    """Return the special tokens, as strings, that a local tokenizer adds to every text by default.

    This is fast because it does not import transformers. Returns None if the files don't tell. The arguments
    are those of `load_tokenizer`.
    """
    from tokenizers import Tokenizer

    folder = Path(folder).expanduser()
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config = {**config, **(kwargs or {})}
        borders = Borders(*(tuple(map(backend.id_to_token, side)) for side in own_borders(backend)))
        name = str(config.get("tokenizer_class"))
        if name.startswith(CLASSES_WITH_SWITCHES):
            if metadata.version("transformers").startswith("4."):
                borders = _switched(borders, config)
            elif not name.startswith(CLASSES_OF_THE_FILE) or {"add_bos_token", "add_eos_token"} & set(
                kwargs or ()
            ):
                return None
    except Exception:  # the tokenizers library raises plain Exceptions
        return None
    return borders


def _switched(borders: Borders, config: Mapping[str, Any]) -> Borders:
    """The borders as `add_bos_token` and `add_eos_token` say."""
    for name, side in (("bos", "before"), ("eos", "after")):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if (switch := config.get(f"add_{name}_token")) is not None:
            borders = borders._replace(**{side: (token,) if switch and token else ()})
    return borders


def spelled(borders: Borders, tokenizer: Any) -> Borders:
    """Convert borders from ids to strings."""
    return Borders(*(tuple(tokenizer.convert_ids_to_tokens(list(side))) for side in borders))


def adds_in_words(borders: Borders) -> str:
    """Describe what a tokenizer adds by default, e.g. `adds <s> before each text by itself`."""
    sides = zip(("before", "after"), borders, strict=True)
    parts = [f"{' '.join(tokens)} {place}" for place, tokens in sides if tokens]
    return f"adds {' and '.join(parts)} each text by itself" if parts else "adds no special tokens by itself"


def documents_in_words(borders: Borders, own: Borders) -> str:
    """Describe the special tokens around each document, and how they differ from the tokenizer's default.

    Args:
        borders: Special tokens around the documents, as strings.
        own: Special tokens the tokenizer adds by default, as strings.
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
    """Check that the model has an embedding for every id of the tokenizer.

    Raises:
        ConfigError: The tokenizer has more than `vocab_size` ids.
    """
    if (needed := count_ids(tokenizer)) > vocab_size:
        raise ConfigError(
            f"tokenizer: it has {needed} ids, and the model has rows for {vocab_size}. Name the tokenizer "
            "that the model was trained with."
        )


def vocabulary_problem(needed: int, vocab_size: int) -> str | None:
    """Explain why a new model's `vocab_size` is too small for the tokenizer; None if it is large enough."""
    if needed <= vocab_size:
        return None
    return (
        f"{vocab_size} is smaller than the tokenizer's {needed} ids. "
        f"Use {needed} or more; {-(-needed // 128) * 128} is a multiple of 128, which is fastest."
    )


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a tokenizer's files, read without transformers.

    Attributes:
        parts: The content of `tokenizer.json`.
        ids: The tokenizer's largest id plus one.
        is_plain: Whether `tokenizer.json` alone determines the ids. A custom tokenizer class may change them.
    """

    parts: Mapping[str, Any]
    ids: int
    is_plain: bool


def find_tokenizer(name: str) -> Path | None:
    """Find a tokenizer's folder on this machine: `name` itself, or its folder in the Hub cache."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _find_in_hub_cache(name)


def _find_in_hub_cache(name: str) -> Path | None:
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
    """Read a tokenizer's files; None if there is no `tokenizer.json` and transformers has to create it.

    Raises:
        ConfigError: A file is damaged, or the folder has no tokenizer files.
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
    """Return how many bytes of UTF-8 text each id represents; 0 for special tokens and unused ids.

    Exact for byte-level BPE (MPT, GPT-2) and for byte fallback. WordPiece drops the spaces between words, so
    they are not counted.

    Returns:
        (vocab_size,) int64, bytes; larger ids are left out.
    """
    import numpy as np

    parts = backend_parts(tokenizer)
    byte_level = any('"ByteLevel"' in json.dumps(parts[key]) for key in ("pre_tokenizer", "decoder"))
    added = {token["content"]: token["special"] for token in parts["added_tokens"]}
    lengths = np.zeros(vocab_size, np.int64)
    for token, token_id in _backend_of(tokenizer).get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size or added.get(token, False):
            continue
        if token in added:
            lengths[token_id] = len(token.encode())
        elif byte_level:
            lengths[token_id] = len(token)
        else:
            lengths[token_id] = _bytes_of_piece(token)
    return lengths


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    *,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like MPT's on `texts` and save it atomically.

    Ids 0 and 1 are `<|endoftext|>` (EOS, BOS and unknown, as in GPT-NeoX) and `<|padding|>`. The 256 bytes
    follow after `special_tokens`, so every text can be encoded and decodes exactly.

    Args:
        texts: Documents; read once.
        vocab_size: Number of ids, at least 258. With little text the tokenizer may have fewer.
        folder: Where to save `tokenizer.json` and `tokenizer_config.json`; an existing folder is replaced.
        special_tokens: More special tokens; their ids follow those of the first two.
        chat_template: A Jinja template for conversations, saved with the tokenizer.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys((END_OF_TEXT, PADDING, *special_tokens)))
    if vocab_size < (least := 256 + len(specials)):
        raise ConfigError(
            f"vocab_size: {vocab_size} can't hold 256 bytes and {len(specials)} special tokens. Use {least}."
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
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
        additional_special_tokens=specials[2:] or None,
        chat_template=chat_template,
    )
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    save_tokenizer(tokenizer, staging)
    staging.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    return load_tokenizer(str(folder))


def _load_from_folder(folder: Path, options: dict[str, Any]) -> Any:
    if "revision" in options:
        raise ConfigError(f"tokenizer.kwargs.revision: {folder} is a folder, which has none. Remove the key.")
    files = read_tokenizer_files(folder)
    try:
        if files is not None and files.is_plain:
            return _load_plain(folder, options)
        return _load_by_class(folder, options, has_ids=files is not None)
    except Exception as error:
        raise ConfigError(f"tokenizer.name: {folder} can't be read: {first_line(error)}.") from error


def _load_by_class(folder: Path, options: dict[str, Any], *, has_ids: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception:
        if not has_ids:
            raise
    # The class is unknown or needs remote code; tokenizer.json alone defines the ids.
    return _load_plain(folder, options)


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

    if name.startswith(("/", "./", "../", "~")) or Path(name).expanduser().exists():
        raise ConfigError(f"tokenizer.name: {name} is not a folder. Give a folder that holds tokenizer.json.")
    name, at, revision = name.partition("@")
    options = {**options, "revision": revision} if at else options
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
    """Drop options that don't change ids or are defaults; library versions differ in which they write."""
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
