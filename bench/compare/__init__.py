"""`make compare`: the same QLoRA training step by HF PEFT + bitsandbytes, by Unsloth and by peft_fast, side by side.

options.py: what is compared; models.py: the base model; worker.py: one library in a process of its own; report.py:
table, CSV and picture; __main__.py puts them together.
"""
