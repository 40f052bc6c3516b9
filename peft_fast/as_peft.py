"""python -m peft_fast.as_peft script.py ...: runs a script in which `import peft` gives peft_fast."""

import runpy
import sys
from pathlib import Path

from peft_fast.integrations.stand_in import install_as_peft

USAGE = """usage: python -m peft_fast.as_peft script.py [its arguments]
       python -m peft_fast.as_peft -m module [its arguments]
Runs a script or a module in which `import peft` gives peft_fast. On several GPUs: torchrun -m peft_fast.as_peft ..."""


def main(arguments: list[str]) -> None:
    as_module = arguments[:1] == ["-m"]
    rest = arguments[as_module:]
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if rest else sys.stderr)
        sys.exit(0 if rest else 2)
    install_as_peft()
    sys.argv = rest
    if as_module:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(rest[0]).resolve().parent)  # what python itself does with a script
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
