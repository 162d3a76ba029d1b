"""The options of the MPT architecture, with their defaults and rules.

Names and defaults are llm-foundry's. The classes hold plain values and raise ValueError for invalid ones.
This module imports only the standard library. Lengths are in tokens, widths in features.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")
# Attention backends of the user's own, by name; see attention.py.
OWN_BACKENDS: dict[str, Any] = {}
# A broken rule: the key, several keys, or "" for the section as a whole; and the message.
Problem = tuple[str | tuple[str, ...], str]
# A section's rules in order. Each yields its problems and reads its fields lazily.
Rules = Iterator[Iterable[Problem]]


@dataclass(frozen=True)
class Limits:
    """Which numbers a field may hold; None and words such as `auto` pass.

    Attributes:
        least: The smallest one.
        most: The largest one.
        above: Numbers have to be larger than this.
        below: Numbers have to be smaller than this.
        text: What to say after a number that is too small, or not below `below`.
    """

    least: float = -inf
    most: float = inf
    above: float = -inf
    below: float | None = None
    text: str = ""

    def problems(self, section: Any, name: str) -> Iterator[Problem]:
        """Yield the problem of a section's field, if its number is outside."""
        value = getattr(section, name)
        if not isinstance(value, (int, float)):
            return
        if value < self.least or value <= self.above or (self.below is not None and value >= self.below):
            yield name, f"{value}{self.text or f' is too small. Use {self.least} or more.'}"
        elif value > self.most:
            yield name, f"{value} is too large. Use {self.most} or less."


class Section:
    """A dataclass with rules; an instance that breaks one can't be made."""

    # The limits of its numbers, by field.
    limits: ClassVar[Mapping[str, Limits]] = {}

    def __post_init__(self) -> None:
        for problems in self.all_rules():
            for key, text in problems:
                raise ValueError(in_words(key, text))

    def all_rules(self) -> Rules:
        """What has to hold, for an instance or for a view of the fields that are valid."""
        yield from (limits.problems(self, name) for name, limits in self.limits.items())
        yield from self.rules()

    def rules(self) -> Rules:
        """What has to hold besides the limits."""
        yield from ()


class OwnBackend(str):
    """The name of an attention backend of the user's own."""

    @staticmethod
    def own_names() -> tuple[str, ...]:
        """The names that there are: further choices next to those of a Literal."""
        return tuple(OWN_BACKENDS)


AttnImpl = Literal["auto", "torch", "flash", "triton"] | OwnBackend


def in_words(key: str | tuple[str, ...], text: str) -> str:
    """A problem as one sentence."""
    if isinstance(key, tuple):
        return f"{' and '.join(key)} {text}"
    return f"{key}: {text}" if key else text


POSITIVE = Limits(above=0, text=" is not positive. Use a positive number.")
POSITIVE_OR_NONE = Limits(above=0, text=" is not positive. Use a positive number, or null for none.")
PROBABILITY = Limits(least=0, below=1, text=" is not a probability. Use 0 or more and less than 1.")


def whole(most: float = inf) -> Limits:
    """The limits of a number of things: at least one."""
    return Limits(above=0, most=most, text=" is not positive. Use 1 or more.")


@dataclass(frozen=True)
class RotaryScalingConfig(Section):
    """How rotary positions are extended beyond the trained length.

    Attributes:
        type: `no_scaling`: they are not extended; `linear`: positions are divided by `factor`; `dynamic`: the
            base is increased for sequences longer than `max_seq_len` (NTK-aware scaling).
        factor: The extended length divided by the trained length.
    """

    type: Literal["no_scaling", "linear", "dynamic"] = "no_scaling"
    factor: float = 1.0

    limits: ClassVar = {"factor": Limits(1)}


@dataclass(frozen=True)
class RotaryDailConfig(Section):
    """Options of llm-foundry's `dail` implementation of rotary positions, which computes the same as `hf`.

    Attributes:
        type: Only `original` (https://arxiv.org/abs/2104.09864); xPos is not supported.
        pos_idx_in_fp32: Only `true`: positions are computed in float32.
        xpos_scale_base: Has no effect, because only xPos uses it; accepted for older configs.
    """

    type: Literal["original"] = "original"
    pos_idx_in_fp32: Literal[True] = True
    xpos_scale_base: int = 512


