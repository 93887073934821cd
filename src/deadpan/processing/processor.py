"""The processor: pictures and turns in, the model's tensors out.

Training and every engine use this one class, so a picture and a question become the same numbers everywhere. It is
made from a checkpoint folder and knows three things: the tokenizer, the template, and the tile policy.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from deadpan.data.pictures import open_picture, picture_size
from deadpan.data.records import IMAGE_TAG, Record, Turn
from deadpan.errors import DeadpanError
from deadpan.processing import tiles
from deadpan.processing.encoding import IGNORE_INDEX, ConversationEncoder
from deadpan.processing.template import Template, named, recognise
from deadpan.processing.tokenizer import load_tokenizer, read_json

POLICY_FILE = "deadpan.json"
"""Where an export keeps its template and tile policy, whole, for deadpan itself to read back."""


@dataclass(frozen=True)
class TilePolicy:
    """How pictures are cut; saved with every checkpoint.

    Attributes:
        tile_size: The edge of a tile in pixels.
        min_tiles: The fewest tiles a picture may become, thumbnail not counted.
        max_tiles: The most tiles the pictures of one sample may become together, thumbnails not counted.
        thumbnail: Whether a picture of several tiles is followed by a thumbnail.
        tokens_per_tile: Image tokens a tile becomes after the pixel shuffle.
    """

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    tokens_per_tile: int

    def share(self, pictures: int) -> int:
        """The tile limit of each of several pictures in one sample, as upstream shares it."""
        return max(self.min_tiles, self.max_tiles // max(1, pictures))

    def count(self, size: tuple[int, int], pictures: int) -> int:
        """Tiles of a picture of (width, height) among several pictures, thumbnail included."""
        limit = self.share(pictures)
        return tiles.count(*size, self.min_tiles, limit, self.tile_size, self.thumbnail)

    def grid(self, size: tuple[int, int], pictures: int) -> tuple[int, int]:
        """(columns, rows) of the tiles of a picture of (width, height) among several pictures."""
        return tiles.grid(*size, self.min_tiles, self.share(pictures), self.tile_size)

    def pixel_values(self, image: Image.Image, pictures: int) -> torch.Tensor:
        """Tiles of a picture among several, float32 of shape (tile, 3, tile_size, tile_size)."""
        return tiles.normalise(self.pixel_bytes(image, pictures))

    def pixel_bytes(self, image: Image.Image, pictures: int) -> torch.Tensor:
        """The same before `tiles.normalise`, uint8 of shape (tile, tile_size, tile_size, 3)."""
        limit = self.share(pictures)
        return tiles.pixel_bytes(image, limit, self.tile_size, self.thumbnail, self.min_tiles)


@dataclass(frozen=True)
class Sample:
    """One encoded conversation.

    Attributes:
        input_ids: Token ids, image tokens expanded.
        labels: The ids to learn, `IGNORE_INDEX` elsewhere.
        pixel_values: float32 of shape (tile, 3, tile_size, tile_size), or None without pictures.
        name: The record it came from, for messages.
        position_ids: Where each token stands; None if one after the other. Answers after the first that
            continue the same prefix start again where it ends.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None
    name: str
    position_ids: list[int] | None = None


@dataclass(frozen=True)
class Size:
    """How large a sample will be, known before its pictures are decoded.

    Attributes:
        tokens: Tokens, image tokens included.
        supervised: Those of them that are learned.
        tiles: Tiles of its pictures, thumbnails included.
        prefix: Tokens before the first that is learned.
    """

    tokens: int
    supervised: int
    tiles: int
    prefix: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(
            self.tokens + other.tokens,
            self.supervised + other.supervised,
            self.tiles + other.tiles,
        )


def place_pictures(turns: Sequence[Turn], pictures: int, where: str) -> list[Turn]:
    """Put `<image>` in front of the first question where the one picture has no place, and check the count.

    Raises:
        DeadpanError: If the number of `<image>` differs from the number of pictures.
    """
    if not any(turn.role == "human" for turn in turns):
        raise DeadpanError(
            "The conversation has no question.",
            where=where,
            expected="at least one turn from human",
        )
    marks = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
    turns = list(turns)
    if marks == 0 and pictures == 1:
        first = next(i for i, turn in enumerate(turns) if turn.role == "human")
        turns[first] = Turn("human", f"{IMAGE_TAG}\n{turns[first].text.strip()}")
    elif marks != pictures:
        raise DeadpanError(
            "The pictures and their places in the text do not match.",
            where=where,
            expected=f"{pictures} {IMAGE_TAG}, one for each picture",
            found=f"{marks} {IMAGE_TAG}",
            fix=f"write {IMAGE_TAG} once where each picture goes",
        )
    return turns


