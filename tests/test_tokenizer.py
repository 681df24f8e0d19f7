"""Tokenizers: bytes, tokenizer.json, chat templates; what transformers answers is stored beside the fixture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from kl_rl.models.config import DecoderConfig
from kl_rl.tokenizer import ByteTokenizer, check_vocabulary, load_tokenizer

FOLDER = Path(__file__).parent / "checkpoints" / "qwen3"
EXPECTED = json.loads((FOLDER / "expected_tokenizer.json").read_text())
TEXTS = [*EXPECTED["texts"], "\x00\x7f\u0080 ﷽ 👩‍👩‍👧 <end> <begin>", "a\r\n b"]


@pytest.fixture
def folder(tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


def model(vocab, extra=0):
    return DecoderConfig.gpt2(vocab, width=8, layers=1, heads=2, context=8, extra=extra)


def rewrite(path, **change):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_go_in_and_out(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=True) == [257, *ids]
    padded = np.array([-1, 257, *ids, 256, -1])
    assert tokenizer.decode(padded) == text
    assert tokenizer.decode(padded, skip_special_tokens=False) == f"<begin>{text}<end>"


def test_any_bytes_decode():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xFF, 0x41, 0xE2, 0x98]) == "\ufffdA\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800")) == "a\ufffd\ufffd\ufffd"
    assert tokenizer.decode([65, 300]) == "A"
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.begin_id) == (257, (256,), 257)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat([])


def test_the_byte_tokenizer_is_an_ordinary_tokenizer_json(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path) == ByteTokenizer()
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.get_vocab_size() == 258
    for text in EXPECTED["texts"]:
        assert inner.encode(text).ids == ByteTokenizer().encode(text, add_special_tokens=True)
        assert inner.decode(ByteTokenizer().encode(text)) == text
    assert inner.encode("a<end>", add_special_tokens=False).ids == [97, 256]
    every = [i for i in range(256) if i < 128]
    assert inner.encode(bytes(every).decode(), add_special_tokens=False).ids == every


def test_ids_are_those_of_transformers():
    tokenizer = load_tokenizer(FOLDER)
    assert [tokenizer.encode(text) for text in EXPECTED["texts"]] == EXPECTED["ids"]
    wrapped = [tokenizer.encode(text, add_special_tokens=True) for text in EXPECTED["texts"]]
    assert wrapped == EXPECTED["ids_with_special_tokens"]
    assert [tokenizer.decode([-1, *ids, -1]) for ids in wrapped] == EXPECTED["texts"]
    assert (tokenizer.end_ids, tokenizer.begin_id, tokenizer.vocab_size) == ((1, 2), 0, 320)
    assert tokenizer.decode([0, 1, 9999], skip_special_tokens=False) == "<|text|><|end|>"


def test_chats_are_those_of_transformers():
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer.apply_chat(EXPECTED["messages"]) == EXPECTED["chat"]
    assert tokenizer.encode(EXPECTED["chat"]) == EXPECTED["chat_ids"]
    without = tokenizer.apply_chat(EXPECTED["messages"], add_generation_prompt=False)
    assert EXPECTED["chat"] == without + "<|start|>assistant\n"


def test_ends_come_from_the_first_file_that_names_them(folder):
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).end_ids == (1,)
    rewrite(folder / "config.json", eos_token_id=[5, 6])
    assert load_tokenizer(folder).end_ids == (5, 6)
    rewrite(folder / "tokenizer_config.json", eos_token="<|start|>")
    rewrite(folder / "config.json", eos_token_id=[1, 0, 2])
    assert load_tokenizer(folder).end_ids == (
        2,
        1,
        0,
    )  # what the tokenizer calls the end is written after completions
    rewrite(folder / "config.json", eos_token_id=None)
    rewrite(folder / "tokenizer_config.json", eos_token={"content": "<|start|>"}, bos_token=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_ids == (2,) and tokenizer.begin_id is None
    rewrite(folder / "generation_config.json", eos_token_id="x")
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: must be an id or a list"):
        load_tokenizer(folder)


def test_templates_of_older_files(folder):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template is None
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(folder).apply_chat([])
    chat = [{"role": "user", "content": "é<"}]
    rewrite(folder / "tokenizer_config.json", chat_template=source)
    assert load_tokenizer(folder).apply_chat(chat) == '<|text|>"é<"'
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    rewrite(folder / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(folder).apply_chat(chat) == '<|text|>"é<"'
    rewrite(folder / "tokenizer_config.json", chat_template=7)
    with pytest.raises(ValueError, match="chat_template: must be a string or a list"):
        load_tokenizer(folder)
    rewrite(folder / "chat_template.json", chat_template=source)
    assert load_tokenizer(folder).apply_chat(chat) == '<|text|>"é<"'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses these messages: no system turn"),
        ("a\n{% for %}", "line 2: the chat template is no valid Jinja"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe|is not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{% set n = namespace(_x=1) %}", "may not set '_x'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "may not set '_x'"),
        ("{{ messages[0].content + 1 }}", "failed: TypeError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
    ],
)
def test_templates_are_caught_and_confined(folder, template, message):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).apply_chat([{"role": "user", "content": "hi"}])


def test_templates_may_use_what_transformers_offers(folder):
    template = (
        "{% set n = namespace(count=0) %}{% for m in messages %}{% set n.count = n.count + 1 %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ n.count }} {{ tools is none }} {{ strftime_now('%Y') | length }} {{ mode }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "hi"}] * 3
    assert load_tokenizer(folder).apply_chat(chat, mode="x") == "hi2 True 4 x"


def test_messages_are_checked():
    tokenizer = load_tokenizer(FOLDER)
    with pytest.raises(ValueError, match="message 1: must be an object with a role"):
        tokenizer.apply_chat([{"role": "user", "content": "x"}, {"content": "x"}])
    with pytest.raises(ValueError, match="messages must be plain JSON"):
        tokenizer.apply_chat([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="refuses these messages: unknown role: tool"):
        tokenizer.apply_chat([{"role": "tool", "content": "x"}])


def test_the_tokenizer_must_fit_the_model():
    ours, theirs = ByteTokenizer(), load_tokenizer(FOLDER)
    check_vocabulary(ours, model(257, extra=1), "here")
    check_vocabulary(ours, model(300), "here")
    check_vocabulary(theirs, model(320), "here")
    check_vocabulary(theirs, model(512), "here")
    with pytest.raises(ValueError, match=r"^here: the tokenizer has ids up to 257, but .* 257 rows"):
        check_vocabulary(ours, model(257), "here")
    with pytest.raises(ValueError, match=r"ids up to 319, but .* 319 rows"):
        check_vocabulary(theirs, model(319), "here")
    with pytest.raises(ValueError, match=r"ends texts with id 256; the model emits 0\.\.255"):
        check_vocabulary(ours, model(256, extra=2), "here")


def test_what_cannot_be_opened_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "nothing")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer that tokenizers \d"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing$"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing; convert tokenizer\.model"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load_tokenizer(folder)


def test_saving_copies_the_files(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "out")
    tokenizer.save(folder)
    again = load_tokenizer(tmp_path / "out")
    assert again.apply_chat(EXPECTED["messages"]) == EXPECTED["chat"] and again.end_ids == (1, 2)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
