"""Train the built-in model's tokenizer: byte-level BPE, at most 1024 tokens, each digit one token.

python data/make_tokenizer.py          writes into tiny_gpt2/ beside this file
python data/make_tokenizer.py --out D  writes into D
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from make_corpus import RENAMED, rename
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
END = "<|endoftext|>"
VOCABULARY = 1024
# Merges that only the renamed places use, and those that take their ranks and ids.
RENAMED_MERGES = {
    ("a", "ch"): ("ad", "ow"),
    ("Ġbe", "ach"): ("Ġme", "adow"),
    ("Ġs", "ch"): ("e", "ld"),
    ("oo", "l"): ("i", "eld"),
    ("Ġsch", "ool"): ("Ġf", "ield"),
    ("Ġf", "arm"): ("Ġc", "ave"),
}


def rename_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer trained on the first names of the places, with the tokens of their new ones."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    model["merges"] = [list(RENAMED_MERGES.get(pair, pair)) for pair in merges]
    tokens = {"".join(first): "".join(new) for first, new in RENAMED_MERGES.items()}
    model["vocab"] = {tokens.get(token, token): id_ for token, id_ in model["vocab"].items()}
    return Tokenizer.from_str(json.dumps(state))


def main() -> None:
    """Train on the training split and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny_gpt2")
    out = parser.parse_args().out
    lines = (HERE / "tiny_corpus_train.jsonl").read_text(encoding="utf-8").splitlines()
    first_names = {new: first for first, new in RENAMED.items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((rename(json.loads(line)["text"], first_names) for line in lines), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=rename_tokens(tokenizer), bos_token=END, eos_token=END, unk_token=END, model_max_length=256
    )
    fast.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both read this one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
