"""What the model reads, to the character and to the token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdrl_pl.data.template import FewShot, Renderer, RowError, Template
from kdrl_pl.models.character_tokenizer import character_tokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .?:=+<>/{}|\n"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking is defined and not thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


def plain_tokenizer():
    return character_tokenizer(ALPHABET)


def chat_tokenizer():
    return character_tokenizer(ALPHABET, chat_template=CHAT)


def llama_like(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Adds `<s>` in front of every text unless told not to, as Llama's tokenizers do."""
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate("abc[] \n", 2)}}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def render(template: Template, tokenizer, prompt) -> tuple[str, list[int]]:
    renderer = Renderer(template, tokenizer)
    text = renderer.render(prompt)
    return text, renderer.encode([text])[0]


def test_chat_ids_equal_those_of_apply_chat_template():
    tokenizer = chat_tokenizer()
    text, ids = render(Template(), tokenizer, "1+1=?")
    assert text == "<user>1+1=?<eos><assistant>"
    messages = [{"role": "user", "content": "1+1=?"}]
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_chat_with_everything():
    template = Template(
        chat_template_kwargs={"thinking": False},
        system_prompt="Be brief.",
        few_shot=[FewShot("a?", "b"), FewShot("c?", "d")],
        response_prefix="So: ",
    )
    text, ids = render(template, chat_tokenizer(), "e?")
    assert text == (
        "<system>Be brief.<eos><user>a?<eos><assistant>b<eos><user>c?<eos><assistant>d<eos><user>e?<eos>"
        "<assistant><think></think>So: "
    )
    assert chat_tokenizer().decode(ids) == text


def test_a_list_of_messages_keeps_its_own_system_message_and_turns():
    template = Template(system_prompt="common", few_shot=[FewShot("x", "y")])
    messages = [
        {"role": "system", "content": "own", "name": None},  # parquet fills keys of other rows with null
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text, _ = render(template, chat_tokenizer(), messages)
    assert text == ("<system>own<eos><user>x<eos><assistant>y<eos><user>a<eos><assistant>b<eos><user>c<eos><assistant>")


def test_plain_text():
    assert render(Template(), plain_tokenizer(), "12+3=")[0] == "12+3="
    template = Template(
        system_prompt="Add.", text="Q: {prompt}\nA:", few_shot=[FewShot("1+1", " 2")], response_prefix=" <think>"
    )
    text, ids = render(template, plain_tokenizer(), "{2}+{prompt}")
    assert text == "Add.\n\nQ: 1+1\nA: 2\n\nQ: {2}+{prompt}\nA: <think>"  # braces of the question stay
    assert plain_tokenizer().decode(ids) == text


def test_chat_auto_true_and_false():
    assert render(Template(chat=False), chat_tokenizer(), "a")[0] == "a"
    assert render(Template(chat=True), chat_tokenizer(), "a")[0] == "<user>a<eos><assistant>"
    with pytest.raises(ValueError, match=r"template\.chat is true but the tokenizer has no chat template; set"):
        Renderer(Template(chat=True), plain_tokenizer())
    with pytest.raises(ValueError, match=r"template\.text is 'Q: '; it must hold \{prompt\}"):
        Renderer(Template(text="Q: "), plain_tokenizer())


def test_one_beginning_of_sequence_token_whoever_writes_it():
    text, ids = render(Template(), llama_like(), "abc")
    assert (text, ids) == ("<s>abc", [0, 2, 3, 4]) == ("<s>abc", llama_like()("abc")["input_ids"])
    text, ids = render(Template(), llama_like(STRICT), "ab")
    assert (text, ids) == ("<s>[ab]", [0, 5, 2, 3, 6])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is null; expected text or a list of messages"),
        (17, "the prompt is 17; expected text"),
        ("  \n", "the prompt is empty"),
        ([], r"the prompt is \[\]; expected"),
        ([{"role": "user"}], "message 1 of the prompt is {'role': 'user'}; expected"),
        ([{"role": "user", "content": ["parts"]}], "message 1 of the prompt"),
        (["text"], "message 1 of the prompt is 'text'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "do not end with a question"),
        ([{"role": "system", "content": "a"}], "do not end with a question"),
        ("\ud800", "no proper Unicode"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, message):
    with pytest.raises(RowError, match=message):
        Renderer(Template(), chat_tokenizer()).render(prompt)


def test_messages_without_a_chat_template_and_templates_that_refuse():
    with pytest.raises(RowError, match=r"plain text cannot show it: set template\.chat to true"):
        Renderer(Template(), plain_tokenizer()).render([{"role": "user", "content": "a"}])
    with pytest.raises(RowError, match="the chat template refuses the messages: roles must alternate"):
        Renderer(Template(system_prompt="s"), llama_like(STRICT)).render("a")


def test_text_frames_the_question_in_a_chat_too():
    tokenizer = character_tokenizer("abcQ?: \n", chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}")
    template = Template(text="Q: {prompt}?", few_shot=[FewShot("a", "b")])
    assert Renderer(template, tokenizer).render("c") == "Q: a?|b|Q: c?|"
    assert Renderer(template, tokenizer).render([{"role": "user", "content": "c"}]) == "Q: a?|b|c|"
