# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a streamed dataset. Out: an endless stream of examples, split over the processes."""

import itertools
from collections.abc import Callable, Iterator

import torch


class EndlessStream(torch.utils.data.IterableDataset):
    """A streamed dataset as training data: epochs without end, each in a different order.

    Over all processes and data loader workers, each example comes exactly once per epoch. A process starts its next epoch as
    soon as its part ends: parts of different sizes make no process wait. The order depends only on seed and epoch. A
    resumed run reads the examples of the finished steps again and skips them. `Trainer` needs `max_steps`, and
    `InternImageTrainerMixin` for several processes.

    Args:
        dataset: a `datasets.IterableDataset`. Its shards (files) are shuffled. Each process reads whole shards if their number
            is a multiple of the number of processes; otherwise each process reads all shards and keeps its part.
        transform: maps a batch, a dictionary of lists, to another, as for `Dataset.with_transform`. Batches have one example.
        seed: of the order; the same in all processes.
        buffer_size: size in examples of the buffer that the next example is drawn from at random.
    """

    def __init__(
        self, dataset, transform: Callable[[dict], dict] | None = None, seed: int = 0, buffer_size: int = 1000
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.buffer_size = buffer_size

    def part(self, process: int, processes: int) -> "EndlessStream":
        """Returns the part of one process."""
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(self.dataset, rank=process, world_size=processes)
        return EndlessStream(dataset, self.transform, self.seed, self.buffer_size)

    def __iter__(self) -> Iterator[dict]:
        for epoch in itertools.count():
            is_empty = True
            # A new shuffle per epoch, no `set_epoch`: the workers share its value but may be in different epochs.
            for example in self.dataset.shuffle(seed=self.seed + epoch, buffer_size=self.buffer_size):
                is_empty = False
                if self.transform is not None:
                    batch = self.transform({name: [value] for name, value in example.items()})
                    example = {name: values[0] for name, values in batch.items()}
                yield example
            if is_empty:  # there are more workers than shards
                return
