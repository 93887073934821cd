"""All that the page says, in English and in Chinese."""

from dataclasses import dataclass

from deadpan.serve.votes import Outcome


@dataclass(frozen=True)
class Words:
    """The page in one language.

    Attributes:
        code: The language's code, which is the page's path too.
        language: Its name.
    """

    code: str
    language: str
    title: str
    tagline: str
    tell: str
    arena: str
    runs: str
    picture: str
    drop: str
    tellers: str
    question: str
    tell_one: str
    another: str
    nothing_told: str
    no_picture: str
    no_teller: str
    busy: str
    slow: str
    closing: str
    arena_rules: str
    start: str
    next_round: str
    nothing_asked: str
    sides: tuple[str, str]
    outcomes: dict[Outcome, str]
    voted: str
    voted_before: str
    ranking: str
    columns: tuple[str, ...]
    no_votes: str
    not_connected: str
    choose_runs: str
    axis: str
    axes: dict[str, str]
    refresh: str
    no_runs: str
    probes: str
    step: str
    locked: str


ENGLISH = Words(
    code="en",
    language="English",
    title="deadpan",
    tagline="Show it a picture. It will not laugh.",
    tell="Tell",
    arena="Arena",
    runs="Runs",
    picture="Picture",
    drop="Drop a picture here\nor click to choose one",
    tellers="Tellers",
    question="Question",
    tell_one="Tell",
    another="Another one",
    nothing_told="Nothing yet. It is in no hurry.",
    no_picture="A picture first.",
    no_teller="Somebody has to tell it. Pick a teller.",
    busy="Too many are asking. Try again in a moment.",
    slow="It took too long, even for a pause.",
    closing="The server is shutting down.",
    arena_rules="Two tellers, one picture. Who is who stays secret until you have voted.",
    start="Ask two of them",
    next_round="Next round",
    nothing_asked="Two seats, both empty.",
    sides=("Left", "Right"),
    outcomes={
        Outcome.LEFT: "Left is better",
        Outcome.RIGHT: "Right is better",
        Outcome.BOTH_DRY: "Both dry",
        Outcome.BOTH_BAD: "Both bad",
    },
    voted="{}. Noted.",
    voted_before="This round has its vote already. The first one counts.",
    ranking="Ranking",
    columns=("", "teller", "rating", "95%", "votes", "won", "both dry", "both bad"),
    no_votes="No votes yet.",
    not_connected="No chain of votes connects these, so their ratings cannot be compared: ",
    choose_runs="Runs",
    axis="Along",
    axes={"step": "steps", "sample": "samples", "time": "time"},
    refresh="Refresh",
    no_runs="No run here yet.",
    probes="What it said while it learned",
    step="step",
    locked="Any name; the password is the server's API key.",
)

CHINESE = Words(
    code="zh",
    language="中文",
    title="deadpan 冷面",
    tagline="给它一张图。它自己不笑。",
    tell="讲一个",
    arena="擂台",
    runs="训练",
    picture="图片",
    drop="把图片拖到这里\n或点击选择",
    tellers="讲述者",
    question="问题",
    tell_one="讲",
    another="再来一个",
    nothing_told="还没开口。它不着急。",
    no_picture="先给一张图。",
    no_teller="总得有人讲。请选一位。",
    busy="排队的人太多了，请稍后再试。",
    slow="酝酿得太久了，这次没讲出来。",
    closing="服务器正在关闭。",
    arena_rules="两位讲述者，同一张图。投票之前，不告诉你谁是谁。",
    start="请两位开口",
    next_round="下一局",
    nothing_asked="两个座位，都还空着。",
    sides=("左边", "右边"),
    outcomes={
        Outcome.LEFT: "左边更好",
        Outcome.RIGHT: "右边更好",
        Outcome.BOTH_DRY: "都够冷",
        Outcome.BOTH_BAD: "都不行",
    },
    voted="{}。记下了。",
    voted_before="这一局已经投过票了，以第一票为准。",
    ranking="排名",
    columns=("", "讲述者", "评分", "95%", "票数", "胜", "都够冷", "都不行"),
    no_votes="还没有人投票。",
    not_connected="以下各组之间没有任何比较过的票，评分不能互相比较：",
    choose_runs="训练记录",
    axis="横轴",
    axes={"step": "步数", "sample": "样本数", "time": "时间"},
    refresh="刷新",
    no_runs="这里还没有训练记录。",
    probes="它边学边说过的话",
    step="步",
    locked="用户名随意，密码是服务器的 API key。",
)

LANGUAGES = (ENGLISH, CHINESE)


def preferred(accept_language: str) -> Words:
    """The language that a browser would rather have, by its Accept-Language header (RFC 9110, 12.5.4)."""
    best, weight = ENGLISH, 0.0
    for part in accept_language.split(","):
        tag, _, quality = part.strip().partition(";q=")
        try:
            wanted = float(quality or 1)
        except ValueError:
            continue
        for words in LANGUAGES:
            if tag.lower().split("-")[0] == words.code and wanted > weight:
                best, weight = words, wanted
    return best
