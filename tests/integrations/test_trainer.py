import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers.trainer
from transformers import TrainingArguments, trainer_optimizer, trainer_utils

from pyqlora import LoraConfig, get_peft_model, optim
from pyqlora.integrations import adopt, trainer


@pytest.fixture
def registered():
    trainer.unregister()
    trainer.register()
    yield
    trainer.unregister()


def lora():
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))


def test_the_trainer_takes_a_peft_model_for_one(registered):
    model = lora()
    assert trainer_utils._is_peft_model(model) and not trainer_utils._is_peft_model(model.get_base_model())
    assert trainer_utils.unwrap_peft_model(model) is model.get_base_model()
    assert transformers.trainer.is_peft_available() and isinstance(model, transformers.trainer.PeftModel)


def test_pefts_own_models_are_still_recognised(registered):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    assert trainer_utils._is_peft_model(model) and isinstance(model, transformers.trainer.PeftModel)


def test_registration_is_reversible():
    trainer.unregister()
    names = [vars(trainer_utils), vars(transformers.trainer), trainer_optimizer._OPTIMIZER_HANDLERS]
    before = [dict(table) for table in names]
    trainer.register()
    trainer.register()
    assert trainer_utils._is_peft_model(lora())
    trainer.unregister()
    assert [dict(table) for table in names] == before


def test_only_transformers_models_call_for_it():
    trainer.unregister()
    adopt(torch.nn.Linear(2, 2))
    assert not trainer._before
    adopt(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **dict.fromkeys(
                    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), 2
                )
            )
        )
    )
    assert trainer._before
    trainer.unregister()


BEFORE_THE_TRAINER = """
import importlib.util
import sys
import transformers
from pyqlora import LoraConfig, get_peft_model

sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), 2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
for _ in range(2):
    model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear")).unload()
model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
heavy = {"transformers.trainer", "peft", "bitsandbytes", "datasets"} & set(sys.modules)
assert not heavy, heavy
assert importlib.util.find_spec("transformers.trainer").name == "transformers.trainer"  # to look is not to import
from transformers import Trainer
from pyqlora.integrations import _awaited, trainer

assert _awaited not in sys.meta_path
assert trainer._before and transformers.trainer.__spec__.name == "transformers.trainer"
assert transformers.trainer_utils._is_peft_model(model) and Trainer.compute_loss is not trainer._compute_loss
"""


def test_a_trainer_imported_later_knows_too():
    """To adapt a model imports neither the Trainer nor what it imports."""
    subprocess.run([sys.executable, "-c", BEFORE_THE_TRAINER], check=True)


@pytest.mark.parametrize(
    ("name", "cls", "arguments"),
    [
        ("adamw_bnb_8bit", "AdamW", {"optim_bits": 8, "is_paged": False, "eps": 1e-7, "betas": (0.8, 0.99)}),
        ("adamw_8bit", "AdamW", {"optim_bits": 8, "is_paged": False}),
        ("paged_adamw_32bit", "AdamW", {"optim_bits": 32, "is_paged": True}),
        ("paged_adamw_8bit", "AdamW", {"optim_bits": 8, "is_paged": True}),
        ("lion_32bit", "Lion", {"optim_bits": 32, "is_paged": False, "betas": (0.8, 0.99)}),
        ("lion_8bit", "Lion", {"optim_bits": 8, "is_paged": False}),
        ("paged_lion_32bit", "Lion", {"optim_bits": 32, "is_paged": True}),
        ("paged_lion_8bit", "Lion", {"optim_bits": 8, "is_paged": True}),
        ("ademamix", "AdEMAMix", {"optim_bits": 32, "is_paged": False, "betas": (0.8, 0.99, 0.9999), "alpha": 5.0}),
        ("ademamix_8bit", "AdEMAMix", {"optim_bits": 8, "is_paged": False}),
        ("paged_ademamix_32bit", "AdEMAMix", {"optim_bits": 32, "is_paged": True}),
        ("paged_ademamix_8bit", "AdEMAMix", {"optim_bits": 8, "is_paged": True}),
        ("rmsprop_bnb", "RMSprop", {"optim_bits": 32}),
        ("rmsprop_bnb_32bit", "RMSprop", {"optim_bits": 32}),
        ("rmsprop_bnb_8bit", "RMSprop", {"optim_bits": 8}),
    ],
)
def test_optimizers_by_their_names(registered, name, cls, arguments, tmp_path):
    args = TrainingArguments(
        output_dir=tmp_path, optim=name, learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-7
    )
    kind, given = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert kind is getattr(optim, cls) and given["lr"] == 3e-4
    assert arguments.items() <= given.items()
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    kind(layer.parameters(), **given).step()


def test_embeddings_keep_32_bit_states(registered, tmp_path):
    """As the Trainer does for bitsandbytes."""
    model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 64))
    context = SimpleNamespace(
        args=TrainingArguments(output_dir=tmp_path, optim="paged_adamw_8bit"),
        model=model,
        optimizer_kwargs={"lr": 1e-3},
        adam_kwargs={},
        optim_args={},
    )
    kind, given = trainer.optimizer(context)
    optimizer = kind(model.parameters(), **given)
    model(torch.arange(300)).sum().backward()
    optimizer.step()
    dtypes = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters() if p.dim() == 2}
    assert dtypes == {"0.weight": torch.float32, "1.weight": torch.uint8}
