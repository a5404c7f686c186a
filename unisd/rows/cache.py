"""Cache of the findings of a dataset's check: the second start of a run does not wait for it."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from unisd.rows.check import Measured, RowChecker
from unisd_kernels.cache import cache_directory
from unisd_kernels.files import replacing

_FORMAT = 1

logger = logging.getLogger(__name__)


def cache_file(dataset: Any, checker: RowChecker, tokenizer: Any, template_options: dict[str, Any]) -> Path | None:
    """File to keep the findings in; None for a dataset without a fingerprint.

    Limits on the length are not part of the key: lengths are kept, and compared anew.
    """
    fingerprint = getattr(dataset, "_fingerprint", None)
    if not isinstance(fingerprint, str):
        return None
    parts = {
        "format": _FORMAT,
        "dataset": [fingerprint, len(dataset), str(getattr(dataset, "features", ""))],
        "tokenizer": _tokenizer_key(tokenizer),
        "template": repr(sorted(template_options.items(), key=lambda item: item[0])),
        "views": [
            checker.views,
            checker.spec.num_auxiliary,
            checker.spec.negative,
            checker.spec.preset,
            str(checker.spec.template),
        ],
        "frame": repr(checker.frame.name),
        "num_embeddings": checker.num_embeddings,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "rows" / f"{digest[:32]}.npz"


def load(file: Path) -> Measured | None:
    """Read what `save` wrote; None if there is nothing (whole) there."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            faults = {int(row): text for row, text in json.loads(str(stored["faults"])).items()}
            return Measured(stored["lengths"], faults, stored["plain"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read and is made anew (%s: %s)", file, type(error).__name__, error)
        return None


def save(file: Path, measured: Measured) -> None:
    """Write atomically: processes of one run may do so at once."""
    try:
        with replacing(file) as new, new.open("wb") as stream:
            faults = json.dumps(measured.faults)
            np.savez_compressed(stream, lengths=measured.lengths, plain=measured.plain, faults=np.array(faults))
    except OSError as error:
        logger.warning("the check of the rows is not kept for the next start: %s", error)


def _tokenizer_key(tokenizer: Any) -> list[Any]:
    """Everything that decides the ids of a text, with the versions of the libraries that do it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items())) + repr(sorted(tokenizer.init_kwargs.items(), key=str))
    else:
        state = json.loads(backend.to_str())
        # What a call leaves behind; calls that pad or truncate set it for themselves.
        text = json.dumps({name: value for name, value in state.items() if name not in ("padding", "truncation")})
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return [
        type(tokenizer).__name__,
        hashlib.sha256(text.encode()).hexdigest(),
        special,
        str(tokenizer.chat_template),
        [bool(getattr(tokenizer, name, False)) for name in ("add_bos_token", "add_eos_token")],
        transformers.__version__,
        tokenizers.__version__,
    ]
