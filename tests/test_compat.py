"""The stand-ins for bitsandbytes and PEFT: names, versions, refusals, and taking it all back."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import tiny
import torch
from torch import nn

import pyqlora
from pyqlora import compat
from pyqlora.compat.bitsandbytes import MODULES as BITSANDBYTES
from pyqlora.compat.peft import MODULES as PEFT

STAND_INS = [
    *("bitsandbytes" + (path and f".{path}") for path in BITSANDBYTES),
    *("peft" + (path and f".{path}") for path in PEFT),
]


@pytest.fixture
def installed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compat.install()
    yield
    compat.uninstall()


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", STAND_INS)
def test_every_name_that_a_stand_in_lists_can_be_read(installed, name):
    pytest.importorskip("transformers")
    module = importlib.import_module(name)
    assert importlib.util.find_spec(name) is module.__spec__
    assert all(hasattr(module, entry) for entry in dir(module))


@pytest.mark.parametrize(
    ("module", "name", "same"),
    [
        ("bitsandbytes", "matmul_4bit", "pyqlora"),
        ("bitsandbytes.functional", "QuantState", "pyqlora.functional"),
        ("bitsandbytes.nn", "Linear4bit", "pyqlora.nn"),
        ("bitsandbytes.nn.modules", "Params4bit", "pyqlora.nn"),
        ("bitsandbytes.nn.parametrize", "replace_parameter_4bit", "pyqlora.nn.parametrize"),
        ("bitsandbytes.optim.adamw", "AdamW8bit", "pyqlora.optim"),
        ("peft", "LoraConfig", "pyqlora"),
        ("peft.tuners.lora.layer", "LoraLayer", "pyqlora.lora_layer"),
        ("peft.utils", "get_peft_model_state_dict", "pyqlora"),
    ],
)
def test_a_name_has_one_object(installed, module, name, same):
    assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(same), name)


def test_versions_and_availability(installed):
    assert importlib.metadata.version("bitsandbytes") == importlib.import_module("bitsandbytes").__version__ == "0.50.2"
    assert importlib.metadata.metadata("peft")["Version"] == importlib.import_module("peft").__version__ == "0.22.0"
    imports = pytest.importorskip("transformers.utils.import_utils")
    assert imports.is_bitsandbytes_available() and imports.is_peft_available()
    accelerate = pytest.importorskip("accelerate.utils")
    assert accelerate.is_4bit_bnb_available() and accelerate.is_bitsandbytes_multi_backend_available()


def test_other_distributions_are_still_found(installed):
    assert importlib.metadata.version("torch") == torch.__version__.partition("+")[0] or importlib.metadata.version(
        "torch"
    )
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


def test_mixed_models_hold_adapters_of_the_one_method(installed):
    peft = importlib.import_module("peft")
    model = peft.get_peft_model(tiny.mlp(), peft.LoraConfig(target_modules=["up"]), mixed=True)
    assert isinstance(model, peft.PeftMixedModel) and isinstance(model, pyqlora.PeftModel)
    assert not isinstance(peft.get_peft_model(tiny.mlp(), peft.LoraConfig(target_modules=["up"])), peft.PeftMixedModel)


def test_unknown_names(installed):
    with pytest.raises(ModuleNotFoundError, match=r"bitsandbytes\.research"):
        importlib.import_module("bitsandbytes.research")
    with pytest.raises(AttributeError, match="has no attribute 'nothing': pyqlora does not stand in for it"):
        importlib.import_module("bitsandbytes").nothing  # noqa: B018


def test_int8_is_refused_on_use_only(installed):
    bnb = importlib.import_module("bitsandbytes")
    assert not isinstance(nn.Linear(2, 2), bnb.nn.Linear8bitLt)
    assert hasattr(bnb.functional, "int8_vectorwise_dequant")
    for use in (lambda: bnb.nn.Linear8bitLt(4, 4), lambda: bnb.functional.int8_double_quant(None), bnb.MatmulLtState):
        with pytest.raises(NotImplementedError, match=r"LLM\.int8 is not part of pyqlora\. Use 4-bit layers instead"):
            use()


def test_other_methods_of_peft_are_refused_on_use_only(installed):
    peft = importlib.import_module("peft")
    config = peft.AdaLoraConfig(total_step=5)
    assert not isinstance(peft.LoraConfig(), peft.PromptLearningConfig)
    with pytest.raises(NotImplementedError, match=r"peft\.AdaLoraConfig is not part of pyqlora"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    with pytest.raises(NotImplementedError, match=r"peft\.IA3Model is not part of pyqlora"):
        peft.IA3Model(None)


def test_patching_a_name_reaches_the_core_and_is_undone(installed):
    functional = importlib.import_module("bitsandbytes.functional")
    original = pyqlora.functional.quantize_4bit
    with mock.patch("bitsandbytes.functional.quantize_4bit", "patched"):
        assert functional.quantize_4bit == pyqlora.functional.quantize_4bit == "patched"
    assert functional.quantize_4bit is pyqlora.functional.quantize_4bit is original
    with mock.patch("bitsandbytes.functional.another", 1, create=True):
        assert functional.another == 1 and not hasattr(pyqlora.functional, "another")
    assert not hasattr(functional, "another")


def test_install_warns_once_where_the_real_one_is_there_and_uninstall_restores():
    def ours(name):
        return name.partition(".")[0] in ("bitsandbytes", "peft")

    pytest.importorskip("bitsandbytes")
    before = {name: module for name, module in sys.modules.items() if ours(name)}
    finders = list(sys.meta_path)
    with pytest.warns(UserWarning, match="pyqlora.compat: bitsandbytes.* installed, but pyqlora answers") as caught:
        compat.install()
        compat.install()
    assert len(caught) == 1
    assert sys.modules["bitsandbytes"] is not before["bitsandbytes"]
    compat.uninstall()
    compat.uninstall()
    assert {name: module for name, module in sys.modules.items() if ours(name)} == before
    assert sys.meta_path == finders
    assert not hasattr(pyqlora.LoraModel, "get_model_config")


def test_helpers_of_peft_on_our_layers(installed):
    utils, tuners = importlib.import_module("peft.utils"), importlib.import_module("peft.tuners.tuners_utils")
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    adapted = pyqlora.get_peft_model(model, pyqlora.LoraConfig(target_modules=["a"], modules_to_save=["b"]))
    layer = model["a"]
    assert isinstance(layer, tuners.BaseTunerLayer)
    assert isinstance(model["b"], utils.AuxiliaryTrainingWrapper)
    assert utils._get_submodules(model, "a.base_layer") == (layer, layer.base_layer, "base_layer")
    assert tuners.inspect_matched_modules(adapted.base_model)["matched"] == ["a"]
    prefixes = tuners._get_tuner_state_dict_key_prefixes(model, "default")
    kept = tuners._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    assert sorted(kept) == ["a.lora_A.default.weight", "a.lora_B.default.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preparing_casts_plain_half_precision_parameters_as_peft_does(installed, dtype):
    model = nn.Sequential(nn.Linear(64, 64), pyqlora.nn.Linear4bit(64, 64)).to(dtype).to("cpu")
    importlib.import_module("peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model[0].weight.dtype == torch.float32
    assert model[1].weight.dtype == torch.uint8
    assert not any(parameter.requires_grad for parameter in model.parameters())


OPERATORS = """
import torch
from torch._subclasses import FakeTensorMode
from pyqlora import compat, functional as F
compat.install()
ops = torch.ops.bitsandbytes
x, w = torch.randn(3, 64), torch.randn(96, 64)
for nested in (False, True):
    q, s = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    want = F.gemv_4bit(x, q, state=s)
    if nested:
        got = ops.gemm_4bit(x, q, [96, 64], s.state2.absmax, 64, "nf4", None, s.absmax, s.state2.code, s.offset)
    else:
        got = ops.gemm_4bit(x, q, [96, 64], s.absmax, 64, "nf4")
        assert torch.equal(ops.gemv_4bit(x, q, [96, 64], s.absmax, s.code, 64), want)
        decoded = torch.empty(96, 64)
        ops.dequantize_4bit.out(q, s.absmax, 64, "nf4", [96, 64], torch.float32, out=decoded)
        assert torch.equal(decoded, F.dequantize_4bit(q, s))
        packed, absmax = ops.quantize_4bit(w, 64, "nf4", torch.bfloat16)
        assert torch.equal(packed.view(torch.uint8), q.view(packed.shape[0], 2)) and torch.equal(absmax, s.absmax)
    assert torch.equal(got, want)
