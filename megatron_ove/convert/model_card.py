"""The README.md of an export: what the model is, how it was trained, how to use it, what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ove.config.objectives import source_names
from megatron_ove.kinds import kinds_of

_HEADER = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- vision
- onevision_encoder
---
"""

_USAGE = """## Use

Needs torch and transformers 4.57 or 5.x. `trust_remote_code=True` runs the two Python files of this folder.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")

# An image. Any size works; the processor makes {image_size} x {image_size}.
pixels = processor(images=Image.open("picture.jpg"), return_tensors="pt").pixel_values  # [1, 3, H, W]
with torch.inference_mode():
    output = model(pixels)
output.last_hidden_state  # [1, tokens, {hidden}]{pooled_line}
```

**A clip**: `frames` [n, 3, H, W], processed as above, taken at the frame numbers `index` of a clip of `length`
frames. Time is counted on a grid of {temporal} frames, whatever the clip's length:

```python
rows, columns = frames.shape[-2] // {patch}, frames.shape[-1] // {patch}
times = (torch.tensor(index) / (length - 1) * {last_frame}).round().long()
places = torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns))  # [n * rows * columns, 3] = (t, h, w)
clip = frames.transpose(0, 1)[None]  # [1, 3, n, H, W]
with torch.inference_mode():
    output = model(clip, patch_positions=places[None])
```

With {temporal} frames, `model(clip, visible_indices=indices)` encodes only the patches at `indices` [1, s], counted
t * rows * columns + h * columns + w.

**Selected patches of a clip**: `patches` [s, 3, {patch}, {patch}] and their `places` [s, 3] = (t, h, w), laid side
by side in a strip:

```python
strip = patches.permute(1, 2, 0, 3).reshape(1, 3, {patch}, -1)
with torch.inference_mode():
    output = model(strip, patch_positions=places[None])
```

Attention is `sdpa`, or `eager` if attention weights are wanted (`attn_implementation="eager"`, then
`output_attentions=True`). `flash_attention_2` is not offered; sdpa uses torch's flash kernel where it can.
"""

_LIMITS = """## Limits

- All samples of a batch must have equally many tokens: there is no padding mask.
- The image processor crops the centre, which suits photographs. For a page, keep everything: resize it whole, aspect
  kept, to a multiple of the patch size per side, and set `do_center_crop=False, do_resize=False`.
- Positions are not interpolated. Pictures much larger than those trained on have positions never seen.
- Labels were made by programs (OCR, clustering), so whatever those miss or confuse, the encoder has learned.
- It was evaluated only as far as its run's report says. Do not use it where a wrong answer harms someone
  without testing it.
"""


def describe_model(
    values: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    num_parameters: int,
    num_words: Mapping[str, int] | None = None,
    has_class_centers: bool = False,
) -> str:
    """Returns the model card.

    Args:
        values: content of config.json.
        facts: plain values of the checkpoint: step, config, train_state.
        num_parameters: of the exported model.
        num_words: vocabulary in the folder -> its words.
        has_class_centers: whether the folder holds the heads' class centers.
    """
    usage = _USAGE.format(
        image_size=values["image_size"],
        hidden=values["hidden_size"],
        patch=values["patch_size"],
        temporal=values["rope_temporal_size"],
        last_frame=values["rope_temporal_size"] - 1,
        pooled_line=f"\noutput.pooler_output  # [1, {values['hidden_size']}]" if values["use_head"] else "",
    )
    name = facts["config"].get("name", "OneVision-Encoder")
    training = _training(facts, num_words or {}, has_class_centers)
    parts = [f"{_HEADER}\n# {name}\n", _architecture(values, num_parameters), training, usage, _LIMITS]
    return "\n".join(parts)


_READER_HEADER = """---
library_name: transformers
pipeline_tag: image-to-text
tags:
- vision
- ocr
---
"""

