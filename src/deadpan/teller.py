"""The Python API: a teller is a loaded model that tells jokes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deadpan.checkpoints.load import Loaded, Progress
from deadpan.checkpoints.load import load as load_checkpoint
from deadpan.data.pictures import open_picture
from deadpan.data.records import IMAGE_TAG, PROMPT, Turn
from deadpan.engines.base import Engine, GenerationSettings, Joke, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.engines.concurrent import check_installed
from deadpan.engines.exported import ENGINES, find_export
from deadpan.engines.lmdeploy import LmdeployEngine
from deadpan.engines.vllm import VllmEngine
from deadpan.errors import DeadpanError, did_you_mean
from deadpan.processing.processor import Processor

Picture = str | Path | Image.Image


class Teller:
    """A model and its processor behind an engine.

    Args:
        loaded: What `deadpan.checkpoints.load.load` returns.
        batch_size: Answers computed at once; None for what suits the device.
        engine: What answers; by default the builtin engine, with the loaded model.
    """

    def __init__(
        self, loaded: Loaded, batch_size: int | None = None, engine: Engine | None = None
    ) -> None:
        self._loaded = loaded
        self.engine: Engine = engine or BuiltinEngine(loaded, batch_size)

    @property
    def model(self) -> Any:
        """The transformers module; None behind vLLM and LMDeploy, which load the model themselves."""
        return self._loaded.model

    @property
    def processor(self) -> Processor:
        """What makes the model's inputs."""
        return self._loaded.processor

    def tell(
        self,
        pictures: Sequence[Picture] | Picture | None,
        prompt: str = PROMPT,
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_new_tokens: int = 128,
    ) -> str | list[str] | list[list[str]]:
        """Tell jokes about pictures.

        Args:
            pictures: A picture (path or PIL image), several to be answered each for itself, or None for none.
            prompt: The question.
            n: Jokes a picture; more than one needs a temperature.
            temperature: 0 for the likeliest answer; about 0.8 for variety.
            top_p: Draw only among the likeliest tokens that together have this probability.
            seed: Makes drawing repeatable.
            max_new_tokens: The most tokens of a joke.

        Returns:
            One joke; with n > 1 a list of them; for several pictures a list with one of these for each.

        Raises:
            DeadpanError: If a picture is broken or a setting is out of range.
        """
        settings = GenerationSettings(max_new_tokens, temperature, top_p, seed)
        if pictures is None or isinstance(pictures, str | Path | Image.Image):
            (group,) = self.jokes([pictures], prompt, n=n, settings=settings)
            return group[0].text if n == 1 else [joke.text for joke in group]
        groups = self.jokes(pictures, prompt, n=n, settings=settings)
        if n == 1:
            return [group[0].text for group in groups]
        return [[joke.text for joke in group] for group in groups]

    def jokes(
        self,
        pictures: Sequence[Picture | None],
        prompt: str = PROMPT,
        *,
        n: int = 1,
        settings: GenerationSettings | None = None,
    ) -> list[list[Joke]]:
        """Like `tell`, with token counts and the reason each joke ended: n jokes for each picture."""
        settings = settings or GenerationSettings()
        check_number(n, settings)
        requests = [request(picture, prompt) for picture in pictures for _ in range(n)]
        jokes = self.engine.generate(requests, settings)
        return [jokes[i : i + n] for i in range(0, len(jokes), n)]

    def score(
        self, picture: Picture | None, choices: Sequence[str], prompt: str = PROMPT
    ) -> list[float]:
        """How likely the model finds each of several answers to a picture.

        Returns:
            For each choice, the log-probability in nats of its tokens and the closing stop token, summed.

        Raises:
            DeadpanError: If the picture is broken, or `choices` is a text, whose characters would be scored.
        """
        if isinstance(choices, str):
            raise DeadpanError(
                "The choices are one text.", expected="a list of texts", found=repr(choices[:60])
            )
        return self.engine.score(request(picture, prompt), choices)

    def close(self) -> None:
        """Release the model's memory."""
        self.engine.close()


def check_number(n: int, settings: GenerationSettings) -> None:
    """Refuse a number of jokes that makes no sense.

    Raises:
        DeadpanError: If it is below 1, or above 1 where all would be the same.
    """
    if n < 1:
        raise DeadpanError(
            "The number of jokes is out of range.", expected="at least 1", found=str(n)
        )
    if n > 1 and settings.temperature == 0:
        raise DeadpanError(
            f"{n} jokes were asked for, but without drawing they would all be the same.",
            fix="set a temperature, for example 0.8",
        )


def request(picture: Picture | None, prompt: str) -> Request:
    """A question about a picture (or about none), the picture in front of the question."""
    if picture is None:
        return Request([], [Turn("human", prompt)])
    name = "the picture" if isinstance(picture, Image.Image) else str(picture)
    image = picture if isinstance(picture, Image.Image) else open_picture(Path(picture))
    text = prompt if IMAGE_TAG in prompt else f"{IMAGE_TAG}\n{prompt}"
    return Request([image], [Turn("human", text)], name)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str = "none",
    max_tiles: int | None = None,
    base: str | Path | None = None,
    batch_size: int | None = None,
    engine: str = "builtin",
    memory: float = 0.9,
    progress: Progress | None = None,
) -> Teller:
    """Load a teller.

    Args:
        model: A checkpoint folder (official or Hugging Face layout, or an adapter), a run folder, or a Hub id.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (bf16 on a GPU that computes in it, else fp32), bf16, fp16 or fp32.
        attention: auto, eager, sdpa, flash or varlen.
        quantization: none, nf4 or fp8.
        max_tiles: Overrides the checkpoint's own tile limit.
        base: For an adapter whose base model has moved: where it is now.
        batch_size: Answers computed at once; None for what suits the device. vLLM and LMDeploy decide it themselves.
        engine: builtin, vllm or lmdeploy. The last two load exports in the Hugging Face layout, on a GPU. vLLM
            starts a process, so a script needs `if __name__ == "__main__":`.
        memory: For vLLM and LMDeploy: the share of the GPU's memory that they may take.
        progress: Called with the number of tensors read and their total.

    Raises:
        DeadpanError: If the model cannot be found or loaded, saying why.
    """
    if engine not in ENGINES:
        raise DeadpanError(f"The engine {engine!r} is unknown.", fix=did_you_mean(engine, ENGINES))
    if engine != "builtin":
        check_installed(engine)
        export = find_export(
            model,
            engine,
            device=device,
            dtype=dtype,
            attention=attention,
            quantization=quantization,
            max_tiles=max_tiles,
            base=base,
            memory=memory,
        )
        kind = VllmEngine if engine == "vllm" else LmdeployEngine
        started = Loaded(None, export.processor, export.adapter or export.folder, export.folder)
        return Teller(started, engine=kind(export))
    loaded = load_checkpoint(
        model,
        device=device,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        max_tiles=max_tiles,
        base=base,
        progress=progress,
    )
    return Teller(loaded, batch_size)
