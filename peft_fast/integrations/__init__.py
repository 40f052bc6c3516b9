"""How peft_fast meets the libraries around it: peft itself, transformers, TRL, vLLM. None of them is imported here."""
