"""The only file that has the words of benchmarks/surgery.py's tables in Chinese."""

from __future__ import annotations

import re

WORDS = {
    "type": "类型",
    "outputs": "输出",
    "the type itself": "类型本身",
    "loss": "损失",
    "its own": "类型本身",
    "same tokens": "相同的词元",
    "norms": "归一化层",
    "layer": "层",
    "before": "之前",
    "rotated": "旋转之后",
    "error of weights, mean": "权重误差，平均",
    "largest": "最大",
    "error of logits": "logits 误差",
    "as it is": "未改动",
    "folded": "折叠",
    "folded, rotated": "折叠并旋转",
    "weights, one scale a matrix": "权重，每个矩阵一个缩放因子",
    "weights, one scale a row": "权重，每行一个缩放因子",
    "and inputs, one scale a token": "加上输入，每个词元一个缩放因子",
    "and inputs, one scale in all": "加上输入，总共一个缩放因子",
    "norms of transformers, ms": "transformers 的归一化层，毫秒",
    "norms of rmsnorm, ms": "rmsnorm 的归一化层，毫秒",
    "norms of rmsnorm without weights, ms": "rmsnorm 的无权重归一化层，毫秒",
    "LayerNorms of torch, ms": "torch 的 LayerNorm，毫秒",
    "RMSNorms of rmsnorm, ms": "rmsnorm 的 RMSNorm，毫秒",
    "RMSNorms of rmsnorm without weights, ms": "rmsnorm 的无权重 RMSNorm，毫秒",
    "last ÷ second": "第三种 ÷ 第二种",
    "last ÷ first": "第三种 ÷ 第一种",
}
"""Cells of tables, in Chinese."""
SENTENCES = {
    r"\b(\d+) of (\d+)\b": r"\1 / \2",
    r"a token, (\w+)": r"一个词元，\1",
    r"30 s of sound, (\w+)": r"30 秒声音，\1",
    r"prefill of (\d+), (\w+)": r"预填充 \1 个词元，\2",
    r"(\d+) LayerNorms are left in it, and what it writes of a tone is the same (\d+) tokens\.": (
        r"里面剩下 \1 个 LayerNorm，它听一个纯音写出的 \2 个词元与原来相同。"
    ),
    r"Measured on: (.+?); not timed\.": r"测量环境：\1；没有计时。",
    r"Measured on: (.+?); ([\d.]+) processes ran before\.": r"测量环境：\1；开始前的负载为 \2。",
}


def chinese(block: str) -> str:
    """What is written, for the Chinese page."""
    block = re.sub(r"(?<=\| )[^|\n]+(?= \|)", lambda cell: WORDS.get(cell[0], cell[0]), block)
    for pattern, words in SENTENCES.items():
        block = re.sub(pattern, words, block)
    return block
