"""The options of all verbs except `train`: what `mptfoundry VERB key=value ...` accepts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mptfoundry.config.data import LoaderConfig, label_problems, loaders_by_label, some_batches
from mptfoundry.config.engine.section_rules import Problem, Rules, Section, at_least
from mptfoundry.config.tasks import GauntletConfig, TaskConfig

COMPRESSIONS = ("br", "bz2", "snappy", "zstd")
_MULTIPLE = re.compile(r"[1-9]\d*x")
# A key, its value and the key again, each of 8 tokens, and some text around them.
_SHORTEST_NEEDLE = 32
# Four pieces of 8 tokens, and two times what is before them.
_SHORTEST_COPY = 64


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """Turn text into shards of tokens.

    Attributes:
        inputs: Files and folders of text, source code, JSONL or Parquet, folders saved by `datasets`, or
            `hf:NAME` or `hf:NAME@REVISION` for a data set on the Hugging Face hub.
        out: Folder for the shards; those of a split are in `out/split`.
        tokenizer: Folder of a tokenizer, or its name on the hub.
        max_seq_len: Tokens in a sample.
        split: Subfolder of `out`.
        held_out: Share of the documents, chosen by a hash of their text, that goes into a second split.
        held_out_split: Subfolder of `out` for those documents.
        text_key: The field of a record that holds the text.
        include: File name patterns to take from folders, such as `*.py`. Default: every known format.
        exclude: Patterns of files and folders to leave out.
        hf_subset: Configuration of a data set on the hub.
        hf_split: Split of a Hugging Face data set.
        add_eos: Put the tokenizer's end-of-text token after each document, once.
        add_bos: Put the tokenizer's beginning-of-text token before each document, once. `auto`: if the
            tokenizer puts it before a text by itself, as Llama's does.
        special_tokens: What a special token spelled out in a text, such as `<|endoftext|>`, becomes: that
            token, or plain text.
        bad_input: Whether a broken record or file ends the preparation, or is counted and left out.
        engine: Encode text in processes on this machine, or on a Spark cluster; the shards are the same.
            Every machine needs this package and has to see the inputs under the same paths.
        workers: Processes on this machine. `auto`: one per processor.
        shard_bytes: Size of a shard before compression.
        compression: How to compress shards, such as `zstd` or `zstd:7`. Default: not compressed.
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

    def rules(self) -> Rules:
        yield self._local_workers()
        yield from at_least(self, workers=1)
        yield self._something_to_predict()
        yield self._share_held_out()
        yield self._split_names()
        yield self._bad_input()
        yield self._compression()

    def _something_to_predict(self) -> Iterator[Problem]:
        if self.max_seq_len < 2:
            text = f"{self.max_seq_len} leaves nothing to predict. Use 2 or more, such as 2048."
            yield "max_seq_len", text

    def _share_held_out(self) -> Iterator[Problem]:
        if not 0 <= self.held_out < 1:
            yield "held_out", f"{self.held_out} is not a share from 0 to 1. Use one such as 0.01."

    def _split_names(self) -> Iterator[Problem]:
        for key in ("split", "held_out_split") if self.held_out else ("split",):
            name = getattr(self, key)
            if not name or Path(name).name != name or name.startswith("."):
                yield key, f"{name!r} is not the name of a folder. Use one such as train or val."
        if self.held_out and self.split == self.held_out_split:
            yield "held_out_split", f"it has the same name as split, {self.split!r}. Use another."

    def _bad_input(self) -> Iterator[Problem]:  # the Python API does not check types
        if self.bad_input not in ("error", "skip"):
            yield "bad_input", f"{self.bad_input!r} is not allowed. Use error or skip."

    def _compression(self) -> Iterator[Problem]:
        if self.compression is not None and self.compression.split(":")[0] not in COMPRESSIONS:
            text = f"{self.compression!r} is not allowed. Use one of {', '.join(COMPRESSIONS)}."
            yield "compression", text

    def _local_workers(self) -> Iterator[Problem]:
        if self.engine == "spark" and self.workers != "auto":
            yield "workers", "belongs to this machine, and engine: spark has its own. Remove it."


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Section):
    """Show samples of a data set as text, and the mix that a config reads.

    Further words, such as `max_seq_len=512`, override the config, as for `train`.

    Attributes:
        data: Folder of shards, or a training config, whose streams are all shown.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the one that the data names.
        split: Subfolder of a folder of shards. Default: `train`, if there is one.
        samples: How many samples to show from each folder.
        token_encoding_type: Integer type of `tokens` that are stored as bytes in shards. Default: int64.
        picture: File for a picture of the config's data mix, such as `mix.png`.
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

    def rules(self) -> Rules:
        yield from at_least(self, samples=0)
        yield picture_format(self)


def picture_format(options: PreviewConfig | CompareConfig) -> Iterator[Problem]:
    """Refuse a picture whose name does not say its format."""
    if options.picture is not None and not options.picture.endswith((".png", ".pdf", ".svg")):
        yield "picture", f"{options.picture} is not a picture. Use a name that ends in .png."


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(Section):
    """A needle hidden in held-out text, which the model has to choose among four.

    Attributes:
        lengths: Tokens of the context, one or more numbers.
        depths: Depths at which the needle is hidden, from the beginning to the end of the context.
        documents: Questions of each length and depth.
    """

    lengths: tuple[int, ...]
    depths: int = 5
    documents: int = 50

    def rules(self) -> Rules:
        yield from at_least(self, depths=1, documents=1)
        yield long_enough(self, _SHORTEST_NEEDLE)


@dataclass(frozen=True, kw_only=True)
class CopyConfig(Section):
    """A text of random order that begins again, and that the model has to continue.

    Attributes:
        lengths: Tokens of the context, one or more numbers.
        documents: Questions of each length.
    """

    lengths: tuple[int, ...]
    documents: int = 50

    def rules(self) -> Rules:
        yield from at_least(self, documents=1)
        yield long_enough(self, _SHORTEST_COPY)


def long_enough(section: NeedleConfig | CopyConfig, shortest: int) -> Iterator[Problem]:
    """Refuse lengths without room for a question."""
    if not section.lengths or min(section.lengths) < shortest:
        text = f"{list(section.lengths)}. Use one or more numbers of tokens, of at least {shortest}."
        yield "lengths", text


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluate a model on held-out text.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or an adapter in peft's format.
        base: The base model of such an adapter.
        eval_loader: The data: one loader, or a list, each with a `label`. Default: as in the run's config.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the run's.
        max_seq_len: Tokens in a sequence, or `4x` for a multiple of the model's. Default: the model's.
        positions: Also report the loss by position in the context. With a `max_seq_len` of `4x`, rows are
            four consecutive samples.
        needle: Whether the model finds a needle in held-out text, such as `{lengths: [512, 1024], depths: 5,
            documents: 50}`; instead of the loss.
        copy: Whether the model copies a text of random order, such as `{lengths: [512], documents: 50}`;
            instead of the loss.
        device_eval_batch_size: Sequences a device evaluates at once. `auto` chooses by the memory.
        eval_subset_num_batches: Batches in an evaluation; -1: all.
        icl_tasks: In-context tasks to evaluate, or a YAML file of them. Without an `eval_loader`, the loss is
            then not measured.
        eval_gauntlet: How the tasks' scores are averaged, or a YAML file that says it.
        num_fewshot: Evaluate all tasks with this many examples, instead of each task's own numbers.
        limit: Evaluate only the first documents of each task; -1: all.
        precision: Number format of the computation. `auto`: bfloat16 on GPUs that support it, else float32.
        attn_impl: The attention backend; all have the same mathematics.
        verify: Compare the weights with their checksums.
        seed: Seed for anything random.
        out: JSON file for the results. Default: `eval.json` next to the model.
        dist_timeout: Seconds that a rank waits for the others.
        allow_code: Run the `preprocessing_fn` of a loader. On the command line only.
        variables: Values that other keys refer to as `${variables.x}`.
    """

    model: str
    base: str | None = None
    eval_loader: LoaderConfig | tuple[LoaderConfig, ...] | None = None
    tokenizer: str | None = None
    max_seq_len: int | str | None = None
    positions: bool = False
    needle: NeedleConfig | None = None
    copy: CopyConfig | None = None
    device_eval_batch_size: int | Literal["auto"] = "auto"
    eval_subset_num_batches: int = -1
    icl_tasks: tuple[TaskConfig, ...] | str | None = None
    eval_gauntlet: GauntletConfig | str | None = None
    num_fewshot: int | None = None
    limit: int = -1
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = "auto"
    attn_impl: Literal["auto", "torch", "flash", "triton"] = "auto"
    verify: bool = True
    seed: int = 17
    out: str | None = None
    dist_timeout: float = 600.0
    allow_code: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    def rules(self) -> Rules:
        yield self._multiple()
        yield self._all_samples()
        yield from at_least(self, max_seq_len=1, eval_subset_num_batches=-1, seed=0, dist_timeout=1)
        yield from at_least(self, device_eval_batch_size=1)
        yield from at_least(self, num_fewshot=0, limit=-1)
        yield some_batches(self, "eval_subset_num_batches")
        yield label_problems(self)
        yield self._tasks_needed()

    def _all_samples(self) -> Iterator[Problem]:
        if self.positions and self.eval_subset_num_batches != -1:
            yield "eval_subset_num_batches", "has no effect with positions: true. Remove one of them."

    def _multiple(self) -> Iterator[Problem]:
        if not isinstance(self.max_seq_len, str):
            return
        if not _MULTIPLE.fullmatch(self.max_seq_len):
            yield "max_seq_len", f"{self.max_seq_len!r} is not a number of tokens. Use one, or 2x or 4x."
        elif not self.is_of_long_context and self.icl_tasks is None:
            text = f"{self.max_seq_len}: the loss in rows of several samples needs positions: true. Add it."
            yield "max_seq_len", text

    def length_for(self, trained: int) -> int:
        """Tokens in a sequence, for a model that was trained with `trained`."""
        if isinstance(self.max_seq_len, str):
            return int(self.max_seq_len[:-1]) * trained
        return self.max_seq_len or trained

    def sample_length_for(self, trained: int) -> int:
        """Tokens in a sample of the data; a multiple of the training length joins several of them."""
        return trained if isinstance(self.max_seq_len, str) else self.max_seq_len or trained

    @property
    def is_of_long_context(self) -> bool:
        """Whether it measures how a model uses its context."""
        return self.positions or self.needle is not None or self.copy is not None

    def _tasks_needed(self) -> Iterator[Problem]:
        if self.icl_tasks is None:
            for key in ("eval_gauntlet", "num_fewshot"):
                if getattr(self, key) is not None:
                    yield key, "has no effect without icl_tasks. Name the tasks, or remove it."

    @property
    def eval_loaders(self) -> dict[str, LoaderConfig]:
        """The evaluation loaders by label; a single one without a label is `eval`."""
        return loaders_by_label(self.eval_loader)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """Compare runs with runs, or evaluations with evaluations; the first one is the baseline.

    Attributes:
        places: Folders of runs, or evaluations: an `eval.json`, or a folder that holds one.
        picture: File for a picture of the runs' losses over tokens, such as `losses.png`.
        examples: How many documents of each task to show that only one of two models answered rightly.
        fail_if: `worse`: end with exit code 3 if the 95 % interval of a difference in accuracy, of a task or
            of the mean of all tasks, lies below 0.
        seed: Seed of the bootstrap.
    """

    places: tuple[str, ...] = ()
    picture: str | None = None
    examples: int = 0
    fail_if: Literal["worse"] | None = None
    seed: int = 17

    def rules(self) -> Rules:
        yield from at_least(self, examples=0, seed=0)
        yield self._two()
        yield picture_format(self)

    def _two(self) -> Iterator[Problem]:
        if len(self.places) < 2:
            text = f"{len(self.places)} named. Name two runs or two evaluations, or more."
            yield "places", text


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Write a model as a Hugging Face folder.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or the URL of one in an object store; or an
            adapter in peft's format.
        out: Folder to write to.
        base: The base model of such an adapter.
        format: `native`: transformers' own classes load it; `custom`: with the network's code, for any model.
            `auto`: native if transformers' own classes can compute the model.
        adapter: Merge the adapters of a LoRA run into its base's weights (`merged`), or write them alone as a
            PEFT folder (`separate`).
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the run's.
        run_folder: Local folder of the run, for a remote checkpoint without config and tokenizer next to it.
        dtype: Number format of the weights.
        license: SPDX name of the model's license, for the model card.
        shard_bytes: Size of the largest weight file.
        verify: Compare the weights with their checksums, and refuse logits that are not finite or exceed 1e4.
        overwrite: Replace an existing folder.
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

    def rules(self) -> Rules:
        yield from map(self._of_merged_weights, ("format", "shard_bytes", "license"))

    def _of_merged_weights(self, name: str) -> Iterator[Problem]:
        if getattr(self, name) != getattr(ExportConfig, name) and self.adapter == "separate":
            yield name, "has no effect with adapter: separate. Remove it."


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Section):
    """Write another project's model, or llm-foundry's checkpoint, as a Hugging Face folder to start from.

    Attributes:
        source: A Hugging Face folder, its name on the hub, a run folder, or a Composer checkpoint, whole or
            sharded; also the URL of one in an object store.
        out: Folder to write to.
        revision: Branch, tag or commit of a name on the hub. Default: its main branch.
        config: A folder, `config.json` or YAML with the architecture, if the source does not contain it.
        config_overrides: Architecture keys to change, such as `max_seq_len`. Another `vocab_size` cuts the
            embedding at its end, or pads it with the mean of its rows.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the source's.
        dtype: Number format of the weights.
        verify: Compare the weights with their checksums.
        overwrite: Replace an existing folder.
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
class DoctorConfig(Section):
    """Show what works on this machine.

    Attributes:
        clean: Instead, remove and list the shared memory and temporary files that dead runs of this user
            left. Whatever a living process uses stays.
        install: Instead, print the command that installs a tested set of packages: `current` (today's PyTorch
            and transformers) or `composer-pins` (PyTorch 2.7, for Python 3.10, older GPUs and older drivers).
    """

    clean: bool = False
    install: Literal["current", "composer-pins"] | None = None


@dataclass(frozen=True)
class Sampling(Section):
    """How the next token is chosen.

    Attributes:
        temperature: Logits are divided by it before sampling; 0: always take the most likely token.
        top_k: Sample from this many of the most likely tokens; 0: all.
        top_p: Sample from the most likely tokens that together have this probability
            (https://arxiv.org/abs/1904.09751).
        seed: Seed of the sampling.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 17

    def rules(self) -> Rules:
        yield from at_least(self, temperature=0)
        yield self._probability()
        yield self._most_likely()

    def _probability(self) -> Iterator[Problem]:
        if not 0 < self.top_p <= 1:
            yield "top_p", f"{self.top_p}. Use a number above 0 and up to 1."

    def _most_likely(self) -> Iterator[Problem]:
        if self.top_k < 0:
            yield "top_k", f"{self.top_k} is negative. Use 0 for all, or more."


@dataclass(frozen=True, kw_only=True)
class TextConfig(Sampling):
    """How a model generates text.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or an adapter in peft's format.
        base: The base model of such an adapter.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the model's.
        max_new_tokens: Most tokens to generate.
        stop: Texts that end the generation.
        dtype: Number format of the weights. `auto`: bfloat16 on GPUs that support it, else float32.
        attn_impl: The attention backend; all have the same mathematics.
        verify: Compare the weights with their checksums.
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

    def rules(self) -> Rules:
        yield from super().rules()
        yield self._no_empty_stop()
        yield from at_least(self, max_new_tokens=1)

    def _no_empty_stop(self) -> Iterator[Problem]:
        if "" in self.stop:
            yield "stop", "an empty text would end each continuation at once. Remove it."


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
        system: The system message that the chat begins with.
    """

    system: str | None = None
