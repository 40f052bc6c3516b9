"""python -m peft_fast.finetune: the whole command on a tiny model, and each of its parts."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast.finetune import base_model, embedded, memory, report, run
from peft_fast.finetune.options import Options, UserError, build_parser, parse
from peft_fast.finetune.trainer import make_trainer

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = {
    "adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random Llama of 0.1 million parameters with the byte-level tokenizer, as any model directory."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    embedded.byte_tokenizer(1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} plus one is ", "completion": f"{i + 1}, of course."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(model_folder, data_file, tmp_path) -> list[str]:
    """A run of a second, to be followed by what a test changes."""
    return [
        "--model", str(model_folder), "--data", str(data_file), "--output", str(tmp_path / "run"), "--rank", "4",
        "--steps", "4", "--batch-size", "4", "--sequence-length", "32", "--learning-rate", "1e-2",
        "--sample-tokens", "0", "--save-every", "0",
    ]  # fmt: skip


def finished(arguments: list[str]) -> dict:
    """metrics.json of a run in this process, which must succeed."""
    assert run.main(arguments) == 0
    return json.loads((Path(parse_output(arguments)) / "metrics.json").read_text())


def parse_output(arguments: list[str]) -> str:
    return build_parser().parse_args(arguments).output


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_command(model_folder, data_file, tmp_path):
    """The real entry point, in a process of its own, where any attempt to reach a hub fails."""
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "peft_fast.finetune", "--model", str(model_folder), "--data", str(data_file),
        "--output", str(output), "--steps", "8", "--batch-size", "4", "--sequence-length", "32", "--rank", "4",
        "--learning-rate", "1e-2", "--eval-every", "4", "--save-every", "4", "--sample-tokens", "8", "--mask-prompt",
        "--verify",
    ]  # fmt: skip
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    metrics = json.loads((output / "metrics.json").read_text())
    losses = metrics["heldout_loss"]
    assert losses["after"] < losses["before"] - 0.05
    assert losses["adapter_disabled"] == losses["before"]
    assert losses["reloaded"] == losses["after"]
    assert [step for step, _ in metrics["train_losses"]] == list(range(1, 9))
    assert [step for step, _ in metrics["heldout_losses"]] == [0, 4, 8]
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_mib"] > 100
    assert set(metrics["options"]) == {field.name for field in fields(Options)}

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("adapter_model.safetensors", "loss.png", "metrics.json"):
        assert f"{output / name}" in done.stdout
    for shown in (
        "q_proj",
        "trainable parameters: 8,192 of",
        "memory (estimate)",
        "there is",
        "held-out loss",
        "tokens/s",
    ):
        assert shown in done.stdout
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        assert {path.name for path in (output / checkpoint).iterdir()} == CHECKPOINT


def test_resuming_continues_exactly(arguments, tmp_path):
    """Six steps, or three and then three more from the checkpoint: the same losses, the same adapter, bit for bit."""
    changed = ["--steps", "6", "--save-every", "3", "--dropout", "0.2"]
    through = finished([*arguments, *changed])
    second = tmp_path / "second"
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed = finished([*arguments, *changed, "--output", str(second), "--resume", checkpoint])

    assert resumed["train_losses"] == through["train_losses"]
    assert resumed["heldout_loss"] == through["heldout_loss"]
    expected = adapter(tmp_path / "run")
    for name, weight in adapter(second).items():
        assert torch.equal(weight, expected[name]), name


def test_resume_alone_takes_the_newest_checkpoint(arguments, tmp_path):
    finished([*arguments, "--save-every", "2"])
    resumed = finished([*arguments, "--save-every", "2", "--steps", "6", "--resume"])
    assert [step for step, _ in resumed["train_losses"]] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "checkpoint-2").exists()  # the newest two are kept


def test_resuming_another_adapter_is_refused_before_anything_is_loaded(arguments, capsys):
    finished([*arguments, "--save-every", "4", "--target-modules", "q_proj", "--alpha", "64"])
    for changed, message in (
        (["q_proj,v_proj", "--alpha", "64"], "pass --target-modules q_proj (now --target-modules q_proj,v_proj)"),
        (["q_proj", "--rank", "8", "--alpha", "64"], "pass --rank 4 (now --rank 8)"),
        (["q_proj", "--alpha", "16"], "pass --alpha 64 (now --alpha 16)"),
        (["q_proj"], "pass --alpha 64 (now --alpha 8)"),
        (["v_proj"], "pass --alpha 64 --target-modules q_proj (now"),
    ):
        with pytest.raises(SystemExit) as exited:
            parse([*arguments, "--resume", "--target-modules", *changed])
        assert exited.value.code == 2
        assert message in capsys.readouterr().err
    # Which layers all-linear means is known only once the model is there.
    assert run.main([*arguments, "--resume", "--alpha", "64"]) == 1
    assert "--target-modules" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"rank": 8}, {"alpha": 64}], ids=["rank", "alpha"])
def test_what_the_model_refuses_to_load_ends_with_a_message(arguments, model_folder, tmp_path, changed):
    """Past the options' check, as when a script drives the trainer: the model compares the adapters again."""
    finished([*arguments, "--save-every", "4"])
    options = replace(parse([*arguments, "--resume"]), bits=16, **changed)
    model = base_model.add_adapter(base_model.load_base(options), options)
    corpus = run.data.load(options, base_model.load_tokenizer(str(model_folder)))
    trainer, _ = make_trainer(model, corpus, options, 256)
    with pytest.raises(UserError, match="cannot resume from .*checkpoint-4"):
        trainer._load_from_checkpoint(str(options.checkpoint))


