from __future__ import annotations

import errno

import pytest

from pyqlora.finetune import files


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_write_text_replaces(tmp_path):
    (tmp_path / "a").write_text("old")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch, existing):
    if existing:
        (tmp_path / "a").write_text("old")
    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "a", "new")
    assert names(tmp_path) == (["a"] if existing else [])
    assert not existing or (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("manager", [files.whole_directory, files.merged_directory])
def test_a_directory_is_whole_or_as_before(tmp_path, monkeypatch, manager):
    def write(text):
        with manager(tmp_path / "d") as directory:
            (directory / "a").write_text(text)
            (directory / "b").write_text(text)

    write("old")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["a", "b"]
    write("newer")
    assert (tmp_path / "d" / "a").read_text() == "newer"
    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write("newest")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["a", "b"]
    assert (tmp_path / "d" / "a").read_text() == "newer"


def test_a_merged_directory_keeps_other_files(tmp_path):
    (tmp_path / "log").write_text("kept")
    with files.merged_directory(tmp_path) as directory:
        (directory / "a").write_text("new")
    assert names(tmp_path) == ["a", "log"]
