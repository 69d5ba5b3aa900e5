from __future__ import annotations

import io
import json
import re

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny
import tiny_model

from pyqlora import LoraConfig, get_peft_model
from pyqlora.cli import chat as verb
from pyqlora.cli.app import run

SPEED = r"\(\d+ tokens(, [\d.]+ tok/s)?, the first after [\d.]+ s\)"


def save_adapter(path, model, seed, **config):
    adapted = get_peft_model(tiny_model.model(), LoraConfig(**{"target_modules": "all-linear", **config}))
    tiny.randomize(adapted, seed)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(model, two adapters)."""
    directory = tmp_path_factory.mktemp("chat")
    model = tiny_model.save(directory / "model")
    return str(model), *(save_adapter(directory / name, model, seed) for seed, name in enumerate(("one", "two")))


@pytest.fixture
def say(monkeypatch, capsys):
    """Run `pyqlora chat` on lines of input and return what it printed."""

    def say(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert run(["chat", *arguments, "--max-new-tokens", "8"]) == 0
        return capsys.readouterr().out

    return say


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(["chat", *arguments, "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(SPEED + "\n", printed.err)
    return printed.out


def test_one_shot(places, capsys):
    model, one, two = places
    answers = [answer(capsys, model, "--adapter", adapter, "--prompt", "1 is") for adapter in (one, one, two)]
    answers.append(answer(capsys, model, "--prompt", "1 is"))
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3
    assert answer(capsys, one, "--prompt", "1 is") == answers[0]
    assert answer(capsys, one, "--prompt", "1 is", "--plain") != answers[0]


def test_swapping_and_comparing(places, capsys, say):
    model, one, two = places
    both = ("--adapter", one, "--adapter", two)
    alone = {
        name: answer(capsys, model, *arguments, "--prompt", "hi").rstrip("\n")
        for name, arguments in (("one", both[:2]), ("two", both[2:]), ("base", ()))
    }
    printed = say(["hi", "/base", "/clear", "/adapter two", "hi", "/clear", "/adapter base", "hi"], model, *both)
    expected = [alone["one"], alone["base"], alone["two"], alone["base"]]
    found = re.split(SPEED + "\n", re.sub(r"adapters: .*\n", "", printed))
    assert [text.rstrip("\n") for text in found[::2]] == [*expected, ""]
    assert "adapters: one, [two], base" in printed


def test_the_conversation_is_remembered(places, say, monkeypatch):
    """What the model reads the second time is the first exchange and the second message."""
    from pyqlora.cli.conversation import Conversation

    seen = []
    original = Conversation._generate

    def spy(self, messages, *rest, **named):
        seen.append([message["role"] for message in messages])
        return original(self, messages, *rest, **named)

    monkeypatch.setattr(Conversation, "_generate", spy)
    say(["a", "b", "/base", "c"], *places[:1])
    user, both = "user", ["user", "assistant"]
    assert seen == [[user], [*both, user], [*both, user], [*both, *both, user]]
    seen.clear()
    say(["a", "b"], places[0], "--plain")
    assert seen == [[user], [user]]


def test_oldest_turns_are_left_out_of_a_full_context(places, say):
    printed = say(["a" * 120, "b" * 120, "c" * 400], places[0])
    assert len(re.findall(SPEED, printed)) == 2
    assert re.search(r"error: the message has 4\d\d tokens, and the model reads 256 at most\n", printed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter three", "error: no adapter 'three', there are: one, two, base"),
        ("/save", "error: /save: no such command, expected one of /adapter, /base, /clear, /help, /quit"),
        ("/base", "error: /base answers your last message without an adapter; there is none yet"),
        ("/adapter", "adapters: [one], two, base"),
        ("/help", "/adapter NAME  answer with that adapter from now on"),
    ],
)
def test_commands(places, say, line, message):
    model, one, two = places
    assert message in say([line], model, "--adapter", one, "--adapter", two)


def test_quit_and_names(places, say):
    model, one, two = places
    printed = say(["/adapter", "/quit", "hi"], model, "--adapter", f"first={one}", "--adapter", two)
    assert printed == "adapters: [first], two, base\n"


def test_a_terminal(places, monkeypatch, capsys):
    """Prompts name the adapter; Ctrl-C at the prompt is no end, in an answer it stops that; Ctrl-D ends."""
    model, one, _ = places
    lines = iter([KeyboardInterrupt, "hi", "/adapter base", EOFError])
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(verb, "write", interrupted)
    assert run(["chat", model, "--adapter", one, "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert prompts == ["one> ", "one> ", "one> ", "base> "]
    assert "adapters: [one], base; /help lists the commands" in printed
    assert "(/quit or Ctrl-D leaves)" in printed
    assert "(stopped)" in printed


def test_completion(places, monkeypatch):
    readline = pytest.importorskip("readline")

    class Talk:
        names = ("one", "other", "two")

    verb.edit_lines(Talk)
    complete = readline.get_completer()
    for line, text, expected in (
        ("/a", "/a", ["/adapter"]),
        ("/adapter o", "o", ["one", "other"]),
        ("/adapter ", "", ["one", "other", "two", "base"]),
        ("he", "he", []),
    ):
        monkeypatch.setattr(readline, "get_line_buffer", lambda line=line: line)
        assert [complete(text, i) for i in range(len(expected) + 1)] == [*expected, None]
    readline.set_completer(None)


def test_sampling_repeats_with_a_seed(places, capsys):
    arguments = [places[0], "--prompt", "1 is", "--temperature", "1.5", "--top-p", "0.9"]
    answers = [answer(capsys, *arguments, "--seed", seed) for seed in ("0", "0", "1")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1.0"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--prompt", " "], "--prompt is empty; leave it out to chat"),
    ],
)
def test_options_out_of_range(places, capsys, options, message):
    assert run(["chat", places[0], *options]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def fails(capsys, *arguments) -> str:
    assert run(["chat", *map(str, arguments)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_what_is_not_there(places, tmp_path, monkeypatch, capsys):
    model, one, _ = places
    assert "no such model directory or .gguf file" in fails(capsys, tmp_path / "no")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "poet: no such model directory or .gguf file, and it is not in the hub's cache" in fails(capsys, "runs/poet")
    assert "adapter_config.json" in fails(capsys, model, "--adapter", tmp_path / "no")
    assert f"the name 'one' is taken; give another: NAME={one}" in fails(
        capsys, model, "--adapter", one, "--adapter", one
    )
    assert "the name 'base' is taken" in fails(capsys, model, "--adapter", f"base={one}")


def test_an_adapter_without_a_base(places, tmp_path, capsys):
    config = {"peft_type": "LORA", "base_model_name_or_path": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = fails(capsys, tmp_path)
    assert f"names no base model; give it: pyqlora chat MODEL --adapter {tmp_path}" in message


def test_an_adapter_of_another_model(places, tmp_path, capsys):
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path)
    assert "this adapter does not fit the model" in fails(capsys, places[0], "--adapter", tmp_path)


def test_no_chat_template(tmp_path, capsys):
    tiny_model.save(tmp_path, template=None)
    assert "no chat template: use --plain to complete text" in fails(capsys, tmp_path)
