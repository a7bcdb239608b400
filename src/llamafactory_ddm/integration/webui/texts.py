"""Labels and explanations of our fields, in upstream's table of languages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from .fields import CHAT_KEYS, PREDICT_KEYS, PREFIX, TRAINING_KEYS, spec_of

TRAINING_TAB, PREDICT_TAB, CHAT_TAB = (f"{PREFIX}{name}" for name in ("training_tab", "predict_tab", "chat_tab"))
_TABS = {
    TRAINING_TAB: ("Diffusion configurations", "扩散模型参数设置"),
    PREDICT_TAB: ("Denoising (diffusion models)", "去噪设置（扩散模型）"),
    CHAT_TAB: ("Denoising", "去噪设置"),
}
# Key -> label and explanation.
CHINESE = {
    "attention": (
        "注意力",
        "full：每个词元可见全部词元；block：逐块从左到右去噪，只见本块及之前的块。默认沿用检查点。",
    ),
    "train_block_length": ("训练块长度", "attention 为 block 时每块的词元数。默认沿用检查点。"),
    "anneal_steps": ("注意力退火步数", "注意力从因果过渡到双向所用的优化步数；0 表示一开始即为双向。"),
    "shift": ("保留移位预测", "保留自回归模型的移位预测：位置 i 预测第 i+1 个词元。默认沿用检查点，否则为 true。"),
    "mask_token": ("掩码词元", "[MASK] 词元：词表中的词元、其编号或新词元。默认沿用检查点或分词器的掩码词元。"),
    "noise_process": ("加噪方式", "masked：替换为 [MASK]；mixed：其中一部分替换为随机词元，模型由此学会改错。"),
    "uniform_ratio": ("随机词元比例", "noise_process 为 mixed 时，加噪词元中替换为随机词元的比例。默认 0.1。"),
    "noise_schedule": ("噪声调度", "时刻 t 保留词元的比例 alpha(t)。默认沿用检查点，否则为 linear。"),
    "random_truncate_ratio": ("随机截断比例", "仅扩散适配阶段：被截断到随机长度的训练样本比例（LLaDA：0.01）。"),
    "antithetic_time": ("分层抽样时刻", "在每个优化步的样本间分层抽取噪声时刻，降低损失的方差。"),
    "variable_length": ("可变长度", "训练模型自行生成 EOS 及其后的填充：eos_pad、eos_eos 或 rainbow；none 为不使用。"),
    "pad_block_length": ("填充块长度", "可变长度下，将每行填充到该词元数的整数倍。默认填充到截断长度。"),
    "pad_mask_ratio": ("填充掩码比例", "可变长度下，计分的掩码词元中填充的目标比例。默认与正文同等对待。"),
    "eos_window_ratio": ("EOS 窗口比例", "可变长度下，从 EOS 前的随机位置起全部掩码的样本比例。"),
    "drop_overlong": ("丢弃超长样本", "可变长度下，丢弃截断长度内放不下 EOS 的样本；不勾选则报错。"),
    "loss_weighting": ("损失加权", "加噪词元的权重：elbo（证据下界的权重）或 uniform（均为 1）。"),
    "loss_norm": (
        "损失归一化",
        "总损失除以：tokens（可加噪的词元数）、masked（已加噪的词元数）或 sequence（逐行平均）。",
    ),
    "train_on_padding": (
        "在填充上训练",
        "仅扩散微调阶段：用模型要学习生成的填充补足每行，使其学会何处结束。默认沿用检查点，否则为 true。",
    ),
    "sep_token": ("分隔词元", "仅扩散微调阶段：模板为 diffullama 时，提示与回答之间的词元或其编号。默认沿用检查点。"),
    "split_digits": ("拆分数字", "仅扩散微调阶段：将每个数字单独切分，并保存在分词器中。"),
    "sample_steps": ("生成样例间隔", "每隔多少优化步用当前权重生成样例文本；0 或留空为不生成。"),
    "sample_count": ("样例数量", "样例文本的数量。默认为 4。"),
    "sample_length": ("样例长度", "每个样例生成的词元数。"),
    "eval_time_samples": ("评估噪声级数", "评估每行时使用的噪声级数，沿时间轴分层。"),
    "eval_eos": ("评估 EOS", "可变长度下，评估模型预测 EOS 的能力并保存图表。"),
    "denoising_strategy": ("去噪策略", "每一步选定哪些被掩码的词元。"),
    "confidence_threshold": ("置信度阈值", "选定一个词元所需的最低概率（仅用于策略 confidence_threshold）。"),
    "diffusion_steps": ("去噪步数", "去噪步数上限，分配给各个块；attention 为 block 的模型按每块计。"),
    "block_length": ("块长度", "每块的位置数，各块从左到右依次解码。默认整个画布为一块。"),
    "kv_cache": ("KV 缓存", "每次前向计算哪些位置：none 全部；prefix 当前块及其后；dual 仅当前块。"),
    "chat_steps": ("去噪步数", "去噪步数上限；0 表示自动选择。"),
    "seed": ("随机种子", "所有随机抽样的种子。默认每条消息各取一个新种子。"),
    "save_trace": ("保存去噪过程", "写出 generated_predictions.html，可在浏览器中回放每条文本的去噪过程。"),
}
_LABELS = {"chat_steps": "Diffusion steps"}
_ACRONYMS = {"eos": "EOS", "kv": "KV"}
_STEP = {"en": "step {step}: {n} of {total} tokens", "zh": "第 {step} 步：{n} / {total} 个词元"}
_FAILED = {"en": "Not answered", "zh": "未能回答"}
_ONE_QUESTION = {
    "en": "The template of this model takes one question at a time: it does not see earlier messages.",
    "zh": "该模型的模板一次只接受一个问题：它看不到之前的消息。",
}


def english_label(name: str) -> str:
    """Return the label of a key: its words."""
    if name in _LABELS:
        return _LABELS[name]
    first, *rest = (_ACRONYMS.get(word, word) for word in name.split("_"))
    return " ".join([first[0].upper() + first[1:], *rest])


def with_our_texts(locales: dict[str, Any]) -> dict[str, Any]:
    """Return upstream's texts with those of our fields, in each of its languages; English where we have no other."""
    languages: Iterable[str] = next(iter(locales.values()))
    keys = dict.fromkeys((*TRAINING_KEYS, *PREDICT_KEYS, *CHAT_KEYS))
    ours = {
        **{f"{PREFIX}{name}": _texts_of_key(name, languages) for name in keys},
        **{
            name: {language: {"label": chinese if language == "zh" else english} for language in languages}
            for name, (english, chinese) in _TABS.items()
        },
    }
    return {**locales, **ours}


def _texts_of_key(name: str, languages: Iterable[str]) -> dict[str, dict[str, str]]:
    explanation = spec_of(name).help
    if name in PREDICT_KEYS:  # their columns are narrow; docs/keys.md has the rest
        explanation = re.split("[.;:] ", explanation)[0].rstrip(".") + "."
    english = {"label": english_label(name), "info": html.escape(explanation, quote=False)}
    label, info = CHINESE[name]
    return {language: {"label": label, "info": info} if language == "zh" else english for language in languages}


def step_caption(lang: str, step: int, n: int, total: int) -> str:
    """Return the line below a canvas: the step, and how many of its positions are decoded."""
    return _STEP.get(lang, _STEP["en"]).format(step=step, n=n, total=total)


def failed_caption(lang: str) -> str:
    """Return what stands before the reason why a message was not answered."""
    return _FAILED.get(lang, _FAILED["en"])


def one_question_caption(lang: str) -> str:
    """Return the note that a model answers each message without those before it."""
    return _ONE_QUESTION.get(lang, _ONE_QUESTION["en"])
