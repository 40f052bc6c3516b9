"""Reload a written adapter on a freshly loaded, freshly quantised base and measure the held-out loss again.

    python -m peft_fast.finetune.verify runs/finetune

Prints one JSON object with `eval_loss`, in nats per token. In a process of its own nothing of the training is left that
could make up for something missing in the files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft_fast
from peft_fast.finetune import base_model, data
from peft_fast.finetune.options import Options
from peft_fast.finetune.trainer import make_trainer


class CheckFailed(Exception):
    """The run ended, but its adapter does not do what it should. The message says what was seen."""


def heldout_loss(folder: Path) -> float:
    """The held-out loss of the adapter in `folder`, on base and data as `folder`/metrics.json names them."""
    options = Options.from_dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["options"])
    tokenizer = base_model.load_tokenizer(str(options.model))
    corpus = data.load(options, tokenizer)
    base = base_model.load_base(options)
    base_model.apply_liger(base, options)
    with peft_fast.use_backend(options.backend):
        model = peft_fast.PeftModel.from_pretrained(base, str(folder))
        trainer, _ = make_trainer(model, corpus, options, tokenizer.pad_token_id)
        return trainer.evaluate()["eval_loss"]


def in_fresh_process(folder: Path) -> float:
    """`heldout_loss` as a new Python process finds it.

    Raises:
        CheckFailed: the process failed; the message has the end of its output.
    """
    # Under torchrun this process is one of several; the new one must not try to join them.
    of_launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in of_launcher}
    command = [sys.executable, "-m", "peft_fast.finetune.verify", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(
            f"the adapter was written to {folder}, but reloading it in a fresh process failed (exit status "
            f"{done.returncode}); repeat that with `python -m peft_fast.finetune.verify {folder}`. Its output ended:\n"
            + done.stderr[-2000:].strip()
        )
    return json.loads(done.stdout.splitlines()[-1])["eval_loss"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m peft_fast.finetune.verify FOLDER")
    print(json.dumps({"eval_loss": heldout_loss(Path(sys.argv[1]))}))