def test_the_newest_checkpoint_has_the_highest_step(arguments, tmp_path, capsys):
    for step in (20, 100, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-old").mkdir()
    for content, message in ((None, "checkpoint-100 is not a checkpoint of this command"), ("{", "is damaged")):
        if content:
            (tmp_path / "run" / "checkpoint-100" / "adapter_config.json").write_text(content)
        with pytest.raises(SystemExit):
            parse([*arguments, "--resume"])
        assert message in capsys.readouterr().err


def test_a_subset_of_the_layers_learns_on_a_cpu(arguments, tmp_path):
    """bitsandbytes' own forward, which the other layers would run, repacks weights in eval mode and loses gradients."""
    metrics = finished([*arguments, "--target-modules", "q_proj,v_proj", "--steps", "8"])
    names = adapter(tmp_path / "run")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
    assert all(weight.abs().max() > 0 for weight in names.values())
    assert metrics["heldout_loss"]["after"] < metrics["heldout_loss"]["before"]
    assert metrics["heldout_loss"]["adapter_disabled"] == metrics["heldout_loss"]["before"]


def test_gradient_checkpointing_changes_memory_and_nothing_else(arguments, tmp_path):
    plain = finished(arguments)
    checkpointed = finished([*arguments, "--gradient-checkpointing", "--output", str(tmp_path / "other")])
    assert checkpointed["train_losses"] == plain["train_losses"]
    estimates = [metrics["memory_estimate_bytes"]["activations"] for metrics in (checkpointed, plain)]
    assert estimates[0] < estimates[1]


def test_accumulation_equals_a_larger_batch(arguments, tmp_path):
    whole = finished(arguments)
    parts = [*arguments, "--batch-size", "2", "--gradient-accumulation", "2", "--output", str(tmp_path / "parts")]
    for (_, a), (_, b) in zip(whole["train_losses"], finished(parts)["train_losses"]):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(["--bits", "16"], id="16-bit"),
        pytest.param(["--precision", "bf16"], id="bf16"),
        pytest.param(["--packing"], id="packing"),
        pytest.param(["--optimizer", "adafactor"], id="adafactor"),
        pytest.param(["--warmup", "2", "--alpha", "4", "--seed", "3", "--backend", "torch"], id="the-rest"),
    ],
)
def test_options_reach_the_training(arguments, tmp_path, changed):
    plain = finished(arguments)
    metrics = finished([*arguments, *changed, "--output", str(tmp_path / "other")])
    assert metrics["train_losses"] != plain["train_losses"]
    assert metrics["heldout_loss"]["after"] < metrics["heldout_loss"]["before"]
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, metrics["options"]["alpha"])


