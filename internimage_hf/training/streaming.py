# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""A streamed data set as training data: shards in, examples without an end out, each process its part."""

import itertools
from collections.abc import Callable, Iterator

import torch


class EndlessStream(torch.utils.data.IterableDataset):
    """A streamed dataset as training data: epoch after epoch without an end, each in an order of its own.

    Over several processes, and workers of a data loader, each example comes exactly once per epoch; a process starts its
    next epoch when its part is through, so parts of different sizes do not keep the others waiting. The order depends on
    the seed and the epoch alone, and a resumed run skips what it has seen (which reads it again). A `Trainer` needs
    `max_steps`, and the mix-in below if there are several processes.

    Args:
        dataset: a `datasets.IterableDataset`. Shards (files) are shuffled as a whole and go to the processes whole if their
            number is a multiple of that of the processes; otherwise each process reads all and keeps its part.
        transform: from a batch, a dictionary of lists, to another, as for `Dataset.with_transform`. It gets batches of one.
        seed: of the order; the same on all processes.
        buffer_size: examples are drawn at random from this many that were read ahead.
    """

    def __init__(
        self, dataset, transform: Callable[[dict], dict] | None = None, seed: int = 0, buffer_size: int = 1000
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.buffer_size = buffer_size

    def part(self, process: int, processes: int) -> "EndlessStream":
        """What one of several processes reads."""
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(self.dataset, rank=process, world_size=processes)
        return EndlessStream(dataset, self.transform, self.seed, self.buffer_size)

    def __iter__(self) -> Iterator[dict]:
        for epoch in itertools.count():
            is_empty = True
            # A dataset of its own for each epoch: `set_epoch` is shared by the workers, which need not be in the same one.
            for example in self.dataset.shuffle(seed=self.seed + epoch, buffer_size=self.buffer_size):
                is_empty = False
                if self.transform is not None:
                    batch = self.transform({name: [value] for name, value in example.items()})
                    example = {name: values[0] for name, values in batch.items()}
                yield example
            if is_empty:  # a worker more than there are shards
                return
