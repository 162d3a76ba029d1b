"""Split inputs into units of work, and read the documents of a unit.

Inputs are files and datasets. A *document* is a text file, a line of a JSONL file, or a row of a Parquet file
or Hugging Face dataset. A *part* is a section of one input. A *unit* is a few parts, about two megabytes of
text, that one process reads at a time. The order is fixed: inputs in the user's order, files of a folder by
name.
"""

from __future__ import annotations

import io
import json
import re
import reprlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from mptfoundry import plugins
from mptfoundry.data.records.inputs import Input, is_array, open_decompressed
from mptfoundry.data.shards.index import read_index, read_samples
from mptfoundry.errors import DataError, MPTFoundryError, RunStopped, first_line

# Tokenizers with `TextEncoder.can_cut` always split here: `data.prepare.encode.SAFE_CUT` in UTF-8 bytes.
_SAFE_CUT = re.compile(rb"\n(?=[A-Za-z])")
UNIT_BYTES = 1 << 21
UNIT_ROWS = 1000
PARQUET_ROWS = 256
READ_BYTES = 1 << 20
BINARY_CHECK_BYTES = 1 << 13
IDENTITY_BYTES = 1 << 16
MOST_FIELDS_NAMED = 8
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class BadInput(DataError):
    """Part of an input is not text or not a record, or can't be read."""


@dataclass(frozen=True)
class Part:
    """A section of one input.

    Attributes:
        kind: `text`, `lines`, `line_bytes`, `parquet`, `dataset` or `mds`; or `bad` if the input can't be
            split into parts.
        source: The file, or the index of the dataset in the list of datasets; for `bad`, what is wrong.
        start: First byte, line, row group or row.
        stop: Exclusive end. For `text` and `lines`, a piece that starts before it is in the part as a whole.
        payload: For `line_bytes`, the lines (a compressed file can't be read from the middle).
    """

    kind: str
    source: str | int
    start: int
    stop: int
    payload: bytes = b""


@dataclass(frozen=True)
class Unit:
    """The parts that one process reads at a time; `weight` is their size in bytes, for progress."""

    parts: tuple[Part, ...]
    weight: int


@dataclass(frozen=True)
class Document:
    """A document, or a section of one that is too long to read at once.

    Attributes:
        text: The text.
        size: Bytes of the text in UTF-8.
        identity: The start of the document's text in UTF-8; the same for all its sections.
        is_start: Whether the document starts here.
        is_end: Whether the document ends here.
    """

    text: str
    size: int
    identity: bytes
    is_start: bool = True
    is_end: bool = True


class Row(NamedTuple):
    """A record's values, and a function that returns its location, which may be slow."""

    values: Any
    where: Callable[[], str]


@dataclass(frozen=True)
class Skipped:
    """A skipped input, with the reason and location."""

    reason: str
    where: str


def plan_units(inputs: Sequence[Input], datasets: Sequence[Any], cut_texts: bool) -> Iterator[Unit]:
    """Split the inputs into units deterministically.

    Args:
        inputs: The inputs, in order.
        datasets: The Hugging Face datasets that inputs refer to.
        cut_texts: Whether a long text file may be split (`TextEncoder.can_cut`).
    """
    parts: list[Part] = []
    weight = 0
    for source in inputs:
        for part, part_weight in _plan_source(source, datasets, cut_texts):
            if parts and weight + part_weight > UNIT_BYTES:
                yield Unit(tuple(parts), weight)
                parts, weight = [], 0
            parts.append(part)
            weight += part_weight
    if parts:
        yield Unit(tuple(parts), weight)


def read_part(part: Part, text_key: str, datasets: Sequence[Any]) -> Iterator[Document | Skipped | BadInput]:
    """Read the documents of a part; yields a BadInput in place of anything it can't read.

    Args:
        part: The part to read.
        text_key: The record field with the text.
        datasets: The datasets that parts refer to.
    """
    if part.kind != "text":
        for row in read_rows(part, datasets, text_key):
            yield row if isinstance(row, BadInput) else _document(*row, text_key, part)
        return
    try:
        yield from _read_text(part)
    except OSError as error:
        yield _unreadable(part, error)