def test_epochs(arguments):
    """38 rows of 40 are trained on, 4 a step: 10 steps make an epoch."""
    at = arguments.index("--steps")
    metrics = finished([*arguments[:at], *arguments[at + 2 :], "--epochs", "0.5"])
    assert len(metrics["train_losses"]) == 5


def test_refused_before_anything_is_loaded(arguments, capsys):
    refused = {
        ("--rank", "0"): "--rank must be at least 1, got 0",
        ("--dropout", "1.0"): "--dropout is a probability below 1",
        ("--precision", "fp16"): "needs a GPU",
        ("--optimizer", "paged_adamw_8bit"): "needs a GPU",
        ("--backend", "triton"): "needs a GPU",
        ("--epochs", "2"): "not allowed with argument",
        ("--learning-rate", "-1"): "--learning-rate must be above 0",
        ("--eval-fraction", "1"): "--eval-fraction must lie between 0 and 1",
        ("--target-modules", ","): "names no layer",
        ("--data", "missing.txt"): "does not exist",
        ("--data", str(ROOT / "README.md")): "end in .txt or .jsonl",
        ("--resume",): "found no checkpoint",
        ("--resume", "/nowhere"): "is not a checkpoint",
        ("--eval", "x"): "unrecognized arguments",
    }
    for changed, message in refused.items():
        with pytest.raises(SystemExit) as exited:
            parse([*arguments, *changed])
        assert exited.value.code == 2
        assert message in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(arguments, capsys):
    (Path(parse_output(arguments)) / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "continue it with --resume" in capsys.readouterr().err


def test_masking_prompts_of_plain_text_is_refused(arguments, tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("plain")
    for given, message in (([], "the default data holds plain text"), ([*arguments, "--data", str(text)], str(text))):
        with pytest.raises(SystemExit):
            parse([*given, "--mask-prompt"])
        assert message in capsys.readouterr().err


def test_model_and_data_belong_together(data_file, capsys):
    with pytest.raises(SystemExit):
        parse(["--data", str(data_file)])
    assert "--data needs --model" in capsys.readouterr().err


def test_options_survive_json(arguments):
    options = parse([*arguments, "--target-modules", "q_proj,v_proj"])
    assert Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert options.target_modules == ("q_proj", "v_proj")
    assert options.alpha == 8


def test_what_the_user_can_change_ends_with_a_message(arguments, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"texts": 1}\n')
    for changed, message in (
        (["--data", str(bad)], f"{bad}:2: `text` must be a string"),
        (["--model", str(tmp_path)], "has no tokenizer"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
    ):
        assert run.main([*arguments, *changed]) == 1
        assert message in capsys.readouterr().err


def test_memory_estimate(arguments, model_folder):
    options = parse(arguments)
    base = base_model.load_base(options)
    model = base_model.add_adapter(base, options)
    estimate = memory.estimate(model, options, 32)
    trainable, _ = model.get_nb_trainable_parameters()
    assert estimate.adapter == estimate.gradients == 4 * trainable
    assert estimate.optimizer_states == 8 * trainable
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # q and o, k and v, the MLP; two layers
    rest = 4 * (257 * 64 + 5 * 64)  # embedding and norms in fp32
    codes = 14 * 4 * (256 + 16)  # the codebooks of each of the 14 layers
    assert estimate.base_weights == pytest.approx(0.516 * linear + rest + codes, rel=0.01)
    twice = memory.estimate(model, replace(options, batch_size=8), 32)
    assert twice.activations == 2 * estimate.activations
    assert 2**28 < estimate.available < 2**50


def test_the_measured_activations_are_what_backward_keeps():
    """One linear layer and a tanh: x for the adapter, its product with A, and tanh's output."""

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(64, 4)), torch.nn.Parameter(torch.randn(4, 64))

        def forward(self, input_ids, labels):
            x = torch.ones(input_ids.shape[1], 64)
            return type("Output", (), {"loss": (x @ self.a @ self.b).tanh().sum()})

    assert memory.kept_for_backward(Model(), 16, torch.float32) == 4 * 16 * (64 + 4 + 64)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
def test_running_out_of_memory_gives_advice(arguments, error):
    options = replace(parse(arguments), bits=16, sequence_length=512)
    estimate = memory.Estimate(800 * 2**20, 1, 1, 1, 400 * 2**20, 0, available=2**20)
    with pytest.raises(memory.OutOfMemory) as raised, memory.advice_when_exhausted(options, estimate):
        raise error
    lines = str(raised.value).splitlines()
    assert lines[2] == "  --bits 4: about 560 MiB less"
    assert any("--batch-size 2 --gradient-accumulation 2 (the same training): about 200 MiB" in line for line in lines)
    assert any("--gradient-checkpointing" in line for line in lines)


def test_only_running_out_of_memory_is_taken_for_it(arguments):
    options = parse(arguments)
    with pytest.raises(memory.OutOfMemory), memory.advice_when_exhausted(options):
        torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator's own error
    with pytest.raises(RuntimeError, match="size of tensor"), memory.advice_when_exhausted(options):
        torch.ones(2) + torch.ones(3)


def test_out_of_memory_ends_the_command_without_a_traceback(arguments, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model, "load_base", exhausted)
    assert run.main(arguments) == 1
    assert "to need less, in this order:" in capsys.readouterr().err


def test_packing_is_refused_where_documents_would_see_each_other(arguments, model_folder):
    options = replace(parse(arguments), bits=16, packing=True)
    model = base_model.add_adapter(base_model.load_base(options), options)
    corpus = run.data.load(options, base_model.load_tokenizer(str(model_folder)))
    trainer, _ = make_trainer(model, corpus, options, 256)
    base_model.refuse_leaky_packing(model, trainer.data_collator)

    def without_positions(rows):
        batch = trainer.data_collator(rows)
        del batch["position_ids"]
        return batch

    with pytest.raises(UserError, match="leave out --packing"):
        base_model.refuse_leaky_packing(model, without_positions)


def test_a_check_that_fails_ends_the_run():
    run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.0, "reloaded": 1.00001})
    with pytest.raises(run.CheckFailed, match=r"adapter disabled is 2\.1"):
        run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.1})
    with pytest.raises(run.CheckFailed, match="adapter reloaded is nan"):
        run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.0, "reloaded": float("nan")})


