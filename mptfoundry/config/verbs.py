"""The options of the verbs that are not `train`: what `mptfoundry VERB key=value ...` understands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mptfoundry.config.data import LoaderConfig, label_problems, loaders_by_label
from mptfoundry.config.forms import check_at_least


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into shards of tokens.

    Attributes:
        inputs: Files and folders of text, source code, JSONL or Parquet, folders saved by `datasets`, or
            `hf:NAME` or `hf:NAME@REVISION` for a data set of the Hugging Face hub.
        out: Folder of the shards; those of a split lie in `out/split`.
        tokenizer: Folder of a tokenizer, or its name on the hub.
        max_seq_len: Tokens of a sample.
        split: Subfolder of `out`.
        held_out: Share of the documents, chosen by a hash of their text, that goes to another split.
        held_out_split: Subfolder of `out` for those.
        text_key: The field of a record that holds the text.
        include: File name patterns to take from folders, such as `*.py`. Default: every known format.
        exclude: Patterns of files and folders to leave out.
        hf_subset: Configuration of a data set of the hub.
        hf_split: Split of a Hugging Face data set.
        add_eos: Put the tokenizer's end-of-text token after each document, once.
        add_bos: Put the tokenizer's beginning-of-text token before each document, once. `auto`: if the
            tokenizer puts it before a text by itself, as Llama's does.
        special_tokens: What a text that spells a special token, such as `<|endoftext|>`, becomes: that token,
            or the ids of the text as it stands.
        bad_input: What a broken record or text does: end the preparation, or be counted and left out.
        engine: Where text is encoded: in processes of this machine, or on the machines of a Spark cluster,
            with the same shards. Every machine needs this package and sees the inputs under the same paths.
        workers: Processes of this machine. `auto`: one for each processor.
        shard_bytes: Size of a shard before compression.
        compression: How shards are compressed, such as `zstd` or `zstd:7`. Default: not.
        progress: Show a progress bar.
    """

    inputs: tuple[str, ...]
    out: str
    tokenizer: str
    max_seq_len: int
    split: str = "train"
    held_out: float = 0.0
    held_out_split: str = "val"
    text_key: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hf_subset: str | None = None
    hf_split: str = "train"
    add_eos: bool = True
    add_bos: bool | Literal["auto"] = "auto"
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"
    bad_input: Literal["error", "skip"] = "error"
    engine: Literal["local", "spark"] = "local"
    workers: int | Literal["auto"] = "auto"
    shard_bytes: int = 1 << 26
    compression: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.engine == "spark" and self.workers != "auto":
            raise ValueError("workers: belongs to this machine, and engine: spark has its own. Remove it.")
        if self.workers != "auto":
            check_at_least(self, workers=1)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Show samples of a data set as text, and the mix that a config reads.

    Further words, such as `max_seq_len=512`, override the config, as for `train`.

    Attributes:
        data: Folder of shards, or a training config: then each of its streams.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: what the shards or the config name.
        split: Subfolder of a folder of shards. Default: `train`, if there is one.
        samples: How many samples of each folder.
        token_encoding_type: Integer type of `tokens` stored as bytes, in a folder of shards. Default: int64.
        picture: File to draw a config's data mix into, such as `mix.png`.
        allow_code: Run the `preprocessing_fn` that a config names. On the command line only.
    """

    data: str
    tokenizer: str | None = None
    split: str | None = None
    samples: int = 3
    token_encoding_type: (
        Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"] | None
    ) = None
    picture: str | None = None
    allow_code: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, samples=0)
        if self.picture is not None and not self.picture.endswith((".png", ".pdf", ".svg")):
            raise ValueError(f"picture: {self.picture} is no picture. Use a name that ends in .png.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model on held-out text.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or an adapter in peft's format.
        base: The model that such an adapter belongs to.
        eval_loader: The data: one loader, or a list with a `label` each. Default: as in the run's config.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the run's.
        max_seq_len: Tokens of a sequence. Default: the model's.
        device_eval_batch_size: Sequences that a device evaluates at once. `auto` chooses by the memory.
        eval_subset_num_batches: Batches of an evaluation; -1: all.
        precision: Number format of the computation. `auto`: bfloat16 on GPUs that have it, else float32.
        attn_impl: The attention backend; all give the same mathematics.
        verify: Compare what is read of the weights with its checksums.
        seed: Seed of whatever is drawn.
        out: JSON file for the results. Default: beside the model.
        dist_timeout: Seconds that a rank waits for the others.
        allow_code: Run the `preprocessing_fn` of a loader. On the command line only.
        variables: Values that others refer to as `${variables.x}`.
    """

    model: str
    base: str | None = None
    eval_loader: LoaderConfig | tuple[LoaderConfig, ...] | None = None
    tokenizer: str | None = None
    max_seq_len: int | None = None
    device_eval_batch_size: int | Literal["auto"] = "auto"
    eval_subset_num_batches: int = -1
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = "auto"
    attn_impl: Literal["auto", "torch", "flash", "triton"] = "auto"
    verify: bool = True
    seed: int = 17
    out: str | None = None
    dist_timeout: float = 600.0
    allow_code: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least(self, max_seq_len=1, eval_subset_num_batches=-1, seed=0, dist_timeout=1)
        if self.eval_subset_num_batches == 0:
            raise ValueError(
                "eval_subset_num_batches: 0 batches leave nothing to do. Use -1 for all of them."
            )
        if self.device_eval_batch_size != "auto":
            check_at_least(self, device_eval_batch_size=1)
        for key, text in label_problems(self.eval_loader):
            raise ValueError(f"{key}: {text}")

    @property
    def eval_loaders(self) -> dict[str, LoaderConfig]:
        """The evaluation loaders by label; a single one without a label is `eval`."""
        return loaders_by_label(self.eval_loader)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as a Hugging Face folder.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or the URL of one in an object store; or an
            adapter in peft's format.
        out: The folder to write.
        base: The model that such an adapter belongs to.
        format: `native`: stock transformers loads it; `custom`: with the network's code, for every model.
            `auto`: native where transformers' own classes express the model.
        adapter: Adapters of a LoRA run are added to its base's weights (`merged`), or written alone as a
            PEFT folder (`separate`).
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the run's.
        run_folder: Local folder of the run, for a remote checkpoint without config and tokenizer beside it.
        dtype: Number format of the weights.
        license: Licence of the model, by its SPDX name, for the model card.
        shard_bytes: Largest weight file.
        verify: Compare what is read of the weights with its checksums, and refuse logits that are not finite
            or larger than 1e4.
        overwrite: Replace a folder that is there.
    """

    model: str
    out: str
    base: str | None = None
    format: Literal["auto", "native", "custom"] = "auto"
    adapter: Literal["merged", "separate"] = "merged"
    tokenizer: str | None = None
    run_folder: str | None = None
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    license: str | None = None
    shard_bytes: int = 5_000_000_000
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.adapter == "separate":
            for name in ("format", "shard_bytes", "license"):
                if getattr(self, name) != getattr(ExportConfig, name):
                    raise ValueError(f"{name}: has no effect with adapter: separate. Remove it.")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Write a Hugging Face folder, or llm-foundry's checkpoint, as a run to start from.

    Attributes:
        source: A Hugging Face folder, its name on the hub, a run folder, or a Composer checkpoint, whole or
            sharded; also the URL of one in an object store.
        out: The folder to write.
        revision: Branch, tag or commit of a name on the hub. Default: its main branch.
        config: A folder, `config.json` or YAML with the architecture, where the source does not tell it.
        config_overrides: Switches of the architecture to change, such as `max_seq_len`. Another `vocab_size`
            cuts the embedding at its end, or pads it with the mean of its rows.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the source's.
        dtype: Number format of the weights.
        verify: Compare what is read of the weights with its checksums.
        overwrite: Replace a folder that is there.
    """

    source: str
    out: str
    revision: str | None = None
    config: str | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show what works on this machine.

    Attributes:
        clean: Instead, remove the shared memory and temporary files that dead runs of this user left, and
            list them. What a living process uses stays.
    """

    clean: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: How freely: logits are divided by it before the draw; 0: always the likeliest token.
        top_k: Choose among this many likeliest tokens; 0: all.
        top_p: Choose among the likeliest tokens that together have this probability
            (https://arxiv.org/abs/1904.09751).
        seed: Seed of the choice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 17

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is negative. Use 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}. Use a number above 0 and up to 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is negative. Use 0 for all, or more.")


@dataclass(frozen=True, kw_only=True)
class TextConfig(Sampling):
    """How a model makes text.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or an adapter in peft's format.
        base: The model that such an adapter belongs to.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the model's.
        max_new_tokens: Tokens to add at most.
        stop: Texts that end a continuation.
        dtype: Number format of the weights. `auto`: bfloat16 on GPUs that have it, else float32.
        attn_impl: The attention backend; all give the same mathematics.
        verify: Compare what is read of the weights with its checksums.
    """

    model: str
    base: str | None = None
    tokenizer: str | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    attn_impl: Literal["auto", "torch", "flash", "triton"] = "auto"
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise ValueError("stop: an empty text would end each continuation at once. Remove it.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is not positive. Use 1 or more.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(TextConfig):
    """Continue texts.

    Attributes:
        prompts: Texts to continue; `file::PATH` reads one from a file.
    """

    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TextConfig):
    """Talk with a model.

    Attributes:
        system: What the chat begins with.
    """

    system: str | None = None
