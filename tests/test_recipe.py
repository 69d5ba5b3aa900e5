"""The recipe that tutorials post for transformers, bitsandbytes and peft, with its imports changed, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from pyqlora import BitsAndBytesConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

OPTIM = "paged_adamw_8bit"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = ["the small cat sees a red bird and then it sleeps .", "a large dog follows the blue cat and then it runs ."]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(" ".join(TEXTS).split()))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a random Llama in bfloat16 and a word tokenizer."""
    path = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def quantized(path):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="auto")


def trainer_for(path, output, steps, optim):
    """The recipe up to trainer.train()."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = prepare_model_for_kbit_training(quantized(path), use_gradient_checkpointing=True)
    torch.manual_seed(0)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=TARGETS, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    data = [tokenizer(text) for text in TEXTS * 8]
    args = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=steps,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        bf16=True,
        optim=optim,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=1,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=args, train_dataset=data, data_collator=collator)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The trainer after ten steps with a checkpoint every five."""
    trainer = trainer_for(base, tmp_path_factory.mktemp("out"), 10, OPTIM)
    trainer.train()
    return trainer


def test_the_loss_falls(trained):
    first, last = losses(trained)[0], losses(trained)[-1]
    assert last < 0.7 * first, losses(trained)


def test_trainable_parameters(trained, capsys):
    """2 layers of seven adapters, counted by hand; the base counts unpacked."""
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    trainable = 2 * sum(16 * (n + k) for n, k in shapes)
    assert trained.model.get_nb_trainable_parameters() == (
        trainable,
        trainable + 2 * sum(n * k for n, k in shapes) + 2 * len(VOCABULARY) * 64 + 5 * 64,
    )
    trained.model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


def test_checkpoints_hold_adapters_only(trained):
    files = {path.name for path in (Path(trained.args.output_dir) / "checkpoint-5").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= files
    assert not {"model.safetensors", "config.json"} & files


def test_resuming_continues_the_run(base, trained, tmp_path):
    """Steps six to ten after a resumed checkpoint give the losses of the run that went through."""
    trainer = trainer_for(base, tmp_path, 10, OPTIM)
    trainer.train(resume_from_checkpoint=str(Path(trained.args.output_dir) / "checkpoint-5"))
    resumed, expected = losses(trainer)[-5:], losses(trained)[-5:]
    assert resumed[0] == expected[0]
    if torch.cuda.is_available():  # torch's backward pass of attention adds up in no fixed order there
        expected = pytest.approx(expected, rel=0.02)
    assert resumed == expected


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    trained.model.save_pretrained(path)
    return path


def test_adapter_files_are_as_peft_writes_them(adapter, base):
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["inference_mode"]) == ("LORA", 16, 32, True)
    assert config["base_model_name_or_path"] == str(base)
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    paths = [f"self_attn.{name}" for name in TARGETS[:4]] + [f"mlp.{name}" for name in TARGETS[4:]]
    assert keys == {
        f"base_model.model.model.layers.{i}.{path}.lora_{ab}.weight" for i in range(2) for path in paths for ab in "AB"
    }


@torch.no_grad()
def test_load_generate_merge_save_load(trained, adapter, base, tmp_path):
    """The reloaded adapter gives the trained model's logits; the merged model, saved and loaded plainly, nearly so."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(quantized(base), adapter)
    inputs, start = (tokenizer(text, return_tensors="pt").to(model.device) for text in (TEXTS[0], "the small cat"))
    logits = model(**inputs).logits
    original = trained.accelerator.unwrap_model(trained.model.eval(), keep_fp32_wrapper=False)  # without autocast
    assert torch.equal(logits, original(**inputs).logits)
    generated = model.generate(**start, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("the small cat sees a red bird")

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    # merging rounds to bfloat16 once: 2**-9 of each weight, here and there over two layers
    assert (loaded(**inputs).logits - logits).abs().max() < 0.02 * logits.abs().max()


def test_recipe_without_peft_and_bitsandbytes(base, tmp_path):
    script = f"""
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_recipe import OPTIM, trainer_for
trainer = trainer_for({str(base)!r}, {str(tmp_path)!r}, 5, OPTIM)
trainer.train()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    assert (tmp_path / "checkpoint-5" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-5" / "model.safetensors").exists()
