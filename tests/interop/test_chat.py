"""Chat templates give the text of `transformers`; a folder's tokenizer gives its ids."""

import json
import shutil

import pytest
from golden import GOLDEN

from lcx.interop.chat import ChatError, ChatTemplate, chat_template
from lcx.interop.folder import Folder
from lcx.spec import SpecError
from lcx.training.pretrained import pretrained, tokenizer_of

FOLDER = GOLDEN / "llama3.1"
CHAT = json.loads((FOLDER / "chat.json").read_text())


def test_text_is_that_of_transformers():
    template = chat_template(FOLDER)
    assert template.render(CHAT["messages"]) == CHAT["asked"]
    assert template.render(CHAT["messages"][:3], answer=False) == CHAT["whole"]


def test_ids_are_those_of_transformers():
    tokenizer = tokenizer_of(Folder(FOLDER))
    assert tokenizer.prompt("hi, you").tolist() == CHAT["prompt"]
    assert tokenizer.encode("hi, you").tolist() == CHAT["plain"]
    assert tokenizer.decode(CHAT["prompt"]) == "hi, you"
    assert tokenizer.stops == (1, 2)  # of the tokenizer and the generation config


def test_turns_tell_what_the_model_said():
    pieces = chat_template(FOLDER).turns(CHAT["messages"])
    assert pieces == [("<s><s>be kind</s><u>hi there</s><a>", False), ("hello</s>", True)]
    changes = ChatTemplate("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}")
    with pytest.raises(ChatError, match=r"messages\[1\]: the chat template writes what stands before it otherwise"):
        changes.turns(CHAT["messages"][1:3])


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "messages are empty"),
        ([{"role": "user"}], "expected an object with role and content"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses them: no role tool"),
    ],
)
def test_messages_that_are_refused(messages, line):
    with pytest.raises(ChatError, match=line):
        chat_template(FOLDER).render(messages)


def test_a_template_says_what_it_reads():
    assert not chat_template(FOLDER).reads("tools")
    assert ChatTemplate("{% if x %}{% set tools = x %}{% endif %}{% for one in tools %}{{ one }}{% endfor %}").reads("tools")


def test_a_template_cannot_reach_out():
    with pytest.raises(ChatError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([{"role": "user", "content": ""}])


def test_what_the_model_says_may_be_marked():
    template = ChatTemplate("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}")
    assert template.render(CHAT["messages"][1:3], answer=False) == "hi there;hello;"


def test_folders_without_a_part_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "a")
    with pytest.raises(SpecError, match=r"no chat_template\.jinja, and no chat_template"):
        chat_template(tmp_path / "a")
    with pytest.raises(SpecError, match=r"tokenizer\.json: there is no such file"):
        pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "{% for"}')
    with pytest.raises(SpecError, match="the chat template is no Jinja template"):
        chat_template(tmp_path / "a")
    shutil.copyfile(FOLDER / "tokenizer.json", tmp_path / "a" / "tokenizer.json")
    with pytest.raises(SpecError, match="no eos_token"):
        pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "entries", "line"),
    [
        ("config.json", {"vocab_size": 5}, "vocab_size = 5: expected at least the 37 ids of its tokenizer.json"),
        ("config.json", {"eos_token_id": "a"}, "eos_token_id = 'a': expected a token's id or a list of ids"),
        ("generation_config.json", {"eos_token_id": [1, 99]}, r"eos_token_id = \[1, 99\]: 99 is no id of tokenizer.json"),
    ],
)
def test_a_config_that_does_not_fit_the_tokenizer_is_named(file, entries, line, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "a")
    said = json.loads((FOLDER / file).read_text()) | entries
    (tmp_path / "a" / file).write_text(json.dumps(said))
    with pytest.raises(SpecError, match=f"{file}: {line}"):
        pretrained(tmp_path / "a")


def test_older_forms_of_a_template(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "a")
    source = (FOLDER / "chat_template.jinja").read_text()
    (tmp_path / "a" / "chat_template.jinja").unlink()
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": [{"name": "default", "template": source}]}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_template(tmp_path / "a").render(CHAT["messages"]) == CHAT["asked"]
