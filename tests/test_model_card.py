from pathlib import Path

from torch import nn

from pyqlora import LoraConfig, get_peft_model


def saved(tmp_path, **config) -> str:
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], **config)).save_pretrained(tmp_path)
    return (Path(tmp_path) / "README.md").read_text()


def test_a_card_names_the_library_and_the_settings(tmp_path):
    card = saved(tmp_path, r=3)
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- lora\n---\n")
    assert "| r | 3 |" in card and "| Trainable parameters | 48 of 120 |" in card


def test_a_card_that_is_there_keeps_its_text(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\nlanguage: tr\n---\nMy words\n")
    card = saved(tmp_path)
    assert card.endswith("---\nMy words\n")
    assert {"license: mit", "language: tr", "- mine", "- lora", "library_name: peft"} <= set(card.splitlines())
    assert saved(tmp_path) == card


def test_a_card_without_front_matter_gets_one(tmp_path):
    (tmp_path / "README.md").write_text("My words\n")
    assert saved(tmp_path).endswith("- lora\n---\nMy words\n")
