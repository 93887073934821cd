"""The engine that needs nothing but PyTorch.

A batch is read by `deadpan.models.decoding`, and then each step gives every answer one token. The tokens
stay on the device: they are copied to the host beside the computing, and on a GPU the host looks for the
end one step behind. So the device never waits for it, at the price of one step in vain.

Reading is arithmetic, and a step is memory and waiting: on a GPU a batch's steps run on a stream of their
own while the next batch is seen and read. One thread gives both to the device.

    the current stream    read 1   read 2           read 3
    the steps' stream              steps of 1       steps of 2 ...
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from deadpan.checkpoints.load import Loaded
from deadpan.engines.base import Asked, GenerationSettings, Joke, Request
from deadpan.engines.batches import Answers, Batch, Prompt
from deadpan.engines.features import KEPT_BYTES, PictureFeatures
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.models.decoding import Decoder, ModuleDecoder, unsupported
from deadpan.models.drawing import drawn, likeliest

_BATCH_SIZE = {"cuda": 32, "cpu": 8}
"""Requests answered at once; a 7-tile picture takes about 0.2 GiB in bfloat16 with the 2B model."""


def batch_size_for(device: torch.device) -> int:
    """How many requests are answered at once on a device where nobody says."""
    return _BATCH_SIZE["cuda" if device.type == "cuda" else "cpu"]


class BuiltinEngine:
    """Answers with the model in this process.

    Args:
        loaded: The model and its processor.
        batch_size: Requests answered at once, or fewer where a GPU's memory is full; None for what suits the
            device.
        kept_bytes: The most bytes of pictures' features kept for further jokes; 0 for a model whose weights
            change.
        overlap: Read a batch while the one before is answered, which takes another cache's memory, and is
            not done where there is none; None where it saves time.
    """

    def __init__(
        self,
        loaded: Loaded,
        batch_size: int | None = None,
        kept_bytes: int = KEPT_BYTES,
        overlap: bool | None = None,
    ) -> None:
        self._model = loaded.model.eval()
        self._processor = loaded.processor
        self._device: torch.device = plain_model(loaded.model).lm_head.weight.device
        self.batch_size = batch_size or batch_size_for(self._device)
        self._modules = ModuleDecoder(self._model)
        self._decoder = Decoder(self._model) if unsupported(self._model) is None else None
        self._beside = self._decoder.beside() if self._decoder else None
        self._overlap = (
            bool(self._decoder and self._decoder.records) if overlap is None else overlap
        )
        # First come the few blocks of a step, and the others have what is left.
        self._side = (
            torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        )
        self._features = PictureFeatures(self._model, loaded.processor.tile_policy, kept_bytes)

    def prepare(self, request: Request) -> Request:
        """The request, its pictures being cut by threads while it waits for its turn."""
        return replace(request, prepared=self._features.cut(request.images))

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        """Answer requests, in their order; those for the same conversation share its reading."""
        (jokes,) = self.generate_each([(requests, settings)])
        return jokes

    def generate_each(self, asked: Iterable[Asked | None]) -> Generator[list[Joke], None, None]:
        """What `generate` gives for each of several calls, a call being read while the one before is answered.

        Args:
            asked: The calls, each taken once the one before is begun; None for nothing yet, and it is asked
                for the next after a step.
        """
        jokes: list[Joke] = []
        with closing(self._told(self._batches(asked))) as told:
            for batch, of_batch in told:
                jokes += of_batch
                if not batch.coming:
                    yield jokes
                    jokes = []

    def _batches(self, asked: Iterable[Asked | None]) -> Iterator[Batch | None]:
        for call in asked:
            if call is None:
                yield None
                continue
            requests, settings = call
            if not requests:
                yield Batch([], settings, torch.empty(0, 0))
                continue
            prompts = self._prompts(requests)
            uniform = _uniform(len(prompts), settings)
            longest = max(len(prompt.ids) for prompt in prompts) + settings.max_new_tokens
            size = min(self.batch_size, len(prompts))
            twice = False
            if self._decoder is not None and self._beside is not None:
                room = self._decoder.room(longest, self._beside)
                twice = self._overlap and longest <= self._decoder.longest
                twice = twice and room >= 2 * size and self._beside.room(longest) >= size
                size = min(size, room)
            for start in range(0, len(prompts), size):
                end = start + size
                coming = prompts[end : end + size]
                for prompt in [*prompts[start:end], *coming]:
                    self._cut(prompt)  # the next batch's pictures while this one is computed
                part = prompts[start:end], settings, uniform[start:end]
                yield Batch(*part, coming, longest, twice)

    def _told(
        self, batches: Iterator[Batch | None]
    ) -> Generator[tuple[Batch, list[Joke]], None, None]:
        """Batches with their jokes, in order."""
        before: Answers | None = None
        first: Decoder | ModuleDecoder = self._decoder or self._modules
        decoder = first
        try:
            for batch in batches:
                if batch is None:
                    if before is not None and next(before.rest(), None) is None:
                        yield before.batch, self._jokes(before)
                        before = None
                    continue
                if before is not None and not batch.twice:
                    yield before.batch, self._jokes(before)
                    before = None
                if not batch.prompts:
                    yield batch, []
                    continue
                if not batch.twice:
                    self._make_room(batch)
                other = self._beside if before is not None and decoder is first else None
                decoder = other or first
                answers = self._begun(batch, decoder, before, self._side if batch.twice else None)
                for prompt in batch.prompts:
                    if prompt not in batch.coming:
                        prompt.cuts = None
                if before is not None:
                    yield before.batch, self._jokes(before)
                before = answers
                if not batch.twice:
                    yield batch, self._jokes(answers)
                    before = None
            if before is not None:
                yield before.batch, self._jokes(before)
        finally:
            # What comes next may take the place of what a step in vain reads still.
            self._settle()

    def _prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """What each request continues; equal conversations about the same pictures are one."""
        known: dict[object, Prompt] = {}
        policy = self._processor.tile_policy
        prompts = []
        for request in requests:
            images, turns = request.images, request.turns
            key = (tuple(map(id, images)), tuple(turns))
            if key not in known:
                counts = [policy.count(image.size, len(images)) for image in images]
                ids, _ = self._processor.encode(turns, counts, request.name)
                known[key] = Prompt(request, ids, request.prepared)
            prompts.append(known[key])
        return prompts

    def _cut(self, prompt: Prompt) -> None:
        if prompt.cuts is None:
            prompt.cuts = self._features.cut(prompt.request.images)

    @torch.inference_mode()
    def _begun(
        self,
        batch: Batch,
        decoder: Decoder | ModuleDecoder,
        before: Answers | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Answers:
        """Read a batch.

        Args:
            batch: What is asked.
            decoder: What reads it; it is at work for no other.
            before: Answers that are to grow meanwhile.
            stream: Where the steps are to run; None for the current stream.
        """
        settings = batch.settings
        prompts = list(dict.fromkeys(batch.prompts))
        longest = max(len(prompt.ids) for prompt in prompts) + settings.max_new_tokens
        if isinstance(decoder, Decoder) and longest > decoder.longest:
            decoder = self._modules

        def features(wanted: Sequence[int]) -> torch.Tensor | None:
            if before is not None:
                before.go_on()
            cuts = [cut for i in wanted for cut in prompts[i].cuts or []]
            return self._features.of(cut.result() for cut in cuts) if cuts else None

        number = {prompt: i for i, prompt in enumerate(prompts)}
        rows = [number[prompt] for prompt in batch.prompts]
        uniform = batch.uniform
        if self._side is not None and uniform.numel():
            uniform = uniform.pin_memory()  # or the copy waits for the device
        uniform = uniform.to(self._device, non_blocking=True)

        def chosen(logits: torch.Tensor, step: int) -> torch.Tensor:
            if settings.temperature == 0:
                return likeliest(logits)
            return drawn(logits, settings.temperature, settings.top_p, uniform[:, step])

        ids = [prompt.ids for prompt in prompts]
        first = chosen(decoder.begin(ids, rows, features, settings.max_new_tokens), 0)
        return Answers(
            batch,
            first,
            lambda tokens, step: chosen(decoder.step(tokens), step),
            self._processor.stop_id,
            stream,
        )

    def _tokens(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, uniform: torch.Tensor
    ) -> Iterator[list[int]]:
        """The tokens of a batch's answers, step by step, until all have ended."""
        batch = Batch(prompts, settings, uniform)
        yield from self._begun(batch, self._decoder or self._modules).rest()

    def _jokes(self, answers: Answers) -> list[Joke]:
        for _ in answers.rest():
            pass
        self._settle()
        return [
            self._joke(ids, len(prompt.ids))
            for ids, prompt in zip(answers.ids, answers.batch.prompts, strict=True)
        ]

    def _make_room(self, batch: Batch) -> None:
        """Let go of the second cache if a batch by itself wants its memory."""
        wanted = len(batch.prompts)
        if self._decoder and self._beside and self._decoder.room(batch.longest) < wanted:
            self._beside.release()

    def _settle(self) -> None:
        """Let what comes on the current stream wait for the steps."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

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
        del self._model, self._modules, self._decoder, self._beside, self._features
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
