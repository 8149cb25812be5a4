"""How a model card says that an export is run: the hub's metadata and lines to paste, by the runtime that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.dtypes import WEB_LAYOUT
from vlmexport.families.transformersjs import WEB_FAMILIES
from vlmexport.genai_options import GENAI_LAYOUT
from vlmexport.model.json_files import read_json_if_there
from vlmexport.variants import variant_names

if TYPE_CHECKING:
    from vlmexport.manifest import Manifest

# Names of libraries as the hub has them (huggingface.js, model-libraries.ts); genai has none of its own there.
_LIBRARIES = {WEB_LAYOUT: "transformers.js"}
_RUNTIMES = {WEB_LAYOUT: "transformers.js", GENAI_LAYOUT: "onnxruntime-genai"}
_TAGS = {WEB_LAYOUT: ("transformers.js",), GENAI_LAYOUT: ("onnxruntime-genai",)}


def library(layout: str) -> str:
    """The hub's ``library_name`` of an export of `layout`."""
    return _LIBRARIES.get(layout, "onnx")


def tags(layout: str) -> tuple[str, ...]:
    """Tags beside ``onnx`` and ``vlmexport``."""
    return _TAGS.get(layout, ())


def runtime(layout: str) -> str:
    """What the export is for, in words."""
    return _RUNTIMES.get(layout, "ONNX Runtime")


def usage(manifest: Manifest, source: Path) -> list[str]:
    """Lines of the section that runs it, up to an open block of shell commands; `source` is the original's folder."""
    if manifest.model.get("output") == "embeddings":
        return [*_EMBEDDINGS, "", "```sh"]
    if manifest.layout == WEB_LAYOUT:
        return [*_javascript(manifest, source), "", "```sh", "vlmexport web ."]
    if manifest.layout == GENAI_LAYOUT:
        return [*_GENAI, "", "```sh"]
    return ["```sh", 'vlmexport run . --image picture.png --prompt "What is in this picture?"']


def _javascript(manifest: Manifest, source: Path) -> list[str]:
    names = variant_names(manifest)
    family = WEB_FAMILIES.get(str(read_json_if_there(source / "config.json").get("model_type")))
    order = "picture, prompt" if family is not None and family.images_first else "prompt, picture"
    return [
        f"Precisions in it (`dtype`): {', '.join(f'`{name}`' for name in names)}; the first is the default.",
        "",
        "```js",
        'import { AutoModelForImageTextToText, AutoProcessor, RawImage } from "@huggingface/transformers";',
        "",
        'const id = "OWNER/NAME";  // where this folder is on the hub, or below env.localModelPath',
        "const processor = await AutoProcessor.from_pretrained(id);",
        f'const model = await AutoModelForImageTextToText.from_pretrained(id, {{ dtype: "{names[0]}" }});',
        'const content = [{ type: "image" }, { type: "text", text: "What is in this picture?" }];',
        'const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });',
        'const picture = [await RawImage.read("picture.png")];',
        f"const inputs = await processor({order});",
        "const made = await model.generate({ ...inputs, max_new_tokens: 100, do_sample: false });",
        "const answer = made.slice(null, [inputs.input_ids.dims.at(-1), null]);",
        "console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0]);",
        "```",
    ]


_EMBEDDINGS = (
    "It gives an embedding of length 1 for each token of a page or a query; the score of a page is the sum, over",
    "the query's embeddings, of the best product with one of the page's.",
    "",
    "```python",
    "from pathlib import Path",
    "from vlmexport.manifest import open_artifact",
    "from vlmexport.runtime.retrieval import RetrievalRunner",
    "from vlmexport.runtime.retrieval_inputs import RetrievalInputs",
    "",
    'inputs, runner = RetrievalInputs(Path(".")), RetrievalRunner(open_artifact(Path(".")))',
    'page, _ = runner.embeddings([inputs.page(Path("page.png"))])',
    'query, _ = runner.embeddings([inputs.query("How many shapes?")])',
    "score = (query[0] @ page[0].T).max(axis=1).sum()",
    "```",
)
_GENAI = (
    "```python",
    "import json",
    "import onnxruntime_genai as og",
    "",
    'model = og.Model(".")',
    "processor = model.create_multimodal_processor()",
    'content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]',
    'messages = json.dumps([{"role": "user", "content": content}])',
    "prompt = og.Tokenizer(model).apply_chat_template(messages, add_generation_prompt=True)",
    "settings = og.GeneratorParams(model)",
    "settings.set_search_options(max_length=2048, do_sample=False)",
    "generator = og.Generator(model, settings)",
    'generator.set_inputs(processor(prompt, images=og.Images.open("picture.png")))',
    "stream = processor.create_stream()",
    "while not generator.is_done():",
    "    generator.generate_next_token()",
    '    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)',
    "```",
)
