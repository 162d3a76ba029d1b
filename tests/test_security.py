"""What SECURITY.md says: nothing that a run reads is run, but for code that the command line allows."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mptfoundry.config.load import load_train_config
from mptfoundry.config.streams import RecordsConfig
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.data.examples.chat import RecordError, turns_of
from mptfoundry.data.records.inputs import find_inputs
from mptfoundry.data.records.records import Row, plan_units, read_rows
from mptfoundry.data.records.sources import find_records
from mptfoundry.data.shards.index import read_index
from mptfoundry.errors import ConfigError, DataError, MPTFoundryError
from mptfoundry.tokenizer import load_tokenizer
from tests.loaders import text_loader

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("hostile YAMLs, data sets, templates, tokenizers", "14 tests", "refused, nothing is run"),
]

PACKAGE = Path(__file__).parent.parent / "mptfoundry"
FILES = sorted(PACKAGE.rglob("*.py"))
# What runs text, bytes or files as code, by how a call of it is written.
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    "spec.loader.exec_module",
    *("pickle.load", "pickle.loads", "marshal.loads", "dill.loads", "dill.load", "joblib.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "shelve.open"),
    *("tarfile.open", "shutil.unpack_archive", "importlib.import_module", "import_module"),
}
# The places that do so, and for what: modules that the package itself names, or code that was allowed.
ALLOWED = {
    ("__init__.py", "importlib.import_module"): "the modules of the public names",
    ("plugins.py", "spec.loader.exec_module"): "code_paths",
    ("build.py", "importlib.import_module"): "the tables of callbacks, loggers and algorithms",
    ("config/legacy.py", "yaml.load"): "a file of the package, by a safe loader",
    ("config/engine/plain_yaml.py", "yaml.load"): "a safe loader, with other numbers",
    ("data/examples/turns.py", "importlib.import_module"): "preprocessing_fn",
    ("export/comparison.py", "importlib.import_module"): "the network's own modules",
}


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that each hostile example makes if it runs."""
    return tmp_path / "it-ran"


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def constants_of(call: ast.Call) -> dict[str | None, Any]:
    return {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}


def test_no_call_runs_what_was_read_but_those_that_are_listed() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), ast.unparse(call.func))
        for path in FILES
        for call in calls_of(path)
        if ast.unparse(call.func) in RUNS_CODE
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_could_run_code_is_told_not_to(path: Path) -> None:
    for call in calls_of(path):
        name, given = ast.unparse(call.func), constants_of(call)
        if name == "torch.load":
            assert given.get("weights_only") is True, ast.unparse(call)
        if name.endswith("load_dataset") or re.fullmatch(r"Auto\w+\.from_pretrained", name):
            assert given.get("trust_remote_code") is False, ast.unparse(call)
        assert given.get("trust_remote_code", False) is False, ast.unparse(call)
        assert given.get("allow_pickle", False) is False, ast.unparse(call)
        assert given.get("shell", False) is False, ast.unparse(call)


