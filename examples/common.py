"""What the example programs share: flags, data sets, backbones, the Trainer, and the order of things at the end."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from data import Account, Data, DataArguments, InputError, check_resumed
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from internimage_hf import InternImageBackbone, InternImageConfig
from internimage_hf.remote_code import write_remote_code
from internimage_hf.training import InternImageTrainer, InternImageTrainingFlags, last_checkpoint


# albumentations asks PyPI for a newer version of itself when it is imported, and waits for the answer
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

VARIANTS = ("t", "s", "b", "l", "xl", "h", "g")


@dataclass
class HeadDataArguments(DataArguments):
    image_column: str = field(default="image", metadata={"help": "column of the images"})
    random_flip: bool | None = field(
        default=None, metadata={"help": "mirror half of the training images; by default all but digits"}
    )
    color_jitter: bool | None = field(
        default=None,
        metadata={"help": "change colours and contrast of training images at random; by default of all but digits"},
    )
    picture_samples: int = field(
        default=6, metadata={"help": "images of the evaluation set in the picture of predictions"}
    )


@dataclass
class ModelArguments:
    model: str | None = field(
        default=None,
        metadata={"help": "a trained model of this program (folder or Hub id) to go on from; the head comes with it"},
    )
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "an InternImage checkpoint (folder or Hub id) whose backbone is taken, or t, s, b, l, xl, h, g for "
            "one of these untrained; a small untrained backbone under a small head if absent"
        },
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "stochastic depth of the backbone; its own if absent"}
    )
    head_config_overrides: str | None = field(
        default=None, metadata={"help": 'fields of the head\'s configuration as JSON, such as {"num_queries": 100}'}
    )


@dataclass
class ExampleTrainingArguments(InternImageTrainingFlags, TrainingArguments):
    """`TrainingArguments` with the defaults of the embedded data, and the flags of `internimage_hf.training`."""

    remote_code: bool = field(
        default=False,
        metadata={"help": "save the package's code with the model, for readers who do not have the package"},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "1e-4 to go on from trained weights; for untrained models what suits the embedded data, 5e-4 to 4e-3"
        },
    )
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    logging_strategy: str = "epoch"
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = torch.cuda.is_available()
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser wants this order)
    seed: int = 0


def choose_learning_rate(training: TrainingArguments, checkpoint: str | None, untrained: float) -> None:
    """Where there is no `--learning_rate`: 1e-4, or `untrained` if `checkpoint` is None or the name of an architecture."""
    if training.learning_rate is None:
        training.learning_rate = untrained if checkpoint is None or checkpoint in VARIANTS else 1e-4


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names; `last` is the newest checkpoint in the output folder, if there is one."""
    if arguments.resume_from_checkpoint == "last":
        return last_checkpoint(arguments.output_dir)
    return arguments.resume_from_checkpoint


def check_column(data: Data, name: str, flag: str) -> None:
    """
    Raises:
        InputError: if a split has no such column.
    """
    for split, dataset in data.splits.items():
        if name not in dataset.column_names:
            raise InputError(
                f"--{flag} {name} is not a column of the split {split} of {data.name}, which has {', '.join(dataset.column_names)}"
            )


