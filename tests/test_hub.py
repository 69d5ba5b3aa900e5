from __future__ import annotations

import builtins
import re
import time

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub
from huggingface_hub import constants, errors

from pyqlora import hub
from pyqlora.adapter_files import find_file

NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """An empty cache; whoever waits to ask again fails."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def wait(seconds):
        raise AssertionError(f"waited for {seconds} s")

    monkeypatch.setattr(time, "sleep", wait)


def cached(tmp_path, revision="main"):
    """The cache with one file of one repository."""
    repository = tmp_path / "cache" / "models--owner--name"
    for path, text in ((f"refs/{revision}", "1234"), ("snapshots/1234/inner/file.json", "{}")):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_text(text)
    return str(tmp_path / "cache")


def test_without_a_network_the_answer_comes_at_once():
    assert hub.reason_to_lack("owner/name", "file.json", endpoint=NOWHERE).startswith("the hub cannot be reached (")
    assert hub.download("owner/name", "file.json", endpoint=NOWHERE) is None
    assert find_file("owner/name", "file.json", endpoint=NOWHERE) is None


def test_what_is_cached_needs_no_network(tmp_path):
    cache = cached(tmp_path)
    where = {"cache_dir": cache, "endpoint": NOWHERE}
    assert hub.reason_to_lack("owner/name", "inner/file.json", **where) is None
    path = find_file("owner/name", "file.json", subfolder="inner", subfolders=3, **where)
    assert path.endswith("snapshots/1234/inner/file.json")
    assert find_file("owner/name", "file.json", subfolder="inner", revision="other", **where) is None
    assert hub.reason_to_lack("owner/name", "other.json", local_files_only=True, **where) == (
        "it is not in the hub's cache either"
    )


def test_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.reason_to_lack("owner/name", "file.json") == (
        "it is not in the hub's cache either (HF_HUB_OFFLINE is set)"
    )


@pytest.mark.parametrize("name", ["./runs/poet", "/runs/poet", "runs/poet/last", "--"])
def test_paths_are_no_names_of_repositories(name):
    assert hub.reason_to_lack(name, "file.json") == "it is no name of a repository"


def answer(monkeypatch, error, code):
    """Let the hub answer with an HTTP error."""
    response = type("Response", (), {"headers": {}, "status_code": code, "request": None})()

    def refuse(*args, **kwargs):
        raise error("not\nhere", response=response)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.RepositoryNotFoundError, 401, "the hub has no such repository, or only with a token"),
        (errors.HfHubHTTPError, 404, r"the hub has no file\.json there \(.*not here.*\)"),
        (errors.GatedRepoError, 403, None),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, code, reason):
    answer(monkeypatch, error, code)
    assert re.fullmatch(str(reason), str(hub.reason_to_lack("owner/name", "file.json")))


def test_without_huggingface_hub(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert hub.reason_to_lack("owner/name", "file.json").endswith("is not installed")
    assert hub.download("owner/name", "file.json") is None
