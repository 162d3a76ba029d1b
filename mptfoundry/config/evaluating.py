"""The options of `eval` and `compare`."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from mptfoundry import plugins
from mptfoundry.config.data import LoaderConfig, label_problems, loaders_by_label, some_batches
from mptfoundry.config.engine.section_rules import Limits, Problem, Rules, Section, picture_format
from mptfoundry.config.engine.signatures import LOGGERS, REFUSED_LOGGERS, Catalogue
from mptfoundry.config.streams import code_problem
from mptfoundry.config.tasks import GauntletConfig, TaskConfig
from mptfoundry.mpt.config import AttnImpl

# Keys of an evaluation that only its public tasks read.
PUBLIC_ONLY = ("include_path", "apply_chat_template", "fewshot_as_multiturn", "system_instruction")
# The type of a section that names loggers.
Loggers = Annotated[
    dict[str, Any],
    Catalogue("a section of loggers by name", ChainMap(plugins.loggers, LOGGERS), REFUSED_LOGGERS),
]
# The type of a section that names metrics.
Metrics = Annotated[
    dict[str, Any], Catalogue("a section of metrics of your own by name", plugins.metrics, supplied=2)
]
_MULTIPLE = re.compile(r"[1-9]\d*x")
# A key, its value and the key again, each of 8 tokens, and some text around them.
_SHORTEST_NEEDLE = 32
# Four pieces of 8 tokens, and two times what is before them.
_SHORTEST_COPY = 64


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

    limits: ClassVar = {"depths": Limits(1), "documents": Limits(1)}

    def rules(self) -> Rules:
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

    limits: ClassVar = {"documents": Limits(1)}

    def rules(self) -> Rules:
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
        eval_metrics: Metrics of your own, which code in `code_paths` names. Default: as in the run's config.
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
        code_paths: Python files with code of your own. Default: those of the run.
        allow_code: Run these files, the `preprocessing_fn` of a loader, and the Python code of tasks. On the
            command line only.
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
    eval_metrics: Metrics = field(default_factory=dict)
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
    attn_impl: AttnImpl = "auto"
    verify: bool = True
    seed: int = 17
    out: str | None = None
    loggers: Loggers = field(default_factory=dict)
    dist_timeout: float = 600.0
    code_paths: tuple[str, ...] = ()
    allow_code: bool = False
    variables: dict[str, Any] = field(default_factory=dict)

    limits: ClassVar = {
        "max_seq_len": Limits(1),
        "eval_subset_num_batches": Limits(-1),
        "seed": Limits(0),
        "dist_timeout": Limits(1),
        "device_eval_batch_size": Limits(1),
        "num_fewshot": Limits(0),
        "limit": Limits(-1),
    }

    def rules(self) -> Rules:
        yield self._multiple()
        yield self._all_samples()
        yield some_batches(self, "eval_subset_num_batches")
        yield label_problems(self)
        yield self._some_documents()
        yield from map(self._needs_public_tasks, PUBLIC_ONLY)
        yield self._gauntlet_needs_tasks()
        yield self._shots_need_tasks()
        yield self._turns_need_a_chat()
        yield code_problem(self)

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

    limits: ClassVar = {"examples": Limits(0), "seed": Limits(0)}

    def rules(self) -> Rules:
        yield self._two()
        yield picture_format(self)

    def _two(self) -> Iterator[Problem]:
        if len(self.places) < 2:
            text = f"{len(self.places)} named. Name two runs or two evaluations, or more."
            yield "places", text
