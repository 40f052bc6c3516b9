"""Several independent training jobs over one frozen base model, in shared batches.

    from peft_fast import Job, JobTrainer, LoraConfig

    trainer = JobTrainer(model)  # a causal language model of transformers, dense or k-bit
    trainer.add(Job("law", LoraConfig(r=16, lora_dropout=0.05), law_rows, "out/law", learning_rate=1e-4, epochs=3))
    trainer.add(Job("code", LoraConfig(r=64, lora_alpha=128), code_rows, "out/code", max_steps=500, seed=7))
    results = trainer.train(plot="losses.png")

Each job ends as it would have ended alone: its weights' start, the order of its data and its dropout come from its own
seed, and its gradients are those of its own batch, up to rounding. What the jobs share is the base model and one
forward and backward a step. job.py: what a job is; data.py: its batches; shared.py: the shared forward and backward;
running.py: a job under way; checkpoint.py: its state in a file; report.py: bars, table, picture.
"""

from .job import Job, JobResult
from .trainer import JobTrainer

__all__ = ["Job", "JobResult", "JobTrainer"]
