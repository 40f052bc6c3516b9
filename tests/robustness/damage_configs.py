"""Damage to adapter_config.json, and to what it says."""

from collections.abc import Iterator
from random import Random

from damage import CONFIG, EITHER, LOADS, REFUSED, Case, config, kind, raw


@kind
def expressions_without_end(rng: Random) -> Iterator[Case]:
    for pattern in ("(.*)*X", ".*.*.*.*.*.*.*.*.*X", r"(\w|\w\w|\.)+!"):
        yield pattern, REFUSED, config(target_modules=pattern)
    yield "exclude", REFUSED, config(exclude_modules="(.*)*X")
    yield "rank", REFUSED, config(rank_pattern={"(.*)*X": 4})
    yield "layers", REFUSED, config(layers_to_transform=[0], layers_pattern="(.*)*X")


@kind
def broken_expressions(rng: Random) -> Iterator[Case]:
    for pattern in (
        "(",
        "[",
        "*",
        "a{3,1}",
        r"\1",
        "(?P<a",
        "(?<=a*)b",
        "(" * 5000 + ")" * 5000,
        "a{99999999999999999999}",
    ):
        yield f"{pattern[:12]}", REFUSED, config(target_modules=pattern)
        yield f"rank {pattern[:12]}", REFUSED, config(rank_pattern={pattern: 4})


@kind
def cut_configs(rng: Random) -> Iterator[Case]:
    for share in sorted(rng.random() * 0.99 for _ in range(25)):
        change = raw(lambda content, share=share: content[: int(share * len(content))], CONFIG)
        yield f"{share:.3f}", REFUSED, change


@kind
def broken_configs(rng: Random) -> Iterator[Case]:
    texts = {
        "empty": b"", "list": b"[]", "number": b"3", "text": b'"x"', "null": b"null", "true": b"true", "{}": b"{}",
        "deep": b"[" * 100_000, "deep object": b'{"a":' * 100_000,
        "long number": b'{"peft_type":"LORA","r":' + b"9" * 9999,
        "comment": b'{"peft_type":"LORA" // x\n}', "single": b"{'peft_type':'LORA'}", "noise": Random(1).randbytes(300),
        "utf-16": '{"peft_type":"LORA"}'.encode("utf-16"), "bom": b'\xef\xbb\xbf{"peft_type":"LORA"}', "nul": bytes(20),
        "latin": b'{"peft_type":"L\xd6RA"}', "lfs": b"version https://git-lfs.github.com/spec/v1\n", "yaml": b"r: 8",
        "surrogate": b'{"peft_type":"\\ud800"}', "html": b"<html>", "nan": b'{"peft_type":"LORA","lora_alpha":NaN}',
        "infinity": b'{"peft_type":"LORA","lora_alpha":Infinity}', "twice": b'{"peft_type":"LORA","r":4,"r":0}',
    }  # fmt: skip
    for name, text in texts.items():
        yield name, REFUSED, raw(text, CONFIG)


@kind
def values_of_options(rng: Random) -> Iterator[Case]:
    from peft_fast import LoraConfig

    values = [3, -1, 0, 2.5, True, "x", "", [], ["x"], [[1]], [None], {}, {"x": 1}, {"x": "y"}, 1e300]
    for name in sorted(LoraConfig.option_names() - {"runtime_config"}):
        for value in rng.sample(values, 6):
            yield f"{name}={value!r}", EITHER, config(**{name: value})


@kind
def peft_types(rng: Random) -> Iterator[Case]:
    for value in (
        "IA3",
        "ADALORA",
        "PROMPT_TUNING",
        "lora",
        "LORA ",
        "",
        None,
        3,
        ["LORA"],
        {"LORA": 1},
        "../x",
        "__class__",
    ):
        yield f"{value!r}", REFUSED, config(peft_type=value)
    yield "none", REFUSED, lambda folder, marker: (folder / CONFIG).write_text('{"r": 4}')


@kind
def unknown_options(rng: Random) -> Iterator[Case]:
    for name in (
        "rnak",
        "__class__",
        "__init__",
        "self",
        "cls",
        "check",
        "to_dict",
        "../x",
        "",
        "peft_typ",
        "é",
        "x" * 9999,
    ):
        yield f"{name[:12]!r}", REFUSED, config(**{name: 1})
        newer = {name: 1, "peft_version": "0.99.0"}
        yield f"newer {name[:12]!r}", f"{LOADS}: does not know", config(**newer)
        yield f"off {name[:12]!r}", LOADS, config(**{name: None})


@kind
def targets_that_do_not_fit(rng: Random) -> Iterator[Case]:
    for value in (
        [],
        ["zzz"],
        [""],
        "zzz",
        "",
        ".*",
        ["model"],
        ["self_attn"],
        ["embed_tokens", "q_proj"],
        ["../q_proj"],
    ):
        yield f"{value!r}", REFUSED, config(target_modules=value)
    yield "fewer", REFUSED, config(target_modules=["q_proj"])
    yield "excluded", REFUSED, config(exclude_modules=["q_proj"])
    yield "other layers", REFUSED, config(layers_to_transform=[1])
    yield "no layers", REFUSED, config(layers_to_transform=[99])
    for value in (["q_proj", "v_proj", "k_proj"], "all-linear"):
        yield f"more {value!r}", f"{LOADS}: the file lacks weights", config(target_modules=value)
    for value in ([""], ["zzz"], ["layers"], ["q_proj"], ["model"], "lm_head", [".."]):
        yield f"saved {value!r}", REFUSED, config(modules_to_save=value)
    yield "saved more", f"{LOADS}: the file lacks weights", config(modules_to_save=["lm_head"])


@kind
def another_size(rng: Random) -> Iterator[Case]:
    for rank in (1, 2, 3, 5, 8, 64):
        yield f"r={rank}", REFUSED, config(r=rank)
    for rank in (0, -1, 2.5, "4", None, True, [4]):
        yield f"r={rank!r}", REFUSED, config(r=rank)
    yield "pattern", REFUSED, config(rank_pattern={"q_proj": 2})
    yield "bias", REFUSED, config(lora_bias=3)
    yield "with bias", f"{LOADS}: the file lacks weights", config(lora_bias=True)


@kind
def names_of_base_models(rng: Random) -> Iterator[Case]:
    """Nothing is looked up when an adapter is put into a model that is there."""
    for name in ("../../etc", "/", "http://127.0.0.1:9/x", "a\nb: c", "x" * 9999, "~", "$(touch x)", "a/b/c/d", "\0"):
        yield f"{name[:12]!r}", LOADS, config(base_model_name_or_path=name)
    yield "library", LOADS, config(task_type=None, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    yield "mapping", REFUSED, config(auto_mapping="os.system")


@kind
def other_tasks(rng: Random) -> Iterator[Case]:
    for value in ("CHAT", "", "causal_lm", 3, ["CAUSAL_LM"], {"a": 1}, "../x"):
        yield f"{value!r}", REFUSED, config(task_type=value)
    for value in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        yield value, LOADS, config(task_type=value)  # a head that the model lacks is not trained
    yield "none", LOADS, config(task_type=None)
