"""The words of a page in two languages; a switch on the page chooses, and no word needs a script."""

from dataclasses import dataclass

from markupsafe import Markup, escape

_CHINESE = {
    "Answers": "回答",
    "Figures": "指标",
    "Loss": "损失曲线",
    "Settings": "设置",
    "pictures": "张图片",
    "a training answer, word for word": "训练集原句",
    "nearly a training answer": "接近训练集原句",
    "trained on": "训练数据",
    "cut off": "未说完",
    "same as": "同",
    "training answers repeated:": "重复训练集答案：",
    "what it was trained on is not known": "训练数据未知",
    "with 95% intervals": "附 95% 区间",
    "chance": "随机",
    "not measured:": "未测：",
    "model": "模型",
    "base": "基座",
    "run": "训练",
    "checkpoint": "检查点",
    "objective": "训练目标",
    "optimizer": "优化器",
    "adapter": "适配器",
    "samples a step": "每步样本数",
    "epochs": "轮数",
    "steps": "步数",
    "decoding": "解码",
    "greedy": "贪心",
    "samples": "采样数",
    "temperature": "温度",
    "top-p": "top-p",
    "seed": "随机种子",
    "most new tokens": "最多新 token 数",
    "device": "设备",
    "weights in memory": "内存中的权重",
    "most tiles": "最多切块数",
    "evaluated on": "评测数据",
    "training": "训练时间",
    "export: largest difference of logits": "导出：logits 最大差",
    "export: same answer": "导出：回答相同",
    "joke form": "像笑话的一句话",
    "grounded": "切题",
    "grounded and in joke form": "切题且像笑话",
    "describes the picture": "在描述图片",
    "verbatim from training": "训练集原句",
    "nearly verbatim": "接近训练集原句",
    "characters an answer": "平均字数",
    "ranking": "排序",
    "held-out loss": "留出集 loss",
    "perplexity": "困惑度",
}
_TASKS = {
    "2T1 accuracy": "2T1 准确率",
    "3T1 accuracy": "3T1 准确率",
    "4T1 accuracy": "4T1 准确率",
    "5T2 accuracy": "5T2 准确率",
    "ranking NDCG": "排序 NDCG",
    "ranking top-1": "排序 top-1",
}
_CHINESE |= _TASKS | {f"{en}, per character": f"{zh}，按字数" for en, zh in _TASKS.items()}
# Why something is not measured, as `deadpan.evaluate` has it.
_CHINESE |= {
    "the records have no stars": "数据没有点赞数",
    "no picture has 5 answers whose stars are known and differ": "没有图片有 5 个点赞数已知且不全相同的回答",
    "the records do not say what is pictured (concepts)": "数据没有注明画的是什么（concepts）",
    "it is not known what it was trained on": "训练数据未知",
    **{
        f"there are not {n} answers to other pictures to offer beside": f"凑不出 {n} 个其他图片的回答作陪选"
        for n in (1, 2, 3)
    },
    **{f"no picture has {n} answers": f"没有图片有 {n} 个回答" for n in (1, 2)},
}


@dataclass(frozen=True)
class Bilingual:
    """A text in both languages."""

    en: str
    zh: str


def bilingual(text: str) -> Bilingual:
    """A text of the page's own in both languages; one without a translation is the same in both."""
    return Bilingual(text, _CHINESE.get(text, text))


def words(text: str | Bilingual) -> Markup:
    """A text in both languages, each in an element of its own; one without a translation as it is."""
    if isinstance(text, str):
        text = bilingual(text)
    if text.en == text.zh:
        return escape(text.en)
    return Markup('<span class="en">{}</span><span class="zh" lang="zh">{}</span>').format(
        text.en, text.zh
    )
