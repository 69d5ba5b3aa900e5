from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import tiny_model

from pyqlora.finetune.data import Sample
from pyqlora.finetune.encode import IGNORED, PLAIN_TEMPLATE, Encoded, encode

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer()


def trained_text(tokenizer, sample):
    return tokenizer.decode([token for token, label in zip(sample.ids, sample.labels, strict=True) if label >= 0])


def test_completion_alone_is_trained(tokenizer):
    (sample,) = encode([Sample("x", prompt="in a", completion=" b")], tokenizer, 64).samples
    assert tokenizer.decode(sample.ids) == "in a b</s>"
    assert trained_text(tokenizer, sample) == " b</s>"
    assert sample.trained == len(sample.completion) == 3
    assert tokenizer.decode(sample.prompt) == "in a"


def test_every_assistant_turn_is_trained_up_to_its_end_token(tokenizer):
    (sample,) = encode([Sample("x", messages=CHAT)], tokenizer, 256).samples
    assert tokenizer.decode(sample.ids).startswith("<s>system:be kind</s>\n<s>user:hi</s>\n<s>assistant:ho</s>")
    assert trained_text(tokenizer, sample) == "ho</s>ciao</s>"
    assert tokenizer.decode(sample.completion) == "ho</s>"


def test_turns_that_the_template_rewrites_are_not_trained():
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}.{% else %}-{% endif %}"
    tokenizer = tiny_model.tokenizer(forgetful + "{% endfor %}")
    (sample,) = encode([Sample("x", messages=CHAT[1:])], tokenizer, 256).samples
    assert tokenizer.decode(sample.ids) == "hi.-bye.ciao."
    assert trained_text(tokenizer, sample) == "ciao."


def test_a_tokenizer_without_chat_template_gets_the_plain_one():
    tokenizer = tiny_model.tokenizer(None)
    (sample,) = encode([Sample("x", messages=CHAT[1:3])], tokenizer, 256).samples
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert tokenizer.decode(sample.ids) == "### User:\nhi\n\n### Assistant:\nho</s>\n\n"
    assert trained_text(tokenizer, sample) == "ho</s>"


def test_truncation_and_drops_are_counted(tokenizer):
    samples = [
        Sample("a", prompt="abc", completion="def"),
        Sample("b", prompt="abc", completion=""),
        Sample("c", prompt="abcdefg", completion="h"),
        Sample("d", prompt="a", completion="b"),
    ]
    result = encode(samples, tokenizer, 5)
    assert [len(sample.ids) for sample in result.samples] == [5, 3]
    assert result.read == 4
    assert result.truncated == 1
    assert dict(result.dropped) == {"with an empty completion": 1, "with no trained token within --max-length 5": 1}


def test_text_is_cut_into_blocks(tokenizer):
    result = encode([Sample("x", text="abc"), Sample("y", text="defg")], tokenizer, 4)
    assert [tokenizer.decode(sample.ids) for sample in result.samples] == ["abc</s>", "defg"]
    assert all(sample.ids == sample.labels and sample.trained == 3 for sample in result.samples)


def test_the_first_token_is_never_counted():
    assert Encoded([5, 6], [5, 6]).trained == 1
    assert Encoded([5, 6], [5, IGNORED]).trained == 0


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("x", prompt="abcdef", completion="g"), "1 with no trained token within --max-length 4"),
        (Sample("x", messages=CHAT[:2]), "1 without an assistant turn"),
        (Sample("x", prompt="a", completion=""), "1 with an empty completion"),
        (Sample("x", text=""), "1 fewer than two tokens"),
    ],
)
def test_nothing_left_is_an_error(tokenizer, sample, message):
    with pytest.raises(ValueError, match=f"no sample is left to train on: {message}"):
        encode([sample], tokenizer, 4)


def test_a_template_that_refuses_names_the_sample():
    tokenizer = tiny_model.tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"d\.jsonl:3: the model's chat template refuses .* no system role"):
        encode([Sample("d.jsonl:3", messages=CHAT)], tokenizer, 64)
