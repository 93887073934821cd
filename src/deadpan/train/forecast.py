"""What a run will take, in memory and time: the arithmetic. `rehearsal` makes the measurements.

The peak of a run is that of its heaviest micro-batch, and which one that is, is known beforehand: the
plan says which records meet, and the survey how large each is. The time is measured on steps of the
run's own order and scaled by tokens, padding included, which is what the model computes on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deadpan.processing.prefix import join_sizes
from deadpan.processing.processor import Size
from deadpan.train.plan import MicroBatch


@dataclass(frozen=True)
class Load:
    """What a micro-batch, or several, asks of the model.

    Attributes:
        samples: Samples.
        tokens: Tokens without padding.
        computed: Tokens with padding.
        tiles: Tiles.
        supervised: Tokens that meet the output head.
        pairs: Pairs of tokens that attention without a flash kernel holds scores of.
    """

    samples: int = 0
    tokens: int = 0
    computed: int = 0
    tiles: int = 0
    supervised: int = 0
    pairs: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(**{name: mine + getattr(other, name) for name, mine in vars(self).items()})


def load_of(micro_batch: MicroBatch, sizes: Sequence[Size], packing: bool) -> Load:
    """The load of a micro-batch of records of the given sizes."""
    chosen = [join_sizes([sizes[index] for index in group]) for group in micro_batch.groups]
    tokens = sum(size.tokens for size in chosen)
    width = tokens if packing else max(size.tokens for size in chosen)
    rows = 1 if packing else len(chosen)
    return Load(
        samples=len(micro_batch.indices),
        tokens=tokens,
        computed=rows * width,
        tiles=sum(size.tiles for size in chosen),
        supervised=sum(size.supervised for size in chosen),
        pairs=rows * width**2,
    )


def heaviest(
    micro_batches: Iterable[MicroBatch], sizes: Sequence[Size], packing: bool
) -> tuple[list[MicroBatch], Load]:
    """Find the micro-batches one of which decides the peak, and sum up the load of all.

    Activations grow with tokens, the vision tower's with tiles, logits with supervised tokens, and
    masks and scores with pairs of tokens. Mostly one micro-batch leads in all of them.

    Returns:
        The leaders in each, without repetition, the one of most tokens first; and the whole load.
    """
    leaders: dict[str, tuple[int, MicroBatch]] = {}
    total = Load()
    for micro_batch in micro_batches:
        load = load_of(micro_batch, sizes, packing)
        total += load
        for name in ("computed", "tiles", "supervised", "pairs"):
            amount = getattr(load, name)
            if name not in leaders or amount > leaders[name][0]:
                leaders[name] = (amount, micro_batch)
    return list(dict.fromkeys(micro_batch for _, micro_batch in leaders.values())), total


@dataclass(frozen=True)
class Memory:
    """A peak and what it is made of, in bytes.

    Attributes:
        frozen: Weights that are not trained.
        trainable: Weights that are.
        gradients: Their gradients.
        optimizer: The optimizer's state.
        other: On a GPU, buffers and workspaces; on a CPU, the interpreter and its libraries.
        activations: What comes and goes within a forward and backward pass.
    """

    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    other: int
    activations: int

    @property
    def peak(self) -> int:
        return sum(asdict(self).values())

    def scaled(self, ratio: float) -> "Memory":
        """With activations so many times as large: they go by tokens, the rest stays."""
        return Memory(**asdict(self) | {"activations": round(self.activations * ratio)})


def split(peak: int, level: int, frozen: int, trainable: int, optimizer: int) -> Memory:
    """Tell apart what a measured peak is made of.

    Args:
        peak: The most that was taken, in bytes.
        level: What was taken before the step, without gradients.
        frozen: Bytes of the frozen weights.
        trainable: Bytes of the trainable ones; their gradients take as much.
        optimizer: Bytes of the optimizer's state.
    """
    other = max(0, level - frozen - trainable - optimizer)
    held = frozen + 2 * trainable + optimizer + other
    return Memory(frozen, trainable, trainable, optimizer, other, max(0, peak - held))


@dataclass(frozen=True)
class Trial:
    """A micro-batch size, or another change of the recipe, and whether it fits.

    Attributes:
        change: Recipe keys as on the command line.
        peak: The peak in bytes; None if memory ran out and nothing is there to estimate it from.
        measured: Whether it was run; else it is an estimate.
        fits: Whether it stays below the limit.
    """

    change: str
    peak: int | None
    measured: bool
    fits: bool


@dataclass(frozen=True)
class Pace:
    """How long the run takes.

    Attributes:
        steps: Optimizer steps that were timed.
        seconds: What they took.
        timed: Their load.
        whole: The load of the run.
        evaluations: Evaluations on the way, if nothing ends the run early.
        evaluation_seconds: What one takes.
    """

    steps: int
    seconds: float
    timed: Load
    whole: Load
    evaluations: int = 0
    evaluation_seconds: float = 0.0

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps."""
        return self.seconds * self.whole.computed / self.timed.computed

    @property
    def run_seconds(self) -> float:
        """Seconds of all steps and evaluations; checkpoints are not in it."""
        return self.training_seconds + self.evaluations * self.evaluation_seconds

    @property
    def samples_per_second(self) -> float:
        return self.whole.samples / self.training_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.whole.tokens / self.training_seconds


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        device: Its name.
        run: The run folder that it will write.
        records: Training records.
        steps: Optimizer steps to come.
        micro_batch_size: Samples of a forward pass.
        gradient_accumulation_steps: Forward passes of a step.
        whole: The load of all steps.
        heaviest: The load of the micro-batch of most tokens.
        memory: The peak; None if memory ran out at once.
        measured: Whether the peak was measured; else it is scaled up from a smaller micro-batch,
            since the run's own did not fit.
        loading: The peak while the weights were read, in bytes.
        beside: On a GPU, bytes of the CUDA context and of other programs.
        available: Bytes that the process may take in all.
        limit: Bytes that it may plan with.
        pace: How long it takes; None if it does not fit.
        sizes: The micro-batch sizes that were tried for `micro_batch_size: auto`.
        changes: What to change if it does not fit.
    """

    device: str
    run: str
    records: int
    steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    whole: Load
    heaviest: Load
    memory: Memory | None
    measured: bool
    loading: int
    beside: int
    available: int
    limit: int
    pace: Pace | None
    sizes: list[Trial]
    changes: list[Trial]

    @property
    def peak(self) -> int | None:
        """The most bytes that the run will take: what `memory_gib` will say."""
        return None if self.memory is None else max(self.memory.peak, self.loading)

    @property
    def fits(self) -> bool:
        return self.measured and self.peak is not None and self.peak <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON; memory in bytes, time in seconds."""
        figures = asdict(self) | {"peak": self.peak, "fits": self.fits}
        if self.pace is not None:
            figures["pace"] |= {
                "training_seconds": self.pace.training_seconds,
                "run_seconds": self.pace.run_seconds,
                "samples_per_second": self.pace.samples_per_second,
                "tokens_per_second": self.pace.tokens_per_second,
            }
        return figures
