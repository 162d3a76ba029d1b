"""Text generation: sampling, streaming, and a chat in the terminal.

The prompts of a batch are padded on the left, so that all continue at the same column. The network processes
the prompt once; each further step processes one column and uses a KV cache of fixed size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from mptfoundry.config.verbs import Sampling
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.tokenizer import default_template, own_borders

if TYPE_CHECKING:
    from mptfoundry.mpt.network import MPT

log = logging.getLogger(__name__)

GREEDY = Sampling()


def generate(
    network: MPT,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    stream: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Continue token ids.

    Args:
        network: In eval mode.
        input_ids: (batch, seq) int64; shorter rows are padded on the left.
        max_new_tokens: The most tokens to add.
        sampling: How each token is chosen.
        eos_token_id: A row ends after this token, or any of these.
        attention_mask: (batch, seq) bool, false where a row is padded.
        stream: Called after each step with the new ids (batch,).

    Returns:
        (batch, seq + new) int64: the prompts and their continuations. A finished row repeats its last token.

    Raises:
        ConfigError: Prompt and new tokens exceed the model's learned positions.
    """
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    columns = [input_ids]
    for ids in _steps(network, input_ids, attention_mask, max_new_tokens, sampling, eos_token_id, done):
        columns.append(ids[:, None])
        if stream is not None:
            stream(ids)
    return torch.cat(columns, dim=1)


