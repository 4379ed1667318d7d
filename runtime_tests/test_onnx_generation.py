"""Text from onnxruntime-genai against transformers on the same weights: greedy tokens, chat templates, end tokens.

At accuracy_level 0 both compute in float32 and differ in the order of sums only, so greedy tokens are equal up to the
first position where the two likeliest tokens lie closer than TIE; on the bundled model there is no such position.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import signround
from exporters.onnx.exporter import OnnxExporter
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.runtimes.genai import open_genai
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

og = pytest.importorskip("onnxruntime_genai")
EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"
PROMPTS = (
    "Once upon a time",
    "The capital of the country is",
    "In the year 1984 the",
    "She opened the door and",
    "Water is made of two",
)
NEW, TIE = 64, 1e-4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MESSAGES = [{"role": "user", "content": 'Tell me a "story", please: 1 < 2 & é.\nThanks '}]


def exported(artifact: QuantizedCheckpoint, folder: Path) -> Path:
    return OnnxExporter(accuracy_level=0).export(artifact, folder, silent).target


@torch.no_grad()
def generated(model: Any, prompt: Tensor, count: int = NEW, **settings: Any) -> Tensor:
    """The greedy continuation by transformers."""
    mask = torch.ones_like(prompt[None])
    return torch.as_tensor(
        model.generate(prompt[None], attention_mask=mask, max_new_tokens=count, do_sample=False, **settings)
    )[0, len(prompt) :]


def shown(tokens: Tensor, ends: tuple[int, ...]) -> Tensor:
    """As onnxruntime-genai tells a sequence: without the end token, which transformers keeps."""
    return tokens[:-1] if len(tokens) and int(tokens[-1]) in ends else tokens


@torch.no_grad()
def first_tie(model: Any, prompt: Tensor, continuation: Tensor) -> int:
    """How many tokens of a greedy continuation come before one that float noise could have decided."""
    logits = model(torch.cat([prompt, continuation])[None]).logits[0, len(prompt) - 1 : -1]
    best = logits.float().topk(2, dim=-1).values
    close = (best[:, 0] - best[:, 1] < TIE).nonzero()
    return int(close[0]) if len(close) else len(continuation)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    """The bundled model, tuned for some steps, and its folder for onnxruntime-genai."""
    folder = tmp_path_factory.mktemp("tuned")
    signround.quantize(EXAMPLE, "w4g32", folder / "out", samples=4, seqlen=32, iters=4)
    artifact = QuantizedCheckpoint(folder / "out" / "artifact")
    return artifact, exported(artifact, folder / "onnx")


def test_greedy_text_of_the_tuned_model_is_transformers(tuned: tuple[QuantizedCheckpoint, Path]) -> None:
    from transformers import AutoTokenizer

    artifact, folder = tuned
    model, tokenizer = signround.load(artifact.folder), AutoTokenizer.from_pretrained(folder)
    runtime = open_genai(folder)
    texts = set()
    for text in PROMPTS:
        prompt = tokenizer(text, return_tensors="pt")["input_ids"][0]
        wanted = generated(model, prompt)
        assert first_tie(model, prompt, wanted) == len(wanted)
        found = runtime.greedy(prompt, NEW)
        assert torch.equal(found, shown(wanted, (tokenizer.eos_token_id,)))
        texts.add(tokenizer.decode(found))
    assert len(texts) == len(PROMPTS)


@pytest.mark.parametrize(
    ("family", "scheme", "overrides"),
    [
        ("qwen3", "w4g32", {}),
        ("qwen3", "w2g64-asym", {}),
        ("mistral", "w4g32", {"sliding_window": 16}),
        ("gemma2", "w8g32", {}),
        pytest.param("gemma3", "w4g32-asym", {}, marks=pytest.mark.slow),
        pytest.param("phi3", "w4g32", {}, marks=pytest.mark.slow),
        pytest.param("smollm3", "w4g32", {}, marks=pytest.mark.slow),
        pytest.param("granite", "w4g32", {}, marks=pytest.mark.slow),
        pytest.param("olmo2", "w3g32", {}, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_of_other_families(family: str, scheme: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Random models, whose likeliest tokens can lie close together; windows are passed several times."""
    write_small_model(tmp_path / "model", family, **overrides)
    artifact = write_rounded_artifact(tmp_path / "model", tmp_path / "artifact", scheme)
    model, runtime = signround.load(artifact.folder), open_genai(exported(artifact, tmp_path / "onnx"))
    compared = 0
    for seed in range(5):
        prompt = torch.randint(2, 512, (12,), generator=torch.Generator().manual_seed(seed))
        wanted = generated(model, prompt)
        sure = first_tie(model, prompt, wanted)
        assert torch.equal(runtime.greedy(prompt, NEW)[:sure], shown(wanted, (1,))[:sure])
        compared += sure
    assert compared > NEW  # ties are rare, and so is an early end


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """The bundled model as a chat model: a template beside its tokenizer."""
    shutil.copytree(EXAMPLE, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tmp_path / "model"


def test_a_chat_turn(chatty: Path, tmp_path: Path) -> None:
    """Template, tokens, answer and its end are those of transformers. The second end token is one that the model will
    say, so that the turn must end there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatty)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    artifact = write_rounded_artifact(chatty, tmp_path / "first", "w4g32")
    free = generated(signround.load(artifact.folder), prompt, 24).tolist()
    end = next(token for index, token in enumerate(free) if index >= 8 and token not in free[:index])
    ends = [tokenizer.eos_token_id, end]
    (chatty / "generation_config.json").write_text(json.dumps({"bos_token_id": 4094, "eos_token_id": ends}))
    artifact = write_rounded_artifact(chatty, tmp_path / "second", "w4g32")
    wanted = generated(signround.load(artifact.folder), prompt, eos_token_id=ends, pad_token_id=ends[0])
    assert wanted[-1] == end
    assert len(wanted) < 24

    folder = exported(artifact, tmp_path / "onnx")
    model = og.Model(str(folder))
    encoder = og.Tokenizer(model)
    assert [int(token) for token in encoder.eos_token_ids] == ends
    rendered = encoder.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    assert rendered == text
    assert [int(token) for token in encoder.encode(rendered)] == prompt.tolist()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW)  # greedy is what generation_config.json asks for
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answer = torch.tensor([int(token) for token in generator.get_sequence(0)])[len(prompt) :]
    assert torch.equal(answer, shown(wanted, tuple(ends)))
    assert encoder.decode(answer.numpy().astype(np.int32)) == tokenizer.decode(answer)


TEMPLATES = {
    "chatml": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|system|>Be kind.<|end|>\n"
    "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "numbered": "{{ bos_token }}{%- for m in messages -%}\n{{ loop.index0 }}{{ '. ' + m.role | lower }}: "
    "{{ m.content | trim }}{% if not loop.last %};{% endif %}{%- endfor %}{{ eos_token }}",
    "turns": "{%- set ns = namespace(count=0) -%}{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}{%- for m in rest -%}"
    "{%- set ns.count = ns.count + 1 -%}{%- if m['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = m['role'] -%}{%- endif -%}<start>{{ role }}\n{{ m['content'] | trim }}<stop>\n{%- endfor -%}"
    "{{ ns.count }}{%- if add_generation_prompt -%}<start>model\n{%- endif -%}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] ~ '\n' }}"
    "{% endif %}{% endfor %}",
}
CONVERSATIONS = [
    MESSAGES,
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}],
    [*MESSAGES, {"role": "assistant", "content": "No.\n\n"}, {"role": "user", "content": "Why?\ttab 'quoted' 日本"}],
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_small_model(folder / "model", "llama", layers=1)
    return exported(write_rounded_artifact(folder / "model", folder / "artifact", "w4g32"), folder / "onnx")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, plain: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(plain, tmp_path / "onnx")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATES[name]}))
    theirs, ours = AutoTokenizer.from_pretrained(folder), og.Tokenizer(og.Model(str(folder)))
    for messages in CONVERSATIONS:
        for prompted in (True, False):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
            assert ours.apply_chat_template(json.dumps(messages), add_generation_prompt=prompted) == wanted


def test_what_the_tokenizer_of_onnxruntime_genai_must_be_told(plain: Path, tmp_path: Path) -> None:
    """Facts that docs/onnx.md states: no begin token unless it is asked for; a tokenizer_config.json must be there; a
    list of templates stops it; its own copy of the template wins over chat_template.jinja; some filters are unknown."""
    encoder = og.Tokenizer(og.Model(str(plain)))
    without = [int(token) for token in encoder.encode("Hi there")]
    encoder.update_options(add_special_tokens="true")
    assert [int(token) for token in encoder.encode("Hi there")] == [0, *without]
    folder = shutil.copytree(plain, tmp_path / "onnx")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    (folder / "chat_template.jinja").write_text("beside")
    config.write_text(json.dumps(settings | {"chat_template": "inside"}))
    assert og.Tokenizer(og.Model(str(folder))).apply_chat_template("[]") == "inside"
    config.write_text(json.dumps(settings | {"chat_template": "{{ messages[0]['content'] | upper }}"}))
    with pytest.raises(RuntimeError, match="Value is not callable"):
        og.Tokenizer(og.Model(str(folder))).apply_chat_template(json.dumps(MESSAGES))
    config.write_text(json.dumps(settings | {"chat_template": [{"name": "default", "template": "x"}]}))
    with pytest.raises(Exception, match="must be string, but is array"):
        og.Tokenizer(og.Model(str(folder)))
    config.unlink()
    with pytest.raises(Exception, match="Failed to open a json file"):
        og.Tokenizer(og.Model(str(folder)))
