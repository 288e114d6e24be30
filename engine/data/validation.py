"""Held-out loss by source: the same packs at every measurement, dealt over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from smalt.model import Document, ModelConfig, PackedBatch, pack
from smalt.parallel import World

from ..errors import BadRecord
from .agreement import Account, Entry, read_alike
from .chat import ChatEncoder
from .loader import num_targets
from .reading import SkippedSample
from .records import Records


class ValidationSet:
    """The first documents of each source, in think mode where they have a thought, packed once."""

    def __init__(
        self,
        sources: Mapping[str, Records],
        encoder: ChatEncoder,
        limit: int,
        length: int,
        model: ModelConfig,
        world: World,
    ):
        self.world = world
        self.packs: dict[str, list[PackedBatch]] = {}
        self.loss_tokens: dict[str, int] = {}
        for name, records in sources.items():
            samples = _read_alike(records, encoder, limit, world)
            documents = [d for d in samples if isinstance(d, Document) and len(d) <= length]
            rows = _in_order(documents, length)
            # Every replica runs as many packs: where they do not divide, the last ones are empty.
            rows += [[] for _ in range(-len(rows) % world.num_replicas)]
            mine = rows[world.replica :: world.num_replicas]
            self.packs[name] = [pack(row, length, model.image_attention, model.vision.tile) for row in mine]
            self.loss_tokens[name] = sum(map(num_targets, documents))

    def losses(self, loss: Callable[[list[PackedBatch]], Tensor]) -> dict[str, float]:
        """Nats a token by source, where a document of it fits; ``loss`` gives a rank's share of the sum over packs."""
        result = {}
        for name, packs in self.packs.items():
            if not self.loss_tokens[name]:
                continue
            result[name] = float(self.world.sum(loss(packs))) / self.loss_tokens[name]
        return result


def _read_alike(records: Records, encoder: ChatEncoder, limit: int, world: World) -> list[Document | SkippedSample]:
    """The first samples, the same on every rank. Raises UserError where they are not."""
    return read_alike(
        world,
        f"validation source {records.name!r}",
        lambda: [_sample(records, i, encoder) for i in range(min(limit, len(records)))],
        lambda samples: Account.of([Entry.of(sample) for sample in samples]),
    )


def _sample(records: Records, number: int, encoder: ChatEncoder) -> Document | SkippedSample:
    try:
        return encoder.sample(records[number], "think")
    except BadRecord as error:  # training reports bad records; a held-out one is left out of every measurement alike
        return SkippedSample(records.name, number, error.cause, error.detail)


def _in_order(documents: list[Document], length: int) -> list[list[Document]]:
    rows: list[list[Document]] = []
    free = 0
    for document in documents:
        if len(document) > free:
            rows.append([])
            free = length
        rows[-1].append(document)
        free -= len(document)
    return rows
