"""The walkthrough in one go, on the bundled model: check, hear, fine-tune, evaluate, export, hear again, look.

Every step leaves what it made in the folder and is then marked as done there, so a demo that was stopped goes on with
the step at hand; training itself goes on from its newest checkpoint. With one seed, one machine tells one story.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from deadpan import __version__, nano
from deadpan.checkpoints.export import export
from deadpan.compare.page import Column, page_of
from deadpan.compare.tellers import about
from deadpan.config.loader import load_recipe
from deadpan.data.checks import check
from deadpan.data.records import Record
from deadpan.data.records import load as load_records
from deadpan.engines.base import GenerationSettings
from deadpan.errors import DeadpanError
from deadpan.evaluate.answers import Answer, Question, questions, read, write
from deadpan.evaluate.evaluation import GROUNDED_JOKES, Evaluation, evaluate
from deadpan.evaluate.hearing import Asking, hear
from deadpan.evaluate.statistics import Items
from deadpan.report import comparison
from deadpan.report.words import Bilingual
from deadpan.train import state
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher

_HELD_OUT = Path("nano:held-out")
_STATE = "demo.json"
_LONGEST_ANSWER = 48
"""Tokens; the base model's descriptions end well before."""

Progress = Callable[[int, int], None]


class Telling(Protocol):
    """Whoever shows how the demo goes."""

    def step(self, title: str) -> AbstractContextManager[Progress]:
        """A step runs while the context does; what it gives takes how far the step is, and out of how much.

        The title has the step's number and the number of all in front, as in `3/7 fine-tune`.
        """

    def note(self, text: str) -> None:
        """A word about the step at hand, that the next word replaces."""

    def done(self, title: str, line: str, seconds: float, before: bool) -> None:
        """A step has been done, now or before, with what there is to say of it."""


class Stopped(Exception):
    """Training was asked to stop, and has saved what it had."""


@dataclass(frozen=True)
class _Step:
    title: str
    run: Callable[[Progress], str]


