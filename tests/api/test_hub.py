"""The Hub: a stand-in answers huggingface_hub's own HTTP requests, so that all of its code and ours runs."""

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

from peft_fast import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights

http: Any = getattr(_http, "httpx2", None) or _http.httpx  # by the version of huggingface_hub
TOKEN = "hf_stand_in"


class Hub:
    """Repositories as dicts {(repository, revision): {path: bytes}}; every request is kept."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[Any] = []
        self.messages: list[str] = []

    def __call__(self, request: Any) -> Any:
        request.read()
        self.requests.append(request)
        parts = [part for part in request.url.path.split("/") if part]
        if "resolve" in parts:
            at = parts.index("resolve")
            return self.resolve(request, "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        if parts[:3] == ["api", "repos", "create"]:
            name = request_json(request)
            repo = f"{name.get('organization') or 'user'}/{name['name']}"
            self.files.setdefault((repo, "main"), {})
            return http.Response(200, json={"url": f"https://huggingface.co/{repo}", "id": repo, "name": repo})
        if parts[-1] == "validate-yaml":
            return http.Response(200, json={"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if "branch" in parts:
            self.files.setdefault((repo, parts[-1]), dict(self.files[repo, "main"]))
            return http.Response(200, json={})
        if "preupload" in parts:
            return http.Response(200, json={"files": [self.mode(file) for file in request_json(request)["files"]]})
        if "commit" in parts:
            return self.commit(request, repo, parts[-1])
        return http.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)

    def resolve(self, request: Any, repo: str, revision: str, path: str) -> Any:
        if not any(known == repo for known, _ in self.files):
            return http.Response(401, headers={"X-Error-Code": "RepoNotFound"}, request=request)
        if (repo, revision) not in self.files:
            return http.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
        content = self.files[repo, revision].get(path)
        commit = hashlib.sha1(revision.encode()).hexdigest()
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return http.Response(404, headers=headers, request=request)
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
            "Content-Length": str(len(content)),
        }  # fmt: skip
        return http.Response(200, headers=headers, content=b"" if request.method == "HEAD" else content)

    @staticmethod
    def mode(file: dict) -> dict:
        return {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}

    def commit(self, request: Any, repo: str, revision: str) -> Any:
        files = self.files[repo, revision]
        for line in map(json.loads, request.content.decode().splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                raise AssertionError(line)
        oid = hashlib.sha1(request.content).hexdigest()
        url = f"https://huggingface.co/{repo}/commit/{oid}"
        return http.Response(200, json={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def request_json(request: Any) -> Any:
    return json.loads(request.content)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    stand_in = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hooks = {"request": [_http.hf_request_event_hook]}  # as huggingface_hub's own client has it: it knows of offline
    huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(stand_in), event_hooks=hooks))
    yield stand_in
    huggingface_hub.set_client_factory(_http.default_client_factory)


@pytest.fixture
def adapter(llama, trained):
    base = llama()
    base.name_or_path = "user/base"
    return trained(get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))).eval()


def headers_of(hub, path):
    return [request.headers for request in hub.requests if request.url.path.endswith(path)]


def test_what_is_pushed_comes_back(hub, adapter, llama, tokens):
    adapter.push_to_hub("user/adapter", token=TOKEN, commit_message="Trained", private=True)
    files = hub.files["user/adapter", "main"]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.messages == ["Trained"]
    about_it = [request for request in hub.requests if "user/adapter" in request.url.path]
    assert about_it
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in about_it)
    create = next(request for request in hub.requests if request.url.path.endswith("create"))
    asked = request_json(create)  # hubs before 2.0 say private=True
    assert asked.get("private") is True or asked.get("visibility") == "private"
    read = PeftModel.from_pretrained(llama(), "user/adapter", token=TOKEN)
    assert torch.equal(read(tokens).logits, adapter(tokens).logits)


def test_the_card_that_is_pushed_is_ours_and_keeps_what_the_hub_had(hub, adapter):
    """transformers' mixin writes its own card over the one that save_pretrained made."""
    hub.files["user/adapter", "main"] = {"README.md": b"---\nlicense: mit\n---\n\nWritten on the Hub.\n"}
    adapter.push_to_hub("user/adapter", tags=["mine"])
    text = hub.files["user/adapter", "main"]["README.md"].decode()
    for part in (
        "license: mit",
        "Written on the Hub.",
        "library_name: peft",
        "base_model: user/base",
        "- lora",
        "- mine",
    ):
        assert part in text


