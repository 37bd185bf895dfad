"""The hub route, against a small server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from pllm_helpers.corpora import DATASETS, load_dialogues
from pllm_helpers.corpora.hub import HUB
from pllm_helpers.runtime import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(tmp_path, rows) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table")
    return (tmp_path / "table").read_bytes()


@pytest.fixture
def files(tmp_path):
    """Per repository and revision: the files, in the layout that the real one has, and what should come out."""
    utterance = {"context": "proud", "prompt": "I won_comma_ finally.", "selfeval": "", "tags": ""}
    story = [
        {"conv_id": "hit:0_conv:1", "utterance_idx": i, "speaker_idx": i % 2, "utterance": said, **utterance}
        for i, said in ((1, "I won_comma_ finally."), (2, "Well done."))
    ]
    orca = [{"id": "cot.1", "system_prompt": "", "question": "Why?", "response": "Because."}]
    chat = [
        {
            "context": "I lied.",
            "response": "Tell the truth.",
            "rots": ["Be honest."],
            "dialogue_id": 0,
            "response_id": 0,
        }
    ]
    return {
        "tatsu-lab/alpaca@main": {
            "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(
                tmp_path, [{"instruction": "Name a colour.", "input": "", "output": "Teal.", "text": "…"}]
            )
        },
        "databricks/databricks-dolly-15k@main": {
            "databricks-dolly-15k.jsonl": b'{"instruction": "Q", "context": "", "response": "A", "category": "x"}\n'
        },
        "allenai/prosocial-dialog@main": {
            f"{s}.json": (json.dumps(chat[0]) + "\n").encode() for s in ("train", "valid", "test")
        },
        "facebook/empathetic_dialogues@refs/convert/parquet": {
            f"default/{s}/0000.parquet": parquet(tmp_path, story) for s in ("train", "validation", "test")
        },
        "Open-Orca/OpenOrca@main": {
            "1M-GPT4-Augmented.parquet": parquet(tmp_path, orca),
            "3_5M-GPT3_5-Augmented.parquet": b"not to be fetched",
        },
        "lighteval/med_dialog@main": {
            f"{site}/{s}-00000-of-00001.parquet": parquet(
                tmp_path, [{"src": "Patient: Ow. Doctor: Rest.", "tgt": "Pain?", "id": 1}]
            )
            for site in ("healthcaremagic", "icliniq")
            for s in ("train", "validation", "test")
        },
        "stanfordnlp/sst2@main": {
            f"data/{s}-00000-of-00001.parquet": parquet(tmp_path, [{"idx": 0, "sentence": "a joy ", "label": 1}])
            for s in ("train", "validation", "test")
        },
    }  # fmt: skip


@pytest.fixture
def server(files):
    """Address of the server, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, body: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            for key, listing in files.items():
                repository, revision = key.split("@")
                api = f"/api/datasets/{repository}"
                if path == f"{api}/revision/{revision}" or (revision == "main" and path == api):
                    return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
                if path == f"{api}/tree/{COMMIT}":
                    entries = [
                        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in listing.items()
                    ]
                    return self.answer(json.dumps(entries).encode())
                resolve = f"/datasets/{repository}/resolve/{COMMIT}/"
                if path.startswith(resolve) and path.removeprefix(resolve) in listing:
                    body = listing[path.removeprefix(resolve)]
                    etag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.answer(body, "application/octet-stream", ETag=etag, X_Repo_Commit=COMMIT)
            self.send_error(404)
            return None

        do_HEAD = do_GET

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()


CODE = """
import json, os, sys
from pllm_helpers.runtime import InputError, go_offline
from pllm_helpers.corpora import load_dialogues
go_offline()
results = []
for name, options in json.loads(sys.argv[1]):
    try:
        loaded = load_dialogues(name, "hub", **options)
        texts = [[d.question, d.answer] for d in loaded]
        results.append([loaded.source, texts, list(loaded.report.files), list(loaded.report.notes)])
    except InputError as error:
        results.append(str(error))
import huggingface_hub.constants
assert os.environ["HF_HUB_OFFLINE"] == "1" and huggingface_hub.constants.HF_HUB_OFFLINE, "the network stays on"
print(json.dumps(results))
"""


def load(calls, address, home):
    """Results of the calls, in a process of their own: the hub library reads its settings at import."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in (
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "ALL_PROXY",
    ):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(calls)],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TEXTS = {
    "alpaca": [["Name a colour.", "Teal."]],
    "dolly": [["Q", "A"]],
    "prosocial": [["I lied.", "Tell the truth."]],
    "empathetic": [["I won, finally.", "Well done."]],
    "openorca": [["Why?", "Because."]],
    "meddialog": [["Ow.", "Rest."], ["Ow.", "Rest."]],
    "sst2": [["a joy", "positive"]],
}


def test_every_data_set_downloads_once_and_is_then_read_offline(server, tmp_path):
    address, asked = server
    results = load([(name, {"allow_download": True}) for name in DATASETS], address, tmp_path / "home")
    for name, (source, dialogues, files, notes) in zip(DATASETS, results, strict=True):
        assert source == f"hub:{HUB[name].repository}@{COMMIT}"
        assert dialogues == TEXTS[name]
        assert notes[0] == "split: train"
        assert all(name == "meddialog" or "/" not in f for f in files)
    assert not any("GPT3_5" in path for path in asked), "only the files of the split are fetched"
    before = len(asked)
    again = load([(name, {}) for name in DATASETS], address, tmp_path / "home")
    assert again == results and len(asked) == before, "no request without allow_download"


def test_split_and_revision(server, tmp_path):
    address, asked = server
    calls = [
        ("empathetic", {"split": "dev", "allow_download": True}),
        ("sst2", {"revision": "no-such-branch", "allow_download": True}),
        ("sst2", {"revision": COMMIT, "split": "test", "allow_download": True}),
        ("alpaca", {"split": "test", "allow_download": True}),
    ]
    validation, missing, pinned, no_split = load(calls, address, tmp_path / "home")
    assert validation[3][0] == "split: validation" and validation[1] == TEXTS["empathetic"]
    assert missing.startswith("hub:stanfordnlp/sst2@no-such-branch: expected a download, got")
    assert pinned[0].endswith(COMMIT) and pinned[1] == TEXTS["sst2"]
    assert no_split == "split: expected one of train for alpaca, got 'test'."


def test_without_permission_nothing_is_asked(server, tmp_path):
    address, asked = server
    (message,) = load([("alpaca", {})], address, tmp_path / "home")
    assert message.startswith("hub:tatsu-lab/alpaca@main: expected the files in the local hub cache")
    assert "Type load_dialogues('alpaca', \"hub\", allow_download=True)" in message
    assert asked == []


def test_a_dead_network_is_a_clear_error(tmp_path):
    (message,) = load([("dolly", {"allow_download": True})], "http://127.0.0.1:9", tmp_path / "home")
    assert "expected a download, got" in message and "Check the network" in message


@pytest.mark.parametrize("name", ["authored", "medical", "uniform"])
def test_what_is_not_on_the_hub(name):
    with pytest.raises(InputError, match="not on the hub"):
        load_dialogues(name, "hub", allow_download=True)
