"""Make .venv and install peft_fast into it, editable, with the extras named on the command line.

    python .ci/setup_env.py finetune test

Three cases, told apart before anything is installed:

* the interpreter that runs this script already has a CUDA build of torch: the environment sees that interpreter's
  packages, wherever they lie (its own folder, the user's, Debian's dist-packages), and torch and triton are pinned to
  what is there, so pip fails rather than replace them;
* it has a CPU build of torch: the same, and triton is installed by name, because CPU builds bring none;
* it has no torch: the pinned pair is installed. Set PEFT_FAST_TORCH to another requirement to change it.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations  # an older Python must come as far as the message that it is too old

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = os.environ.get("PEFT_FAST_TORCH", "torch==2.13.0")
TRITON = "triton==3.7.1"  # what torch 2.13 pins on CUDA; named because a CPU build of torch does not bring it
OLDEST_TORCH = (2, 10)
ENV = Path(__file__).resolve().parent.parent / ".venv"
PYTHON = ENV / "bin" / "python"

# Run by a child process: this one must not import torch, whose import takes seconds and may fail.
PROBE = "import torch; print(torch.__version__, torch.version.cuda or 'cpu')"
# Where torch and triton really come from, then the other folders of packages: what torch imports may lie in those.
FOLDERS = """
import importlib.util, json, pathlib, sys, torch
specs = [importlib.util.find_spec(name) for name in ("torch", "triton")]
found = [str(pathlib.Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin]
found += [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
print(json.dumps(list(dict.fromkeys(found))))
"""


def pip(*args: str) -> None:
    # --no-compile: 43 s of CPU and not 75, most of which were for modules that nobody imports.
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-compile", *args]
    print("  pip install " + " ".join(args), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"setup: pip failed on: {' '.join(args)}")


def probe(python: str) -> tuple[str, str] | None:
    """(torch version, CUDA version or "cpu") as `python` sees them, or None where torch cannot be imported."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    return tuple(done.stdout.split()[-2:]) if done.returncode == 0 else None


def outer_folders(python: str) -> list[str]:
    """The folders from which `python`, which has torch, takes torch, triton and other packages; those two's first.

    Asked of the interpreter itself: its own site-packages is only one of the places where packages may lie.
    """
    return json.loads(subprocess.check_output([python, "-c", FOLDERS], text=True).splitlines()[-1])


def share(outer: str, version: str) -> None:
    """Make the environment see `outer`'s packages, behind its own; exits unless it then has torch `version` too."""
    folders = outer_folders(outer)
    target = subprocess.check_output(
        [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(target.strip()) / "_outer_torch.pth").write_text("\n".join(folders) + "\n")
    seen = probe(str(PYTHON))
    if seen is None or seen[0] != version:
        sys.exit(
            f"setup: {outer} has torch {version}, but {PYTHON}, which should share it through {', '.join(folders)}, "
            + (f"has torch {seen[0]}" if seen else "cannot import it")
            + f"; nothing was installed. Remove {ENV} if it is of an earlier set-up, and run this again"
        )


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_for(cuda: str) -> str:
    """The triton to install beside a torch that has none: what a CUDA build pins itself, ours for a CPU build."""
    pinned = [r.partition(";")[0].strip() for r in importlib.metadata.requires("torch") or [] if r.startswith("triton")]
    return pinned[0] if cuda != "cpu" and pinned else TRITON


def main(extras: list[str]) -> None:
    if not sys.platform.startswith("linux"):
        sys.exit(f"setup: peft_fast runs on Linux and WSL (Triton is built for them); this is {sys.platform}")
    if sys.version_info < (3, 10):  # noqa: UP036, this script runs before anything is checked
        sys.exit(f"setup: Python >= 3.10 is needed, this is {sys.version.split()[0]}; call make PYTHON=python3.12 ...")
    outer = probe(sys.executable)
    if not PYTHON.exists():
        print(f"making {ENV}", flush=True)
        venv.create(ENV, with_pip=True)
    # A constraint file makes pip fail where a requirement would swap the user's torch for another.
    constraints = ENV / "constraints.txt"
    pins = []
    if outer:
        version, cuda = outer
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
            sys.exit(f"setup: torch >= {'.'.join(map(str, OLDEST_TORCH))} is needed, {sys.executable} has {version}")
        print(f"keeping torch {version} ({cuda}) of {sys.executable}", flush=True)
        share(sys.executable, version)
        pins.append(f"torch=={version}")
        if not installed("triton"):
            pip(triton_for(cuda))
    else:
        cuda = "cpu"
        print(f"no torch in {sys.executable}: installing {TORCH}", flush=True)
        pip(TORCH)
        pip(TRITON)
        found = probe(str(PYTHON))
        if not found:
            sys.exit(f"setup: {TORCH} was installed but cannot be imported by {PYTHON}")
        pins.append(f"torch=={found[0]}")
        cuda = found[1]
    triton = subprocess.check_output(
        [str(PYTHON), "-c", "from importlib.metadata import version; print(version('triton'))"], text=True
    ).strip()
    pins.append(f"triton=={triton}")
    constraints.write_text("\n".join(pins) + "\n")
    if cuda != "cpu":
        extras = [*extras, "cuda"]
    pip("--constraint", str(constraints), "--editable", f"{ENV.parent}[{','.join(extras)}]")
    after = probe(str(PYTHON))
    print(f"ready: torch {after[0]} ({after[1]}), triton {triton}" if after else "ready", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
