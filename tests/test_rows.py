"""Rows of a batch with their own adapters, as compiled code and other threads see them."""

from __future__ import annotations

import threading

import pytest
import torch

from pyqlora import LoraConfig, get_peft_model, rows
from pyqlora.nn import LinearNF4
from pyqlora.rows import RowAdapters, served_rows, serving


def adapted():
    torch.manual_seed(0)
    layer = LinearNF4(64, 32, compute_dtype=torch.float32).to("cpu")
    model = get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.add_adapter("second", LoraConfig(target_modules=["0"], init_lora_weights=False))
    return model.eval()


def test_rows_are_served_in_their_context_and_thread_only():
    seen = []
    with serving(RowAdapters(["a"])):
        thread = threading.Thread(target=lambda: seen.append(served_rows()))
        thread.start()
        thread.join()
        assert served_rows() == RowAdapters(["a"])
    assert seen == [None] and served_rows() is None


@pytest.mark.skipif(torch.__version__ < "2.13", reason="2.4 and 2.6 break the graph at a tensor subclass's attributes")
def test_an_adapted_layer_compiles_to_one_graph_until_rows_are_served(monkeypatch):
    monkeypatch.setattr(rows, "_used", False)
    model, x = adapted(), torch.randn(2, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        names = ["default", "second"]
        expected = model(x, adapter_names=names)
        assert (expected - model(x)).abs().max() > 0.01
        torch.testing.assert_close(compiled(x, adapter_names=names), expected)
        torch.testing.assert_close(compiled(x), model(x))
