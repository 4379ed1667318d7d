"""The files beside the graph: config, tokenizer, chat template, generation settings, as each runtime reads them.

onnxruntime-genai and transformers.js take the chat template from tokenizer_config.json; newer checkpoints keep it in
chat_template.jinja, which transformers prefers. Both are written and say the same. onnxruntime-genai cannot open a
tokenizer_config.json that holds several named templates (measured, 0.18): it gets the default one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.onnx.layouts import GENAI
from signround.checkpoint import TOKENIZER_FILES, additional_templates
from signround.files import read_json
from signround.plan import ModelPlan

TOKENIZER_CONFIG = "tokenizer_config.json"
DEFAULT = "default"
GENERIC_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast"}  # both runtimes insist on a tokenizer_config.json

SideFiles = Mapping[str, Path | str]  # name in the folder -> the file to copy, or the text to write


def chat_templates(files: Path) -> dict[str, str]:
    """Name -> template; `default` is the one that chats use. Read in transformers' order: chat_template.jinja with its
    additional_chat_templates first, then tokenizer_config.json."""
    plain = files / "chat_template.jinja"
    found = {path.stem: path.read_text() for path in additional_templates(files)}
    if plain.is_file():
        return {DEFAULT: plain.read_text(), **found}
    given = _tokenizer_config(files).get("chat_template")
    if isinstance(given, str):
        return {DEFAULT: given, **found}
    return {str(entry["name"]): str(entry["template"]) for entry in given or ()} | found


def _tokenizer_config(files: Path) -> dict[str, Any]:
    return read_json(files / TOKENIZER_CONFIG)


def side_files(plan: ModelPlan, layout: str, configs: Mapping[str, Mapping[str, Any]]) -> SideFiles:
    """Everything but graph and data. `configs` are the JSON files that the layout adds or changes."""
    found: dict[str, Path | str] = {
        name: plan.files / name for name in ("config.json", *TOKENIZER_FILES) if (plan.files / name).is_file()
    }
    settings = _tokenizer_config(plan.files)
    wanted = _for_runtime(chat_templates(plan.files), layout)
    if TOKENIZER_CONFIG not in found and "tokenizer.json" in found:
        settings = dict(GENERIC_TOKENIZER)
        found[TOKENIZER_CONFIG] = _text(settings)
    if wanted != settings.get("chat_template") and TOKENIZER_CONFIG in found:
        settings.pop("chat_template", None)
        found[TOKENIZER_CONFIG] = _text(settings | ({} if wanted is None else {"chat_template": wanted}))
    return found | {name: _text(content) for name, content in configs.items()}


def _for_runtime(templates: Mapping[str, str], layout: str) -> str | list[dict[str, str]] | None:
    """What tokenizer_config.json is to hold under chat_template."""
    if layout == GENAI or set(templates) <= {DEFAULT}:
        return templates.get(DEFAULT)
    return [{"name": name, "template": template} for name, template in templates.items()]


def template_note(files: Path, layout: str) -> str | None:
    """Which named templates onnxruntime-genai will not see."""
    named = [name for name in chat_templates(files) if name != DEFAULT]
    if layout != GENAI or not named:
        return None
    return f"onnx: onnxruntime-genai reads one chat template, the default; {', '.join(named)} must be passed by hand."


def size_of(files: SideFiles) -> int:
    """Bytes that `write` will write."""
    return sum(len(item.encode()) if isinstance(item, str) else item.stat().st_size for item in files.values())


def write(files: SideFiles, folder: Path) -> None:
    """Copy or write each file into `folder`."""
    for name, item in files.items():
        if isinstance(item, str):
            (folder / name).write_text(item)
        else:
            shutil.copyfile(item, folder / name)


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
