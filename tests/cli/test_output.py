"""Files that measurements write: tried before, whole after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from clusterfusion.cli.output import Outputs, check_apart, check_writable, command_line, leave, write_json, write_whole
from clusterfusion.errors import ArgumentError


@pytest.mark.parametrize(
    ("interrupted", "passed", "status"), [(True, True, 130), (True, False, 130), (False, False, 3)]
)
def test_the_exit_status_says_how_it_went(interrupted: bool, passed: bool, status: int) -> None:
    with pytest.raises(typer.Exit) as caught:
        leave(interrupted, passed)
    assert caught.value.exit_code == status
    leave(False, True)


def test_a_trial_leaves_nothing_behind_and_keeps_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    check_writable(file)
    assert not file.exists()
    file.write_text("kept")
    check_writable(file)
    assert file.read_text() == "kept"
    with pytest.raises(ArgumentError, match="--markdown is '.*', which cannot be written"):
        check_writable(tmp_path / "no" / "table.md", "--markdown")
    with pytest.raises(ArgumentError, match="cannot be written"):
        check_writable(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_may_not_be_written_is_seen_before(tmp_path: Path) -> None:
    folder, fixed = tmp_path / "folder", tmp_path / "fixed"
    folder.mkdir()
    for file in (folder / "result.json", fixed):
        file.write_text("kept")
    folder.chmod(0o555)
    fixed.chmod(0o444)
    for file in (folder / "result.json", fixed):
        with pytest.raises(ArgumentError, match="cannot be written"):
            check_writable(file)
    folder.chmod(0o755)


def test_each_option_has_a_file_of_its_own(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    check_apart({"--text": text, "--json": other, "--markdown": None})
    check_apart({"--json": Path(os.devnull), "--markdown": Path(os.devnull)})
    other.symlink_to(text)
    text.write_text("kept")
    with pytest.raises(ArgumentError, match="--json is '.*other', which --text is too; each needs a file of its own"):
        check_apart({"--text": text, "--markdown": None, "--json": other})


def test_what_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "folder"
    outputs = Outputs(lambda report: write_whole(folder / "a", report), said.append)
    outputs("lost")
    assert len(said) == 1 and "cannot be written" in said[0]
    with pytest.raises(ArgumentError, match="cannot be written .*; what was measured is not in it"):
        outputs.check()
    folder.mkdir()
    outputs("there")
    outputs.check()
    assert (folder / "a").read_text() == "there"


def test_links_that_lead_nowhere_yet(tmp_path: Path) -> None:
    link, circle = tmp_path / "link", tmp_path / "circle"
    link.symlink_to(tmp_path / "target")
    circle.symlink_to(circle)
    check_writable(link)
    assert link.is_symlink() and not link.exists()
    write_whole(link, "through")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "through"
    with pytest.raises(ArgumentError, match="cannot be written"):
        check_writable(circle)


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    write_whole(file, "old")

    def interrupt(self: Path, data: bytes) -> None:
        with self.open("wb") as stream:
            stream.write(data[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_whole(file, "new text")
    assert file.read_text() == "old"
    write_whole(file, "new text")
    assert file.read_text() == "new text"
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    check_writable(pipe)
    with pytest.raises(ArgumentError, match="a pipe that nobody reads"):
        write_whole(pipe, "lost")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_bytes_are_written_whole_too(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    write_whole(file, b"\x1f\x8b\x00")
    assert file.read_bytes() == b"\x1f\x8b\x00"
    assert list(tmp_path.iterdir()) == [file]


def test_json_is_said_to_be_written(tmp_path: Path) -> None:
    said: list[str] = []
    write_json(None, {}, said.append)
    assert said == []
    write_json(tmp_path / "x.json", {"a": 1}, said.append, ", with 1 of 2 contexts")
    assert said == [f"written to {tmp_path / 'x.json'}, with 1 of 2 contexts"]
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'


def test_the_command_in_a_report_does_not_say_where_the_report_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "bench decode demo --contexts 8 --json /tmp/a.json --markdown=/tmp/a.md --out a.gz --plots here --runs 5"
    monkeypatch.setattr("sys.argv", ["clusterfusion", *said.split(), "--text", "a b.txt"])
    assert command_line() == "clusterfusion bench decode demo --contexts 8 --runs 5 --text 'a b.txt'"