def read_rows(part: Part, datasets: Sequence[Any], column: str | None = None) -> Iterator[Row | BadInput]:
    """Read the records of a part unchanged; yields a BadInput in place of anything it can't read.

    Args:
        part: The part to read, of any kind but `text`.
        datasets: The datasets that parts refer to.
        column: The only column to read, if the part has columns. By default all are read.
    """
    try:
        if part.kind == "bad":
            yield BadInput(str(part.source))
        elif part.kind in ("lines", "line_bytes"):
            yield from _read_lines(part)
        elif part.kind == "mds":
            yield from _read_shards(part)
        else:
            yield from _read_table(part, datasets, column)
    except OSError as error:
        yield _unreadable(part, error)


def _unreadable(part: Part, error: OSError) -> BadInput:
    return BadInput(f"{part.source}: it can't be read ({error.strerror or error}).")


def _plan_source(source: Input, datasets: Sequence[Any], cut_texts: bool) -> Iterator[tuple[Part, int]]:
    """Yield the parts of an input. If splitting fails, the last part reports the error when it is read."""
    try:
        yield from _plan_parts(source, datasets, cut_texts)
    except BadInput as error:
        yield Part("bad", str(error), 0, 0), 0


def _plan_parts(source: Input, datasets: Sequence[Any], cut_texts: bool) -> Iterator[tuple[Part, int]]:
    if source.kind == "lines" and is_array(Path(source.path)):
        yield from _plan_array(source)
    elif source.kind == "lines" and source.is_compressed:
        yield from _plan_compressed_lines(source)
    elif source.kind in ("lines", "text"):
        whole = max(source.size, 1)
        step = UNIT_BYTES if source.kind == "lines" or cut_texts else whole
        for start in range(0, whole, step):
            stop = min(start + step, source.size)
            yield Part(source.kind, source.path, start, stop), stop - start
    elif source.kind == "own":
        yield from _plan_own(source)
    elif source.kind == "parquet":
        groups = _count_row_groups(source.path)
        for group in range(groups):
            yield Part("parquet", source.path, group, group + 1), source.size // groups
    else:
        is_mds = source.kind == "mds"
        rows = read_index(source.path, source.path).samples if is_mds else len(datasets[source.dataset])
        for start in range(0, rows, UNIT_ROWS):
            stop, place = min(start + UNIT_ROWS, rows), source.path if is_mds else source.dataset
            yield Part(source.kind, place, start, stop), source.size * (stop - start) // rows


def _plan_array(source: Input) -> Iterator[tuple[Part, int]]:
    """Split a JSON array of records, using entry numbers as line numbers."""
    try:
        with open_decompressed(source.path) as (file, _):
            entries = json.loads(file.read())
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise BadInput(f"{source.path}: this is not a JSON array of records ({error}).") from error
    for start in range(0, len(entries), UNIT_ROWS):
        some = entries[start : start + UNIT_ROWS]
        payload = "".join(json.dumps(entry) + "\n" for entry in some).encode()
        part = Part("line_bytes", source.path, start, start + len(some), payload)
        yield part, source.size * len(some) // len(entries)


def _plan_own(source: Input) -> Iterator[tuple[Part, int]]:
    """Read a format of the user's own here, as other processes have not run the user's code."""
    first = 0
    try:
        records = iter(plugins.record_format(source.path)(source.path))  # type: ignore[misc]
        while some := list(islice(records, UNIT_ROWS)):
            payload = "".join(json.dumps(record) + "\n" for record in some).encode()
            yield Part("line_bytes", source.path, first, first + len(some), payload), len(payload)
            first += len(some)
    except (MPTFoundryError, RunStopped):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(
            f"{source.path}: its format of your own fails after record {first}: {text}."
        ) from error


