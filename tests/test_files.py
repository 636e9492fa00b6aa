"""Files and directories appear complete, or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from comcat.errors import CheckpointError
from comcat.files import CONFIG_NAME, atomic_directory, atomic_file, check_free, tensor_bytes


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(f"comcat.files.os.{function}", full_disk)
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


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "new" / "d") as directory:
        (directory / CONFIG_NAME).write_text("one")
        assert not (tmp_path / "new" / "d").exists()
    with atomic_directory(tmp_path / "new" / "d", overwrite=True) as directory:
        (directory / CONFIG_NAME).write_text("two")
        assert (tmp_path / "new" / "d" / CONFIG_NAME).read_text() == "one"
    assert (tmp_path / "new" / "d" / CONFIG_NAME).read_text() == "two"
    assert names(tmp_path / "new") == ["d"]
    assert (tmp_path / "new" / "d").stat().st_mode & 0o777 == 0o755


def test_the_old_directory_comes_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_directory(tmp_path / "d") as directory:
        (directory / CONFIG_NAME).write_text("old")
    real = os.replace
    monkeypatch.setattr("comcat.files.os.replace", lambda a, b: full_disk() if str(a).endswith(".tmp") else real(a, b))
    with pytest.raises(CheckpointError, match="No space left"), atomic_directory(tmp_path / "d", overwrite=True) as new:
        (new / CONFIG_NAME).write_text("new")
    assert names(tmp_path) == ["d"]
    assert (tmp_path / "d" / CONFIG_NAME).read_text() == "old"


def test_check_free(tmp_path: Path) -> None:
    check_free(tmp_path / "missing")
    check_free(tmp_path)
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="already holds something"):
        check_free(tmp_path)
    with pytest.raises(CheckpointError, match="not a comcat model; they are not overwritten"):
        check_free(tmp_path, overwrite=True)
    (tmp_path / CONFIG_NAME).write_text("")
    check_free(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_free(tmp_path / "mine", overwrite=True)


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
        (directory / CONFIG_NAME).write_text("")
    assert names(tmp_path) == ["link", "real"]
