"""Two processes that talk through gloo, as two GPUs' processes through nccl: what starts them, and what they share.

The scripts beside this file (..._worker.py) run in them; they import this file by its name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # --multi_gpu: with --cpu it starts one process. The script says that it runs on the CPU.
    "accelerate": [*ACCELERATE, "--multi_gpu"],
    "accelerate-fsdp": [
        *ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_state_dict_type", "FULL_STATE_DICT",
        "--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_reshard_after_forward", "true",
    ],
}  # fmt: skip


def environment(**changed: str) -> dict[str, str]:
    """Of a process that finds this checkout, and talks to the others on this machine alone."""
    given = [path for path in [os.environ.get("PYTHONPATH")] if path]  # where DeepSpeed may be
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent / "ecosystem"), *given])}
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **paths, **quiet, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changed}


def two(script: str, folder: Path, *arguments: str, launcher: str | None = None, port: int = 0) -> list[Any]:
    """What the two processes of a script beside this file say (`tell`), by rank. Both must end well.

    folder: for what they write; arguments: of the script, after the folder; launcher: of LAUNCHERS, or None for two
    processes that are started here, which is quicker
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(HERE / f"{script}_worker.py"), str(folder), *arguments]
    if launcher is not None:
        more = ["--main_process_port", str(port)] if launcher.startswith("accelerate") else []
        started = [_start([*LAUNCHERS[launcher], *more, *command])]
    else:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        started = [_start(command, STORE=str(folder / "store"), **variables) for variables in ranks]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:  # one that waits for another that is gone
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(
        f"{out[-1500:]}{err[-9000:]}" for out, err in outputs
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def _start(command: list[str], **variables: str) -> Any:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment(**variables), **pipes)


def join() -> tuple[int, int]:
    """(this process's rank, the number of processes), in a process that `two` or a launcher has started."""
    import torch.distributed as dist

    store = os.environ.get("STORE")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    return rank, world


def tell(folder: Path, rank: int, what: Any) -> None:
    """For `two` to return."""
    (folder / f"rank{rank}.json").write_text(json.dumps(what))