@dataclass(frozen=True)
class AttnConfig(Section):
    """The attention of every block.

    Attributes:
        attn_type: How many heads keys and values have: as many as queries, one, or `kv_n_heads`.
        attn_pdrop: Dropout probability of the attention weights.
        attn_impl: The backend that computes attention; the result is the same for all. `auto` chooses one for
            the hardware, and the run prints which. On a GPU, with `triton`, kernels also compute the norms.
        qk_ln: Apply layer norm to queries and keys, over all heads together.
        qk_gn: Apply layer norm to queries and keys, for each head separately.
        fused_qkv: Only `true`: one matrix, `Wqkv`, computes queries, keys and values.
        clip_qkv: Clamp queries, keys and values to [-clip_qkv, clip_qkv]. Default: no clamping.
        softmax_scale: Factor on the attention scores. Default: 1 / sqrt(head_dim).
        attn_uses_sequence_id: In a packed row, tokens attend only to tokens of their own document.
        sliding_window_size: A token attends to itself and to this many tokens before it; -1: to all of them.
        attn_logit_softcapping: Cap of the scores: they become cap * tanh(score / cap). Default: no cap.
        alibi: Attention with linear biases (https://arxiv.org/abs/2108.12409) instead of positions.
        alibi_bias_max: The steepest slope of a head is 2 ** (-alibi_bias_max / n_heads).
        alibi_skips: Skip keys whose weight is below rounding error because of ALiBi. The result is the same.
        rope: Rotary positions (https://arxiv.org/abs/2104.09864).
        rope_theta: Base of the rotary frequencies.
        rope_impl: Which of llm-foundry's implementations; both compute the same formula.
        rope_dail_config: Options of `dail`.
        rope_hf_config: Options of `hf`: how to extend the context beyond the trained length.
        kv_n_heads: How many heads keys and values have with `grouped_query_attention`.
        prefix_lm: Tokens in the batch's `prefix_mask` attend to each other in both directions.
    """

    attn_type: Literal["multihead_attention", "multiquery_attention", "grouped_query_attention"] = (
        "multihead_attention"
    )
    attn_pdrop: float = 0.0
    attn_impl: AttnImpl = "auto"
    qk_ln: bool = False
    qk_gn: bool = False
    fused_qkv: Literal[True] = True
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    attn_uses_sequence_id: bool = False
    sliding_window_size: int = -1
    attn_logit_softcapping: float | None = None
    alibi: bool = False
    alibi_bias_max: int = 8
    alibi_skips: bool = True
    rope: bool = False
    rope_theta: float = 10000.0
    rope_impl: Literal["dail", "hf"] = "dail"
    rope_dail_config: RotaryDailConfig = field(default_factory=RotaryDailConfig)
    rope_hf_config: RotaryScalingConfig = field(default_factory=RotaryScalingConfig)
    kv_n_heads: int | None = None
    prefix_lm: bool = False

    limits: ClassVar = {
        "attn_pdrop": PROBABILITY,
        "clip_qkv": POSITIVE_OR_NONE,
        "softmax_scale": POSITIVE_OR_NONE,
        "sliding_window_size": Limits(-1, text=". Use -1 for none, or 0 and more."),
        "attn_logit_softcapping": POSITIVE_OR_NONE,
        "alibi_bias_max": whole(),
        "rope_theta": POSITIVE,
        "kv_n_heads": whole(),
    }

    def rules(self) -> Rules:
        yield only_one(self, "are both true. A model has one of them.", "alibi", "rope")
        yield only_one(self, "are both true. A model has one of them.", "qk_ln", "qk_gn")
        yield self._grouped_heads()

    def _grouped_heads(self) -> Iterator[Problem]:
        is_grouped = self.attn_type == "grouped_query_attention"
        if is_grouped and self.kv_n_heads is None:
            yield "attn_type", "grouped_query_attention needs kv_n_heads."
        if not is_grouped and self.kv_n_heads is not None:
            yield "kv_n_heads", f"only grouped_query_attention takes it, not {self.attn_type}."


