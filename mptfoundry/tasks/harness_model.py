"""Our network as a model of lm-evaluation-harness, which answers the requests of its tasks.

Prompts are tokenized and cut as its own `hf` model does. Each rank has all requests, and the ranks share the
batches. A document's answers are kept as they are computed, and what an earlier evaluation has answered isn't
computed again.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from composer.utils import dist
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mptfoundry.config.verbs import Sampling
from mptfoundry.errors import DataError
from mptfoundry.generation import continue_prompts
from mptfoundry.ranks import rank, say
from mptfoundry.tasks.answers import Samples, prompt_hash
from mptfoundry.tasks.questions import Question, Row
from mptfoundry.tasks.scoring import Batch, Model, Score, plan_batches, rounds, score_batch
from mptfoundry.tokenizer import default_template

_NEW_TOKENS = 256
# What says whether a document was answered rightly, in this order.
_RIGHT = ("acc", "exact_match", "em", "pass@1")


class HarnessModel(TemplateLM):
    """Our network as a model of lm-eval; its rank and world size stay those of a single device.

    Attributes:
        seconds: Task -> the time that its requests took.
        is_computing: Whether it is answering requests now.
    """

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, Any],
        samples: Samples | None,
        *,
        tokens: int,
        max_seq_len: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Any = model.tokenizer
        self.tasks = tasks
        self.seed = seed
        self.samples = samples
        self.tokens = tokens
        self.max_length = max_seq_len
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.is_computing = False
        self._encoded: dict[str, list[int]] = {}
        lines = [] if samples is None else samples.lines
        lines = dist.all_gather_object(lines)[0]
        self._answered = {
            (line["task"], line["shots"], line["doc_id"], line["request"]): line
            for line in lines
            if "request" in line
        }

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, as lm-eval's `hf` model makes them."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # A text that is too long is cut later, so that the tokenizer's warning would be wrong.
        return list(self.tokenizer.encode(string, **options, verbose=False))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without its system message if the template has none."""
        write = partial(
            self.tokenizer.apply_chat_template,
            chat_template=default_template(self.tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(write(chat_history))
        except TemplateError:
            return str(write([turn for turn in chat_history if turn["role"] != "system"]))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest."""
        return self._each(requests, partial(self._scored, is_rolling=False))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens."""
        return self._each(requests, partial(self._scored, is_rolling=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each prompt."""
        taken: Counter[int] = Counter()
        texts = []
        for request, answers in zip(requests, self._each(requests, self._generated), strict=True):
            texts.append(answers[taken[id(request)]])
            taken[id(request)] += 1
        return texts

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError  # `loglikelihood` does it for whole documents

    def _each(self, requests: Sequence[Instance], answer: Callable[..., Any]) -> list[Any]:
        """The answer to each request, where a document's are computed together, task by task."""
        self.is_computing = True
        by_task: dict[str, dict[int, list[Instance]]] = {}
        for request in {id(request): request for request in requests}.values():
            by_task.setdefault(request.task_name, {}).setdefault(request.doc_id, []).append(request)
        answers: dict[int, Any] = {}
        for name, documents in by_task.items():
            began_at = time.monotonic()
            for doc_id, each in answer(name, documents):
                answers |= {id(request): one for request, one in zip(documents[doc_id], each, strict=True)}
            self.seconds[name] += time.monotonic() - began_at
            self._encoded.clear()
        self.is_computing = False
        return [answers[id(request)] for request in requests]

    def _scored(
        self, name: str, documents: Mapping[int, list[Instance]], *, is_rolling: bool
    ) -> Iterator[tuple[int, list[Any]]]:
        rows = {
            doc_id: [row for request in requests for row in self._rows(request, is_rolling)]
            for doc_id, requests in documents.items()
        }
        finished = self._finished(name, documents, {doc_id: each[:1] for doc_id, each in rows.items()})
        for doc_id, line in finished.items():
            both = zip(line["loglikelihoods"], line["greedy"], strict=True)
            yield doc_id, line["loglikelihoods"] if is_rolling else list(both)
        for doc_id, scores in self._scores(name, rows, finished, apart=is_rolling):
            if is_rolling:
                whole = sum(score.total for score in scores)
                answers: list[Any] = [whole]
                detail = {"loglikelihoods": [whole], "tokens": [sum(len(s.logprobs) for s in scores)]}
            else:
                answers = [(score.total, score.is_greedy) for score in scores]
                detail = {
                    "loglikelihoods": [score.total for score in scores],
                    "tokens": [len(score.logprobs) for score in scores],
                }
            detail["greedy"] = [score.is_greedy for score in scores][: len(answers)]
            self._keep(name, documents[doc_id], answers, rows[doc_id][:1], detail)
            yield doc_id, answers

    def _rows(self, request: Instance, is_rolling: bool) -> list[Row]:
        """A request's row, or its windows."""
        if is_rolling:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
        else:
            pairs = [self._pair(*request.args)]
        return [self._row(before, after, request) for before, after in pairs]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if self.prefix_token_id != ids[0] else (ids[:1], ids[1:])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in the base class, where a context that choices share is encoded once."""
        stripped = context.rstrip()
        if stripped not in self._encoded:
            self._encoded[stripped] = self.tok_encode(stripped)
        before = self._encoded[stripped]
        return before, self.tok_encode(context + continuation)[len(before) :]

    def _row(self, before: list[int], after: list[int], request: Instance) -> Row:
        if not after or not before:
            raise DataError(f"{request.task_name}: document {request.doc_id} has an answer without tokens.")
        if len(after) > self.max_length:
            raise DataError(
                f"{request.task_name}: an answer of document {request.doc_id} has {len(after)} tokens, too "
                f"many for a context of {self.max_length}. Use a larger max_seq_len."
            )
        whole = (before + after)[-(self.max_length + 1) :]
        return Row(tuple(whole), len(whole) - len(after))

    def _finished(
        self, name: str, documents: Mapping[int, list[Instance]], rows: Mapping[int, Sequence[Row]]
    ) -> dict[int, dict[str, Any]]:
        """The lines of documents whose prompts an earlier evaluation has answered."""
        shots = self.tasks[name].get_config("num_fewshot")
        finished = {}
        for doc_id, requests in documents.items():
            line = self._answered.get((name, shots, doc_id, requests[0].request_type))
            if line is not None and line["prompt_hash"] == _hash(rows[doc_id]):
                finished[doc_id] = line
        if finished:
            label = label_of(name, self.tasks[name])
            say(f"{label}: {len(finished)} of {len(documents)} documents were evaluated before")
        return finished

    def _scores(
        self, name: str, rows: Mapping[int, Sequence[Row]], finished: Mapping[int, Any], *, apart: bool
    ) -> Iterator[tuple[int, list[Score]]]:
        """The scores of documents' rows: together in a batch, or `apart`."""
        parts = [
            (doc_id, part)
            for doc_id, each in rows.items()
            for part in ([(row,) for row in each] if apart else [tuple(each)])
        ]
        questions = [Question(number, part, ()) for number, (_, part) in enumerate(parts)]
        numbers: dict[int, list[int]] = {}
        for number, (doc_id, _) in enumerate(parts):
            numbers.setdefault(doc_id, []).append(number)
        scores: dict[int, list[Score]] = {}
        yield from ((doc_id, []) for doc_id in rows.keys() - numbers.keys() - finished.keys())
        batches = [
            batch
            for batch in plan_batches(questions, self.tokens)
            if any(parts[question.doc_id][0] not in finished for question in batch.questions)
        ]
        with self._bar(name, len(numbers.keys() - finished.keys())) as bar:
            answer = partial(score_batch, self.model.network)
            for answered in rounds(batches, answer, is_sharded=self.model.is_sharded):
                scores |= answered
                for doc_id in {parts[number][0] for number in answered} - finished.keys():
                    if all(number in scores for number in numbers[doc_id]):
                        yield doc_id, [score for number in numbers[doc_id] for score in scores[number]]
                        bar.update()

    def _bar(self, name: str, total: int) -> Any:
        disable = rank() != 0 or not sys.stderr.isatty()
        return tqdm(total=total, desc=label_of(name, self.tasks[name]), unit="doc", disable=disable)

    def _generated(
        self, name: str, documents: Mapping[int, list[Instance]]
    ) -> Iterator[tuple[int, list[list[str]]]]:
        rows, options = {}, {}
        for doc_id, (request, *_) in documents.items():
            prompt, given = request.args[:2]
            options[doc_id] = normalize_gen_kwargs(given, _NEW_TOKENS)
            room = self.max_length - options[doc_id]["max_gen_toks"]
            if room < 1:
                raise DataError(
                    f"{name}: generates {options[doc_id]['max_gen_toks']} tokens, too many for a context of "
                    f"{self.max_length}. Use a larger max_seq_len."
                )
            ids = (self.tok_encode(prompt) or [self.prefix_token_id])[-room:]
            rows[doc_id] = Row(tuple(ids), len(ids))
        finished = self._finished(name, documents, {doc_id: [row] for doc_id, row in rows.items()})
        for doc_id, line in finished.items():
            yield doc_id, [[line["chosen"]] if isinstance(line["chosen"], str) else line["chosen"]]
        kinds: dict[str, list[int]] = {}
        for doc_id, each in options.items():
            repeats = documents[doc_id][0].repeats
            kinds.setdefault(json.dumps([each, repeats], sort_keys=True, default=str), []).append(doc_id)
        with self._bar(name, len(documents) - len(finished)) as bar:
            for doc_ids in kinds.values():
                questions = [Question(doc_id, (rows[doc_id],), ()) for doc_id in doc_ids]
                batches = [
                    batch
                    for batch in plan_batches(questions, self.tokens)
                    if any(question.doc_id not in finished for question in batch.questions)
                ]
                repeats = documents[doc_ids[0]][0].repeats or 1
                answer = partial(self._continue, options[doc_ids[0]], repeats)
                for answered in rounds(batches, answer, is_sharded=self.model.is_sharded):
                    for doc_id, texts in answered.items():
                        if doc_id not in finished:
                            self._keep(name, documents[doc_id], [texts], [rows[doc_id]], {})
                            yield doc_id, [texts]
                            bar.update()

    def _continue(self, options: Mapping[str, Any], repeats: int, batch: Batch) -> dict[int, list[str]]:
        """The continuations of a batch's prompts, `repeats` of each."""
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = [text for text in handle_stop_sequences(list(options["until"]), eos=eos) if text]
        prompts = [list(question.rows[0].ids) for question in batch.questions]
        drawn = []
        for number in range(repeats):
            sampling = Sampling(
                temperature=float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0,
                top_k=int(options.get("top_k", 0)),
                top_p=float(options.get("top_p", 1.0)),
                seed=self.seed + number,
            )
            network, is_sharded = self.model.network, self.model.is_sharded
            new_tokens = options["max_gen_toks"]
            drawn.append(
                continue_prompts(
                    network, self.tokenizer, prompts, new_tokens, sampling, stops, None, to_the_end=is_sharded
                )
            )
        texts = zip(*drawn, strict=True)
        return {question.doc_id: list(each) for question, each in zip(batch.questions, texts, strict=True)}

    def _keep(
        self,
        name: str,
        requests: Sequence[Instance],
        answers: Sequence[Any],
        rows: Sequence[Row],
        detail: Mapping[str, Any],
    ) -> None:
        """Write the line of a document's answers."""
        if self.samples is None:
            return
        task, kind = self.tasks[name], requests[0].request_type
        is_choice = task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results)
        texts = [] if kind != "loglikelihood" else [request.args[1] for request in requests]
        chosen: Any = None
        if kind == "generate_until":
            chosen = answers[0][0] if len(answers[0]) == 1 else answers[0]
        elif is_choice:
            count = len(task.doc_to_choice(requests[0].doc))
            totals = [total for total, _ in answers[:count]]
            chosen = totals.index(max(totals))
        doc = requests[0].doc
        line = {
            "task": name,
            "shots": task.get_config("num_fewshot"),
            "doc_id": requests[0].doc_id,
            "request": kind,
            "prompt_hash": _hash(rows),
            "choices": texts,
            "loglikelihoods": [],
            "tokens": [],
            "greedy": [],
            **detail,
            "chosen": chosen,
            "gold": gold_index(task, doc) if is_choice else None,
            "correct": self._is_correct(task, requests, answers, kind),
            "confidence": None,
            "confidently_correct": False,
        }
        self.samples.append_lines([line])

    def _is_correct(
        self, task: Any, requests: Sequence[Instance], answers: Sequence[Any], kind: str
    ) -> bool | None:
        """Whether a document was answered rightly, by its task's first filter; None if unknown."""
        if kind == "loglikelihood_rolling":
            return None
        filled = []
        for request, answer in zip(requests, answers, strict=True):
            other = copy.copy(request)
            other.resps, other.filtered_resps = list(answer) if kind == "generate_until" else [answer], {}
            filled.append(other)
        task._filters[0].apply(filled)
        (key,) = filled[0].filtered_resps
        metrics = task.process_results(requests[0].doc, [each.filtered_resps[key] for each in filled])
        for name in _RIGHT:
            if isinstance(value := metrics.get(name), (bool, int, float, np.number)):
                return bool(value >= 1)
        return None


def _hash(rows: Sequence[Row]) -> str:
    return prompt_hash(rows[0].ids[: rows[0].start]) if rows else ""


def gold_index(task: Any, doc: Any) -> int | None:
    """The index of a right choice; None if the document has none."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    for each in gold if isinstance(gold, list) else [gold]:
        index = choices.index(each) if isinstance(each, str) and each in choices else each
        if isinstance(index, int) and 0 <= index < len(choices):
            return index
    return None


def label_of(name: str, task: Any) -> str:
    """A task's name in all results."""
    # Not `task.task_name`, which draws a random number.
    return f"{name}/{task.get_config('num_fewshot') or 0}-shot"
