"""Adapter files on disk and on the Hub: finding them, and writing several of them as one.

A save that moves more than one file into place first leaves a note, `.peft_fast_save.<tag>`, beside them: from then on
the staged files `.<name>.<tag>.new` are the adapter, whether their moves are done or not. Readers look there, and the
next save finishes the moves of a process that was killed. Staged files without a note are rubbish: nobody reads them.
"""

import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

HUB_ARGUMENTS = (
    "revision", "cache_dir", "token", "subfolder", "force_download", "local_files_only", "user_agent", "repo_type",
    "library_name", "library_version", "local_dir", "etag_timeout", "headers", "endpoint", "use_auth_token",
)  # fmt: skip
GONE = ("proxies",)  # huggingface_hub 1 has it no more; transformers passes on that there is none
# peft takes these wherever an adapter is loaded and uses them for base models that accelerate has offloaded, if at all.
WITHOUT_EFFECT = (
    "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "torch_dtype", "dtype",
    "use_safetensors", "trust_remote_code",
)  # fmt: skip
NOTE = ".peft_fast_save."  # and the tag of the save
STALE = 3600.0  # seconds after which nobody still works with a temporary file


def check_hub_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that no file look-up understands: it would be lost otherwise."""
    none = {name for name in GONE if name in arguments and arguments[name] is None}
    unknown = sorted(set(arguments) - set(HUB_ARGUMENTS) - none)
    if unknown:
        raise TypeError(f"unknown keyword arguments {unknown}: beside the documented ones these are {HUB_ARGUMENTS}")


def without_idle_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` less those that do nothing to an adapter, in peft neither, with a warning that names them."""
    idle = [name for name, value in arguments.items() if name in WITHOUT_EFFECT and value is not None]
    if idle:
        warnings.warn(
            f"{idle} have no effect on an adapter: it goes where its layers are, in the dtype that "
            "autocast_adapter_dtype says. Leave them out, or give them to the base model",
            stacklevel=3,
        )
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}


def locate(model_id: str | os.PathLike[str], name: str, **hub_arguments: Any) -> Path | None:
    """The path of file `name` of an adapter, or None where the adapter has no such file.

    `model_id` is a directory or a Hub id; a directory wins, and with one nothing is asked of the network.
    Raises ValueError when the Hub cannot be asked (no such repository, no permission, no network).
    """
    check_hub_arguments(hub_arguments)
    hub_arguments = {name: value for name, value in hub_arguments.items() if name not in GONE}
    subfolder = hub_arguments.get("subfolder") or ""
    if os.path.isdir(model_id):
        return newest(Path(model_id, subfolder, name))
    if (old_token := hub_arguments.pop("use_auth_token", None)) is not None:
        warnings.warn("use_auth_token is called token now", FutureWarning, stacklevel=2)
        hub_arguments["token"] = hub_arguments.get("token") or old_token
    try:
        return Path(hf_hub_download(str(model_id), name, **hub_arguments))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, the file is not
        raise ValueError(
            f"{str(model_id)!r} is neither a directory nor an adapter on the Hub that can be reached: {error}"
        ) from error


def newest(path: Path) -> Path | None:
    """Where the content of `path` is: elsewhere if a save was killed between its moves. None: there is no such file."""
    for note, tag in _notes(path.parent):
        staged = _staged(path, tag)
        if staged.is_file():
            return staged
        if path.name in _obsolete(note):
            return None
    return path if path.is_file() else None


