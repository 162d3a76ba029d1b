"""What is a URL and what is a path, and what runs and checkpoints can be called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mptfoundry.places import is_url, path_in_store, why_no_start_finds, why_not_a_run_name


@pytest.mark.parametrize("place", ["s3://b/x", "gs://b", "AZURE_BLOBS://b/x", "dbfs:/Volumes/a", "hf://a/b"])
def test_a_url_has_a_scheme(place: str) -> None:
    assert is_url(place)


@pytest.mark.parametrize(
    "place", ["runs/a#1", "runs/a?b=c;d", "exp:1/run", "/x:y", "C:\\x", "a%20b", "dbfs", "//server/x", ""]
)
def test_anything_else_is_a_path(place: str) -> None:
    assert not is_url(place) and not is_url(Path(place))


def test_the_path_in_a_store_is_taken_as_it_is_written() -> None:
    assert path_in_store("s3://bucket/runs/a#1?b;c") == "runs/a#1?b;c"
    assert path_in_store("s3://bucket") == "" and path_in_store("dbfs:/Volumes/a#1") == "Volumes/a#1"


@pytest.mark.parametrize("name", ["exp#1", "a?b;c&d", "group/exp", "é 言葉", "..a", "a:b", "x" * 255])
def test_names_of_runs_are_free(name: str) -> None:
    assert why_not_a_run_name(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc",
        "a//b",
        "a/",
        "./a",
        "a\nb",
        "a\x00b",
        "a\x7f",
        "{x}",
        "x" * 256,
    ],
)
def test_a_run_can_not_be_called_what_lies_elsewhere(name: str) -> None:
    assert why_not_a_run_name(name) is not None


@pytest.mark.parametrize(
    ("name", "local", "store"),
    [
        ("ep{epoch}-ba{batch}-rank{rank}.pt", True, True),
        ("ep{epoch}-ba{batch}", True, True),
        ("mine-{batch}.pt", True, False),
        ("ep{epoch}-ba{batch}.bin", False, False),
        (".ep{epoch}-ba{batch}.pt", False, False),
        ("{batch}", False, False),
        ("ep0-ba0.pt", True, False),
    ],
)
def test_a_checkpoint_is_called_what_a_start_finds(name: str, local: bool, store: bool) -> None:
    assert (why_no_start_finds(name, in_a_store=False) is None) == local
    assert (why_no_start_finds(name, in_a_store=True) is None) == store