_READER_USAGE = """## Use

Needs torch and transformers 4.57 or 5.x. `trust_remote_code=True` runs the Python files of this folder.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("FOLDER")

# Sides must be whole patches of {patch} pixels. Pages are shown whole, at their own aspect.
options = {{"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}}
pixels = processor(images=Image.open("page.png"), **options).pixel_values  # [1, 3, H, W]
print(tokenizer.batch_decode(model.generate(pixels, max_new_tokens=256), skip_special_tokens=True)[0])
```

A text may have several pictures: pass a list of lists of pictures [3, H, W]. `questions` takes token ids of what is
asked; without it the question of training is asked. Further options are those of transformers' `generate`.
"""


def describe_reader(facts: Mapping[str, Any], objective: str, *, num_parameters: int) -> str:
    """Returns the model card of a reader.

    Args:
        facts: plain values of the checkpoint.
        objective: that the decoder belongs to.
        num_parameters: of encoder, bridge and decoder.
    """
    config = facts["config"]
    section, encoder = config["objectives"][objective], config["encoder"]
    learns = kinds_of(config).objectives[section["kind"]].describe(section)
    architecture = (
        f"A vision encoder of {encoder['num_layers']} layers, {encoder['hidden_size']} wide, with patches of "
        f"{encoder['patch_size']} pixels, a {section['bridge']['kind']} bridge, and a decoder: {num_parameters:,} "
        f"parameters. It learned {learns}. Trained with megatron_ove.\n"
    )
    usage = _READER_USAGE.format(patch=encoder["patch_size"])
    name = config.get("name", "OneVision-Reader")
    return "\n".join([f"{_READER_HEADER}\n# {name}\n", architecture, _training(facts, {}, False), usage])


def _architecture(values: Mapping[str, Any], num_parameters: int) -> str:
    head = "with its attention-pooling head" if values["use_head"] else "without pooling head and final norm"
    return (
        f"A vision encoder for images, pages with text and clips, {head}: {num_parameters:,} parameters, "
        f"{values['num_hidden_layers']} layers, hidden size {values['hidden_size']}, {values['num_attention_heads']} "
        f"heads, MLP {values['intermediate_size']}, patches of {values['patch_size']} pixels, 3-D rotary positions. "
        "Names and shapes are those of the OneVision-Encoder. Trained with megatron_ove; weights are stored in "
        f"{values['dtype']}.\n"
    )


_CENTERS = """
`class_centers/NAME.safetensors` holds the class centers of head NAME, in the order of class ids: the nearest ones to a
picture's embedding are the classes that the head sees on it.

```python
from safetensors.torch import load_file

head = load_file("FOLDER/class_centers/NAME.safetensors")
embedding = output.pooler_output - head.get("embedding_mean", 0.0)
scores = torch.nn.functional.cosine_similarity(embedding[:, None], head["class_centers"][None], dim=-1)
```
"""


def _training(facts: Mapping[str, Any], num_words: Mapping[str, int], has_class_centers: bool) -> str:
    config = facts["config"]
    if "objectives" not in config:
        return f"## Training\n\nImported from {facts.get('imported_from', 'elsewhere')} and not trained further.\n"
    state, kinds = facts.get("train_state", {}), kinds_of(config).objectives
    lines = [
        "## Training\n",
        f"{facts['step']:,} of {config['train']['num_steps']:,} steps, {state.get('samples_seen', 0):,} samples "
        f"({config['train']['global_batch_size']} a step), {config['train']['precision']}, seed {config['seed']}.\n",
        "| source | kind | weight |\n|---|---|---|",
        *(f"| {name} | {item['kind']} | {item['weight']:g} |" for name, item in config["data"]["sources"].items()),
        "\n| objective | kind | source | learns | loss weight |\n|---|---|---|---|---|",
        *(
            f"| {name} | {item['kind']} | {', '.join(source_names(item))} | {kinds[item['kind']].describe(item)} | "
            f"{item['loss_weight']:g} |"
            for name, item in config["objectives"].items()
        ),
        _CENTERS if has_class_centers else "\nThe heads' class centers are not part of this export.\n",
        *(
            f"`{path}` holds the {count:,} words of a head's classes, in the order of class ids.\n"
            for path, count in num_words.items()
        ),
    ]
    return "\n".join(lines)
