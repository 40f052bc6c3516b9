"""AutoPeftModel and its classes: the base model from what the adapter's config names."""

import json

import peft
import pytest
import torch
import transformers

import peft_fast

from .test_tasks import CLASSES, TASKS, base, flags, make


class TestAuto:
    @pytest.fixture(params=TASKS)
    def adapter(self, request, tmp_path, trained):
        base(request.param).save_pretrained(tmp_path / "base")
        name = CLASSES[request.param][1]
        model = getattr(transformers, name).from_pretrained(tmp_path / "base")
        model = trained(make(peft_fast, request.param, model)).eval()
        model.save_pretrained(tmp_path / "adapter")
        return request.param, model, tmp_path / "adapter"

    def test_every_class_loads_its_task(self, adapter, inputs):
        task, model, folder = adapter
        auto = f"Auto{CLASSES[task][0]}"
        found = getattr(peft_fast, auto).from_pretrained(folder)
        theirs = getattr(peft, auto).from_pretrained(folder)
        assert type(found).__name__ == type(theirs).__name__ == CLASSES[task][0]
        for other in (found, theirs):
            torch.testing.assert_close(
                other(**inputs(task)).to_tuple()[0], model(**inputs(task)).to_tuple()[0], rtol=1e-4, atol=1e-6
            )
        assert not any(flags(found).values())
        other = getattr(peft_fast, auto).from_pretrained(
            folder, adapter_name="mine", is_trainable=True, dtype=torch.bfloat16, autocast_adapter_dtype=False,
            low_cpu_mem_usage=True, torch_device="cpu",
        )  # fmt: skip
        assert other.dtype == torch.bfloat16
        assert other.active_adapters == ["mine"]
        assert any(flags(other).values())
        assert not any(parameter.is_meta for parameter in other.parameters())

    def test_another_task_is_refused(self, adapter):
        task, _, folder = adapter
        wrong = peft_fast.AutoPeftModelForTokenClassification
        if task == "TOKEN_CLS":
            wrong = peft_fast.AutoPeftModelForCausalLM
        for auto in (wrong, peft_fast.AutoPeftModel):
            with pytest.raises(ValueError, match=f"cannot load an adapter for {task}: use Auto{CLASSES[task][0]}"):
                auto.from_pretrained(folder)

    @pytest.fixture
    def without_task(self, tmp_path, trained):
        base("CAUSAL_LM").save_pretrained(tmp_path / "base")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model = trained(make(peft_fast, None, model)).eval()
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    def change(self, folder, **values):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def test_a_config_that_names_the_class(self, without_task, tokens):
        model, folder = without_task
        for library in (peft_fast, peft):
            found = library.AutoPeftModel.from_pretrained(folder)
            assert type(found) is library.PeftModel
            torch.testing.assert_close(found(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-6)

    def test_nothing_is_imported_that_is_not_allowed(self, without_task, tmp_path, monkeypatch):
        _, folder = without_task
        (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        for library in ("evil_module", "transformersevil", "", None, ["os"]):
            self.change(folder, auto_mapping={"parent_library": library, "base_model_class": "Model"})
            with pytest.raises(ValueError, match="not in the import allowlist"):
                peft_fast.AutoPeftModel.from_pretrained(folder)
        self.change(folder, auto_mapping={"parent_library": "transformers", "base_model_class": "set_seed"})
        with pytest.raises(ValueError, match="has no model class 'set_seed'"):
            peft_fast.AutoPeftModel.from_pretrained(folder)
        mapping = {"parent_library": "mine_module", "base_model_class": "Mine"}
        (tmp_path / "mine_module.py").write_text("from transformers import LlamaForCausalLM as Mine")
        self.change(folder, auto_mapping=mapping)
        found = peft_fast.AutoPeftModel.from_pretrained(folder, import_allowlist=["mine_module"])
        assert type(found.get_base_model()) is transformers.LlamaForCausalLM
        with pytest.raises(TypeError, match="import_allowlist must be a list"):
            peft_fast.AutoPeftModel.from_pretrained(folder, import_allowlist="mine_module")

    def test_what_cannot_be_known(self, without_task):
        _, folder = without_task
        self.change(folder, auto_mapping=None)
        with pytest.raises(ValueError, match="neither task_type nor auto_mapping"):
            peft_fast.AutoPeftModel.from_pretrained(folder)
        self.change(folder, task_type="CAUSAL_LM", base_model_name_or_path=None)
        with pytest.raises(ValueError, match="does not name its base model"):
            peft_fast.AutoPeftModelForCausalLM.from_pretrained(folder)
        with pytest.raises(OSError, match="call AutoPeftModel.from_pretrained"):
            peft_fast.AutoPeftModel()

    def test_a_tokenizer_with_more_tokens(self, without_task, tokens):
        model, folder = without_task
        self.change(folder, task_type="CAUSAL_LM")
        words = {f"w{i}": i for i in range(96)}
        slow = tokenizers_of(words)
        slow.save_pretrained(folder)
        kept = peft_fast.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert kept.get_input_embeddings().weight.shape[0] == 96
        slow.add_tokens(["new1", "new2"])
        slow.save_pretrained(folder)
        for library in (peft_fast, peft):
            found = library.AutoPeftModelForCausalLM.from_pretrained(folder)
            assert found.get_input_embeddings().weight.shape[0] == 98
            torch.testing.assert_close(found(tokens).logits[..., :96], model(tokens).logits, rtol=1e-4, atol=1e-6)


def tokenizers_of(words):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0")
