"""What of a text is final while it is denoised, and what of it is sent."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamafactory_ddm.data.canvas import canvas_of
from llamafactory_ddm.data.text_codec import TextCodec
from llamafactory_ddm.serving.text_stream import TextStream
from support.tiny import tiny_tokenizer

TEXTS = (
    "plain words",
    "  spaces   and\n\nline breaks \n",
    "ein Bär trinkt 日本の茶 🍵 und schläft",
    "STOP within, then STO and more STOPS",
    "dogdog Ωμέγα",
)


def byte_tokenizer():
    """Every byte is a token, so characters of several bytes are never whole."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    return tokenizer


def metaspace_tokenizer():
    """Pieces with a mark for the space before them, and bytes for the rest, as Llama 2's."""
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    words = ["▁", "▁a", "▁dog", "dog", "▁Tom", "s", "▁,", "STO", "P", "▁STOP"]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "</s>", *bytes_, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.add_tokens(["<|mask|>"], special_tokens=True)
    return fast


@pytest.fixture(params=[byte_tokenizer, metaspace_tokenizer], ids=["bytes", "metaspace"])
def codec(request):
    tokenizer = request.param()
    return TextCodec(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"), [tokenizer.eos_token_id])


def stream_of(codec, ids, *, prompt=(), rest=(), **options):
    canvas = canvas_of([*([list(prompt)] if prompt else []), len(ids), *([list(rest)] if rest else [])])
    return TextStream(codec, canvas, [codec.tokenizer.eos_token_id], **options), canvas


def revealed(codec, ids, seed, *, prompt=(), rest=()):
    """The ids of a canvas after each of several steps that decode random positions."""
    order, pick = list(range(len(ids))), random.Random(seed)
    pick.shuffle(order)
    now = [codec.mask_id] * len(ids)
    while order:
        for _ in range(min(pick.randint(1, 4), len(order))):
            position = order.pop()
            now[position] = ids[position]
        yield [*prompt, *now, *rest]


def any_ids(codec, seed):
    """Random tokens, among them parts of characters that never become whole."""
    pick = random.Random(seed)
    return [pick.randrange(2, len(codec.tokenizer) - 1) for _ in range(25)]


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("stop", [(), ("STOP",), ("TOP", "ST O", "\n\n", "茶")])
def test_pieces_are_the_text_whatever_is_decoded_first(codec, stop, with_prompt):
    prompt = codec.encode("Tom") if with_prompt else []
    cases = [codec.encode(text) for text in TEXTS] + [any_ids(codec, seed) for seed in range(15)]
    for seed, ids in enumerate(cases):
        stream, canvas = stream_of(codec, ids, prompt=prompt, stop=stop)
        whole = codec.decode(ids, follows=with_prompt)
        ends = [whole.find(word) for word in stop if word in whole]
        expected = whole[: min(ends)] if ends else whole
        sent = []
        for now in revealed(codec, ids, seed, prompt=prompt):
            sent.append(stream.advance(canvas, now))
            assert expected.startswith("".join(sent))
            if stream.stopped is not None:
                break
        assert (stream.stopped is not None) == bool(ends)
        sent.append(stream.finish(expected))
        assert "".join(sent) == expected


def test_text_is_sent_as_soon_as_it_is_final(codec):
    ids = codec.encode("dogs dogs dogs")
    stream, canvas = stream_of(codec, ids, prompt=codec.encode("Tom"))
    mask, prompt = codec.mask_id, list(canvas.ids[: stream.start])
    assert stream.advance(canvas, [*prompt, mask, *ids[1:]]) == ""
    assert stream.advance(canvas, [*prompt, *ids[:-1], mask]) != ""


def test_an_eos_ends_the_text_but_not_a_gap(codec):
    end, ids = codec.tokenizer.eos_token_id, codec.encode("dog")
    stream, canvas = stream_of(codec, [*ids, end, *ids])
    assert stream.advance(canvas, [*ids, end, *ids]) == "dog" and stream.ends([*ids, end, *ids])
    rest = codec.encode("s")
    gap, canvas = stream_of(codec, [*ids, end, *ids], rest=rest)
    assert not gap.ends([*ids, end, *ids])
    assert gap.finish(gap.text_of([*ids, end, *ids])).count("dog") == 2


def test_with_edits_a_block_is_final_once_a_later_one_has_a_token(codec):
    ids, mask = codec.encode("abcdefgh"), codec.mask_id
    n = len(ids)
    stream, canvas = stream_of(codec, ids, block_of=lambda canvas: [position // 3 for position in range(n)])
    assert stream.final_ids(canvas, [*ids[:3], *[mask] * (n - 3)]) == []
    assert stream.final_ids(canvas, [*ids[:3], mask, ids[4], *[mask] * (n - 5)]) == ids[:3]
    assert stream.final_ids(canvas, ids) == ids[: (n - 1) // 3 * 3]


def test_tokens_of_the_beginning_of_a_text(codec):
    ids = codec.encode("dogs Bär")
    stream, _ = stream_of(codec, ids)
    text = stream.text_of(ids)
    assert stream.n_tokens(ids, "") == 0 and stream.n_tokens(ids, text) == len(ids)
    for n in range(len(text) + 1):
        k = stream.n_tokens(ids, text[:n])
        assert len(stream.text_of(ids[:k])) >= n and (k == 0 or len(stream.text_of(ids[: k - 1])) < n)


def test_a_long_stop_string_costs_no_more_than_the_text():
    """Only as many of its beginnings are tried as the text is long."""

    class Word(str):
        tried = 0

        def __getitem__(self, index):
            Word.tried += 1
            return str.__getitem__(self, index)

    tokenizer = byte_tokenizer()
    codec = TextCodec(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"), [tokenizer.eos_token_id])
    ids = codec.encode("plain words a")
    stream, canvas = stream_of(codec, ids, stop=(Word("a" * 10_000),))
    assert stream.advance(canvas, ids) == "plain words" and 0 < Word.tried <= len("plain words a")


def test_bytes_around_a_token_without_text():
    """A special token between bytes leaves no text, so they are decoded together."""
    tokenizer = metaspace_tokenizer()
    codec = TextCodec(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"), [tokenizer.eos_token_id])
    ids = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0x0F>", "<unk>", "<0xD9>", "s"])
    stream, canvas = stream_of(codec, ids)
    now = [codec.mask_id] * len(ids)
    pieces = []
    for position, token in enumerate(ids):
        now[position] = token
        pieces.append(stream.advance(canvas, now))
    text = codec.decode(ids, follows=False)
    assert "".join(pieces) + stream.finish(text) == text


def test_half_a_character_is_no_stop_string():
    """It looks like U+FFFD until its last byte is there."""
    tokenizer = byte_tokenizer()
    codec = TextCodec(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"), [tokenizer.eos_token_id])
    ids = codec.encode("ein Bär")
    stream, canvas = stream_of(codec, ids, stop=("\ufffd",))
    for n in range(len(ids) + 1):
        stream.advance(canvas, [*ids[:n], *[codec.mask_id] * (len(ids) - n)])
    assert stream.stopped is None and stream.sent == "ein Bär"
