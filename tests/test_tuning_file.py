"""The tuning file: what is written comes back, and nothing is lost however it is damaged, locked or shared."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from fpscompile.tuning import Contents, default_path, merge, read, signature, update
from fpscompile.tuning.format import VERSION, CorruptError, dumps, parse
from fpscompile.tuning.store import TuningFileError, check_writable


def entry(value: int, effort: str = "quick", measured: str = "2030-01-01T00:00:00") -> dict:
    return {"config": {"block_m": value}, "effort": effort, "measured": measured, "versions": {"torch": "2.13"}}


def values(contents: Contents) -> dict[str, int]:
    return {key: found["config"]["block_m"] for key, found in contents.sites.items()}


def process(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    """A real process that runs ``target``; a fork, since a fresh interpreter spends seconds on importing torch."""
    started = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    started.start()
    return started


def test_text_comes_back_and_is_readable() -> None:
    n = random.randrange(1000)
    sites = {f"site {n}": entry(n) | {"signature": {"grid": [21, 30, 52]}}, "a": entry(1)}
    contents = Contents(sites, {"model": {"overrides": {"0-1": [1, 2, n]}, "name": "Größe"}}, {"note": "mine"})
    text = dumps(contents)
    assert parse(text) == contents
    assert '"grid": [21, 30, 52]' in text
    assert "Größe" in text
    assert max(map(len, text.splitlines())) <= 200
    assert len(text.splitlines()) > 5
    assert dumps(parse(text)) == text
    data = json.loads(text)
    assert (data["format"], data["version"]) == ("fpscompile-tuning", VERSION)


def test_half_a_character_is_kept() -> None:
    """JSON may escape one alone; UTF-8 cannot hold it."""
    contents = parse(dumps(Contents(other={"note": "\ud800 é"})))
    assert contents.other == {"note": "\ud800 é"}
    dumps(contents).encode()


def test_endless_nesting_is_corrupt() -> None:
    with pytest.raises(CorruptError, match="not whole JSON"):
        parse("[" * 200_000)


def test_default_path_is_in_the_cache_folder(cold_caches: Path) -> None:
    assert default_path() == cold_caches / "fps" / "tuning.json"


def test_missing_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = read(tmp_path / "absent.json")
    assert (loaded.outcome, loaded.contents, loaded.message) == ("missing", Contents(), "")
    assert not caplog.records


def test_update_merges_and_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.json"
    update(path, Contents({"a": entry(1)}, other={"from": "elsewhere"}))
    update(path, Contents({"b": entry(2)}))
    loaded = read(path)
    assert values(loaded.contents) == {"a": 1, "b": 2}
    assert loaded.contents.other == {"from": "elsewhere"}
    assert oct(path.stat().st_mode & 0o777) != "0o600", "others can read it"


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (entry(1), entry(2), 2),
        (entry(1, "full"), entry(2, "quick", "2031-01-01T00:00:00"), 1),
        (entry(1, "quick", "2031-01-01T00:00:00"), entry(2, "full"), 2),
        (entry(1, measured="2031-01-01T00:00:00"), entry(2), 1),
        (entry(1, "full") | {"versions": {"torch": "2.11"}}, entry(2, "quick", "2031-01-01T00:00:00"), 2),
    ],
)
def test_of_two_entries_the_better_measured_stays(tmp_path: Path, old: dict, new: dict, kept: int) -> None:
    path = tmp_path / "tuning.json"
    update(path, Contents({"a": old}))
    update(path, Contents({"a": new}))
    assert values(read(path).contents) == {"a": kept}


def test_merge_of_files(tmp_path: Path) -> None:
    for name, n in (("a", 1), ("b", 2)):
        update(tmp_path / f"{name}.json", Contents({name: entry(n)}, {name: {"measured": "2030"}}))
    contents = merge([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "both.json")
    assert values(contents) == values(read(tmp_path / "both.json").contents) == {"a": 1, "b": 2}
    assert set(contents.calibrations) == {"a", "b"}
    with pytest.raises(TuningFileError, match=r"absent\.json does not exist"):
        merge([tmp_path / "absent.json"], tmp_path / "both.json")


WHOLE = dumps(Contents({"a": entry(1)}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not whole JSON"),
        (WHOLE[: len(WHOLE) // 2], "not whole JSON"),
        ("\x00" * 64, "not whole JSON"),
        ("[1, 2]", 'no "format"'),
        ('{"sites": {}}', 'no "format"'),
        (WHOLE.replace('"version": 1', '"version": "new"'), "'new' is no integer"),
        ('{"format": "fpscompile-tuning", "version": 1, "sites": [1]}', "'sites' is not an object of objects"),
    ],
)
def test_corrupt_is_named_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, words: str
) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    loaded = read(path)
    assert loaded.outcome == "corrupt"
    assert words in loaded.message
    assert str(path) in caplog.text
    assert path.read_text() == text, "reading moves nothing"
    update(path, Contents({"b": entry(2)}))
    assert values(read(path).contents) == {"b": 2}
    aside = [file for file in tmp_path.iterdir() if "corrupt" in file.name]
    assert [file.read_text() for file in aside] == [text]
    assert str(aside[0]) in caplog.text


def test_bytes_that_are_no_text_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert read(path).outcome == "corrupt"
    update(path, Contents({"b": entry(2)}))
    assert read(path).outcome == "read"


def test_foreign_version_is_never_written_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tuning.json"
    text = WHOLE.replace(f'"version": {VERSION}', f'"version": {VERSION + 1}')
    path.write_text(text)
    loaded = read(path)
    assert (loaded.outcome, loaded.contents) == ("foreign", Contents())
    assert f"version {VERSION + 1}" in caplog.text
    for write in (lambda: update(path, Contents({"b": entry(2)})), lambda: check_writable(path)):
        with pytest.raises(TuningFileError, match="name another file"):
            write()
    assert path.read_text() == text


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    assert read(tmp_path).outcome == "unreadable"
    with pytest.raises(TuningFileError, match="cannot be read"):
        update(tmp_path, Contents())
    (tmp_path / "file").write_text("")
    for write in (check_writable, lambda path: update(path, Contents())):
        with pytest.raises(TuningFileError, match=r"cannot be written.*FPS_CACHE_DIR"):
            write(tmp_path / "file" / "tuning.json")


def _as_nobody(path: Path, answers: Connection) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    loaded = read(path)
    lines = [f"{loaded.outcome} {len(loaded.contents.sites)}"]
    for attempt in (lambda: update(path, Contents({"b": {}})), lambda: check_writable(path)):
        try:
            attempt()
        except Exception as error:
            lines.append(f"{type(error).__name__} {error}")
    answers.send(lines)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_read_only_is_read_and_refuses_by_name(tmp_path: Path, what: str) -> None:
    """By a process that is not root, since root may write everywhere."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    folder = tmp_path / "shipped"
    path = folder / "tuning.json"
    update(path, Contents({"a": entry(1)}))
    (folder / ".tuning.json.lock").unlink(missing_ok=True)
    path.chmod(0o444)
    folder.chmod(0o555 if what == "folder" else 0o777)
    here, there = multiprocessing.Pipe()
    process(_as_nobody, path, there).join(60)
    folder.chmod(0o755)
    lines = here.recv()
    assert lines[0] == "read 1"
    assert len(lines) == 3, lines
    assert all(line.startswith("TuningFileError") and str(path) in line and "written" in line for line in lines[1:])
    assert values(read(path).contents) == {"a": 1}