def generate_text(
    network: MPT,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue texts, as one batch.

    Args:
        network: In eval mode.
        tokenizer: The network's.
        prompts: An empty prompt starts with the tokenizer's beginning-of-text token.
        max_new_tokens: The most tokens to add.
        sampling: How each token is chosen.
        stop: A continuation ends before any of these texts.
        stream: Called with the prompt's index and each new piece of its continuation, in whole characters.

    Returns:
        The continuations, without the prompts and without special tokens.
    """
    encoded = [encode_prompt(tokenizer, prompt, network.config) for prompt in prompts]
    return continue_prompts(network, tokenizer, encoded, max_new_tokens, sampling, stop, stream)


def encode_prompt(tokenizer: Any, prompt: str, config: MPTConfig) -> list[int]:
    """The ids of a prompt, at least one; raises ConfigError for ids that the model does not have.

    If the tokenizer adds a BOS, it stays; if it adds an EOS, which would end the text, it is removed."""
    ids = tokenizer(prompt)["input_ids"]
    if (after := list(own_borders(tokenizer).after)) and ids[-len(after) :] == after:
        ids = ids[: -len(after)]
    if not ids:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ConfigError("prompts: an empty prompt needs a tokenizer with a beginning-of-text token.")
        ids = [begin]
    if max(ids) >= config.vocab_size:
        raise ConfigError(
            f"tokenizer: a prompt has the token id {max(ids)}, the model's vocabulary ends at "
            f"{config.vocab_size - 1}. Use the model's own tokenizer."
        )
    return ids


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next ids (batch,) from logits (batch, vocab)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kept, ids = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        kept, ids = logits.sort(dim=-1, descending=True)
    else:
        return _draw(logits.softmax(dim=-1), generator)
    probabilities = kept.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(-1, _draw(probabilities, generator)[:, None])[:, 0]


def _draw(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _steps(
    network: MPT,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | Sequence[int] | None,
    done: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Yield the next ids (batch,) until all rows are done; the caller may also set `done` (batch,)."""
    from mptfoundry.mpt.network import KVCache

    batch, prompt_len = input_ids.shape
    total = prompt_len + max_new_tokens
    check_length(network.config, total)
    device = input_ids.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    end_ids = torch.tensor(ends, dtype=torch.int64, device=device)
    cache = KVCache(network.config, batch, total, device=device, dtype=next(network.parameters()).dtype)
    mask = None
    if attention_mask is not None and not attention_mask.all():
        mask = torch.ones(batch, total, dtype=torch.bool, device=device)
        mask[:, :prompt_len] = attention_mask
    ids, length = input_ids, prompt_len
    last = input_ids[:, -1]
    while length < total:
        with torch.no_grad():  # FSDP would keep tensors of inference_mode, and training fail on them
            visible = None if mask is None else mask[:, :length]
            logits = network(ids, attention_mask=visible, cache=cache, last_only=True).logits[:, -1]
            if length == prompt_len and not logits.isfinite().all():
                raise CheckpointError("the model's logits are not finite: its weights are NaN or too large.")
            last = torch.where(done, last, choose(logits, sampling, generator))
        yield last
        done |= torch.isin(last, end_ids)
        if done.all():
            return
        ids, length = last[:, None], length + 1


def check_length(config: MPTConfig, length: int) -> None:
    """Raise ConfigError if `length` exceeds the learned positions; warn if it exceeds the trained length."""
    if length <= config.max_seq_len:
        return
    if config.has_learned_positions:
        raise ConfigError(
            f"max_new_tokens: prompt and continuation are {length} tokens, the model has "
            f"{config.max_seq_len} learned positions. Shorten one of them."
        )
    log.warning(
        "%d tokens are more than the model was made for (max_seq_len: %d).", length, config.max_seq_len
    )


def continue_prompts(
    network: MPT,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    stream: Callable[[int, str], None] | None,
    *,
    to_the_end: bool = False,
) -> list[str]:
    """The continuations of encoded prompts; `stream` gets the row's index and each piece.

    With `to_the_end`, the network makes `max_new_tokens` steps even if all texts have ended, so that ranks
    whose weights are sharded make equally many.
    """
    device = next(network.parameters()).device
    width = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([[ids[0]] * (width - len(ids)) + ids for ids in encoded], device=device)
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    done = torch.zeros(len(encoded), dtype=torch.bool, device=device)
    rows = [TextStream(tokenizer, tuple(stop)) for _ in encoded]
    end = tokenizer.eos_token_id

    def show(number: int, piece: str) -> None:
        if piece and stream is not None:
            stream(number, piece)

    ends = None if to_the_end else end
    for ids in _steps(network, input_ids, mask, max_new_tokens, sampling, ends, done):
        for number, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if not row.ended:
                row.ended = token == end
                show(number, "" if row.ended else row.add(token))
                done[number] = row.ended and not to_the_end
    for number, row in enumerate(rows):
        show(number, row.finish())
    return [row.text for row in rows]


@dataclass
class TextStream:
    """Decodes ids one by one into pieces of text that never split a character or a stop text.

    Attributes:
        tokenizer: Decodes the ids.
        stop: Texts that end the stream; the output excludes them and everything after them.
        text: All output so far.
        ended: Whether the stream has ended.
    """

    tokenizer: Any
    stop: tuple[str, ...] = ()
    text: str = ""
    ended: bool = False
    _context: list[int] = field(default_factory=list)
    _pending: list[int] = field(default_factory=list)
    _held: str = ""

    def add(self, token: int) -> str:
        """The text that is final after this id; often empty inside a multi-byte character."""
        self._pending.append(token)
        piece = self._decoded()
        if piece.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return self._give(piece, is_last=False)

    def finish(self) -> str:
        """The remaining text, which was held back."""
        return self._give(self._decoded() if self._pending else "", is_last=True)

    def _decoded(self) -> str:
        """The pending ids as text, decoded with the ids before them: some tokenizers trim the first token."""
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _give(self, piece: str, *, is_last: bool) -> str:
        text = self._held + piece
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.ended = True
            text, self._held = text[: min(found)], ""
        else:
            held = 0 if is_last else max((_overlap(text, stop) for stop in self.stop), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def chat(
    network: MPT,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    system: str | None = None,
    input_fn: Callable[[str], str] = input,
    output_fn: Callable[[str], None] = _print,
) -> None:
    """Chat with a model until `/quit`, Ctrl-D or Ctrl-C; `/new` starts over.

    If the tokenizer has a chat template, lines are turns of a conversation; otherwise the model continues
    them as plain text. If the text exceeds `max_seq_len`, tokens are dropped from the front, with a note.

    Args:
        network: In eval mode.
        tokenizer: The network's.
        max_new_tokens: The most tokens of an answer.
        sampling: How each token is chosen; the seed increases by one with each answer.
        stop: Texts that end an answer.
        system: The system prompt.
        input_fn: Reads a line.
        output_fn: Shows a piece of text, without a line break.
    """
    talk = _Talk(tokenizer, network.config, system, max_new_tokens)
    if default_template(tokenizer) is None:
        output_fn("The tokenizer has no chat template: your lines are continued as plain text.\n")
    output_fn("/quit ends, /new begins again.\n")
    try:
        while True:
            line = input_fn("> ")
            if line.strip() == "/quit":
                return
            if line.strip() == "/new":
                talk = _Talk(tokenizer, network.config, system, max_new_tokens)
                continue
            ids, left_out = talk.ask(line)
            if left_out:
                output_fn(
                    f"({left_out} tokens from the beginning of the talk no longer fit and are left out.)\n"
                )
            answer = continue_prompts(
                network, tokenizer, [ids], max_new_tokens, sampling, stop, lambda _, piece: output_fn(piece)
            )
            sampling = replace(sampling, seed=sampling.seed + 1)
            talk.answered(answer[0])
            output_fn("\n")
    except (EOFError, KeyboardInterrupt):
        output_fn("\n")


class _Talk:
    """The conversation so far, and the ids that the next answer continues."""

    def __init__(self, tokenizer: Any, config: MPTConfig, system: str | None, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.room = max(1, config.max_seq_len - max_new_tokens)

    def ask(self, line: str) -> tuple[list[int], int]:
        """Add a line; returns the ids to continue, and how many tokens were dropped."""
        self.turns.append({"role": "user", "content": line})
        ids = whole = self._encoded()
        while len(ids) > self.room and len(self.turns) > 1:
            del self.turns[:2]
            ids = self._encoded()
        ids = ids[-self.room :]
        return ids, len(whole) - len(ids)

    def answered(self, text: str) -> None:
        """Add the model's answer."""
        self.turns.append({"role": "assistant", "content": text})

    def _encoded(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        template = default_template(self.tokenizer)
        if template is None:
            text = "".join(turn["content"] for turn in system + self.turns)
            return encode_prompt(self.tokenizer, text, self.config)
        return list(
            self.tokenizer.apply_chat_template(
                system + self.turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                chat_template=template,
            )
        )