def _plan_compressed_lines(source: Input) -> Iterator[tuple[Part, int]]:
    """Decompress here, since the file can only be read from the start, and yield whole lines."""
    with open_decompressed(source.path) as (file, raw):
        first_line, weighed = 0, 0
        beginning: list[bytes] = []
        at_end = False
        while not at_end:
            try:
                block = file.read(UNIT_BYTES)
            except (OSError, EOFError, ValueError) as error:
                raise BadInput(f"{source.path}: the compressed file is damaged ({error}).") from error
            at_end = not block
            end = len(block) if at_end else block.rfind(b"\n") + 1
            if not end and not at_end:
                beginning.append(block)
                continue
            payload = b"".join((*beginning, block[:end]))
            beginning = [block[end:]]
            if payload:
                lines = payload.count(b"\n")
                weight, weighed = raw.tell() - weighed, raw.tell()
                yield Part("line_bytes", source.path, first_line, first_line + lines, payload), weight
                first_line += lines


def _count_row_groups(path: str) -> int:
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.ParquetFile(path).num_row_groups)
    except (ArrowException, OSError) as error:
        raise BadInput(f"{path}: this is not a readable Parquet file ({error}).") from error


def _read_text(part: Part) -> Iterator[Document | Skipped | BadInput]:
    path = str(part.source)
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(IDENTITY_BYTES)
        if not head or b"\0" in head[:BINARY_CHECK_BYTES]:
            if part.start == 0:
                yield Skipped("binary file" if head else "empty file", path)
            return
        begin, end = _next_cut(file, part.start, size), _next_cut(file, part.stop, size)
        file.seek(begin)
        data = file.read(end - begin)
    if not data:
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadInput(
            f"{path}: byte {begin + error.start} (0x{data[error.start]:02x}) is not UTF-8. "
            f"Convert the file, or leave it out with exclude."
        )
        return
    text = text.removeprefix("\ufeff") if begin == 0 else text
    yield Document(text, len(data), head, begin == 0, end == size)


def _next_cut(file: IO[bytes], position: int, size: int) -> int:
    """Find the first safe cut at or after a position. The ends of the text are always safe."""
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    at = position - 1
    while at < size:
        file.seek(at)
        block = file.read(READ_BYTES)
        found = _SAFE_CUT.search(block)
        if found:
            return at + found.end()
        at += max(len(block) - 1, 1)
    return size


def _read_lines(part: Part) -> Iterator[Row | BadInput]:
    for line, line_number in _numbered_lines(part):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            yield BadInput(f"{part.source}:{line_number()}: byte {error.start} of the line is not UTF-8.")
        except (ValueError, RecursionError) as error:
            yield _no_line(part, line, line_number(), error)
        else:
            yield Row(record, partial(_line_of, part.source, line_number))


def _no_line(part: Part, line: bytes, number: int, error: Exception) -> BadInput:
    path = str(part.source)
    if number == 1 and line.strip() == b"{" and path.lower().endswith(".json"):
        return BadInput(
            f"{path}:1: this is one JSON object over several lines, not a record in each line. Write it in "
            f"one line: `python -m json.tool --compact {shlex.quote(path)} {shlex.quote(path + 'l')}`."
        )
    return BadInput(f"{path}:{number}: this is not a line of JSON ({error}).")


def _line_of(source: str | int, line_number: Callable[[], int]) -> str:
    return f"{source}:{line_number()}"


def _numbered_lines(part: Part) -> Iterator[tuple[bytes, Callable[[], int]]]:
    """Yield lines, each with a function that returns its 1-based number and may read the file up to it."""
    if part.kind == "line_bytes":
        for number, line in enumerate(io.BytesIO(part.payload), part.start + 1):
            yield line, partial(int, number)
        return
    with Path(str(part.source)).open("rb") as file:
        offset = max(part.start - 1, 0)
        file.seek(offset)
        if part.start:
            offset += len(file.readline())
        while offset < part.stop and (line := file.readline()):
            yield line, partial(_line_number, str(part.source), offset)
            offset += len(line)


def _line_number(path: str, offset: int) -> int:
    with Path(path).open("rb") as file:
        blocks = iter(lambda: file.read(min(READ_BYTES, offset - file.tell())), b"")
        return 1 + sum(block.count(b"\n") for block in blocks)


