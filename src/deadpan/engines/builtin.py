"""The engine that needs nothing but PyTorch: transformers' own generation."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import TextIteratorStreamer

from deadpan.checkpoints.load import Loaded
from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels

BATCH_SIZE = 8
"""Requests answered at once; a 7-tile picture takes about 0.3 GiB in bfloat16 with the 2B model."""


class BuiltinEngine:
    """Answers with the model in this process.

    Args:
        loaded: The model and its processor.
        batch_size: Requests answered at once.
    """

    def __init__(self, loaded: Loaded, batch_size: int = BATCH_SIZE) -> None:
        self._model = loaded.model.eval()
        self._processor = loaded.processor
        self._batch_size = batch_size
        self._device: torch.device = plain_model(loaded.model).lm_head.weight.device

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        """Answer requests, in their order."""
        jokes = []
        with self._randomness(settings.seed):
            for start in range(0, len(requests), self._batch_size):
                jokes += self._answer(requests[start : start + self._batch_size], settings)
        return jokes

    def _answer(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        inputs = self._inputs(requests)
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode(), kernels():
            output = self._model.generate(**inputs, **_arguments(settings))
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            self._joke(row[width:], prompt)
            for row, prompt in zip(output.tolist(), prompts, strict=True)
        ]

    def _joke(self, ids: list[int], prompt_tokens: int) -> Joke:
        stop = self._processor.stop_id
        stopped = stop in ids
        tokens = ids.index(stop) + 1 if stopped else len(ids)
        text = self._processor.decode(ids)
        return Joke(text, prompt_tokens, tokens, "stop" if stopped else "length")

    def _inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """A batch padded on the left, where generation needs it."""
        samples = [self._processor.sample(r.images, r.turns, r.name) for r in requests]
        width = max(len(sample.input_ids) for sample in samples)
        ids = torch.full((len(samples), width), self._processor.pad_id)  # (request, token)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            ids[row, width - length :] = torch.tensor(sample.input_ids)
            mask[row, width - length :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    @contextlib.contextmanager
    def _randomness(self, seed: int | None) -> Iterator[None]:
        """Draw from a seed of our own without touching the caller's random numbers."""
        if seed is None:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        """Answer one request piece by piece; the pieces joined are the text of the joke returned at the end."""
        streamer = TextIteratorStreamer(
            self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        inputs = self._inputs([request])
        prompt_tokens = inputs["input_ids"].shape[1]

        def work() -> Joke:
            try:
                with torch.inference_mode(), kernels(), self._randomness(settings.seed):
                    output = self._model.generate(
                        **inputs, streamer=streamer, **_arguments(settings)
                    )
            finally:
                streamer.end()  # or the reader would wait for ever
            return self._joke(output[0, prompt_tokens:].tolist(), prompt_tokens)

        with ThreadPoolExecutor(max_workers=1) as pool:
            done = pool.submit(work)
            yield from _stripped(streamer)
            return done.result()

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        """For each choice, log p(choice and its stop token | the conversation), in nats, summed over tokens."""
        prompt = self._inputs([request])
        ids = [self._processor.choice(text) for text in choices]
        scores: list[float] = []
        with torch.inference_mode(), kernels():
            for start in range(0, len(ids), self._batch_size):
                # The picture and the question are read once a batch, whatever the number of choices.
                scores += self._score(prompt, ids[start : start + self._batch_size])
        return scores

    def _score(self, prompt: dict[str, torch.Tensor], choices: list[list[int]]) -> list[float]:
        read = self._model(**prompt, use_cache=True, logits_to_keep=1)
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(choices))
        width = max(map(len, choices))
        ids = torch.full((len(choices), width), self._processor.pad_id, device=self._device)
        valid = torch.zeros_like(ids)
        for row, choice in enumerate(choices):
            ids[row, : len(choice)] = torch.tensor(choice)
            valid[row, : len(choice)] = 1
        before = prompt["attention_mask"].expand(len(choices), -1)
        logits = read.logits.expand(len(choices), -1, -1)  # (choice, 1, vocabulary)
        if width > 1:
            rest = self._model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([before, valid[:, :-1]], dim=1),
                past_key_values=cache,
            ).logits
            logits = torch.cat([logits, rest], dim=1)  # (choice, token, vocabulary)
        log_probabilities = logits.float().log_softmax(dim=-1)
        chosen = log_probabilities.gather(2, ids[:, :, None])[:, :, 0]  # (choice, token)
        sums: list[float] = (chosen * valid).sum(dim=1).tolist()
        return sums

    def close(self) -> None:
        """Release the model's memory."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _arguments(settings: GenerationSettings) -> dict[str, object]:
    arguments: dict[str, object] = {"max_new_tokens": settings.max_new_tokens}
    if settings.temperature == 0:
        return {**arguments, "do_sample": False}
    return {
        **arguments,
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
    }


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Drop the white space at either end of a text that comes in pieces."""
    held, begun = "", False
    for piece in pieces:
        text = held + (piece if begun else piece.lstrip())
        body = text.rstrip()
        held = text[len(body) :]
        begun = begun or bool(body)
        if body:
            yield body
