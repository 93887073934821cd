"""The engine that needs nothing but PyTorch.

A batch is read by `deadpan.models.decoding`, and then each step gives every answer one token. The tokens
stay on the device: they are copied to the host beside the computing, and on a GPU the host looks for the
end one step behind. So the device never waits for it, at the price of one step in vain.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from deadpan.checkpoints.load import Loaded
from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.engines.features import KEPT_BYTES, Cut, PictureFeatures
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.models.decoding import Decoder, ModuleDecoder, unsupported
from deadpan.models.drawing import drawn, likeliest

_BATCH_SIZE = {"cuda": 32, "cpu": 8}
"""Requests answered at once; a 7-tile picture takes about 0.2 GiB in bfloat16 with the 2B model."""


def batch_size_for(device: torch.device) -> int:
    """How many requests are answered at once on a device where nobody says."""
    return _BATCH_SIZE["cuda" if device.type == "cuda" else "cpu"]


@dataclass(eq=False)
class _Prompt:
    """A conversation to be continued, by one answer or several.

    Attributes:
        request: The first request that has it.
        ids: Its tokens.
        cuts: Its pictures, while they are cut and seen.
    """

    request: Request
    ids: list[int]
    cuts: list[Future[Cut]] | None = None


class BuiltinEngine:
    """Answers with the model in this process.

    Args:
        loaded: The model and its processor.
        batch_size: Requests answered at once, or fewer where a GPU's memory is full; None for what suits the
            device.
        kept_bytes: The most bytes of pictures' features kept for further jokes; 0 for a model whose weights
            change.
    """

    def __init__(
        self, loaded: Loaded, batch_size: int | None = None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._model = loaded.model.eval()
        self._processor = loaded.processor
        self._device: torch.device = plain_model(loaded.model).lm_head.weight.device
        self.batch_size = batch_size or batch_size_for(self._device)
        self._modules = ModuleDecoder(self._model)
        self._decoder = Decoder(self._model) if unsupported(self._model) is None else None
        self._features = PictureFeatures(self._model, loaded.processor.tile_policy, kept_bytes)

    def prepare(self, request: Request) -> Request:
        """The request, its pictures being cut by threads while it waits for its turn."""
        return replace(request, prepared=self._features.cut(request.images))

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        """Answer requests, in their order; those for the same conversation share its reading."""
        prompts = self._prompts(requests)
        uniform = _uniform(len(requests), settings)
        batches = self._batches(prompts, settings)
        jokes: list[Joke] = []
        for number, batch in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else []
            for prompt in [*batch, *following]:
                self._cut(prompt)  # the next batch's pictures while this one is computed
            answers: list[list[int]] = [[] for _ in batch]
            numbers = uniform[len(jokes) : len(jokes) + len(batch)]
            for tokens in self._tokens(batch, settings, numbers):
                for answer, token in zip(answers, tokens, strict=True):
                    answer.append(token)
            jokes += [
                self._joke(answer, len(prompt.ids))
                for answer, prompt in zip(answers, batch, strict=True)
            ]
            for prompt in batch:
                if prompt not in following:
                    prompt.cuts = None
        return jokes

    def _prompts(self, requests: Sequence[Request]) -> list[_Prompt]:
        """What each request continues; equal conversations about the same pictures are one."""
        known: dict[object, _Prompt] = {}
        policy = self._processor.tile_policy
        prompts = []
        for request in requests:
            images, turns = request.images, request.turns
            key = (tuple(map(id, images)), tuple(turns))
            if key not in known:
                counts = [policy.count(image.size, len(images)) for image in images]
                ids, _ = self._processor.encode(turns, counts, request.name)
                known[key] = _Prompt(request, ids, request.prepared)
            prompts.append(known[key])
        return prompts

    def _batches(
        self, prompts: Sequence[_Prompt], settings: GenerationSettings
    ) -> list[list[_Prompt]]:
        longest = max((len(prompt.ids) for prompt in prompts), default=0) + settings.max_new_tokens
        size = self.batch_size
        if self._decoder is not None:
            size = min(size, self._decoder.room(longest))
        return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def _cut(self, prompt: _Prompt) -> None:
        if prompt.cuts is None:
            prompt.cuts = self._features.cut(prompt.request.images)

    # Not only `with`: a generator would leave the mode on for whoever reads it.
    @torch.inference_mode()
    def _tokens(
        self, batch: Sequence[_Prompt], settings: GenerationSettings, uniform: torch.Tensor
    ) -> Iterator[list[int]]:
        """The answers' tokens, step by step, until all have ended.

        Args:
            batch: What each answer continues.
            settings: How tokens are drawn.
            uniform: Random numbers for drawing, of shape (answer, step).
        """
        prompts = list(dict.fromkeys(batch))
        longest = max(len(prompt.ids) for prompt in prompts) + settings.max_new_tokens
        decoder: Decoder | ModuleDecoder = self._modules
        if self._decoder is not None and longest <= self._decoder.longest:
            decoder = self._decoder

        def features(wanted: Sequence[int]) -> torch.Tensor | None:
            cuts = [cut for i in wanted for cut in prompts[i].cuts or []]
            return self._features.of(cut.result() for cut in cuts) if cuts else None

        number = {prompt: i for i, prompt in enumerate(prompts)}
        rows = [number[prompt] for prompt in batch]
        if self._device.type == "cuda" and uniform.numel():
            uniform = uniform.pin_memory()  # or the copy waits for the device
        uniform = uniform.to(self._device, non_blocking=True)

        def chosen(logits: torch.Tensor, step: int) -> torch.Tensor:
            if settings.temperature == 0:
                return likeliest(logits)
            return drawn(logits, settings.temperature, settings.top_p, uniform[:, step])

        ids = [prompt.ids for prompt in prompts]
        tokens = chosen(decoder.begin(ids, rows, features, settings.max_new_tokens), 0)
        behind = 1 if self._device.type == "cuda" else 0
        coming: deque[_Coming] = deque()
        going = set(range(len(batch)))
        for step in range(settings.max_new_tokens):
            if step:
                tokens = chosen(decoder.step(tokens), step)
            coming.append(_Coming(tokens))
            if len(coming) > behind:
                arrived = coming.popleft().ids()
                yield arrived
                going -= {row for row in going if arrived[row] == self._processor.stop_id}
                if not going:
                    return
        yield from (each.ids() for each in coming)

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

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        """Answer one request piece by piece; the pieces joined are the text of the joke returned at the end.

        Closing the generator ends the computing.
        """
        (prompt,) = self._prompts([request])
        self._cut(prompt)
        uniform = _uniform(1, settings)
        ids: list[int] = []

        def texts() -> Iterator[str]:
            text = _Text(self._processor.tokenizer)
            for (token,) in self._tokens([prompt], settings, uniform):
                ids.append(token)
                if token == self._processor.stop_id:
                    break
                yield from text.after(token)
            yield from text.rest()

        yield from _stripped(texts())
        return self._joke(ids, len(prompt.ids))

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        """For each choice, log p(choice and its stop token | the conversation), in nats, summed over tokens."""
        prompt = self._inputs([request])
        ids = [self._processor.choice(text) for text in choices]
        scores: list[float] = []
        with torch.inference_mode(), kernels():
            for start in range(0, len(ids), self.batch_size):
                # The picture and the question are read once a batch, whatever the number of choices.
                scores += self._score(prompt, ids[start : start + self.batch_size])
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
        self._features.close()
        del self._model, self._modules, self._decoder, self._features
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _uniform(rows: int, settings: GenerationSettings) -> torch.Tensor:
    """Random numbers in [0, 1) of shape (row, step), or (row, 0) if none are needed.

    Without a seed they come from the caller's random state; with one, a row's numbers do not depend on how
    many rows follow.
    """
    if settings.temperature == 0:
        return torch.empty(rows, 0)
    generator = None
    if settings.seed is not None:
        generator = torch.Generator().manual_seed(settings.seed)
    # A row at a time, as PyTorch's order in a larger tensor depends on its size.
    steps = settings.max_new_tokens
    numbers = [torch.rand(steps, generator=generator, dtype=torch.float64) for _ in range(rows)]
    return torch.stack(numbers)


class _Coming:
    """Tokens on their way to the host."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    def ids(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class _Text(TextStreamer):
    """Turns tokens into text as soon as it is certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._found: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._found.append(text)

    def after(self, token: int) -> list[str]:
        """The text that is certain after one more token."""
        self._found = []
        self.put(torch.tensor([token]))
        return self._found

    def rest(self) -> list[str]:
        self._found = []
        self.end()
        return self._found


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
