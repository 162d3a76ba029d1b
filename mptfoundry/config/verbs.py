"""The options of all verbs except `train`: what `mptfoundry VERB key=value ...` accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mptfoundry.config.data import LoaderConfig, label_problems, loaders_by_label, some_batches
from mptfoundry.config.engine.section_rules import Problem, Rules, Section, at_least
from mptfoundry.config.engine.signatures import Loggers
from mptfoundry.config.tasks import GauntletConfig, TaskConfig

# Keys of an evaluation that only its public tasks read.
PUBLIC_ONLY = ("include_path", "apply_chat_template", "fewshot_as_multiturn", "system_instruction")
COMPRESSIONS = ("br", "bz2", "snappy", "zstd")


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
        yield self._format()

    def _format(self) -> Iterator[Problem]:
        if self.picture is not None and not self.picture.endswith((".png", ".pdf", ".svg")):
            yield "picture", f"{self.picture} is not a picture. Use a name that ends in .png."


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluate a model on held-out text.

    Attributes:
        model: Folder of a run, a checkpoint, an exported folder, or an adapter in peft's format.
        base: The base model of such an adapter.
        eval_loader: The data: one loader, or a list, each with a `label`. Default: as in the run's config.
        tokenizer: Folder of a tokenizer, or its name on the hub. Default: the run's.
        max_seq_len: Tokens in a sequence. Default: the model's.
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
        loggers: Loggers by name, with their arguments, as for a run.
        dist_timeout: Seconds that a rank waits for the others.
        allow_code: Run the `preprocessing_fn` of a loader, and the Python code of tasks. On the command line
            only.
        variables: Values that other keys refer to as `${variables.x}`.
    """

    model: str
    base: str | None = None
    eval_loader: LoaderConfig | tuple[LoaderConfig, ...] | None = None
    tokenizer: str | None = None
    max_seq_len: int | None = None
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
    loggers: Loggers = field(default_factory=dict)
    dist_timeout: float = 600.0
    allow_code: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    def rules(self) -> Rules:
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

    @property
    def eval_loaders(self) -> dict[str, LoaderConfig]:
        """The evaluation loaders by label; a single one without a label is `eval`."""
        return loaders_by_label(self.eval_loader)


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