def _read_table(part: Part, datasets: Sequence[Any], column: str | None) -> Iterator[Row | BadInput]:
    if part.kind == "dataset":
        dataset = datasets[int(part.source)]
        dataset = dataset if column is None else dataset.select_columns([column])
        # Read raw cells: `datasets` would open the file or URL that an image or audio cell names.
        rows = dataset.with_format("arrow")[part.start : part.stop].to_pylist()
        for row, values in enumerate(rows, part.start):
            yield Row(values, partial("row {} of the data set".format, row))
        return
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(part.source)
        if column is not None and column not in file.schema_arrow.names:
            yield BadInput(
                f"{part.source}: there is no column {column!r}. "
                f"Set text_key to one of {', '.join(file.schema_arrow.names)}."
            )
            return
        first_row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        columns = None if column is None else [column]
        batches = file.iter_batches(PARQUET_ROWS, row_groups=[part.start], columns=columns)
        for row, values in enumerate((row for batch in batches for row in batch.to_pylist()), first_row):
            yield Row(values, partial("{}: row {}".format, part.source, row))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        yield BadInput(f"{part.source}: row group {part.start} can't be read ({error}).")


def _read_shards(part: Part) -> Iterator[Row | BadInput]:
    try:
        index = read_index(str(part.source), str(part.source))
        for number, values in enumerate(read_samples(index, range(part.start, part.stop)), part.start):
            yield Row(values, partial("{}: sample {}".format, part.source, number))
    except DataError as error:
        yield BadInput(str(error))


def _document(record: Any, where: Callable[[], str], text_key: str, part: Part) -> Document | BadInput:
    if not isinstance(record, dict):
        return BadInput(
            f"{where()}: this is a JSON {json_type(record)}, not an object with a field {text_key!r}."
        )
    if text_key not in record:
        fields = names_of(record)
        advice = _how_to_take_out(record, text_key, part) or "Set text_key."
        return BadInput(f"{where()}: there is no field {text_key!r}; the fields are: {fields}. {advice}")
    text = record[text_key]
    if not isinstance(text, str):
        return BadInput(f"{where()}: the field {text_key!r} is {a_type(text)}, not a string.")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        return BadInput(
            f"{where()}: the field {text_key!r} holds half of a surrogate pair, which is not text."
        )
    return Document(text, len(encoded), encoded[:IDENTITY_BYTES])


def _how_to_take_out(record: Mapping[str, Any], text_key: str, part: Part) -> str | None:
    """Advice for `{"data": [...]}`: a command that writes the records in a field one per line."""
    for key, value in record.items():
        is_records = isinstance(value, list) and value and isinstance(value[0], dict) and text_key in value[0]
        if is_records and part.kind == "lines" and key.isidentifier():
            path = shlex.quote(str(part.source))
            code = f"for line in open(sys.argv[1]) for r in json.loads(line)['{key}']"
            return (
                f"The field {key!r} holds a list of records; write them one in each line: "
                f'`python -c "import json, sys; [print(json.dumps(r)) {code}]" {path} > {path}.jsonl`.'
            )
        if is_records:
            return f"The field {key!r} holds a list of records; write them one in each line of a .jsonl file."
    return None


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)


def a_type(value: Any) -> str:
    """Return the type of a value with its article: `a number`."""
    name = json_type(value)
    return name if name == "null" else a_word(name)


def a_word(name: str) -> str:
    """Put an article before a word."""
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def counted(number: int, noun: str) -> str:
    """Format a count with its noun: `1 record`, `1,200 records`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def names_of(record: Mapping[str, Any]) -> str:
    """List the first few fields of a record that are not null, for an error."""
    names = sorted(shown(str(name))[1:-1] for name, value in record.items() if value is not None)
    more = ", ..." * (len(names) > MOST_FIELDS_NAMED)
    return (", ".join(names[:MOST_FIELDS_NAMED]) or "none") + more


def shown(value: Any) -> str:
    """Format a record's value for an error, on one short line."""
    return _SHORT.repr(value)


def text_of(value: Any) -> str:
    """Return a record's text, which may be stored as UTF-8 bytes.

    Raises:
        ValueError: The value is not text. The message follows the field's name and a colon.
    """
    if isinstance(value, (bytes, bytearray)):
        if 0 in value:
            raise ValueError("holds bytes that are not text")
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8") from error
    if not isinstance(value, str):
        raise ValueError(f"is {a_type(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is not text") from error
    return value
