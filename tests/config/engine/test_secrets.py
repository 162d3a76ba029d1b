from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from mptfoundry.architecture.of_run import config_of_run, read_run
from mptfoundry.config.engine.secrets import redacted
from mptfoundry.config.load import load_train_config, refuse_redacted, to_yaml
from mptfoundry.errors import ConfigError
from mptfoundry.plan.table import summary_table

CONFIG = Path(__file__).parents[3] / "configs" / "mpt-tiny.yaml"
WORDS = [
    "train_loader.dataset.streams.code.remote=s3://me:hunter2@store/code",
    "metadata={wandb_token: abc, note: kept, nested: [{password: p, user: u}]}",
]


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "api_key",
        "apiKey",
        "password",
        "client_secret",
        "aws_secret_access_key",
        "webhook_url",
        "pwd",
        "pat",
        "auth",
        "PGPASS",
        "DATABASE_URL",
        "GITHUB_PAT",
        "SLACK_WEBHOOK",
        "AZURE_STORAGE_CONNECTION_STRING",
        "WANDB_KEY",
        "MONGO_URI",
        "SMTP_PASS",
        "authToken",
        "OPENAI_API_KEYS",
        "api_tokens",
        "ACCESS_KEYS",
    ],
)
def test_what_is_named_a_secret_is_one_for_the_environment_too(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redacted({key: "x"}) == {key: "<redacted>"}
    monkeypatch.setenv(key, "s3cret")
    with pytest.raises(ConfigError, match="may be a secret, which no file reads") as refused:
        load_train_config(CONFIG, [f"metadata.note=${{oc.env:{key}}}"])
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "tokenizer_name",
        "eos_token",
        "pad_token",
        "eos_token_id",
        "max_tokens",
        "token_encoding_type",
        "author",
        "pattern",
        "pass_rate",
        "text_key",
        "prompt_key",
        "response_key",
        "max_new_tokens",
        "special_tokens",
        "tokens_per_second",
        "num_tokens",
        "tokens",
        "keys",
        "monitor",
    ],
)
def test_a_tokenizers_tokens_are_none(key: str) -> None:
    assert redacted({key: "x"}) == {key: "x"}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Bearer abc.def-ghi", "Bearer <redacted>"),
        ("Authorization: Basic dXNlcjpwYXNz=", "Authorization: Basic <redacted>"),
        ("hf_AbCd1234EfGh", "<redacted>"),
        ("export T=ghp_0123456789abcdefABCD;", "export T=<redacted>;"),
        ("AKIAIOSFODNN7EXAMPLE", "<redacted>"),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/<redacted>"),
        ("AccountName=a;AccountKey=abc==;Suffix=b", "AccountName=a;AccountKey=<redacted>;Suffix=b"),
        ("Server=db;Pwd=abc;", "Server=db;Pwd=<redacted>;"),
        ("https://1a2b3c@github.com/me/x", "https://<redacted>@github.com/me/x"),
        ("https://discord.com/api/webhooks/1/xyz", "https://discord.com/api/webhooks/<redacted>"),
        ("dapi0123456789abcdef0123456789abcdef", "<redacted>"),
        ("run --password=hunter2 --api-key=abc fast", "run --password=<redacted> --api-key=<redacted> fast"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<redacted>"),
        ("postgres://me:p@ss@db/x", "postgres://me:<redacted>@db/x"),
        ("abfss://container@account.dfs.core.windows.net/x", None),
        ("hf_checkpointer, basic training, a token embedding", None),
        ("mosaicml/mpt-7b@0123456789abcdef0123456789abcdef01234567", None),
    ],
)
def test_what_looks_like_a_secret_is_one(text: str, kept: str | None) -> None:
    assert redacted({"note": text}) == {"note": text if kept is None else kept}


def test_urls_lose_their_passwords_and_signatures_and_nothing_else() -> None:
    assert redacted("s3://me:hunter2@store/data?x=1") == "s3://me:<redacted>@store/data?x=1"
    signed = "https://store/data?X-Amz-Signature=abc&part=2&sig=d"
    assert redacted(signed) == "https://store/data?X-Amz-Signature=<redacted>&part=2&sig=<redacted>"
    assert redacted("hf://datasets/a@main/b:c") == "hf://datasets/a@main/b:c"


def test_numbers_of_a_secrets_key_are_replaced_and_nothing_stays() -> None:
    assert redacted({"token": None, "secret": 3, "password": "", "auth": True, "seed": 3}) == {
        "token": None,
        "secret": "<redacted>",
        "password": "",
        "auth": True,
        "seed": 3,
    }


