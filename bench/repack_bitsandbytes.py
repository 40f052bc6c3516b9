"""bitsandbytes' wheel with the library for one CUDA version alone: 4 MB in place of 60, to carry to a machine without
network.

    python -m bench.repack_bitsandbytes --version 0.50.2 --cuda 130 --to .whl
    python -m bench.repack_bitsandbytes --wheel bitsandbytes-0.49.2-...whl --cuda 130 --to .whl

Without --wheel pip downloads PyPI's for Linux on x86-64. The CPU library stays, other files are left as they are, and
RECORD lists what is there.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")
PLATFORMS = ("manylinux_2_24_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")


def download(version: str, folder: Path) -> Path:
    """PyPI's wheel of this version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    subprocess.run([*command, str(folder), *platforms, f"bitsandbytes=={version}"], check=True)
    (wheel,) = folder.glob("bitsandbytes-*.whl")
    return wheel


def repack(wheel: Path, cuda: str, folder: Path) -> Path:
    """The wheel in `folder`, under its own name, with the libraries for `cuda` ("130") and for CPUs. Raises ValueError
    where it has none for `cuda`, and writes nothing then."""
    out, kept = folder / wheel.name, {f"cuda{cuda}", "cpu"}
    if out.resolve() == wheel.resolve():
        raise ValueError(f"the repacked wheel has the same name: give another folder than {folder}")
    with zipfile.ZipFile(wheel) as source:
        found = {match[1]: name for name in source.namelist() if (match := LIBRARY.fullmatch(name))}
        if f"cuda{cuda}" not in found:
            there = ", ".join(sorted(name.removeprefix("cuda") for name in found if name.startswith("cuda")))
            raise ValueError(f"{wheel.name} has no library for CUDA {cuda}, but for {there}: give one of them")
        folder.mkdir(parents=True, exist_ok=True)
        left_out = {name for kind, name in found.items() if kind not in kept}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                if entry.filename in left_out:
                    continue
                data = source.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if line.partition(",")[0] not in left_out).encode()
                target.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="0.50.2")
    parser.add_argument("--wheel", type=Path, help="one that is here, in place of PyPI's")
    parser.add_argument("--cuda", default="130", help="as in the library's name: 130 is CUDA 13.0 (default)")
    parser.add_argument("--to", type=Path, default=Path(".whl"), help="folder (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = repack(given.wheel or download(given.version, Path(folder)), given.cuda, given.to)
        except ValueError as error:
            parser.error(str(error))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
