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

# Keys of an evaluation that only its public tasks read.
PUBLIC_ONLY = ("include_path", "apply_chat_template", "fewshot_as_multiturn", "system_instruction")
COMPRESSIONS = ("br", "bz2", "snappy", "zstd")
_MULTIPLE = re.compile(r"[1-9]\d*x")
# A key, its value and the key again, each of 8 tokens, and some text around them.
_SHORTEST_NEEDLE = 32
# Four pieces of 8 tokens, and two times what is before them.
_SHORTEST_COPY = 64


def picture_format(options: PreviewConfig | PlanConfig | CompareConfig) -> Iterator[Problem]:
    """The problem of a picture's name, if there is one."""
    if options.picture is not None and not options.picture.endswith((".png", ".pdf", ".svg")):
        yield "picture", f"{options.picture} is not a picture. Use a name that ends in .png."


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Section):
    """Check a config and show what its run would be; further words, such as `max_seq_len=512`, override it.

    Attributes:
        gpu: Plan for a cluster of these GPUs, such as `h100` or `a100-40gb`, not for this machine.
        gpus: GPUs of that cluster.
        gpus_per_node: GPUs of one of its machines.
        here: Fail with exit code 1 if `train` could not start on this machine.
    """

    gpu: str | None = None
    gpus: int | None = None
    gpus_per_node: int = 8
    here: bool = False

    def rules(self) -> Rules:
        yield from at_least(self, gpus=1, gpus_per_node=1)
        yield self._both()
        yield self._one_machine()

    def _both(self) -> Iterator[Problem]:
        if (self.gpu is None) != (self.gpus is None):
            missing, example = ("gpu", "gpu=h100") if self.gpu is None else ("gpus", "gpus=64")
            yield missing, f"gpu and gpus describe a cluster together. Add {example}."

    def _one_machine(self) -> Iterator[Problem]:
        if self.gpu is not None and self.here:
            yield "here", "asks about this machine, and gpu about a cluster. Use one of them."


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """Estimate time, memory and cost of a run on clusters; further words override the config.

    Attributes:
        gpus: Numbers of GPUs, such as `8,64,256`.
        gpu: Kinds of GPUs, such as `h100,b200`.
        gpus_per_node: GPUs of one machine.
        network_gbps: Gbit/s between machines, of one machine. Default: as usual for the GPU.
        dollars_per_gpu_hour: Price of a GPU, or of each kind in `gpu`, such as `2,3.5`.
        dollars_per_gb_month: Price of storage, for the checkpoints that stay.
        goodput: Share of the time that interruptions leave. Default: one interruption in 1,000 GPU-days.
        examples: Examples of the training data, where they can't be counted here.
        tokens_per_example: Their mean length, for `packing_ratio: auto`.
        measured: JSON of `scripts/bench_step.py` from this kind of GPU, to fit the constants to.
        picture: File for a picture of time and cost over the GPUs, such as `plan.png`.
    """

    gpus: tuple[int, ...]
    gpu: tuple[str, ...]
    gpus_per_node: int = 8
    network_gbps: float | None = None
    dollars_per_gpu_hour: tuple[float, ...] | None = None
    dollars_per_gb_month: float | None = None
    goodput: float | None = None
    examples: int | None = None
    tokens_per_example: float | None = None
    measured: str | None = None
    picture: str | None = None

    def rules(self) -> Rules:
        yield from at_least(self, gpus_per_node=1, examples=1, tokens_per_example=1, dollars_per_gb_month=0)
        yield self._numbers()
        yield self._one_price_each()
        yield self._share()
        yield picture_format(self)

    def _numbers(self) -> Iterator[Problem]:
        for key, values in (("gpus", self.gpus), ("gpu", self.gpu)):
            if not values:
                yield key, "is empty. Name at least one, such as gpus=64 gpu=h100."
        if any(count < 1 for count in self.gpus):
            yield "gpus", f"{min(self.gpus)} is too small. Use 1 or more."
        if self.network_gbps is not None and self.network_gbps <= 0:
            yield "network_gbps", f"{self.network_gbps:g} is not a rate. Use one such as 3200."

    def _one_price_each(self) -> Iterator[Problem]:
        prices = self.dollars_per_gpu_hour
        if prices is not None and len(prices) not in (1, len(self.gpu)):
            text = f"{len(prices)} prices for {len(self.gpu)} kinds of GPUs. Give one, or one for each."
            yield "dollars_per_gpu_hour", text
        if any(price < 0 for price in prices or ()):
            yield "dollars_per_gpu_hour", "is negative. Use a price such as 2.5."

    def _share(self) -> Iterator[Problem]:
        if self.goodput is not None and not 0 < self.goodput <= 1:
            yield "goodput", f"{self.goodput:g} is not a share above 0 and up to 1. Use one such as 0.95."

    def prices(self) -> tuple[float | None, ...]:
        """The price of each kind of GPU."""
        prices = self.dollars_per_gpu_hour
        if prices is None:
            return (None,) * len(self.gpu)
        return prices * len(self.gpu) if len(prices) == 1 else prices


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
class TokenizerTrainConfig(Section):
    """Train a byte-level BPE tokenizer like MPT's on your own text.

    Attributes:
        inputs: Files and folders of text, source code, JSONL or Parquet, or `hf:NAME`, as for `prepare`.
        out: Folder for the tokenizer.
        vocab_size: Number of ids, at least 258 and the special tokens. With little text there may be fewer.
        special_tokens: Further special tokens, besides `<|endoftext|>` and `<|padding|>`.
        chat_template: A Jinja file, or `chatml`, which adds `<|im_start|>` and `<|im_end|>`.
        text_key: The field of a record that holds the text.
        include: File name patterns to take from folders, such as `*.py`. Default: every known format.
        exclude: Patterns of files and folders to leave out.
        sample_bytes: Read a random sample of about this many bytes, if there is more text. Memory grows with
            the number of different words in the sample.
        seed: Seed of the sample.
        overwrite: Replace an existing folder.
        progress: Show a progress bar.
    """

    inputs: tuple[str, ...]
    out: str
    vocab_size: int
    special_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    text_key: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sample_bytes: int = 1_000_000_000
    seed: int = 17
    overwrite: bool = False
    progress: bool = True

    def rules(self) -> Rules:
        yield from at_least(self, sample_bytes=1, seed=0)
        yield self._room_for_bytes()

    def _room_for_bytes(self) -> Iterator[Problem]:
        least = 258 + len(self.special_tokens)
        if self.vocab_size < least:
            text = f"{self.vocab_size} can't hold 256 bytes and the special tokens. Use {least} or more."
            yield "vocab_size", text


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareConfig(Section):
    """Compare two tokenizers by bytes per token: the more, the shorter a text becomes.

    Attributes:
        first: Folder of a tokenizer, or its name on the hub.
        second: Another one.
        text: Files and folders of text, as for `prepare`.
        text_key: The field of a record that holds the text.
        sample_bytes: Read a random sample of about this many bytes of each text, if there is more.
        seed: Seed of the sample.
        progress: Show a progress bar.
    """

    first: str
    second: str
    text: tuple[str, ...]
    text_key: str = "text"
    sample_bytes: int = 20_000_000
    seed: int = 17
    progress: bool = True

    def rules(self) -> Rules:
        yield from at_least(self, sample_bytes=1, seed=0)


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
        needle: Whether the model finds a needle in held-out text, without an ordinary loss.
        copy: Whether the model copies a text of random order, without an ordinary loss.
        device_eval_batch_size: Sequences a device evaluates at once. `auto` chooses by the memory.
        eval_subset_num_batches: Batches in an evaluation; -1: all.
        icl_tasks: In-context tasks to evaluate, or a YAML file of them. Without an `eval_loader`, the loss is
            then not measured.
        eval_gauntlet: How the tasks' scores are averaged, or a YAML file that says it.
        num_fewshot: Evaluate all tasks with this many examples, instead of each task's own numbers.
        limit: Evaluate only the first documents of each task; -1: all.
        tasks: Public tasks of lm-evaluation-harness to evaluate, by their names there, with commas between
            them. They may be groups, patterns such as `mmlu_*`, or YAML files of tasks.
        include_path: Folder with further tasks for `tasks`, as YAML files in lm-evaluation-harness' format.
        apply_chat_template: Write the questions of `tasks` as turns of a chat, by the tokenizer's template.
        fewshot_as_multiturn: In a chat, each example is a turn of its own. Default: with a chat template.
        system_instruction: The system message before the questions of `tasks`.
        precision: Number format of the computation. `auto`: bfloat16 on GPUs that support it, else float32.
        attn_impl: The attention backend; all have the same mathematics.
        verify: Compare the weights with their checksums.
        seed: Seed for anything random.
        out: JSON file for the results. Default: `eval.json` next to the model.
        dist_timeout: Seconds that a rank waits for the others.
        allow_code: Run the `preprocessing_fn` of a loader, and the Python code of tasks. On the command line
            only.
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
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
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
        yield self._some_documents()
        yield from map(self._needs_public_tasks, PUBLIC_ONLY)
        yield self._gauntlet_needs_tasks()
        yield self._shots_need_tasks()
        yield self._turns_need_a_chat()

    def _some_documents(self) -> Iterator[Problem]:
        if self.limit == 0:
            yield "limit", "0 documents leave nothing to do. Use -1 for all of them."

    def _needs_public_tasks(self, key: str) -> Iterator[Problem]:
        if getattr(self, key) != getattr(EvalConfig, key) and not self.tasks:
            yield key, "has no effect without tasks. Name the tasks, or remove it."

    def _gauntlet_needs_tasks(self) -> Iterator[Problem]:
        if self.eval_gauntlet is not None and self.icl_tasks is None:
            yield "eval_gauntlet", "has no effect without icl_tasks. Name the tasks, or remove it."

    def _shots_need_tasks(self) -> Iterator[Problem]:
        if self.num_fewshot is not None and self.icl_tasks is None and not self.tasks:
            yield "num_fewshot", "has no effect without icl_tasks or tasks. Name the tasks, or remove it."

    def _turns_need_a_chat(self) -> Iterator[Problem]:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            yield "fewshot_as_multiturn", "needs apply_chat_template: true."

    @property
    def public_tasks(self) -> tuple[str, ...]:
        """The names in `tasks`, each once."""
        names = (name.strip() for text in self.tasks for name in text.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def _all_samples(self) -> Iterator[Problem]:
        if self.positions and self.eval_subset_num_batches != -1:
            yield "eval_subset_num_batches", "has no effect with positions: true. Remove one of them."

    def _multiple(self) -> Iterator[Problem]:
        if not isinstance(self.max_seq_len, str):
            return
        if not _MULTIPLE.fullmatch(self.max_seq_len):
            yield "max_seq_len", f"{self.max_seq_len!r} is not a number of tokens. Use one, or 2x or 4x."
        elif not self.is_of_long_context and self.icl_tasks is None and not self.tasks:
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
        cluster: Instead, time matrix products and all-reduces on each rank that the launcher started, and
            name the slow ones.
        install: Instead, print the command that installs a tested set of packages: `current` (today's PyTorch
            and transformers) or `composer-pins` (PyTorch 2.7, for Python 3.10, older GPUs and older drivers).
        env: Instead, print what a report of a fault needs: versions, devices, limits and the variables that
            change a run. Values that may hold a secret are hidden.
    """

    clean: bool = False
    env: bool = False
    cluster: bool = False
    install: Literal["current", "composer-pins"] | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Section):
    """Write a script or manifest that starts a run on a cluster; further words override the config.

    Attributes:
        scheduler: `slurm`, `kubernetes` (with JobSet) or `skypilot`.
        nodes: Machines.
        gpu: Kind of their GPUs, such as `h100`.
        gpus_per_node: GPUs of one machine.
        out: File to write. Default: the run's name.
        overwrite: Replace an existing file.
        account: Slurm's account.
        partition: Slurm's partition.
        time: Slurm's time limit.
        sbatch: More options of sbatch, such as `--qos=high`.
        modules: Environment modules to load, such as `cuda/13.0`.
        venv: Folder of the Python environment. Default: `.venv`.
        image: Container image to run in.
        container: How Slurm starts it: pyxis and enroot, or apptainer.
        mounts: Mounts: `FROM:TO`; on Kubernetes `CLAIM:PATH`.
        env: Environment variables by name.
        hf_home: Folder of the Hugging Face cache that all machines see.
        offline: Set HF_HUB_OFFLINE, for machines without a network.
        scratch: Folder on each machine's own disk, for streamed shards and compiled kernels.
        health_check: Check GPUs and network before the run.
        launcher: Start processes with the `composer` launcher. `false`: Slurm starts them, and they have ten
            minutes to save.
    """

    scheduler: Literal["slurm", "kubernetes", "skypilot"]
    nodes: int
    gpu: str
    gpus_per_node: int = 8
    out: str | None = None
    overwrite: bool = False
    account: str | None = None
    partition: str | None = None
    time: str = "24:00:00"
    sbatch: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    venv: str | None = None
    image: str | None = None
    container: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    env: dict[str, Any] = field(default_factory=dict)
    hf_home: str | None = None
    offline: bool = False
    scratch: str | None = None
    health_check: bool = True
    launcher: bool = True

    def rules(self) -> Rules:
        yield from at_least(self, nodes=1, gpus_per_node=1)
        yield self._only_slurm()
        yield self._mounts()

    def _only_slurm(self) -> Iterator[Problem]:
        for key in ("account", "partition", "time", "sbatch", "modules", "venv", "container", "launcher"):
            if self.scheduler != "slurm" and getattr(self, key) != getattr(LaunchConfig, key):
                yield key, f"only applies to slurm, not to {self.scheduler}. Remove it."

    def _mounts(self) -> Iterator[Problem]:
        for mount in self.mounts:
            if ":" not in mount:
                yield "mounts", f"{mount} does not say where it is mounted. Use FROM:TO."
        if self.mounts and self.image is None and self.scheduler == "slurm":
            yield "mounts", "has no effect without image. Name a container image, or remove it."


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