def test_all_below_a_secrets_key_is_replaced() -> None:
    given = {"credentials": {"user": "u", "value": "v", "parts": [{"x": 1}]}, "user": "u"}
    assert redacted(given) == {
        "credentials": {"user": "<redacted>", "value": "<redacted>", "parts": [{"x": "<redacted>"}]},
        "user": "u",
    }


def test_a_value_of_the_environment_that_looks_like_a_secret_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AMQP_PLACE", "amqp://me:s3cret@host/v")
    with pytest.raises(ConfigError, match="AMQP_PLACE may be a secret") as refused:
        load_train_config(CONFIG, ["metadata.note=${oc.env:AMQP_PLACE}"])
    assert "s3cret" not in str(refused.value)


def test_the_shells_working_folder_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/here")
    config, _ = load_train_config(CONFIG, ["save_folder=${oc.env:PWD}/runs"])
    assert config.save_folder == "/here/runs"


def test_a_saved_config_holds_no_secret_and_all_the_rest() -> None:
    config, _ = load_train_config(CONFIG, WORDS)
    saved = to_yaml(config)
    assert "hunter2" not in saved and "abc" not in saved and "password: <redacted>" in saved
    assert "note: kept" in saved and "user: u" in saved


def test_a_run_is_not_started_with_what_stands_for_a_secret(tmp_path: Path) -> None:
    config, _ = load_train_config(CONFIG, WORDS)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    saved, _ = load_train_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"metadata\.wandb_token: <redacted> stands for a secret"):
        refuse_redacted(saved)
    refuse_redacted(config)


FROM_ENVIRONMENT = [
    "variables.root=${oc.env:MY_ROOT}",
    "variables.note=${variables.root}/${oc.env:MY_USER,'no one'}",
    "train_loader.dataset.streams.code.local=${variables.root}/code",
    "metadata={note: '${variables.note}', list: ['${oc.env:MY_USER}', '${oc.env:UNSET_THING,usual}']}",
    "seed=${oc.decode:${oc.env:MY_SEED}}",
    "precision=${oc.env:MY_PRECISION}",
    "loggers.file_logger.filename=${oc.env:MY_USER}.txt",
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MY_ROOT": "/r00t", "MY_USER": "us3r", "MY_SEED": "5", "MY_PRECISION": "fp32"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_what_the_environment_gave_is_used_and_never_written(tmp_path: Path) -> None:
    config, _ = load_train_config(CONFIG, FROM_ENVIRONMENT)
    assert config.train_loader.dataset.streams["code"].local == "/r00t/code"
    assert (config.seed, config.precision) == (5, "fp32")
    saved = to_yaml(config)
    assert "r00t" not in saved and "us3r" not in saved and "<redacted>" not in saved
    assert "local: ${oc.env:MY_ROOT}/code" in saved and "- usual" in saved
    # Numbers and choices are no secrets, and what is compared when a run is continued.
    assert "seed: 5" in saved and "precision: fp32" in saved
    (tmp_path / "config.yaml").write_text(saved)
    assert load_train_config(tmp_path / "config.yaml")[0] == config


@pytest.mark.usefixtures("environment")
def test_no_error_and_no_plan_shows_what_the_environment_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        load_train_config(CONFIG, ["seed=${oc.env:MY_USER}", "optimizer.name=${oc.env:MY_USER}"])
    assert "us3r" not in str(refused.value) and "${oc.env:MY_USER}" in str(refused.value)
    table = summary_table(load_train_config(CONFIG, FROM_ENVIRONMENT)[0])
    assert "r00t" not in table and "${oc.env:MY_ROOT}/code" in table


@pytest.mark.usefixtures("environment")
def test_a_run_is_read_without_the_variables_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = load_train_config(CONFIG, FROM_ENVIRONMENT)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run(tmp_path)["metadata"]["list"] == ["us3r", "usual"]
    monkeypatch.delenv("MY_USER")
    monkeypatch.delenv("MY_ROOT")
    run = read_run(tmp_path)
    assert run["metadata"]["list"] == ["${oc.env:MY_USER}", "usual"]
    assert config_of_run(tmp_path) == config.model.network()


@pytest.mark.usefixtures("environment")
def test_values_of_the_environment_survive_copies(tmp_path: Path) -> None:
    config, _ = load_train_config(CONFIG, FROM_ENVIRONMENT)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert to_yaml(other) == to_yaml(config)