def write_together(files: Mapping[Path, Callable[[Path], object]], obsolete: Iterable[Path] = ()) -> None:
    """Write every file or none: `files` maps each path to the function that writes it. `obsolete` ones are removed.

    All are in one directory. Everything is first written beside its destination and flushed to the disk, then moved
    into place. A failure on the way puts the old files back; a process that is killed leaves the old or the new ones,
    see above. A file whose content has not changed is left alone: saving the same adapter again moves one file only.
    """
    directory = next(iter(files)).parent
    _finish_saves(directory)
    tag = f"{os.getpid()}_{time.time_ns()}"
    fresh = {path: _staged(path, tag) for path in files}
    try:
        for path, write in files.items():
            write(fresh[path])
            _flush(fresh[path])
        changed = [path for path in files if not _same(path, fresh[path])]
        _move(directory, tag, {path: fresh[path] for path in changed}, [path for path in obsolete if path.is_file()])
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def _move(directory: Path, tag: str, moves: Mapping[Path, Path], gone: list[Path]) -> None:
    old = {path: path.with_name(f".{path.name}.{tag}.old") for path in (*moves, *gone) if path.exists()}
    note, draft = directory / f"{NOTE}{tag}", directory / f".adapter_note.{tag}.new"
    done: list[Path] = []
    try:
        for path, copy in list(old.items()):
            if not _keep(path, copy):  # another process of the same job was here in this moment
                del old[path]
        if len(moves) + len(gone) > 1:
            draft.write_text("\n".join(path.name for path in gone), encoding="utf-8")
            _flush(draft)
            os.replace(draft, note)
            _flush_directory(directory)
        for path, staged in moves.items():
            done.append(path)
            _finish_move(staged, path)
        for path in gone:
            done.append(path)
            path.unlink(missing_ok=True)
    except BaseException:
        note.unlink(missing_ok=True)
        for path in done:
            if path in old:
                os.replace(old[path], path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        _flush_directory(directory)  # the moves are on the disk before the note that stands in for them is gone
        for path in (note, draft, *old.values()):
            path.unlink(missing_ok=True)


def _finish_saves(directory: Path) -> None:
    """Do what killed processes had noted, and clear away what they left."""
    for note, tag in _notes(directory):
        for staged in filter(Path.is_file, directory.glob(f".*.{tag}.new")):
            _finish_move(staged, staged.with_name(staged.name[1:].removesuffix(f".{tag}.new")))
        for path in filter(Path.is_file, [directory / name for name in _obsolete(note)]):
            path.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    for pattern in (".adapter_*.new", ".adapter_*.old", ".README.md.*.new", ".README.md.*.old"):
        for path in directory.glob(pattern):
            with suppress(FileNotFoundError):  # another process of the same job may be quicker
                if path.is_file() and time.time() - path.lstat().st_ctime > STALE:
                    path.unlink()


def _finish_move(staged: Path, path: Path) -> None:
    with suppress(FileNotFoundError):  # a save of another process found our note and has done it
        os.replace(staged, path)


def _staged(path: Path, tag: str) -> Path:
    return path.with_name(f".{path.name}.{tag}.new")


def _notes(directory: Path) -> list[tuple[Path, str]]:
    """(note, tag) of the saves that were not finished."""
    found = [(path, path.name.removeprefix(NOTE)) for path in sorted(directory.glob(f"{NOTE}*")) if path.is_file()]
    return [(note, tag) for note, tag in found if re.fullmatch(r"\d+_\d+", tag)]


def _obsolete(note: Path) -> list[str]:
    """The files that a save removes. A note comes with the folder, which may be anyone's: it can name adapters only."""
    try:
        names = note.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:  # finished in this moment
        return []
    return [name for name in names if re.fullmatch(r"adapter_[\w.]+", name)]


def _flush(path: Path) -> None:
    """Have a file's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_directory(path: Path) -> None:
    """Have a directory's entries on the disk, where the file system can do that."""
    with suppress(OSError):
        _flush(path)


def _same(path: Path, fresh: Path) -> bool:
    if not path.is_file() or path.stat().st_size != fresh.stat().st_size:
        return False
    chunk = 1 << 20
    with path.open("rb") as one, fresh.open("rb") as other:
        while block := one.read(chunk):
            if block != other.read(chunk):
                return False
    return True


def _keep(path: Path, copy: Path) -> bool:
    """A second name for the file where the file system has hard links, else a copy. False: there is no file."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except (OSError, NotImplementedError):  # no hard links on this file system, or on this platform
        shutil.copy2(path, copy, follow_symlinks=False)
    return True