def test_every_adapter_is_pushed_and_subfolder_and_revision_find_them(hub, adapter, llama, trained, tokens):
    adapter.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    trained(adapter, seed=8)
    adapter.push_to_hub("user/adapter", revision="draft")
    assert "other/adapter_model.safetensors" in hub.files["user/adapter", "draft"]
    assert hub.files["user/adapter", "main"] == {}
    adapter.set_adapter("other")
    where = {"revision": "draft", "subfolder": "other", "token": TOKEN}
    assert PeftConfig.from_pretrained("user/adapter", **where).r == 2
    read = PeftModel.from_pretrained(llama(), "user/adapter", **where)
    assert torch.equal(read(tokens).logits, adapter(tokens).logits)
    read.load_adapter("user/adapter", "first", revision="draft")
    read.set_adapter("first")
    adapter.set_adapter("default")
    assert torch.equal(read(tokens).logits, adapter(tokens).logits)
    assert load_peft_weights("user/adapter", **where).keys()


def test_an_old_bin_is_asked_for_after_the_safetensors(hub, adapter, llama, tokens, tmp_path):
    adapter.save_pretrained(tmp_path / "bin", safe_serialization=False)
    hub.files["user/old", "main"] = {path.name: path.read_bytes() for path in (tmp_path / "bin").iterdir()}
    read = PeftModel.from_pretrained(llama(), "user/old")
    assert torch.equal(read(tokens).logits, adapter(tokens).logits)
    with pytest.warns(FutureWarning, match="use_auth_token is called token now"):
        load_peft_weights("user/old", use_auth_token=TOKEN)
    assert headers_of(hub, "adapter_model.bin")[-1]["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("how", ["offline", "local_files_only"])
@pytest.mark.parametrize("safe", [True, False])
def test_what_was_downloaded_is_found_without_the_hub(hub, adapter, llama, tokens, tmp_path, monkeypatch, safe, how):
    adapter.save_pretrained(tmp_path / "files", safe_serialization=safe)
    hub.files["user/adapter", "main"] = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    PeftModel.from_pretrained(llama(), "user/adapter")
    hub.requests.clear()
    where = {"local_files_only": True} if how == "local_files_only" else {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    read = PeftModel.from_pretrained(llama(), "user/adapter", **where)
    assert torch.equal(read(tokens).logits, adapter(tokens).logits)
    assert not [request for request in hub.requests if "user/adapter" in request.url.path]
    base = llama()
    with pytest.raises(ValueError, match="neither a directory nor an adapter on the Hub that can be reached"):
        PeftModel.from_pretrained(base, "user/never_seen", **where)


@pytest.mark.parametrize(
    ("repo", "where", "message"),
    [
        ("user/nothing", {}, "neither a directory nor an adapter on the Hub"),
        ("user/empty", {}, "Can't find 'adapter_config.json' at 'user/empty'"),
        ("user/empty", {"revision": "gone"}, "neither a directory nor an adapter on the Hub"),
        ("user/torn", {}, "Can't find 'adapter_model.safetensors'"),
        ("not a name", {}, "neither a directory nor an adapter on the Hub"),
    ],
)
def test_what_is_not_there(hub, llama, untouched, repo, where, message):
    hub.files["user/empty", "main"] = {}
    hub.files["user/torn", "main"] = {"adapter_config.json": LoraConfig().to_json().encode()}
    base = llama()
    with untouched(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, repo, **where)


def test_auto_finds_the_base_model_on_the_hub(hub, adapter, llama, tokens, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    hub.files["user/base", "main"] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    adapter.push_to_hub("user/adapter")
    read = AutoPeftModelForCausalLM.from_pretrained("user/adapter", token=TOKEN)
    torch.testing.assert_close(read(tokens).logits, adapter(tokens).logits)


def test_a_config_can_be_pushed_alone(hub):
    LoraConfig(r=3).push_to_hub("user/config")
    assert json.loads(hub.files["user/config", "main"]["adapter_config.json"])["r"] == 3
