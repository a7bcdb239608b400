"""The memory that converting a LLaDA or Dream takes, compared with the size of its weights.

    python benchmarks/convert_memory.py [--kind llada] [--gigabytes 2] [--shards 4] [--folder DIR]

Writes a synthetic checkpoint in bfloat16 to a temporary folder (which needs twice its size), converts it, and converts
the result back, each in a process of its own. It prints the peak resident memory of each process, and that of one that
converts a checkpoint of a few kilobytes. The embedding has 32,000 rows of width 2,048; layers make up the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peak import peak_kib
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llamafactory_ddm.checkpoints.convert import convert

CLAIM = 0.25  # GB more than for a few kilobytes, whatever the size of the checkpoint
_ZEROS = b"\0" * 2**24


def shapes(kind: str, width: int, rows: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the weights of a model by their published names."""
    inner = 3 * width
    linear = {"q_proj": (width, width), "k_proj": (width, width), "v_proj": (width, width)}
    if kind == "llada":
        top, block = "model.transformer.", "model.transformer.blocks.{}."
        names = ("wte", "ln_f", "ff_out", "attn_norm", "ff_norm", "", "attn_out", "ff_proj", "up_proj", "ff_out")
    else:
        top, block = "model.", "model.layers.{}."
        names = ("embed_tokens", "norm", "", "input_layernorm", "post_attention_layernorm", "self_attn.", "o_proj")
        names = (*names, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    embedding, norm, head, first, second, attention, output, gate, up, down = names
    found = {f"{top}{embedding}.weight": (rows, width), f"{top}{norm}.weight": (width,)}
    found[f"{top}{head}.weight" if head else "lm_head.weight"] = (rows, width)
    linear[output] = (width, width)
    for number in range(layers):
        start = block.format(number)
        found |= {f"{start}{name}.weight": (width,) for name in (first, second)}
        found |= {f"{start}{attention}{name}.weight": shape for name, shape in linear.items()}
        if kind == "dream":
            found |= {f"{start}{attention}{name}.bias": (width,) for name in ("q_proj", "k_proj", "v_proj")}
        found |= {f"{start}{name}.weight": (inner, width) for name in (gate, up)}
        found[f"{start}{down}.weight"] = (width, inner)
    return found


def config(kind: str, width: int, rows: int, layers: int) -> dict[str, Any]:
    """Return config.json of a model."""
    tokens = {"vocab_size": rows, "mask_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "llada":
        sizes = {"d_model": width, "mlp_hidden_size": 3 * width, "n_layers": layers, "n_heads": 8, "n_kv_heads": 8}
        others = {"max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "weight_tying": False}
        return {"model_type": "llada", "embedding_size": rows, **sizes, **others, **tokens}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    return {"model_type": "Dream", **sizes, **heads, **tokens, "rope_theta": 1e6, "rms_norm_eps": 1e-6}


def write_shard(path: Path, part: dict[str, tuple[int, ...]]) -> int:
    """Write zeros in bfloat16, a few MB at a time, and return their size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in part.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, place, len(_ZEROS)):
            file.write(_ZEROS[: place - begin])
    return place


def write_checkpoint(folder: Path, kind: str, gigabytes: float, shards: int) -> int:
    """Write a checkpoint of about this size, and return the bytes of its weights."""
    width, rows = (2048, 32000) if gigabytes >= 0.5 else (64, 300)
    layer = sum(2 * s[0] * (s[1] if len(s) > 1 else 1) for n, s in shapes(kind, width, rows, 1).items() if ".0." in n)
    layers = max(1, round((gigabytes * 1e9 - 4 * rows * width) / layer))
    weights = shapes(kind, width, rows, layers)
    folder.mkdir(parents=True)
    index, size = {}, 0
    names = list(weights)
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        size += write_shard(folder / file, {name: weights[name] for name in part})
        index |= dict.fromkeys(part, file)
    table = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    (folder / "config.json").write_text(json.dumps(config(kind, width, rows, layers)))
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "<|mask|>": 1, "a": 2}, merges=[]))
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, mask_token="<|mask|>"
    ).save_pretrained(folder)
    return size


def peak(source: Path, target: Path, way: str) -> tuple[float, float]:
    """Return the peak resident memory of a process that converts, in GB, and its seconds."""
    start = time.perf_counter()
    kib = peak_kib(_convert, source, target, way == "back")
    return kib * 1024 / 1e9, time.perf_counter() - start


def _convert(source: Path, target: Path, to_published: bool) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        convert(source, target, to_published=to_published)


def main() -> int:
    """Run the benchmark; return 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("llada", "dream"), default="llada")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights in bfloat16 (default: 2)")
    parser.add_argument("--shards", type=int, default=4, help="files (default: 4)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=arguments.folder))
    held = True
    try:
        write_checkpoint(work / "small", arguments.kind, 0.0, 2)
        base, _ = peak(work / "small", work / "small-out", "there")
        print(f"a process that converts a few kilobytes: {base:.2f} GB resident at its peak")
        size = write_checkpoint(work / "there", arguments.kind, arguments.gigabytes, arguments.shards)
        largest = max(path.stat().st_size for path in (work / "there").glob("*.safetensors"))
        files = f"the largest of {arguments.shards} files {largest / 1e9:.2f} GB"
        print(f"{arguments.kind}: {size / 1e9:.2f} GB of weights, {files}")
        for source, target, way in (("there", "plain", "there"), ("plain", "back", "back")):
            found, seconds = peak(work / source, work / target, way)
            shutil.rmtree(work / source)
            more = found - base
            held &= more <= CLAIM
            said = "into a plain model" if way == "there" else "back into its layout"
            print(
                f"{said:20}  {found:.2f} GB, {more:+.2f} GB  claimed <= {CLAIM:+.2f} GB  "
                f"{'held' if more <= CLAIM else 'NOT HELD'}  ({seconds:.0f} s)"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
