"""From pictures to what the language model reads of them.

Threads prepare pictures while the device computes: a GPU gets their bytes and cuts them itself, and for
another device, or with a Pillow that resizes otherwise, Pillow cuts. What the vision tower made of the
latest pictures is kept, by a digest of their pixels: a further joke about the same picture costs neither
tiles nor tower.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image

from deadpan.models import decoding
from deadpan.models.answer_loss import plain_model
from deadpan.models.attention import kernels
from deadpan.models.fused import has_triton
from deadpan.models.fused_loss import picture_features, shuffled
from deadpan.models.vision import Recorded, VisionTower, unsupported
from deadpan.processing import resampling
from deadpan.processing.processor import TilePolicy
from deadpan.processing.tiles import normalise

KEPT_BYTES = 2**28
"""Features kept by an engine; those of a picture of 7 tiles take 7 MiB in a 2B model."""

TILES = 16
"""Tiles that the vision tower sees at once; each number up to it is recorded once. In the 2B model's tower they are
16,400 rows: cut into blocks of 128 x 256, its products fill an H100's 132 processors 3.9 times or a multiple of it."""

Key = tuple[bytes, tuple[int, int], int]


@dataclass(frozen=True)
class Cut:
    """A picture on its way to the vision tower.

    Attributes:
        key: Tells it from others: its pixels, its size, and the pictures that share the tile limit.
        pixels: Its tiles, or itself where the device cuts, uint8; or None where the features are known.
        features: Of shape (image token, hidden), if known.
    """

    key: Key
    pixels: torch.Tensor | None
    features: torch.Tensor | None


class PictureFeatures:
    """Cuts pictures and lets the vision tower and the projector see them.

    Args:
        model: InternVL, plain or with PEFT's adapter.
        policy: How pictures are cut.
        kept_bytes: The most bytes of features kept; 0 for a model whose weights change.
    """

    def __init__(self, model: torch.nn.Module, policy: TilePolicy, kept_bytes: int) -> None:
        self._plain = plain_model(model)
        self._device = self._plain.lm_head.weight.device
        written_out = decoding.unsupported(model) is None and unsupported(self._plain) is None
        self._tower = VisionTower(self._plain) if written_out else None
        self._seen = Recorded(self._see, TILES if self._tower else 0)
        self._device_cuts = has_triton(self._device) and resampling.is_pillows()
        self._policy, self._kept_bytes = policy, kept_bytes
        self._kept: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "tiles")

    def cut(self, images: Sequence[Image.Image]) -> list[Future[Cut]]:
        """Begin with the pictures of one conversation."""
        return [self._threads.submit(self._cut, image, len(images)) for image in images]

    def _cut(self, image: Image.Image, pictures: int) -> Cut:
        image = image.convert("RGB")
        content = image.tobytes()
        key = (hashlib.sha256(content).digest(), image.size, pictures)
        with self._lock:
            features = self._kept.get(key)
        if features is not None:
            return Cut(key, None, features)
        if self._device_cuts:
            flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = flat.view(image.height, image.width, 3)
        else:
            pixels = self._policy.pixel_bytes(image, pictures)
        # Pinned, so that the copy to a GPU waits for nothing.
        return Cut(key, pixels.pin_memory() if self._device.type == "cuda" else pixels, None)

    def of(self, cuts: Iterable[Cut]) -> torch.Tensor:
        """What the language model reads of pictures, of shape (image token, hidden), in their order.

        The device begins with the first ones while the last are waited for.
        """
        known: dict[Key, torch.Tensor] = {}
        counts: dict[Key, int] = {}
        keys: list[Key] = []
        waiting: list[torch.Tensor] = []
        seen: list[torch.Tensor] = []
        for cut in cuts:
            keys.append(cut.key)
            if cut.key in known or cut.key in counts:
                continue
            with self._lock:
                # What another batch has seen since it was cut.
                features = self._kept.get(cut.key, cut.features)
            if features is not None:
                known[cut.key] = features
                continue
            assert cut.pixels is not None
            counts[cut.key] = self._policy.count(*cut.key[1:])
            waiting.append(self.pixel_values(cut))
            while sum(map(len, waiting)) >= TILES:
                values = torch.cat(waiting)
                waiting = [values[TILES:]]
                # Copied, as the next ones are written over it.
                seen.append(self._seen(values[:TILES]).clone())
        if sum(map(len, waiting)):
            seen.append(self._seen(torch.cat(waiting)))
        if seen:
            parts = torch.cat(seen).split(list(counts.values()))  # each (tile, image token, hidden)
            known |= {key: part.flatten(0, 1) for key, part in zip(counts, parts, strict=True)}
        self._keep(known)
        return torch.cat([known[key] for key in keys])

    def pixel_values(self, cut: Cut) -> torch.Tensor:
        """What the vision tower reads of a picture that it is to see."""
        assert cut.pixels is not None
        moved = cut.pixels.to(self._device, non_blocking=True)
        if not self._device_cuts:
            return normalise(moved, self._plain.dtype)
        from deadpan.processing import gpu_tiles

        _, size, beside = cut.key
        edge = self._policy.tile_size
        shape = (self._policy.count(size, beside), 3, edge, edge)
        values = torch.empty(shape, dtype=self._plain.dtype, device=self._device)
        gpu_tiles.put_pixel_values(moved, self._policy.grid(size, beside), values)
        return values

    def _see(self, values: torch.Tensor) -> torch.Tensor:
        """Tiles to what the language model reads of them, (tile, image token, hidden)."""
        with kernels():
            if self._tower is None:
                features = picture_features(self._plain, values)
            else:
                features = shuffled(self._plain, self._tower(values))
            seen: torch.Tensor = self._plain.model.multi_modal_projector(features)
        return seen

    def _keep(self, features: dict[Key, torch.Tensor]) -> None:
        with self._lock:
            for key, value in features.items():
                if key not in self._kept and value.nbytes <= self._kept_bytes:
                    # A part of a larger tensor would hold the whole of it.
                    self._kept[key] = value.clone()
                if key in self._kept:
                    self._kept.move_to_end(key)
            held = sum(value.nbytes for value in self._kept.values())
            while held > self._kept_bytes:
                held -= self._kept.popitem(last=False)[1].nbytes

    def close(self) -> None:
        """Let go of what is kept, and of the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._kept.clear()
        del self._seen  # it refers to what holds it
