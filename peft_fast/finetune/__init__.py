"""The main job: train a LoRA or QLoRA adapter and show that it worked. `python -m peft_fast.finetune --help`.

options.py      what can be asked for, and which combinations are refused before anything heavy runs
data.py         .txt and .jsonl records -> token lists, prompt masking, packing, the held-out split
base_model.py   loading the base model in 4, 8 or 16 bits
embedded.py     the default without --model and --data: a small Llama trained here, on the standard library's prose
trainer.py      transformers' Trainer, checkpointing the adapter alone, and the progress bar
memory.py       the memory that training needs beside the memory there is, and advice when it runs out
report.py       samples, loss.png, metrics.json
verify.py       a fresh process reloads the written adapter and measures the held-out loss again
run.py          the sequence of all that
"""

import logging

# At every import bitsandbytes warns of an optional package that only its own CPU inference would use. Said here, since
# transformers imports it while our modules are being imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