class Processor:
    """Turn pictures and conversations into the tensors that the model takes.

    Args:
        tokenizer: A fast tokenizer with InternVL's special tokens.
        template: How conversations are written.
        tile_policy: How pictures are cut.
        max_length: The most tokens a sample may have; a longer one is an error, never truncated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        tile_policy: TilePolicy,
        max_length: int = 8192,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tile_policy = tile_policy
        self.max_length = max_length
        self.stop_id: int = tokenizer.convert_tokens_to_ids(template.stop)
        if self.stop_id is None or self.stop_id == tokenizer.unk_token_id:
            raise DeadpanError(
                f"The tokenizer lacks the stop token of template {template.name!r}.",
                expected=template.stop,
                fix="use the tokenizer files that came with the checkpoint",
            )
        self.pad_id: int = tokenizer.pad_token_id
        self._encoder = ConversationEncoder(tokenizer)

    def __call__(
        self, images: Sequence[Image.Image], turns: Sequence[Turn] | str
    ) -> dict[str, torch.Tensor]:
        """Make the model's input for one conversation.

        Args:
            images: The pictures, in order.
            turns: The turns, `<image>` where a picture goes, or just a question.

        Returns:
            input_ids and attention_mask of shape (1, token), and with pictures pixel_values of shape
            (tile, 3, tile_size, tile_size).
        """
        if isinstance(turns, str):
            turns = [Turn("human", turns)]
        sample = self.sample(images, turns, "the conversation")
        ids = torch.tensor([sample.input_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample.pixel_values is not None:
            inputs["pixel_values"] = sample.pixel_values
        return inputs

    def sample(self, images: Sequence[Image.Image], turns: Sequence[Turn], name: str) -> Sample:
        """Encode a conversation about decoded pictures.

        Raises:
            DeadpanError: If it is longer than max_length, or `<image>` and pictures do not match.
        """
        values = [self.tile_policy.pixel_values(image, len(images)) for image in images]
        input_ids, labels = self.encode(turns, [len(v) for v in values], name)
        return Sample(input_ids, labels, torch.cat(values) if values else None, name)

    def record(self, record: Record) -> Sample:
        """Encode a record, decoding its pictures.

        Raises:
            DeadpanError: As `sample`, or if a picture is broken.
        """
        images = [open_picture(path) for path in record.image_paths]
        return self.sample(images, record.turns, record.name)

    def text(self, record: Record, tile_counts: Sequence[int]) -> Sample:
        """Encode a record without its pictures, which have so many tiles each.

        Raises:
            DeadpanError: As `sample`.
        """
        input_ids, labels = self.encode(record.turns, tile_counts, record.name)
        return Sample(input_ids, labels, None, record.name)

    def samples(self, record: Record) -> list[Sample]:
        """Encode a record, or the two sides of a preference pair; its pictures are decoded once.

        Raises:
            DeadpanError: As `record`.
        """
        first, *others = record.sides
        sample = self.record(first)
        counts = self.tile_counts(record) if others else ()
        encoded = [self.encode(side.turns, counts, side.name) for side in others]
        return [sample, *(Sample(*ids, sample.pixel_values, record.name) for ids in encoded)]

    def size(self, record: Record) -> Size:
        """The size of a record, from its pictures' headers alone; it may exceed max_length."""
        counts = self.tile_counts(record)
        input_ids, labels = self._encode(record.turns, counts, record.name)
        supervised = len(labels) - labels.count(IGNORE_INDEX)
        prefix = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        return Size(len(input_ids), supervised, sum(counts), prefix)

    def tile_counts(self, record: Record) -> list[int]:
        """How many tiles each of a record's pictures becomes, from their headers alone."""
        paths = record.image_paths
        return [self.tile_policy.count(picture_size(path), len(paths)) for path in paths]

    def length(self, record: Record) -> int:
        """The number of tokens of a record; see `size`."""
        return self.size(record).tokens

    def encode(
        self, turns: Sequence[Turn], tile_counts: Sequence[int], name: str
    ) -> tuple[list[int], list[int]]:
        """Encode the text of a conversation whose pictures have the given numbers of tiles.

        Returns:
            input_ids and labels, equally long.

        Raises:
            DeadpanError: If it is longer than max_length, or `<image>` and pictures do not match.
        """
        input_ids, labels = self._encode(turns, tile_counts, name)
        if len(input_ids) > self.max_length:
            count = sum(tile_counts)
            image = count * self.tile_policy.tokens_per_tile
            raise DeadpanError(
                "The sample is too long.",
                where=name,
                expected=f"at most {self.max_length} tokens",
                found=f"{len(input_ids)} tokens, {image} of them for "
                f"{count} tile" + ("" if count == 1 else "s"),
                fix="lower max_tiles, raise max_length, shorten the text, or set data.overlong=skip",
            )
        return input_ids, labels

    def _encode(
        self, turns: Sequence[Turn], tile_counts: Sequence[int], name: str
    ) -> tuple[list[int], list[int]]:
        turns = place_pictures(turns, len(tile_counts), name)
        image_tokens = [count * self.tile_policy.tokens_per_tile for count in tile_counts]
        return self._encoder.encode(self.template.pieces(turns), image_tokens, self.stop_id)

    def choice(self, text: str) -> list[int]:
        """The ids of an answer as training supervises it: its text, then the stop token."""
        _, labels = self._encode([Turn("human", "?"), Turn("gpt", text)], [], "the answer")
        return [label for label in labels if label != IGNORE_INDEX]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: up to the stop token, without special tokens, stripped."""
        ids = list(ids)
        if self.stop_id in ids:
            ids = ids[: ids.index(self.stop_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def policy(self) -> dict[str, Any]:
        """What `POLICY_FILE` holds."""
        return {"template": self.template.to_json(), "tiles": asdict(self.tile_policy)}


def load_processor(folder: Path, max_tiles: int | None = None, max_length: int = 8192) -> Processor:
    """Make the processor of a checkpoint folder.

    Args:
        folder: A checkpoint in the official or the Hugging Face layout, or an adapter.
        max_tiles: Overrides the checkpoint's own tile limit.
        max_length: The most tokens a sample may have.

    Raises:
        DeadpanError: If a file is missing, the template is unknown, or the tile limit is below 1.
    """
    if max_tiles is not None and max_tiles < 1:
        raise DeadpanError(
            "max_tiles is out of range.", expected="at least 1", found=str(max_tiles)
        )
    tokenizer = load_tokenizer(folder)
    policy_file = folder / POLICY_FILE
    if policy_file.exists():
        saved = read_json(policy_file)
        template, policy = Template(**saved["template"]), TilePolicy(**saved["tiles"])
    else:
        config = read_json(folder / "config.json")
        if "llm_config" in config:
            template, policy = _official_policy(config, folder)
        else:
            template, policy = _hf_policy(config, folder, tokenizer)
    if max_tiles is not None:
        policy = TilePolicy(**{**asdict(policy), "max_tiles": max_tiles})
    return Processor(tokenizer, template, policy, max_length)


def _tokens_per_tile(tile_size: int, patch_size: int, downsample_ratio: float) -> int:
    return int((tile_size // patch_size) ** 2 * downsample_ratio**2)


def _official_policy(config: dict[str, Any], folder: Path) -> tuple[Template, TilePolicy]:
    where = str(folder / "config.json")
    vision = config["vision_config"]
    tile_size = config.get("force_image_size") or vision["image_size"]
    policy = TilePolicy(
        tile_size=tile_size,
        min_tiles=config.get("min_dynamic_patch", 1),
        max_tiles=config.get("max_dynamic_patch", 12)
        if config.get("dynamic_image_size", True)
        else 1,
        thumbnail=config.get("use_thumbnail", True),
        tokens_per_tile=_tokens_per_tile(
            tile_size, vision["patch_size"], config.get("downsample_ratio", 0.5)
        ),
    )
    return named(config.get("template", "internlm2-chat"), where), policy


def _hf_policy(
    config: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[Template, TilePolicy]:
    processor_file = folder / "processor_config.json"
    images = read_json(processor_file).get("image_processor") if processor_file.exists() else None
    if images is None:
        images = read_json(folder / "preprocessor_config.json")
    tile_size = images["size"]["height"]
    patch_size = config["vision_config"]["patch_size"]
    policy = TilePolicy(
        tile_size=tile_size,
        min_tiles=images.get("min_patches", 1),
        max_tiles=images.get("max_patches", 12) if images.get("crop_to_patches", True) else 1,
        thumbnail=True,
        tokens_per_tile=_tokens_per_tile(
            tile_size,
            patch_size if isinstance(patch_size, int) else patch_size[0],
            config.get("downsample_ratio", 0.5),
        ),
    )
    jinja = tokenizer.chat_template
    if not isinstance(jinja, str):
        raise DeadpanError(
            "The checkpoint has no chat template.",
            where=folder,
            fix="put the model's chat_template.jinja in the folder",
        )
    return recognise(jinja, tokenizer.bos_token or "", str(folder)), policy
