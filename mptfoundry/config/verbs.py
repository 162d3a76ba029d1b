"""The options of all verbs except `train`: what `mptfoundry VERB key=value ...` accepts.

Those of `eval` and `compare` are in `evaluating.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, picture_format
from mptfoundry.config.evaluating import CompareConfig as CompareConfig
from mptfoundry.config.evaluating import EvalConfig as EvalConfig
from mptfoundry.config.streams import code_problem
from mptfoundry.mpt.config import AttnImpl

COMPRESSIONS = ("br", "bz2", "snappy", "zstd")


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

    limits: ClassVar = {"gpus": Limits(1), "gpus_per_node": Limits(1)}

    def rules(self) -> Rules:
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

    limits: ClassVar = {
        "gpus_per_node": Limits(1),
        "examples": Limits(1),
        "tokens_per_example": Limits(1),
        "dollars_per_gb_month": Limits(0),
    }

    def rules(self) -> Rules:
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

    limits: ClassVar = {"workers": Limits(1)}

    def rules(self) -> Rules:
        yield self._local_workers()
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

    limits: ClassVar = {"sample_bytes": Limits(1), "seed": Limits(0)}

    def rules(self) -> Rules:
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

    limits: ClassVar = {"sample_bytes": Limits(1), "seed": Limits(0)}


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
        allow_code: Run the files in `code_paths` and every `preprocessing_fn` of a config. On the command
            line only.
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

    limits: ClassVar = {"samples": Limits(0)}

    def rules(self) -> Rules:
        yield picture_format(self)


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
        code_paths: Python files with code of your own to run first. Default: those of the run.
        allow_code: Run these files. On the command line only.
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
    code_paths: tuple[str, ...] = ()
    allow_code: bool = False

    def rules(self) -> Rules:
        yield from map(self._of_merged_weights, ("format", "shard_bytes", "license"))
        yield code_problem(self)

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

    limits: ClassVar = {"nodes": Limits(1), "gpus_per_node": Limits(1)}

    def rules(self) -> Rules:
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

    limits: ClassVar = {
        "temperature": Limits(0),
        "top_k": Limits(0, text=" is negative. Use 0 for all, or more."),
    }

    def rules(self) -> Rules:
        yield self._probability()

    def _probability(self) -> Iterator[Problem]:
        if not 0 < self.top_p <= 1:
            yield "top_p", f"{self.top_p}. Use a number above 0 and up to 1."


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
        code_paths: Python files with code of your own to run first. Default: those of the run.
        allow_code: Run these files. On the command line only.
    """

    model: str
    base: str | None = None
    tokenizer: str | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    attn_impl: AttnImpl = "auto"
    verify: bool = True
    code_paths: tuple[str, ...] = ()
    allow_code: bool = False

    limits: ClassVar = {**Sampling.limits, "max_new_tokens": Limits(1)}

    def rules(self) -> Rules:
        yield from super().rules()
        yield code_problem(self)
        yield self._no_empty_stop()

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
