"""A small GPT-2 and data for it, made in memory."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig

VOCABULARY, MASK_ID, LENGTH = 40, 39, 16


class Rows(torch.utils.data.Dataset):
    """Rows of random ids; `lengths` gives each row's real tokens, the rest is padding."""

    def __init__(self, count, lengths=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, MASK_ID, (count, LENGTH), generator=generator)
        self.keep = torch.ones(count, LENGTH, dtype=torch.long)
        for row, length in enumerate(lengths or []):
            self.keep[row, length:] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "attention_mask": self.keep[index]}


def stack(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(config)
    make_bidirectional(model)
    return model


def tiny_tokenizer():
    """Return a byte-level tokenizer made by hand, with <|endoftext|> as its only special token."""
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca", "cat", "do", "dog", "Ġdog"]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("Ġ", "dog")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def save_model(
    folder,
    *,
    kind="diffusion",
    family="gpt2",
    positions=48,
    width=32,
    layers=2,
    seed=0,
    shift=True,
    block_length=None,
    template=None,
):
    """Save a GPT-2 or Llama with random weights that reads bytes, and return its folder.

    Args:
        folder: to save it in.
        kind: "diffusion", or "ar" for a model without mask token and diffusion_config.json.
        family: "gpt2" or "llama".
        positions: of the model.
        width: of its embeddings.
        layers: their number.
        seed: of the weights.
        shift: what diffusion_config.json says.
        block_length: train_block_length of a model with `attention: block`; None for full attention.
        template: a PromptTemplate that diffusion_config.json names.
    """
    tokenizer = tiny_tokenizer()
    if kind == "diffusion":
        tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    torch.manual_seed(seed)
    config_class, model_class, sizes = {
        "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
        "llama": (LlamaConfig, LlamaForCausalLM, {"intermediate_size": 2 * width, "num_key_value_heads": 1}),
    }[family]
    config = config_class(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "diffusion":
        DiffusionConfig(
            mask_token="<|mask|>",
            mask_token_id=len(tokenizer) - 1,
            shift=shift,
            noise_process="masked",
            uniform_ratio=0.0,
            noise_schedule="linear",
            attention_ratio=1.0,
            attention="full" if block_length is None else "block",
            train_block_length=block_length,
            template=template,
        ).save(folder)
    return folder


def save_pair(folder, positions=48):
    """Save a causal GPT-2 in `folder`/ar and a diffusion model in `folder`/ddm, and return both folders."""
    return (
        save_model(folder / "ar", kind="ar", positions=positions, seed=2),
        save_model(folder / "ddm", positions=positions, seed=3),
    )