@dataclass(frozen=True)
class ActivationConfig(Section):
    """The nonlinearity of the feed-forward network.

    Attributes:
        name: The function: one of `torch.nn.functional`, or `quick_gelu`, which is x * sigmoid(1.702 * x).
        approximate: Compute `gelu` exactly (`none`), or with the `tanh` approximation.
    """

    name: Literal["gelu", "quick_gelu", "relu", "silu"] = "gelu"
    approximate: Literal["none", "tanh"] = "none"

    def rules(self) -> Rules:
        yield self._approximation()

    def _approximation(self) -> Iterator[Problem]:
        if self.approximate != "none" and self.name != "gelu":
            yield "approximate", f"only gelu takes it, not {self.name}. Remove it."


@dataclass(frozen=True)
class FFNConfig(Section):
    """The feed-forward network of every block.

    Attributes:
        ffn_type: `mptmlp`: two matrices; `mptglu`: a gated linear unit, with a third matrix for the gate.
        ffn_hidden_size: Width of the hidden layer. Default: `expansion_ratio` * `d_model`.
        ffn_act_fn: The nonlinearity.
    """

    ffn_type: Literal["mptmlp", "mptglu"] = "mptmlp"
    ffn_hidden_size: int | None = None
    ffn_act_fn: ActivationConfig = field(default_factory=ActivationConfig)

    limits: ClassVar = {"ffn_hidden_size": whole(most=1_000_000_000)}


InitName = Literal[
    "default_",
    "baseline_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "neox_init_",
    "small_init_",
    "xavier_uniform_",
    "xavier_normal_",
]


@dataclass(frozen=True)
class InitConfig(Section):
    """How the weights of a new network are initialized.

    Attributes:
        name: How to draw the matrices: `default_` is PyTorch's own; `baseline_` is normal with `init_std`;
            `neox_init_` is `small_init_` with smaller matrices at the end of each branch.
        fan_mode: For kaiming: whether to scale by the inputs or the outputs of a matrix.
        init_nonlinearity: For kaiming: the nonlinearity that sets the gain.
        init_div_is_residual: Divide the weights of matrices that write into the residual stream by
            sqrt(2 * n_layers) (`true`), or by this number.
        emb_init_std: Standard deviation of the embeddings. Default: they are drawn like the matrices.
        emb_init_uniform_lim: Draw the embeddings uniformly from [-lim, lim], or from [low, high].
        init_std: Standard deviation of the matrices with `baseline_`, which requires it.
        init_gain: Gain for xavier; for kaiming, the negative slope of `leaky_relu`.
    """

    name: InitName = "kaiming_normal_"
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"
    init_nonlinearity: Literal["relu", "leaky_relu", "linear", "tanh", "sigmoid", "selu"] = "relu"
    init_div_is_residual: bool | float = True
    emb_init_std: float | None = None
    emb_init_uniform_lim: float | tuple[float, float] | None = None
    init_std: float | None = None
    init_gain: float = 0.0

    def rules(self) -> Rules:
        yield self._baseline()
        yield only_one(self, "are both given. Use one of them.", "emb_init_std", "emb_init_uniform_lim")

    def _baseline(self) -> Iterator[Problem]:
        if self.name == "baseline_" and self.init_std is None:
            yield "name", "baseline_ needs init_std."


