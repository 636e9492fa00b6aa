"""Files and directories appear complete, or not at all."""

import errno
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from comcat.errors import CheckpointError
from comcat.storage import temporary
from comcat.storage.atomic import CONFIG_NAME, atomic_directory, atomic_file, check_free, recover, tensor_bytes
from comcat.storage.manifest import Manifest


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mark(directory: Path, text: str) -> None:
    """Make it a model, as far as overwriting looks."""
    (directory / CONFIG_NAME).write_text(json.dumps({"comcat_format": 1, "text": text}))


def text(directory: Path) -> str:
    return str(json.loads((directory / CONFIG_NAME).read_text())["text"])


@pytest.fixture(params=["exchange", "no exchange"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to replace a directory."""
    if request.param == "no exchange":
        monkeypatch.setattr("comcat.storage.atomic.exchange", lambda a, b: False)
        monkeypatch.setattr("comcat.storage.exchange._function", lambda: None)
    return bool(request.param == "exchange")


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_file_appears_complete(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "a") as file:
        file.write(b"one")
        assert not (tmp_path / "new" / "a").exists()
    with atomic_file(tmp_path / "new" / "a") as file:
        file.write(b"two")
        assert (tmp_path / "new" / "a").read_bytes() == b"one"
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    assert names(tmp_path / "new") == ["a"]


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(f"comcat.storage.atomic.os.{function}", full_disk)
    with (
        pytest.raises(CheckpointError, match="No space left on device; nothing was written"),
        atomic_file(tmp_path / "a") as file,
    ):
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_passes_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_file(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"half")
        raise error
    with pytest.raises(error), atomic_directory(tmp_path / "d") as directory:  # noqa: PT012
        (directory / "x").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"), atomic_file(tmp_path / "a" / "b"):
        pass
    with pytest.raises(CheckpointError, match="cannot write"), atomic_directory(tmp_path / "a" / "b"):
        pass


def test_a_directory_appears_complete(tmp_path: Path, exchanging: bool) -> None:
    with atomic_directory(tmp_path / "new" / "d") as directory:
        mark(directory, "one")
        assert not (tmp_path / "new" / "d").exists()
    with atomic_directory(tmp_path / "new" / "d", overwrite=True) as directory:
        mark(directory, "two")
        assert text(tmp_path / "new" / "d") == "one"
    assert text(tmp_path / "new" / "d") == "two"
    assert names(tmp_path / "new") == ["d"]
    assert (tmp_path / "new" / "d").stat().st_mode & 0o777 == 0o755


def test_the_old_directory_comes_back_if_the_rename_fails(
    tmp_path: Path, exchanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(tmp_path / "d") as directory:
        mark(directory, "old")
    real = os.rename
    monkeypatch.setattr(
        "comcat.storage.atomic.os.rename", lambda a, b: full_disk() if str(a).endswith(".tmp") else real(a, b)
    )
    if exchanging:
        monkeypatch.setattr("comcat.storage.atomic.exchange", full_disk)
    with pytest.raises(CheckpointError, match="No space left"), atomic_directory(tmp_path / "d", overwrite=True) as new:
        mark(new, "new")
    assert names(tmp_path) == ["d"]
    assert text(tmp_path / "d") == "old"


def test_what_was_set_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    mark_at = tmp_path / ".d.comcat-old"
    mark_at.mkdir()
    mark(mark_at, "old")
    recover(tmp_path / "d")
    assert names(tmp_path) == ["d"]
    assert text(tmp_path / "d") == "old"


def test_check_free(tmp_path: Path) -> None:
    check_free(tmp_path / "missing")
    check_free(tmp_path)
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="already holds something"):
        check_free(tmp_path)
    with pytest.raises(CheckpointError, match="not a comcat model; they are not overwritten"):
        check_free(tmp_path, overwrite=True)
    (tmp_path / CONFIG_NAME).write_text('{"my": "own"}')
    with pytest.raises(CheckpointError, match=r"its comcat\.json is of something else"):
        check_free(tmp_path, overwrite=True)
    (tmp_path / CONFIG_NAME).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be told"):
        check_free(tmp_path, overwrite=True)
    mark(tmp_path, "")
    (tmp_path / ".git").mkdir()
    with pytest.raises(CheckpointError, match=r"also holds '\.git', 'mine', which comcat did not make"):
        check_free(tmp_path, overwrite=True)
    (tmp_path / ".git").rmdir()
    with pytest.raises(CheckpointError, match="is a file"):
        check_free(tmp_path / "mine", overwrite=True)
    (tmp_path / "mine").unlink()
    check_free(tmp_path, overwrite=True)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    check_free(tmp_path, overwrite=True)
    (tmp_path / "checkpoints" / "step-00000001" / "optimizer.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints/step-00000001/optimizer\.pt"):
        check_free(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="File name too long"):
        check_free(tmp_path / ("x" * 300))


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_stays_and_the_result_is_kept(tmp_path: Path, exchanging: bool, overwrite: bool) -> None:
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match=r"came to hold something .* the result is in '.*d-1'"),
        atomic_directory(tmp_path / "d", overwrite) as directory,
    ):
        mark(directory, "new")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis.tex").write_text("mine")
    assert names(tmp_path) == ["d", "d-1"]
    assert names(tmp_path / "d") == ["thesis.tex"]
    assert text(tmp_path / "d-1") == "new"
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match=r"the result is in '.*a-1\.txt'"),
        atomic_file(tmp_path / "a.txt", overwrite=False) as file,
    ):
        file.write(b"new")
        (tmp_path / "a.txt").write_text("mine")
    assert [(tmp_path / name).read_text() for name in ("a.txt", "a-1.txt")] == ["mine", "new"]


def test_links_stay_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")  # dangling at first
    for content in (b"one", b"two"):
        with atomic_file(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == content
    (tmp_path / "target").chmod(0o640)
    with atomic_file(tmp_path / "link"):
        pass
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="no regular file"), atomic_file(tmp_path / "fifo"):
        pass
    for odd in ("a\nb", "x" * 250):
        with atomic_file(tmp_path / odd) as file, atomic_directory(tmp_path / "d" / odd):
            file.write(b"")
    assert names(tmp_path / "d") == sorted(["a\nb", "x" * 250])


def test_a_failure_leaves_no_new_parents(tmp_path: Path) -> None:
    for manager in (atomic_file, atomic_directory):
        with pytest.raises(ValueError, match="x"), manager(tmp_path / "a" / "b" / "c"):
            raise ValueError("x")
        assert names(tmp_path) == []


def test_a_directory_inside_another_appears_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), atomic_directory(tmp_path / "d") as outer:  # noqa: PT012
        for inner in (outer, outer / "inner"):
            with atomic_directory(inner, overwrite=True) as directory:
                assert directory == inner
                mark(inner, "")
        assert names(outer) == [CONFIG_NAME, "inner"]
        assert len(names(tmp_path)) == 1
        raise ValueError("x")
    assert names(tmp_path) == []


def killed(function: Any, after: float | None) -> None:
    """Run it in a child that is killed after so many seconds, if not before."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    if after is not None:
        timer = threading.Timer(after, os.kill, (child, signal.SIGKILL))
        timer.start()
        timer.join()
    os.waitpid(child, 0)


def test_kills_leave_old_or_new_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    def write(content: str) -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as directory:
            mark(directory, content)
            (directory / "model.safetensors").write_text(content * 1000)
        with atomic_file(tmp_path / "f") as file:
            file.write(content.encode() * 1000)

    write("old")
    rng = random.Random(3)
    for i in range(12):
        killed(lambda i=i: [write(f"new{i}") for _ in range(50)], rng.uniform(0, 0.02))  # type: ignore[misc]
        content = text(tmp_path / "d")
        assert (tmp_path / "d" / "model.safetensors").read_text() == content * 1000
        assert len(set((tmp_path / "f").read_text().split("new"))) <= 2
    write("last")
    assert names(tmp_path) == ["d", "f"]


def test_temporaries_of_living_processes_and_other_hosts_stay(tmp_path: Path) -> None:
    other = tmp_path / f".a.comcat-{'0' * 8}-{'1' * 12}.tmp"
    other.write_text("")
    dead = tmp_path / f".a.comcat-{temporary._host()}-{'1' * 12}.tmp"
    dead.mkdir()
    with temporary.new(tmp_path / "a", directory=True) as mine, temporary.new(tmp_path / "b", directory=False) as too:
        temporary.sweep(tmp_path)
        assert names(tmp_path) == sorted([other.name, mine.name, too.name])
    assert names(tmp_path) == [other.name]


def test_threads_that_save_one_path_leave_it_whole(tmp_path: Path, exchanging: bool) -> None:
    def write(content: str) -> None:
        with atomic_file(tmp_path / "f") as file:
            file.write(content.encode() * 10_000)
        with atomic_directory(tmp_path / "d", overwrite=True) as directory:
            mark(directory, content)

    failed: list[BaseException] = []

    def work(content: str) -> None:
        try:
            for _ in range(10):
                write(content)
        except BaseException as error:
            failed.append(error)

    write("a")
    threads = [threading.Thread(target=work, args=(letter,)) for letter in "bcdefghi"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(set((tmp_path / "f").read_bytes())) == 1
        assert (tmp_path / "f").stat().st_size == 10_000
        if exchanging:
            assert text(tmp_path / "d") in "abcdefghi"
    assert not failed
    assert names(tmp_path) == ["d", "f"]


def test_a_directory_that_is_replaced_while_it_is_looked_at_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    mark(tmp_path / "d", "old")
    listed = Path.iterdir
    calls = []

    def replaced(path: Path) -> Any:
        if path == tmp_path / "d":
            calls.append(path)
            if len(calls) == 2:  # after the look whether it is empty
                path.rename(tmp_path / "set aside")
                path.mkdir()
                mark(path, "new")
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", replaced)
    check_free(tmp_path / "d", overwrite=True)
    assert len(calls) == 4

    def gone(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        check_free(tmp_path / "d", overwrite=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        temporary.claimed(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another process is writing to"),
        temporary.claimed(tmp_path / "out"),
    ):
        pass
    with temporary.claimed(tmp_path / "out"):
        pass
    assert names(tmp_path) == []
    killed(lambda: temporary.claimed(tmp_path / "out").__enter__(), None)
    with temporary.claimed(tmp_path / "out"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []


def test_a_manifest_knows_its_own_files(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.write("a", b"1")
    manifest.record("log")
    (tmp_path / "log").write_text("more and more")
    (tmp_path / "mine").write_text("mine")
    manifest = Manifest(tmp_path)
    assert [manifest.knows(name) for name in ("a", "log", "mine", "missing")] == [True, True, False, True]
    (tmp_path / "a").write_text("edited")
    manifest.remove("a")
    with pytest.raises(CheckpointError, match="left as it is, move it away"):
        manifest.write("a", b"2")
    with pytest.raises(CheckpointError, match="left as it is, move it away"):
        manifest.take(tmp_path / "log", "mine")
    assert (tmp_path / "a").read_text() == "edited"
    manifest.path.write_text("{}")
    with pytest.raises(CheckpointError, match="not comcat's list of its files"):
        Manifest(tmp_path)


@pytest.mark.parametrize("name", ["../mine", "/etc/hostname", "..", ".", "", "a//b", "a/../../b", "a\0b", "x" * 300])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    manifest = Manifest(tmp_path)
    manifest.path.write_text(json.dumps({"comcat_files": {name: None}}))
    with pytest.raises(CheckpointError, match="which is no file of its directory"):
        Manifest(tmp_path)
    (tmp_path / "folder").mkdir()
    manifest.record("folder")
    manifest.remove("folder")  # of files
    assert (tmp_path / "folder").is_dir()


def test_tensor_bytes_takes_views_and_parameters() -> None:
    base = torch.arange(6.0).view(2, 3)
    content = tensor_bytes({"t": base.T, "p": torch.nn.Parameter(base[:, :2])})
    found = load(content)
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["p"], base[:, :2])


def test_a_link_to_an_empty_directory_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as directory:
        mark(directory, "")
    assert names(tmp_path) == ["link", "real"]
