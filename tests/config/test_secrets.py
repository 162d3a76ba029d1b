from __future__ import annotations

from pathlib import Path

import pytest

from mptfoundry.config.load import load_train_config, refuse_redacted, to_yaml
from mptfoundry.config.secrets import redacted
from mptfoundry.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "configs" / "mpt-tiny.yaml"
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
    ],
)
def test_what_is_named_a_secret_is_one(key: str) -> None:
    assert redacted({key: "x"}) == {key: "<redacted>"}


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
    ],
)
def test_a_tokenizers_tokens_are_none(key: str) -> None:
    assert redacted({key: "x"}) == {key: "x"}


def test_urls_lose_their_passwords_and_signatures_and_nothing_else() -> None:
    assert redacted("s3://me:hunter2@store/data?x=1") == "s3://me:<redacted>@store/data?x=1"
    signed = "https://store/data?X-Amz-Signature=abc&part=2&sig=d"
    assert redacted(signed) == "https://store/data?X-Amz-Signature=<redacted>&part=2&sig=<redacted>"
    assert redacted("hf://datasets/a@main/b:c") == "hf://datasets/a@main/b:c"


def test_numbers_and_nothing_stay() -> None:
    assert redacted({"token": None, "secret": 3, "password": ""}) == {
        "token": None,
        "secret": 3,
        "password": "",
    }


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