class Demo:
    """One demo and its folder.

    Args:
        folder: Holds everything that the demo makes.
        seed: Of the fine-tuning.
        overrides: Further keys of the recipe to set, such as `epochs=4`.
        telling: Shows how it goes.

    Raises:
        DeadpanError: If the folder holds another demo, or something else.
    """

    def __init__(self, folder: Path, seed: int, overrides: Sequence[str], telling: Telling) -> None:
        self.folder, self._telling = folder, telling
        self._begun = {"version": __version__, "seed": seed, "recipe": list(overrides)}
        self._recipe = load_recipe(
            "nano", ["save_every_steps=50", *overrides, f"run={folder / 'run'}", f"seed={seed}"]
        )
        self.report = folder / "report.html"
        self._done: dict[str, dict[str, Any]] = self._open()
        self._records: list[Record] = []
        self._asked: list[Question] = []
        self._by_heart: list[str] = []

    def tell(self) -> Path:
        """Do what has not been done yet.

        Returns:
            The report.

        Raises:
            Stopped: If training was asked to stop; telling again goes on from there.
        """
        steps = [
            _Step("check the data", self._check),
            _Step("hear the base model", self._hear_base),
            _Step("fine-tune", self._train),
            _Step("evaluate", self._evaluate),
            _Step("export and compare", self._export),
            _Step("hear the export", self._hear_export),
            _Step("write the report", self._report),
        ]
        self._records = load_records(_HELD_OUT)
        self._asked = questions(self._records)
        self._by_heart = [
            answer for record in load_records(Path("nano:train")) for answer in record.answers
        ]
        for number, step in enumerate(steps, start=1):
            title = f"{number}/{len(steps)} {step.title}"
            before = self._done.get(step.title)
            if before is None:
                began = time.perf_counter()
                with self._telling.step(title) as progress:
                    line = step.run(progress)
                seconds = round(time.perf_counter() - began, 1)
                self._done[step.title] = {"line": line, "seconds": seconds}
                self._remember()
            now = self._done[step.title]
            self._telling.done(title, now["line"], now["seconds"], before is not None)
        return self.report

    def seconds(self) -> float:
        """How long all steps took."""
        return float(sum(step["seconds"] for step in self._done.values()))

    @cached_property
    def figures(self) -> dict[str, Evaluation]:
        """Both tellers in figures, from what they said; there once they are evaluated."""
        return {
            label: evaluate(
                self._asked,
                self._answers(name),
                self._by_heart,
                likelihood=self._likelihood(name),
            )
            for label, name in (("base", "base"), ("fine-tuned", "tuned"))
        }

    def _open(self) -> dict[str, dict[str, Any]]:
        file = self.folder / _STATE
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise DeadpanError(
                    "The folder holds something that is not a demo.",
                    where=self.folder,
                    fix="choose another folder with --out",
                )
            return {}
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            done = dict(held.pop("done"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DeadpanError(
                "The demo's own notes cannot be read.", where=file, fix="start anew with --fresh"
            ) from None
        if held != self._begun:
            raise DeadpanError(
                "The folder holds a demo that was begun otherwise.",
                where=self.folder,
                expected=json.dumps(self._begun),
                found=json.dumps(held),
                fix="start anew with --fresh, or choose another folder with --out",
            )
        return done

    def _remember(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._begun | {"done": self._done}, ensure_ascii=False, indent=2)
        state.write_whole(self.folder / _STATE, text + "\n")

    def _check(self, progress: Progress) -> str:
        # First of all, so that even a demo stopped here is known as one.
        self._remember()
        reports = [check(Path(name), progress=progress) for name in nano.RECORDS]
        errors = [problem for report in reports for problem in report.errors]
        if errors:
            raise DeadpanError(
                f"The bundled data are damaged: {errors[0].message}",
                where=errors[0].where,
                fix="install deadpan again",
            )
        records, pictures = (
            sum(getattr(report, name) for report in reports) for name in ("records", "pictures")
        )
        return f"{records} records on {pictures} pictures, no error"

    def _hear_base(self, progress: Progress) -> str:
        self._listen("base", nano.MODEL, progress, score=True)
        return self._answers("base")[0].text

    def _train(self, progress: Progress) -> str:
        resume = bool(state.checkpoints(self.folder / "run"))
        result = Trainer(self._recipe, resume, _TrainingProgress(progress, self._telling)).train()
        if result.interrupted:
            raise Stopped
        return f"{result.steps} steps, loss {result.loss:.2f}"

    def _evaluate(self, progress: Progress) -> str:
        self._listen("tuned", self.folder / "run", progress, score=True)
        both = [figures.get(GROUNDED_JOKES) for figures in self.figures.values()]
        base, tuned = (f"{share.value:.0%}" for share in both if share is not None)
        return f"jokes about what is in the picture: {base} before, {tuned} after"

    def _export(self, progress: Progress) -> str:
        out = self.folder / "model"
        if not out.exists():
            export(self.folder / "run", out, "hf", device="cpu", progress=progress)
        held = json.loads((out / "export.json").read_text(encoding="utf-8"))
        return f"reloaded: logits within {held['max_logit_difference']:.3g} of the fine-tuned model"

    def _hear_export(self, progress: Progress) -> str:
        self._listen("export", self.folder / "model", progress, score=False)
        return self._answers("export")[0].text

    def _report(self, progress: Progress) -> str:
        tuned, exported = (self._answers(name) for name in ("tuned", "export"))
        same = sum(a.text == b.text for a, b in zip(tuned, exported, strict=True))
        held = json.loads((self.folder / "model" / "export.json").read_text(encoding="utf-8"))
        base = about("base", nano.MODEL)
        fine_tuned = about("fine-tuned", self.folder / "model", self.folder / "run")
        page = page_of(
            title="冷笑话: nano before and after",
            summary=Bilingual(
                "Pictures that the model never saw in training, what it said of them before, and what after "
                "fine-tuning. Nano is a small model of drawn scenes: it shows the machinery, not what a large "
                "model can do.",
                "模型训练时没见过的图片，微调前后它各说了什么。nano 是一个只认得手绘小景的小模型："
                "它演示的是整套流程，而不是大模型的本事。",
            ),
            asked=self._asked,
            columns=[
                Column(teller, [[answer] for answer in self._answers(name)], figures)
                for teller, name, figures in (
                    (base, "base", self.figures["base"]),
                    (fine_tuned, "export", self.figures["fine-tuned"]),
                )
            ],
            settings={
                "decoding": "greedy",
                "evaluated on": str(_HELD_OUT),
                "training": f"{self._done['fine-tune']['seconds']:.0f} s",
                "export: largest difference of logits": f"{held['max_logit_difference']:.3g}",
                "export: same answer": f"{same} / {len(tuned)}",
            },
        )
        comparison.write(page, self.report)
        return f"{len(self._asked)} pictures, both tellers side by side"

    def _listen(self, name: str, model: str | Path, progress: Progress, score: bool) -> None:
        """Ask a model every question and keep what it says and, if wished, how likely it finds what people said."""

        @contextmanager
        def stage(title: str) -> Iterator[Progress]:
            # One bar for all stages: it starts anew with each.
            self._telling.note(title)
            yield progress

        heard = hear(
            model,
            [Asking(self._asked, GenerationSettings(_LONGEST_ANSWER))],
            self._records if score else (),
            bars=stage,
            device="cpu",
            dtype="fp32",
        )
        write([said[0] for said in heard.answers[0]], self.folder / f"{name}.jsonl")
        likelihood = [asdict(items) for items in heard.likelihood]
        text = json.dumps({"likelihood": likelihood}, ensure_ascii=False)
        state.write_whole(self.folder / f"{name}.json", text + "\n")

    def _answers(self, name: str) -> list[Answer]:
        return read(self.folder / f"{name}.jsonl")

    def _likelihood(self, name: str) -> list[Items]:
        held = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return [Items(**items) for items in held["likelihood"]]


class _TrainingProgress(Watcher):
    """Passes on how far training is."""

    def __init__(self, progress: Progress, telling: Telling) -> None:
        self._progress, self._telling, self._steps = progress, telling, 0

    def starting(self, plan: Any, done: int, *_: Any) -> None:
        self._steps = plan.steps
        self._progress(done, plan.steps)

    def stepped(self, metrics: dict[str, Any]) -> None:
        self._progress(metrics["step"], self._steps)
        self._telling.note(
            f"loss {metrics['loss']:.2f}  {metrics['samples_per_second']:.0f} samples/s"
        )


def forget(folder: Path) -> None:
    """Remove a demo and everything that it made.

    Raises:
        DeadpanError: If the folder is not a demo's.
    """
    if not folder.exists():
        return
    if not (folder / _STATE).is_file():
        raise DeadpanError(
            "Only a demo's folder is removed, and this is none.",
            where=folder,
            fix="choose another folder with --out",
        )
    shutil.rmtree(folder)
