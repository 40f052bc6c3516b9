"""Adapter files on disk and on the Hub: finding them, and writing several of them as one."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "subfolder", "force_download", "local_files_only", "user_agent")


def check_hub_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that no file look-up understands: it would be lost otherwise."""
    unknown = sorted(set(arguments) - set(HUB_ARGUMENTS))
    if unknown:
        raise TypeError(f"unknown keyword arguments {unknown}: beside the documented ones these are {HUB_ARGUMENTS}")


def locate(model_id: str | os.PathLike[str], name: str, **hub_arguments: Any) -> Path | None:
    """The path of file `name` of an adapter, or None where the adapter has no such file.

    `model_id` is a directory or a Hub id; a directory wins, and with one nothing is asked of the network.
    Raises ValueError when the Hub cannot be asked (no such repository, no permission, no network).
    """
    check_hub_arguments(hub_arguments)
    subfolder = hub_arguments.get("subfolder") or ""
    if os.path.isdir(model_id):
        path = Path(model_id, subfolder, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model_id), name, **hub_arguments))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, the file is not
        raise ValueError(
            f"{str(model_id)!r} is neither a directory nor an adapter on the Hub that can be reached: {error}"
        ) from error


def write_together(files: Mapping[Path, Callable[[Path], object]], obsolete: Iterable[Path] = ()) -> None:
    """Write every file or none: `files` maps each path to the function that writes it. `obsolete` ones are removed.

    Everything is first written beside its destination and flushed to the disk, then moved into place. A failure on the
    way puts the old files back. A file whose content has not changed is left alone: saving the same adapter again
    moves one file only, and a single move cannot be torn even by a power cut.
    """
    fresh = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in files}
    gone = [path for path in obsolete if path.is_file()]
    old = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in (*files, *gone)}
    try:
        for path, write in files.items():
            write(fresh[path])
            _flush(fresh[path])
        changed = [path for path in files if not _same(path, fresh[path])]
        for path in (*changed, *gone):
            if path.exists():
                _keep(path, old[path])
        moved: list[Path] = []
        try:
            for path in changed:
                os.replace(fresh[path], path)
                moved.append(path)
            for path in gone:
                moved.append(path)
                path.unlink()
        except BaseException:
            for path in moved:
                if old[path].exists():
                    os.replace(old[path], path)
                else:
                    path.unlink()
            raise
    finally:
        for path in (*fresh.values(), *old.values()):
            with suppress(FileNotFoundError):
                path.unlink()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _same(path: Path, fresh: Path) -> bool:
    if not path.is_file() or path.stat().st_size != fresh.stat().st_size:
        return False
    chunk = 1 << 20
    with path.open("rb") as one, fresh.open("rb") as other:
        while block := one.read(chunk):
            if block != other.read(chunk):
                return False
    return True


def _keep(path: Path, copy: Path) -> None:
    """A second name for the file where the file system has hard links, else a copy."""
    with suppress(FileNotFoundError):
        copy.unlink()
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)