def _write_many(path: Path, name: str, count: int, start: Any) -> None:
    start.wait()
    for n in range(count):
        update(path, Contents({f"{name} {n}": entry(n)}))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    start = multiprocessing.get_context("fork").Event()
    writers = [process(_write_many, path, name, 15, start) for name in "abcd"]
    start.set()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        loaded = read(path)
        assert loaded.outcome in ("read", "missing"), "never half a file"
        assert len(loaded.contents.sites) >= seen
        seen = len(loaded.contents.sites)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert set(read(path).contents.sites) == {f"{name} {n}" for name in "abcd" for n in range(15)}


def test_a_killed_writer_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    update(path, Contents({f"old {n}": entry(n) for n in range(500)}))
    start = multiprocessing.get_context("fork").Event()
    start.set()
    for turn in range(4):
        writer = process(_write_many, path, f"new {turn}", 100_000, start)
        deadline = time.monotonic() + 60
        while not any(key.startswith(f"new {turn}") for key in read(path).contents.sites):
            assert time.monotonic() < deadline, "it never began to write"
        time.sleep(random.uniform(0.0, 0.05))  # to be killed while it writes on
        writer.kill()
        writer.join(60)
        loaded = read(path)
        assert loaded.outcome == "read"
        assert sum(key.startswith("old") for key in loaded.contents.sites) == 500
    update(path, Contents({"after": entry(1)}))
    assert "after" in read(path).contents.sites


def _hold_lock(lock: Path, answers: Connection) -> None:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answers.send("held")
        answers.recv()


def test_a_lock_that_stays_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fpscompile.tuning import store

    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    here, there = multiprocessing.Pipe()
    holder = process(_hold_lock, tmp_path / ".tuning.json.lock", there)
    assert here.recv() == "held"
    with pytest.raises(TuningFileError, match="locked by another process"):
        update(tmp_path / "tuning.json", Contents({"a": entry(1)}))
    here.send("let go")
    holder.join(60)
    update(tmp_path / "tuning.json", Contents({"a": entry(1)}))
    assert values(read(tmp_path / "tuning.json").contents) == {"a": 1}


def test_reading_again_sees_what_others_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "tuning.json"
    for n in range(3):
        path.write_text(dumps(Contents({"a": entry(n)})))
        os.utime(path, (n, n))
        assert values(read(path).contents) == {"a": n}


def test_generations_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud's processors of several generations share a name, and what is fastest differs."""
    text = "cpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: other\n"
    monkeypatch.setattr(signature, "CPUINFO", tmp_path / "cpuinfo")
    name = signature.processor_name.__wrapped__  # the name of this machine stays in its cache
    names = []
    for family, model in ((25, 17), (26, 2)):
        signature.CPUINFO.write_text(text.format(family, model))
        names.append(name())
    assert names == ["AMD EPYC, family 25 model 17", "AMD EPYC, family 26 model 2"]
    signature.CPUINFO.write_text("model name\t: Neoverse\n")
    assert name() == "Neoverse"
    signature.CPUINFO.unlink()
    assert name()