def test_a_verification_that_breaks_ends_with_the_summary_and_a_message(arguments, tmp_path, monkeypatch, capsys):
    """The reload fails in its own process (the data is gone by then): what was trained is still shown and found."""
    gone = tmp_path / "gone.jsonl"
    gone.write_text(Path(arguments[3]).read_text())
    figure = report.loss_figure

    def lose_the_data(*args):
        gone.unlink()
        figure(*args)

    monkeypatch.setattr(report, "loss_figure", lose_the_data)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run.main([*arguments, "--data", str(gone), "--verify"]) == 1
    shown = capsys.readouterr()
    assert f"{tmp_path / 'run' / 'adapter_model.safetensors'}" in shown.out
    assert "adapter disabled (must equal before)" in shown.out
    assert "reloading it in a fresh process failed" in shown.err
    assert "gone.jsonl" in shown.err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["heldout_loss"]["after"] > 0


def test_memory_that_runs_out_in_the_check_of_packing_gives_advice(arguments, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model, "refuse_leaky_packing", exhausted)
    assert run.main([*arguments, "--packing"]) == 1
    assert "to need less, in this order:" in capsys.readouterr().err


def test_metrics_are_strict_json(arguments, tmp_path):
    report.write_metrics(tmp_path / "metrics.json", parse(arguments), {"a": float("nan"), "b": [(1, float("inf"))]})
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert (document["a"], document["b"]) == (None, [[1, None]])