def head_overrides(arguments: ModelArguments) -> dict:
    """
    Raises:
        InputError: if `--head_config_overrides` is not a JSON object.
    """
    if arguments.head_config_overrides is None:
        return {}
    try:
        fields = json.loads(arguments.head_config_overrides)
    except json.JSONDecodeError as error:
        raise InputError(f"--head_config_overrides is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"--head_config_overrides must be a JSON object, got {arguments.head_config_overrides}")
    return fields


def make_backbone(arguments: ModelArguments, out_features: list[str]) -> InternImageBackbone:
    """The backbone that the flags name, with its weights where they are trained."""
    fields = {"out_features": out_features}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    if arguments.backbone is None:
        return InternImageBackbone(InternImageConfig(channels=32, depths=[1, 1, 2, 1], groups=[2, 4, 8, 16], **fields))
    if arguments.backbone in VARIANTS:
        return InternImageBackbone(InternImageConfig.from_variant(arguments.backbone, **fields))
    return InternImageBackbone.from_pretrained(arguments.backbone, **fields)


def backbone_of(model: PreTrainedModel) -> InternImageBackbone:
    """The InternImage in a head.

    Raises:
        InputError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, InternImageBackbone):
            return module
    raise InputError(f"--model holds no InternImage backbone, it is a {type(model).__name__}")


def build_head(
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    backbone: InternImageBackbone,
    arguments: ModelArguments,
    **fields,
) -> PreTrainedModel:
    """An untrained head on the backbone. `--head_config_overrides` win over `fields`.

    Raises:
        InputError: if an override is not a field of the head's configuration.
    """
    overrides = head_overrides(arguments)
    if unknown := [name for name in overrides if not hasattr(config_class(backbone_config=backbone.config), name)]:
        raise InputError(f"--head_config_overrides: {', '.join(unknown)} is not a field of {config_class.__name__}")
    model = model_class(config_class(backbone_config=backbone.config, **{**fields, **overrides}))
    # transformers draws RT-DETR's around 0 with a deviation of 0.01, its authors begin with 1 as PyTorch does
    norms = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.weight is not None]
    with gathered(norms):
        for weight in norms:
            torch.nn.init.ones_(weight)
    copy_weights(backbone, backbone_of(model))
    return model


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """From a model to another of its class, each of which may be sharded already by DeepSpeed's ZeRO-3."""
    with gathered([*source.parameters(), *target.parameters()]):
        target.load_state_dict(source.state_dict())


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Whole parameters, to be changed by the first process, where ZeRO-3 has sharded them; nothing elsewhere."""
    shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shards:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(shards, modifier_rank=0)


def count_parameters(model: PreTrainedModel) -> int:
    """Of the whole model, also where ZeRO-3 has left a part of it to this process."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def model_type_of(name: str | os.PathLike) -> str:
    """The `model_type` of a saved model."""
    config, _ = PreTrainedConfig.get_config_dict(name)
    return config.get("model_type", "")


def load_head(model_classes: dict[str, type[PreTrainedModel]], arguments: ModelArguments, **fields) -> PreTrainedModel:
    """What `--model` names, with new classifiers if it was trained for other classes.

    Args:
        model_classes: of the program's heads, by `model_type`.
        arguments: with `model` set.
        **fields: of the configuration.

    Raises:
        InputError: if it is none of these heads on an InternImage, or a flag would change what comes with it.
    """
    for flag in ("backbone", "drop_path_rate", "head_config_overrides"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"--{flag} is for an untrained head, --model {arguments.model} brings its own")
    model_type = model_type_of(arguments.model)
    if model_type not in model_classes:
        raise InputError(
            f"--model {arguments.model} is a {model_type or 'file'}, not one of {', '.join(model_classes)}"
        )
    model = model_classes[model_type].from_pretrained(arguments.model, ignore_mismatched_sizes=True, **fields)
    backbone_of(model)
    return model


class RandomlyTransformed(torch.utils.data.Dataset):
    """A dataset whose examples go through a random transformation of albumentations.

    The outcome depends on seed, epoch and index alone. A run that was interrupted in mid-epoch and resumed sees the same
    images as one that was not, with any number of workers and processes.

    Args:
        dataset: what is transformed.
        transform: `transform(example, seed)` returns the transformed example.
        seed: of the run.
    """

    def __init__(self, dataset, transform: Callable[[dict, int], dict], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # shared with workers that outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        seed = np.random.SeedSequence((self.seed, int(self.epoch), index)).generate_state(1)[0]
        return self.transform(self.dataset[index], int(seed))


class _CountEpochs(TrainerCallback):
    def __init__(self, dataset: RandomlyTransformed):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch.fill_(int(state.epoch))


class ExampleTrainer(InternImageTrainer):
    """`InternImageTrainer` with the package's code beside what is saved if `--remote_code` asks for it."""

    def __init__(self, *, model: PreTrainedModel, **kwargs):
        self.model_class = type(model)  # FSDP changes the model's class
        super().__init__(model=model, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if self.args.remote_code and self.args.should_save and (Path(folder) / "config.json").is_file():
            write_remote_code(folder, self.model_class)


class HeadTrainer(ExampleTrainer):
    """For a head of transformers."""

    def __init__(self, *, model: PreTrainedModel, train_dataset: RandomlyTransformed, **kwargs):
        # The heads take any keyword, from which Trainer concludes that they scale the loss by the number of targets in
        # all accumulated batches. They average over the batch.
        model.accepts_loss_kwargs = False
        super().__init__(model=model, train_dataset=train_dataset, **kwargs)
        self.add_callback(_CountEpochs(train_dataset))

    @torch.no_grad()
    def predict_batch(self, model, inputs) -> tuple[torch.Tensor, object, dict]:
        """The loss, the model's outputs, and the inputs on its device."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
        return outputs.loss.detach().mean(), outputs, inputs


def train_evaluate_save(trainer: ExampleTrainer, account: Account) -> tuple[dict[str, float], dict[str, float]]:
    """Trains (or goes on), evaluates and saves the best model; returns the metrics of training and of evaluation.

    The account of the data is printed before the first step and kept beside the model.

    Raises:
        InputError: if the checkpoint to go on from was trained on other data.
    """
    folder, checkpoint = trainer.args.output_dir, checkpoint_to_resume(trainer.args)
    if trainer.is_world_process_zero():
        print(account, flush=True)
    if checkpoint is not None:
        check_resumed(folder, checkpoint, account)
    trainer.accelerator.wait_for_everyone()  # all have read the account of the run before
    if trainer.is_world_process_zero():
        account.write(folder)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("all", {**result.metrics, **metrics})
    trainer.save_state()
    return result.metrics, metrics


def load_without_the_others() -> None:
    """Lets one process alone load models: under DeepSpeed's ZeRO-3 `from_pretrained` waits for all of them otherwise."""
    unset_hf_deepspeed_config()


def finish(trainer: HeadTrainer, picture: Callable[[Path], None], summary: dict[str, object]) -> None:
    """Draws the picture and prints the summary on the first process, pushes all of it to the Hub if asked, and ends."""
    if trainer.is_world_process_zero():
        load_without_the_others()
        file = Path(trainer.args.output_dir) / "predictions.png"
        picture(file)
        width = max(map(len, (*summary, "picture")))
        print("\n" + "\n".join(f"{name:>{width}}  {value}" for name, value in {**summary, "picture": file}.items()))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # leaves the process group