@pytest.mark.parametrize(
    "lines",
    [
        "allow_code: true",
        "'allow_code': yes",
        "<<: {allow_code: true}",
        "permitted: &permitted {allow_code: true}\n<<: *permitted",
        "allow_code: ${variables.code}\nvariables: {code: true}",
        "allow_code: ${oc.env:CODE_IS_ALLOWED}",
    ],
)
def test_no_file_allows_code(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_IS_ALLOWED", "true")
    recipe = (PACKAGE.parent / "configs/mpt-tiny.yaml").read_text().replace("variables:", "unused:")
    (tmp_path / "run.yaml").write_text(f"{recipe}\ncode_paths: [mine.py]\n{lines}\n")
    for words in ([], ["variables.allow_code=true"], ["max_seq_len=64"]):
        with pytest.raises(ConfigError, match=r"allow_code: is only taken from the command line"):
            load_train_config(tmp_path / "run.yaml", words)


@pytest.mark.parametrize(
    "line",
    [
        "mptfoundry: !!python/object/apply:pathlib.Path.touch [it-ran]",
        "callbacks: {'os:system': {}}",
        "loggers: {pathlib.Path: {}}",
        "optimizer: {name: 'subprocess:run', lr: 1}",
        "run_name: ${os.system:touch it-ran}",
        "run_name: ${eval:1}",
    ],
)
def test_no_value_of_a_file_is_a_thing_to_call(line: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    with pytest.raises(ConfigError):
        load_train_config(tmp_path / "run.yaml")
    assert not list(tmp_path.glob("it-ran"))


@pytest.mark.parametrize(
    "lines",
    [
        "remote: s3://elsewhere/${oc.env:AWS_SECRET_ACCESS_KEY}",
        "variables: {name: HF_TOKEN}\nremote: s3://elsewhere/${oc.env:${variables.name}}",
        "remote: ${oc.decode:'${oc.env:WANDB_API_KEY,none}'}",
        "remote: ${oc.env:db_password}",
    ],
)
def test_no_file_reads_a_secret_of_the_environment(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "db_password"):
        monkeypatch.setenv(name, "hush")
    (tmp_path / "run.yaml").write_text(f"{lines}\n")
    with pytest.raises(ConfigError, match="may be a secret, which no file reads") as error:
        load_train_config(tmp_path / "run.yaml")
    assert "hush" not in str(error.value)


def test_other_variables_of_the_environment_are_read(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZER_FOLDER", "here")
    tiny_run.write_text(f"{tiny_run.read_text()}run_name: ${{oc.env:TOKENIZER_FOLDER}}\n")
    assert load_train_config(tiny_run)[0].run_name == "here"


def test_aliases_that_unfold_to_billions_of_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="has more than 100,000 values"):
        load_train_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("encoding", ["pkl", "pkl:"])
def test_pickled_columns_of_shards_are_refused_wherever_shards_are_read(
    encoding: str, tmp_path: Path, trace: Path, tiny_tokenizer: Any
) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "shards"), columns={"tokens": "pkl", "prompt": "str"}) as out:
        out.write({"tokens": RunsCode(trace), "prompt": "a"})
    index = tmp_path / "shards" / "index.json"
    index.write_text(index.read_text().replace('"pkl"', f'"{encoding}"'))
    said = "the column 'tokens' is pickled, and reading it could run code"
    with pytest.raises(DataError, match=said):
        read_index(tmp_path / "shards", "here")
    with pytest.raises(DataError, match=said):
        find_records(RecordsConfig(local=str(tmp_path / "shards")), "here", tmp_path)
    with pytest.raises(DataError, match=said):
        text_loader(
            local=str(tmp_path / "shards"),
            tokenizer=tiny_tokenizer,
            max_seq_len=8,
            vocab_size=384,
            device_batch_size=1,
            shuffle=False,
            where="here",
        )
    assert not trace.exists()


def test_a_loading_script_of_a_data_set_is_not_run(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "books.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"trust_remote_code=True|scripts are no longer supported"):
        find_inputs(["hf:books"], text_key="text")
    assert not trace.exists()


def test_a_data_set_of_pickles_is_refused(tmp_path: Path, trace: Path) -> None:
    (tmp_path / "frame.pkl").write_bytes(pickle.dumps(RunsCode(trace)))
    source = RecordsConfig(
        hf_name="pandas", hf_kwargs={"data_files": str(tmp_path / "frame.pkl")}, split="train"
    )
    with pytest.raises(DataError, match="pandas reads pickles, which can run code"):
        find_records(source, "here", tmp_path)
    with pytest.raises(DataError, match="pandas reads pickles, which can run code"):
        find_inputs(["hf:pandas"], text_key="text")
    assert not trace.exists()


def test_a_pickled_type_in_parquet_is_not_unpickled(tmp_path: Path, trace: Path) -> None:
    from pyarrow import Table, field, parquet, schema, string

    words = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(RunsCode(trace)),
    }
    table = Table.from_pylist([{"text": "a"}]).cast(schema([field("text", string(), metadata=words)]))
    parquet.write_table(table, tmp_path / "a.parquet")
    found = find_inputs([str(tmp_path / "a.parquet")], text_key="text")
    rows = [
        row
        for unit in plan_units(found.inputs, [], False)
        for part in unit.parts
        for row in read_rows(part, [])
    ]
    assert [row.values for row in rows] == [{"text": "a"}]
    assert not trace.exists()


