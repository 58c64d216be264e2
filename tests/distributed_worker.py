"""In: a JSON list of arguments for `train`. Out: the training runs that test_distributed.py compares.

The tests run this program in several processes by `accelerate launch`, and call `train` for the results of one process.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.training import EndlessStream, InternImageTrainer, InternImageTrainingFlags


IMAGES = 48
GLOBAL_BATCH = 8


@dataclass
class Arguments(InternImageTrainingFlags, TrainingArguments):
    pass


class KillAt(TrainerCallback):
    """Kills the process after a step, as the system does on lack of memory."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_model(frozen_statistics: bool, drop_path_rate: float) -> InternImageForImageClassification:
    config = InternImageConfig(
        channels=8, depths=[1, 1, 2, 1], groups=[1, 2, 4, 8], mlp_ratio=2.0, num_labels=5, drop_path_rate=drop_path_rate
    )  # fmt: skip
    model = InternImageForImageClassification(config)
    if frozen_statistics:
        norm = model.internimage.pooler.norm.eval()
        norm.train = lambda mode=True: norm
    return model


def image(index: int) -> torch.Tensor:
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))


def example(index: int) -> dict:
    return {"pixel_values": image(index), "labels": index % 5, "index": index}


class Collate:
    """Collates examples and records the indices of their images."""

    def __init__(self):
        self.seen = []

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        self.seen.append([int(e["index"]) for e in examples])
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
            "labels": torch.tensor([e["labels"] for e in examples]),
        }


def make_stream() -> EndlessStream:
    """Shards of different sizes: 48 images in 5 shards."""
    dataset = datasets.Dataset.from_dict({"index": list(range(IMAGES))}).to_iterable_dataset(num_shards=5)
    return EndlessStream(
        dataset,
        lambda batch: {
            name: [example(i)[name] for i in batch["index"]] for name in ("pixel_values", "labels", "index")
        },
        seed=3,
        buffer_size=6,
    )


def train(
    folder: str,
    frozen_statistics: bool = True,
    resume: str | None = None,
    kill_at: int | None = None,
    stream: bool = False,
    drop_path_rate: float = 0.0,
    micro_batches: int = 1,
    **options,
) -> InternImageTrainer:
    """Trains for 9 steps of 8 images, 6 to an epoch, with a checkpoint after each fourth, and saves the model in `folder`.

    With `frozen_statistics` the head's BatchNorm does not depend on the batch, and so not on the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    set_seed(0)
    model = make_model(frozen_statistics, drop_path_rate)
    collate = Collate()
    options = {
        "max_steps": 9, "save_steps": 4, "logging_steps": 1, "learning_rate": 3e-4, "layer_decay": 0.9,
        # Gradients that are zero but for rounding (a bias before a norm) must not become steps of the learning rate.
        "offset_lr_multiplier": 0.1, "adam_epsilon": 1e-4, "seed": 3, **options,
    }  # fmt: skip
    arguments = Arguments(
        output_dir=folder,
        per_device_train_batch_size=GLOBAL_BATCH // world_size // micro_batches,
        gradient_accumulation_steps=micro_batches,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **options,
    )
    examples = [example(i) for i in range(IMAGES)]
    trainer = InternImageTrainer(
        model=model,
        args=arguments,
        train_dataset=make_stream() if stream else examples,
        eval_dataset=examples[:16],
        data_collator=collate,
        callbacks=[KillAt(kill_at)] if kill_at is not None and arguments.process_index == world_size - 1 else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trained = len(collate.seen)
    trainer.save_model()
    trainer.save_state()
    result = {
        "engine": str(trainer.accelerator.distributed_type),
        "sharded": sorted({type(m).__name__ for m in trainer.model.modules() if type(m).__name__.startswith("FSDP")}),
        "rates": sorted((g["initial_lr"], len(g["params"])) for g in trainer.optimizer.param_groups),
        "seen": collate.seen[:trained],
        "evaluation": trainer.evaluate(),
    }
    Path(folder, f"result_{arguments.process_index}.json").write_text(json.dumps(result))
    return trainer


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from data import run_program

    torch.set_num_threads(1)
    run_program(lambda: [train(**run) and None for run in json.loads(sys.argv[1])])
