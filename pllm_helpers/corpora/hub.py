"""The data sets on the Hugging Face hub: repository, revision and files of each."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from ..runtime import InputError, online

__all__ = ["HUB", "HubSet", "fetch"]


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a data set lies on the hub. ``files`` maps each split to file name patterns."""

    repository: str
    files: dict[str, tuple[str, ...]]
    revision: str = "main"
    note: str = ""


HUB: dict[str, HubSet] = {
    "alpaca": HubSet("tatsu-lab/alpaca", {"train": ("data/train-*.parquet",)}),
    "dolly": HubSet("databricks/databricks-dolly-15k", {"train": ("databricks-dolly-15k.jsonl",)}),
    "prosocial": HubSet(
        "allenai/prosocial-dialog",
        {"train": ("train.json",), "validation": ("valid.json", "validation.json"), "test": ("test.json",)},
    ),
    # the repository itself holds a loading script only, the converted branch has the rows
    "empathetic": HubSet(
        "facebook/empathetic_dialogues",
        {split: (f"default/{split}/*.parquet",) for split in ("train", "validation", "test")},
        revision="refs/convert/parquet",
    ),
    "openorca": HubSet(
        "Open-Orca/OpenOrca",
        {"train": ("1M-GPT4-Augmented.parquet",)},
        note="the GPT-4 part of OpenOrca (about 1 GB); its GPT-3.5 part is not fetched",
    ),
    # UCSD26/medical_dialog is a loading script that points to a manual download
    "meddialog": HubSet(
        "lighteval/med_dialog",
        {split: (f"*/{split}-*.parquet",) for split in ("train", "validation", "test")},
        note="MedDialog (English) as repackaged in lighteval/med_dialog, one dialogue a row in the field src",
    ),
    "sst2": HubSet(
        "stanfordnlp/sst2", {split: (f"data/{split}-*.parquet",) for split in ("train", "validation", "test")}
    ),
}


def fetch(
    name: str, split: str, *, revision: str | None = None, allow_download: bool = False
) -> tuple[list[Path], str]:
    """Files of one split, downloaded or from the hub library's cache, and ``hub:repository@commit``.

    Nothing is downloaded unless ``allow_download=True``: then, and only for this call, the network
    is used. Raises :class:`InputError` for an unknown split, a missing download and a failed one.
    """
    where = HUB[name]
    if split not in where.files:
        raise InputError("split", f"expected one of {', '.join(where.files)} for {name}, got {split!r}")
    wanted = revision or where.revision

    from huggingface_hub import snapshot_download

    arguments = dict(repo_type="dataset", revision=wanted, allow_patterns=list(where.files[split]))
    try:
        if allow_download:
            with online():
                folder = snapshot_download(where.repository, **arguments)
        else:
            folder = snapshot_download(where.repository, local_files_only=True, **arguments)
    except Exception as error:  # the library raises its own, its HTTP client's and plain OS errors
        if allow_download:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise InputError(
                f"hub:{where.repository}@{wanted}",
                f"expected a download, got {reason}",
                "Check the network, or pass the path of a file that you have.",
            ) from error
        call = f'load_dialogues({name!r}, "hub"'
        call += f", revision={revision!r}" if revision else ""
        call += f", split={split!r}" if split != "train" else ""
        raise InputError(
            f"hub:{where.repository}@{wanted}",
            "expected the files in the local hub cache, they are not there, and downloads are off",
            f"Type {call}, allow_download=True), or pass the path of a file that you have.",
        ) from error
    root = Path(folder)
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and _matches(p.relative_to(root), where.files[split])]
    if not files:
        raise InputError(
            f"hub:{where.repository}@{wanted}", f"expected files like {', '.join(where.files[split])}, found none there"
        )
    return files, f"hub:{where.repository}@{root.name}"


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path.as_posix(), pattern) for pattern in patterns)