q, s = F.quantize_blockwise(w, blocksize=256)
assert all(map(torch.equal, ops.quantize_blockwise(w, s.code, 256), (q, s.absmax)))
assert torch.equal(ops.dequantize_blockwise(q, s.absmax, s.code, 256, torch.float32), F.dequantize_blockwise(q, s))
p, code = F.quantize_4bit(w)[0], F.get_4bit_type("fp4")
with FakeTensorMode():  # of a GPU, which holds none of a module's own tensors
    fake = torch.empty(96, 64, device="cuda")
    packed, absmax = ops.quantize_4bit(fake, 64, "nf4", torch.bfloat16)
    assert (packed.shape, absmax.shape, packed.device.type) == ((1536, 1), (96,), "cuda")
    assert ops.gemm_4bit(fake, packed, [96, 64], absmax, 64, "nf4").shape == (96, 96)
torch.library.opcheck(ops.gemv_4bit.default, (x, p, [96, 64], torch.ones(96), code, 64))
try:
    ops.gemv_4bit(x, q, [96, 64], s.absmax, torch.arange(16.0), 64)
except ValueError as error:
    assert "get_4bit_type" in str(error)
compat.uninstall()
assert not hasattr(torch.ops.bitsandbytes, "gemm_4bit")
print("done")
"""


def test_operators():
    result = run("-c", OPERATORS)
    assert result.stdout == "done\n", result.stderr


def test_a_script_runs_unchanged(tmp_path):
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script.write_text(
        "import sys, bitsandbytes, peft, beside\n"
        "print(__name__, sys.argv[1:], bitsandbytes.nn.Linear4bit.__module__, peft.__version__, beside.VALUE)\n"
    )
    result = run("-m", "pyqlora.compat", str(script), "--a", "1")
    assert result.stdout == "__main__ ['--a', '1'] pyqlora.nn.linear4bit 0.22.0 7\n", result.stderr


def test_the_command_says_what_is_missing(tmp_path):
    for args, text in (([], "usage: python -m pyqlora.compat SCRIPT"), (["nowhere.py"], "nowhere.py: no such script")):
        result = run("-m", "pyqlora.compat", *args)
        assert result.returncode == 1 and text in result.stderr


def test_reference_optimizer_equals_ours(installed):
    reference = importlib.import_module("bitsandbytes.optim.ademamix")
    a = torch.randn(64, 8).requires_grad_()
    b = a.detach().clone().requires_grad_()
    kinds = reference._ReferenceAdEMAMix([a], t_alpha=5, t_beta3=5), reference.AdEMAMix([b], t_alpha=5, t_beta3=5)
    for _ in range(8):
        a.grad = b.grad = torch.randn(64, 8)
        for optimizer in kinds:
            optimizer.step()
    torch.testing.assert_close(a, b)


def test_unknown_settings_warn_as_in_peft(installed, tmp_path):
    pyqlora.LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"later": 1,', 1))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['later'\] for class LoraConfig"):
        pyqlora.LoraConfig.from_pretrained(tmp_path)
    compat.uninstall()
    with pytest.raises(ValueError, match="with later=1: pyqlora does not know this setting"):
        pyqlora.LoraConfig.from_pretrained(tmp_path)


def test_pickled_weights_are_written_and_read_as_tensors_only(installed, tmp_path):
    model = pyqlora.get_peft_model(tiny.mlp(), pyqlora.LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    x = torch.randn(2, 11)
    assert torch.equal(pyqlora.PeftModel.from_pretrained(tiny.mlp(), tmp_path)(x), model(x))
    torch.save({"code": compat.install}, tmp_path / "adapter_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        pyqlora.PeftModel.from_pretrained(tiny.mlp(), tmp_path)


def test_version_is_that_of_pefts_config_module(installed, monkeypatch):
    config = importlib.import_module("peft.config")
    monkeypatch.setattr(config, "__version__", "0.99.dev0")
    assert pyqlora.LoraConfig().peft_version == "0.99.dev0@UNKNOWN"
    with mock.patch.object(config, "_get_commit_hash", lambda package: "abc"):
        assert pyqlora.LoraConfig().peft_version == "0.99.dev0@abc"
    failing = mock.patch.object(config, "_get_commit_hash", lambda package: 1 / 0)
    with failing, pytest.warns(UserWarning, match="error while trying to determine the commit hash"):
        assert pyqlora.LoraConfig().peft_version == "0.99.dev0@UNKNOWN"


def test_backend_names_in_the_status(installed):
    from peft.utils.quantization_utils import Bnb8bitBackend

    model = pyqlora.get_peft_model(tiny.mlp(), pyqlora.LoraConfig(target_modules=["up"]))
    assert model.get_model_status().quantization_backend is None
    model.base_model.model.up.quantization_backend = Bnb8bitBackend()
    assert model.get_model_status().quantization_backend == "bnb 8bit"


def test_empty_weights(installed):
    from peft.utils.integrations import init_empty_weights, skip_init_on_device

    with init_empty_weights():
        assert nn.Linear(1, 1).weight.device.type == "meta"
        assert skip_init_on_device(nn.Linear)(1, 1).weight.device.type == "cpu"