def test_the_base_is_prepared_once_and_in_one_piece(tmp_path, monkeypatch):
    """A tiny recipe of the default model: cached, loadable with transformers' Auto classes, and of the right data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = embedded.Recipe(hidden_size=64, intermediate_size=128, layers=1, heads=2, steps=2, rows=1, context=32)
    made = embedded.prepare(recipe, show_progress=False)
    assert {path.name for path in (tmp_path / "peft_fast").iterdir()} == {Path(made.model).parent.name}
    tokenizer = base_model.load_tokenizer(made.model)
    text = "déjà vu\t\0\r\n" + "".join(map(chr, range(256)))
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert AutoModelForCausalLM.from_pretrained(made.model, local_files_only=True).config.num_hidden_layers == 1

    sources = {path.read_text(errors="replace") for path in embedded.standard_library()}
    train, heldout = (
        {json.loads(line)["text"] for line in Path(path).read_text().splitlines()}
        for path in (made.data, made.eval_data)
    )
    assert train
    assert heldout
    assert not train & heldout
    assert train | heldout <= sources

    monkeypatch.setattr(embedded, "train_base", pytest.fail)
    assert embedded.prepare(recipe, show_progress=False) == made


def test_no_paragraph_of_a_heldout_file_is_in_the_prose():
    """Files share docstrings: without care, 4 of the 402 paragraphs of held-out files are (Python 3.11)."""
    recipe = embedded.Recipe()
    paragraphs, _, _ = embedded.collect(recipe)
    files = embedded.standard_library()[:: recipe.heldout_every]
    heldout = {line for path in files for line in embedded.prose(path.read_text(encoding="utf-8", errors="replace"))}
    assert len(heldout) > 100
    assert len(paragraphs) > 1000
    assert heldout.isdisjoint(paragraphs)


def test_prose_is_prose():
    source = '''
def f():
    """Return the sum of all the numbers in the list, ignoring whatever is not a number at all.

    >>> f([1, 2])  # this example of the use of the function is long enough but it is code: 3 == 3
    """
'''
    assert list(embedded.prose(source)) == [
        "Return the sum of all the numbers in the list, ignoring whatever is not a number at all."
    ]


def test_peft_and_bitsandbytes_reach_the_same_loss(arguments):
    from bench import finetune_parity

    options = parse([*arguments, "--steps", "20"])
    result = finetune_parity.compare(options)
    assert result["peft_fast"]["after"] < result["peft_fast"]["before"] - 0.3
    assert result["relative_difference_after"] < 1e-5
    assert result["largest_difference_of_a_step"] < 1e-5


def test_parity_refuses_what_would_make_it_unfair(arguments):
    from bench import finetune_parity

    with pytest.raises(ValueError, match="--dropout"):
        finetune_parity.compare(parse([*arguments, "--dropout", "0.1"]))


@pytest.mark.slow
def test_the_default_run(tmp_path):
    """No options, no network, nothing cached: under five minutes on two cores, and the loss falls clearly."""
    environment = {
        **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path),
        "OMP_WAIT_POLICY": "passive",  # threads that spin at barriers make a shared machine five times slower
    }  # fmt: skip
    command = [sys.executable, "-m", "peft_fast.finetune", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "run" / "metrics.json").read_text())["heldout_loss"]
    assert losses["after"] < 0.9 * losses["before"]
    assert losses["adapter_disabled"] == losses["before"]
    assert losses["reloaded"] == losses["after"]


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path):
    """torchrun with gloo, two rows each, against one process with four: one adapter is written, and it is the same."""
    alone = finished(arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changed = ["--batch-size", "2", "--output", str(tmp_path / "two"), "--save-every", "2", "--verify"]
    done = subprocess.run(
        [*torchrun, "-m", "peft_fast.finetune", *arguments, *changed],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("memory (estimate)") == 1
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["heldout_loss"]["reloaded"] == pytest.approx(together["heldout_loss"]["after"], rel=1e-6)
    assert together["heldout_loss"]["after"] == pytest.approx(alone["heldout_loss"]["after"], rel=1e-3)


def test_the_adapter_written_loads_as_any_other(arguments, model_folder, tmp_path):
    finished([*arguments, "--bits", "16"])
    base = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True)
    model = peft_fast.PeftModel.from_pretrained(base, str(tmp_path / "run"))
    for name, weight in peft_fast.get_peft_model_state_dict(model).items():
        assert torch.equal(weight, adapter(tmp_path / "run")[name])
