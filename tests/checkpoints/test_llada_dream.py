"""LLaDA and Dream into plain models and back, in miniature, against a forward pass written out from their formulas."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints.convert import convert
from llamafactory_ddm.checkpoints.families.llada import WEIGHT_NAMES as LLADA
from llamafactory_ddm.checkpoints.rename import write_renamed
from llamafactory_ddm.checkpoints.weights import stored_dtype
from llamafactory_ddm.cli.main import main
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import run
from support.published import (
    DREAM_CONFIG,
    LLADA_CONFIG,
    ROWS,
    WIDTH,
    all_weights,
    by_formula,
    dream_by_formula,
    dream_weights,
    llada_weights,
    write_dream,
    write_llada,
)


@pytest.fixture
def llada(tmp_path):
    return write_llada(tmp_path / "llada")


def bidirectional(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    make_bidirectional(model)
    return model


def test_llada_becomes_a_llama_and_comes_back(llada, tmp_path):
    converted, back = tmp_path / "converted", tmp_path / "back"
    assert main(["convert", str(llada), str(converted)]) == 0
    ids = torch.tensor([5, 9, 262, 7, 30, 262, 11])
    expected = by_formula(llada_weights(), ids)
    with torch.no_grad():
        logits = bidirectional(converted)(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    config = DiffusionConfig.load(converted)
    assert (config.mask_token, config.mask_token_id, config.shift) == ("<|mdm_mask|>", 262, False)
    assert config.attention_ratio == 1.0
    assert load(converted).generate(max_new_tokens=5, num_samples=2)
    assert main(["convert", str(converted), str(back), "--published"]) == 0
    before, after = all_weights(llada), all_weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    raw = json.loads((back / "config.json").read_text())
    assert {key: raw[key] for key in LLADA_CONFIG if key != "auto_map"} == {
        key: value for key, value in LLADA_CONFIG.items() if key != "auto_map"
    }
    convert(back, tmp_path / "again")
    assert all(
        torch.equal(value, all_weights(converted)[key]) for key, value in all_weights(tmp_path / "again").items()
    )


def test_dream_becomes_a_qwen2_and_comes_back(tmp_path):
    source, weights = write_dream(tmp_path / "dream"), dream_weights()
    converted, back = tmp_path / "converted", tmp_path / "back"
    convert(source, converted)
    ids = torch.tensor([5, 9, 262, 7, 30, 262, 11])
    expected = dream_by_formula(weights, ids)
    with torch.no_grad():
        logits = bidirectional(converted)(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    config = DiffusionConfig.load(converted)
    assert (config.mask_token, config.mask_token_id, config.shift) == ("<|mask|>", 262, True)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|beginoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert tokenizer.decode(tokenizer.encode("The cat\n")) == "The cat\n"
    assert "auto_map" not in (converted / "tokenizer_config.json").read_text()
    convert(converted, back, to_published=True)
    assert all(torch.equal(value, weights[key]) for key, value in all_weights(back).items())
    raw = json.loads((back / "config.json").read_text())
    assert {key: raw[key] for key in DREAM_CONFIG} == DREAM_CONFIG


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"block_type": "sequential"}, "config.json .*block_type: 'sequential'"),
        ({"alibi": True, "rope": False}, "alibi: True, rope: False"),
        ({"d_model": None}, r"config\.json .*LLaDA.* 'd_model'"),
        ({"mask_token_id": 287}, r"mask_token_id .*LLaDA.* 287.*--mask-token"),
        ({"n_layers": 3}, r"missing model\.layers\.2\."),
        ({"n_layers": 1}, r"unexpected model\.layers\.1\."),
        ({"mlp_hidden_size": 47}, r"wrong shape model\.layers\.0\.mlp\.down_proj\.weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(llada, tmp_path, change, pattern):
    raw = {**LLADA_CONFIG, **change}
    (llada / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    with pytest.raises(ValueError, match=pattern):
        convert(llada, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        ({"mask_token": "!"}, "--mask-token ! .*id 262"),
        ({"sep_token": "!"}, "--sep-token ! .*id None"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint(llada, tmp_path, option, pattern):
    with pytest.raises(ValueError, match=pattern):
        convert(llada, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
    convert(llada, tmp_path / "plain", pad_token="!")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").pad_token == "!"


def test_a_shift_that_contradicts_the_checkpoint(tmp_path):
    dream = write_dream(tmp_path / "dream")
    with pytest.raises(ValueError, match="--no-shift"):
        convert(dream, tmp_path / "out", shift=False)


def test_a_published_model_without_tokenizer(llada, tmp_path):
    for path in llada.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"llada .*tokenizer\.json.*--base"):
        convert(llada, tmp_path / "out")


def test_a_name_of_neither_layout():
    for name in (
        "model.transformer.blocks.0.other.weight",
        "model.transformer.blocks.x.ff_out.weight",
        "lm_head.weight",
    ):
        with pytest.raises(ValueError, match=f"{re.escape(name)} .*LLaDA"):
            LLADA.to_standard(name)
    for name in llada_weights():
        assert LLADA.to_published(LLADA.to_standard(name)) == name


def test_converting_back_what_is_published(llada, tmp_path):
    with pytest.raises(ValueError, match=r"--published.*LLaDA"):
        convert(llada, tmp_path / "out", to_published=True)


def test_a_config_that_is_broken(llada, tmp_path):
    (llada / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json .*JSON"):
        convert(llada, tmp_path / "out")


def test_renaming_changes_no_bit_of_the_weights(tmp_path):
    weights = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int8), "c": torch.randn(7).bfloat16()}
    weights["empty"] = torch.zeros(0, 3)
    save_file(weights, tmp_path / "in.safetensors")
    names = {"a": "z", "b": None, "c": "x", "empty": "y"}
    sizes = write_renamed(tmp_path / "in.safetensors", tmp_path / "out.safetensors", names.get)
    assert sizes == {"z": 60, "x": 14, "y": 0}
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == {"x", "y", "z"}
    assert all(torch.equal(again[new], weights[old]) for old, new in names.items() if new is not None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_converting_takes_little_memory(tmp_path):
    """A checkpoint of 400 MB in two files, compared with the conversion of a small one."""
    script = tmp_path / "convert.py"
    script.write_text(
        "import re, sys\n"
        "from pathlib import Path\n"
        "from llamafactory_ddm.checkpoints.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )

    def peak_mb(name, num_embeddings):
        weights = {**llada_weights(), **{k: torch.zeros(num_embeddings, WIDTH) for k in BIG}}
        folder = write_llada(tmp_path / name, weights, embedding_size=num_embeddings, vocab_size=num_embeddings)
        done = run(folder, tmp_path / f"{name}-out", program=script)
        assert "custom code" not in done.stdout + done.stderr
        return int(done.stdout.split()[-1]) // 1024

    small, large = peak_mb("small", ROWS), peak_mb("large", 1_600_000)
    assert large - small < 100  # MB, of 400 read and 400 written


BIG = ("model.transformer.wte.weight", "model.transformer.ff_out.weight")


def test_the_dtype_of_a_file_is_read_from_its_header(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2).bfloat16()}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_the_tokenizer_is_the_published_one(llada, tmp_path):
    convert(llada, tmp_path / "out")
    published, converted = (AutoTokenizer.from_pretrained(folder) for folder in (llada, tmp_path / "out"))
    assert published.get_vocab() == converted.get_vocab()