@dataclass(frozen=True)
class MPTConfig(Section):
    """The architecture of an MPT: pre-norm decoder blocks between one embedding and the logits.

    Attributes:
        d_model: Width of the residual stream.
        n_heads: Number of query heads.
        n_layers: Number of blocks.
        head_dim: Width of a head. Default: `d_model` / `n_heads`.
        expansion_ratio: Hidden width of the feed-forward network divided by `d_model`.
        max_seq_len: Longest sequence that the model is trained for. ALiBi and rotary positions allow longer
            ones.
        vocab_size: Rows of the embedding: at least as many as the tokenizer has ids.
        resid_pdrop: Dropout probability of what a block adds to the residual stream.
        emb_pdrop: Dropout probability after the embedding.
        learned_pos_emb: Use a learned embedding for each position. Has no effect with `alibi` or `rope`.
        attn_config: The attention.
        ffn_config: The feed-forward network.
        logit_scale: Factor on the logits; `inv_sqrt_d_model` is 1 / sqrt(d_model). Default: 1.
        no_bias: Use no biases, neither in matrices nor in norms.
        attention_bias: Whether `Wqkv` has a bias; `out_proj` follows `no_bias`. Default: the opposite of
            `no_bias`.
        embedding_fraction: Fraction of the gradient that reaches the embedding
            (https://arxiv.org/abs/2210.02414).
        norm_type: The norm. With autocast, `low_precision_*` computes in the low precision.
        norm_eps: Added to the variance before the square root.
        init_config: How the weights of a new network are initialized.
        tie_word_embeddings: Use the embedding as the output projection, too.
        final_logit_softcapping: Cap of the logits: they become cap * tanh(logit / cap). Default: no cap.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    head_dim: int | None = None
    expansion_ratio: float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    resid_pdrop: float = 0.0
    emb_pdrop: float = 0.0
    learned_pos_emb: bool = True
    attn_config: AttnConfig = field(default_factory=AttnConfig)
    ffn_config: FFNConfig = field(default_factory=FFNConfig)
    logit_scale: float | Literal["inv_sqrt_d_model"] | None = None
    no_bias: bool = False
    attention_bias: bool | None = None
    embedding_fraction: float = 1.0
    norm_type: Literal["low_precision_layernorm", "layernorm", "rmsnorm", "low_precision_rmsnorm"] = (
        "low_precision_layernorm"
    )
    norm_eps: float = 1e-5
    init_config: InitConfig = field(default_factory=InitConfig)
    tie_word_embeddings: bool = True
    final_logit_softcapping: float | None = None

    # Any model is smaller. Counting the parameters of a larger one would use up the machine's memory.
    limits: ClassVar = {
        "d_model": whole(most=10_000_000),
        "n_heads": whole(most=100_000),
        "n_layers": whole(most=10_000),
        "head_dim": whole(most=10_000_000),
        "expansion_ratio": replace(POSITIVE, most=10_000),
        "max_seq_len": whole(most=1_000_000_000),
        "vocab_size": whole(most=1_000_000_000),
        "resid_pdrop": PROBABILITY,
        "emb_pdrop": PROBABILITY,
        "norm_eps": POSITIVE,
        "final_logit_softcapping": POSITIVE_OR_NONE,
    }

    def rules(self) -> Rules:
        yield self._heads()
        yield self._kv_heads()
        yield self._hidden_size()
        yield self._rotary_pairs()
        yield self._embedding_fraction()

    def _heads(self) -> Iterator[Problem]:
        if self.head_dim is None and self.d_model % self.n_heads:
            text = f"{self.d_model} does not split over {self.n_heads} heads."
            yield "d_model", f"{text} Use a multiple of {self.n_heads}, or set head_dim."

    def _kv_heads(self) -> Iterator[Problem]:
        if self.n_heads % self.kv_heads:
            yield "attn_config.kv_n_heads", f"{self.kv_heads} does not divide n_heads: {self.n_heads}."

    def _hidden_size(self) -> Iterator[Problem]:
        if self.ffn_config.ffn_hidden_size is None and self.d_model * self.expansion_ratio % 1:
            text = f"times d_model {self.d_model} is not a whole number."
            yield "expansion_ratio", f"{self.expansion_ratio} {text}"

    def _rotary_pairs(self) -> Iterator[Problem]:
        if self.attn_config.rope and self.d_head % 2:
            yield "head_dim", f"{self.d_head} is odd; rotary positions turn pairs of features."

    def _embedding_fraction(self) -> Iterator[Problem]:
        if not 0 < self.embedding_fraction <= 1:
            yield "embedding_fraction", f"{self.embedding_fraction}. Use a number in (0, 1]."

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads for keys and values."""
        if self.attn_config.attn_type == "multiquery_attention":
            return 1
        return self.attn_config.kv_n_heads or self.n_heads

    @property
    def d_ffn(self) -> int:
        """Hidden width of the feed-forward network."""
        return self.ffn_config.ffn_hidden_size or int(self.d_model * self.expansion_ratio)

    @property
    def logit_factor(self) -> float:
        """The factor on the last norm's output before the output projection."""
        if isinstance(self.logit_scale, str):
            return self.d_model**-0.5
        return 1.0 if self.logit_scale is None else float(self.logit_scale)

    @property
    def has_learned_positions(self) -> bool:
        """Whether the network has `wpe`; ALiBi and rotary positions replace it."""
        return self.learned_pos_emb and not (self.attn_config.alibi or self.attn_config.rope)

    @property
    def has_qkv_bias(self) -> bool:
        """Whether `Wqkv` has a bias."""
        return not self.no_bias if self.attention_bias is None else self.attention_bias

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain nested values, ready for JSON and YAML."""
        return asdict(self)

    def to_explicit_dict(self) -> dict[str, Any]:
        """`to_dict` with explicit head counts instead of defaults: the contents of our `config.json`.

        It writes every attention as grouped-query attention, which is the same mathematics. transformers' own
        MPT classes reject that value; otherwise they would ignore other options and compute something else.
        """
        values = self.to_dict()
        values["head_dim"] = self.d_head
        values["attn_config"] |= {"attn_type": "grouped_query_attention", "kv_n_heads": self.kv_heads}
        return values

    def with_plain_heads(self) -> MPTConfig:
        """The same model without head counts that follow from other fields; undoes `to_explicit_dict`."""
        head_dim = None if self.d_head * self.n_heads == self.d_model else self.head_dim
        attention = self.attn_config
        if self.kv_heads == self.n_heads:
            attention = replace(attention, attn_type="multihead_attention", kv_n_heads=None)
        elif self.kv_heads == 1:
            attention = replace(attention, attn_type="multiquery_attention", kv_n_heads=None)
        return replace(self, head_dim=head_dim, attn_config=attention)


def only_one(section: Any, text: str, *names: str) -> Iterator[Problem]:
    """A rule for fields that exclude each other: at most one may be set."""
    values = {name: getattr(section, name) for name in names}
    given = tuple(
        n for n, value in values.items() if value is not None and value is not False and value != {}
    )
    if len(given) > 1:
        yield given, text


def from_values(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of one of these dataclasses from nested plain values, such as parsed JSON.

    An unknown key is ignored if its value is null; with any other value it could change the mathematics.

    Raises:
        ValueError: The class does not have this key or value; the message prefixes its name with `path`.
    """
    types_of = typing.get_type_hints(kind)
    given = {}
    for key, value in values.items():
        if key not in types_of:
            if value is None:
                continue
            raise ValueError(f"{path}{key}: {value!r}. MPT has no such option here.")
        inner = next((t for t in _alternatives(types_of[key]) if is_dataclass(t)), None)
        if inner is None:
            if not _fits(value, types_of[key]):
                raise ValueError(f"{path}{key}: {value!r}. Allowed: {_allowed(types_of[key])}.")
            given[key] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, Mapping):
            given[key] = from_values(typing.cast(type, inner), value, f"{path}{key}.")
        elif value is not None:
            raise ValueError(f"{path}{key}: {value!r} is not a section.")
    return kind(**given)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    for choice in _alternatives(kind):
        if typing.get_origin(choice) is typing.Literal:
            if any(value == v and type(value) is type(v) for v in typing.get_args(choice)):
                return True
        elif typing.get_origin(choice) is tuple:
            kinds = typing.get_args(choice)
            is_as_long = isinstance(value, (list, tuple)) and len(value) == len(kinds)
            if is_as_long and all(map(_fits, value, kinds)):
                return True
        elif hasattr(choice, "own_names"):
            if value in choice.own_names():
                return True
        elif choice is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif type(value) is (typing.get_origin(choice) or choice):
            return True
    return False


def _allowed(kind: Any) -> str:
    words: list[str] = []
    for choice in _alternatives(kind):
        if typing.get_origin(choice) is typing.Literal:
            words += [str(value) for value in typing.get_args(choice)]
        elif hasattr(choice, "own_names"):
            words += choice.own_names()
        else:
            words.append("null" if choice is types.NoneType else getattr(choice, "__name__", str(choice)))
    return ", ".join(words)