def test_what_a_cell_of_a_data_set_names_is_not_opened(tmp_path: Path) -> None:
    """An image is stored as bytes or as the place that it is to be fetched from."""
    import datasets

    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": stored})
    cell = {"bytes": None, "path": "http://127.0.0.1:9/secret.png"}
    table = datasets.Dataset.from_list([{"prompt": "a", "picture": cell}], features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    info = tmp_path / "saved" / "dataset_info.json"
    about = json.loads(info.read_text())
    about["features"]["picture"] = {"_type": "Image"}
    info.write_text(json.dumps(about))
    found = find_records(RecordsConfig(local=str(tmp_path / "saved")), "here", tmp_path)
    units = plan_units(found.inputs, found.datasets, False)
    rows = [row for unit in units for part in unit.parts for row in read_rows(part, found.datasets)]
    assert [row.values for row in rows if isinstance(row, Row)] == [{"prompt": "a", "picture": cell}]


@pytest.mark.parametrize("has_json", [True, False])
def test_a_tokenizers_code_is_not_run(
    has_json: bool, tmp_path: Path, trace: Path, tokenizer_folder: Path, tiny_tokenizer: Any
) -> None:
    """Where there is a tokenizer.json it defines the ids all by itself."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "tokenization.py").write_text(f"open({str(trace)!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["tokenization.Tokenizer", "tokenization.Tokenizer"]}
    config = json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto_map})
    (folder / "tokenizer_config.json").write_text(config)
    if has_json:
        (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
        assert load_tokenizer(str(folder))("some text").input_ids == tiny_tokenizer("some text").input_ids
    else:
        with pytest.raises(ConfigError, match=r"trust_remote_code=True|contains custom code"):
            load_tokenizer(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch TRACE').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% for i in range(999999999) %}x{% endfor %}",
    ],
)
def test_a_hostile_chat_template_reaches_nothing(
    template: str, tmp_path: Path, trace: Path, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.chat_template = template.replace("TRACE", str(trace))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RecordError, match="the chat template refuses them"):
        turns_of({"messages": messages}, tokenizer)
    assert not trace.exists()


def test_the_config_of_a_hostile_run_runs_nothing_when_it_is_evaluated(
    tmp_path: Path, trace: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.evaluate import evaluate

    (tmp_path / "hostile.py").write_text(f"open({str(trace)!r}, 'w')\n")
    (tmp_path / "records.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.chdir(tmp_path)
    folder = write_run()
    dataset = {"local": "records.jsonl", "preprocessing_fn": "hostile:make"}
    loader = {"name": "finetuning", "dataset": dataset}
    run = yaml.safe_load((folder / "config.yaml").read_text())
    run |= {"train_loader": loader, "eval_loader": loader, "code_paths": ["hostile.py"]}
    run |= {"tokenizer": {"name": "t"}, "optimizer": {"name": "decoupled_lionw", "lr": 1e-3}}
    run |= {"scheduler": {"name": "cosine_with_warmup", "t_warmup": "1ba"}}
    run |= {"max_duration": "1ba", "global_train_batch_size": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(MPTFoundryError, match=r"is code\. Run it with allow_code=true"):
        evaluate(EvalConfig(model=str(folder)))
    assert not trace.exists()


@pytest.mark.parametrize("verb", ["eval", "export", "generate", "chat", "compare", "check"])
def test_no_verb_runs_the_code_of_a_run_unless_the_command_line_allows_it(
    verb: str, tmp_path: Path, trace: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.py").write_text(f"open({str(trace)!r}, 'w')\nraise ValueError('it ran')\n")
    folder = write_run()
    run = yaml.safe_load((folder / "config.yaml").read_text()) | {"code_paths": ["hostile.py"]}
    run |= {"optimizer": {"name": "of_the_file"}, "allow_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    more = {"export": ["out"], "generate": ["a"], "compare": [str(folder)]}.get(verb, [])
    place = str(folder / "config.yaml") if verb == "check" else str(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    main([verb, place, *more])
    assert not trace.exists()
    if verb in ("eval", "export", "generate", "chat"):
        assert main([verb, str(folder), *more, "allow_code=true"]) == 2
        assert trace.exists()


def test_a_tokenizer_of_the_hub_is_read_at_the_revision_that_is_named(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """From the hub's cache as its client leaves it; two commits, of which `main` is the later."""
    cache, commits = tmp_path / "models--team--words", {"main": "a" * 40, "v1": "b" * 40}
    (cache / "refs").mkdir(parents=True)
    for number, (name, commit) in enumerate(commits.items()):
        (cache / "refs" / name).write_text(commit)
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
        content["added_tokens"] = content["added_tokens"][: 2 - number]
        (snapshot / "tokenizer.json").write_text(json.dumps(content))
        (snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (snapshot / "config.json").write_text('{"model_type": "mpt"}')  # transformers 5 looks for it first

    def special(name: str, **kwargs: Any) -> int:
        return len(load_tokenizer(name, {"cache_dir": str(tmp_path), **kwargs}).added_tokens_decoder)

    newest, pinned = special("team/words"), special("team/words", revision="v1")
    assert newest == pinned + 1
    assert special("team/words@v1") == special(f"team/words@{'b' * 40}") == pinned
    with pytest.raises(ConfigError, match="is a folder, which has none"):
        load_tokenizer(str(tokenizer_folder), {"revision": "v1"})


@pytest.mark.parametrize(
    ("name", "given", "revision"),
    [
        ("team/books@v1", {}, "v1"),
        ("team/books", {"hf_kwargs": {"revision": "v1"}}, "v1"),
        ("team/books", {}, None),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_at_the_revision_that_is_named(
    name: str, given: dict[str, Any], revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no hub here; what its client is asked is looked at."""
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        return datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    find_records(RecordsConfig(hf_name=name, **given), "here", tmp_path)
    assert asked.pop("revision", None) == revision
    assert asked == {"path": "team/books", "split": "train", "trust_remote_code": False}
