"""In: flags and datasets of a training program. Out: its model, its Trainer, the saved results and the final report."""

import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from data import Account, Data, DataArguments, InputError, check_resumed, one_line, some
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from internimage_hf import InternImageBackbone, InternImageCompositeBackbone, InternImageConfig
from internimage_hf.compatibility import gathered, whole_shape
from internimage_hf.remote_code import write_remote_code
from internimage_hf.training import InternImageTrainer, InternImageTrainingFlags, last_checkpoint


# on import, albumentations asks PyPI for a newer version and waits for the answer
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

VARIANTS = ("t", "s", "b", "l", "xl", "h", "g", "flash_t", "flash_s", "flash_b", "flash_l")
_WHEN = ["no", "steps", "epoch"]
# Ranges that `TrainingArguments` does not check; values outside end in a traceback or in a useless run.
_RANGES = (
    ("per_device_train_batch_size", 1, math.inf),
    ("per_device_eval_batch_size", 1, math.inf),
    ("gradient_accumulation_steps", 1, math.inf),
    ("learning_rate", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("layer_decay", 0, math.inf),
    ("offset_lr_multiplier", 0, math.inf),
    ("num_train_epochs", 0, math.inf),
    ("dataloader_num_workers", 0, math.inf),
    ("eval_steps", 0, math.inf),
    ("save_steps", 0, math.inf),
    ("ema_decay", 0, 1 - 1e-9),
    ("label_smoothing_factor", 0, 1),
    ("seed", 0, 2**32 - 1),
)


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
    eval_strategy: str = field(
        default="epoch",
        metadata={"help": "when to evaluate during training; at the end it is done in any case", "choices": _WHEN},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "when to keep a checkpoint", "choices": [*_WHEN, "best"]}
    )
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = field(
        default=True,
        metadata={
            "help": "save the best of the checkpoints, not the last; off where checkpoints are not kept when it is evaluated"
        },
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "when to log the loss", "choices": _WHEN})
    remove_unused_columns: bool | None = False
    dataloader_pin_memory: bool = torch.cuda.is_available()
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser wants this order)
    seed: int = 0

    def __post_init__(self):
        for name, least, most in _RANGES:
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                expected = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
                raise InputError(f"--{name} must be {expected}, got {value}")
        self.report_to = self.report_to or "none"
        self.why_not_the_best = self._why_not_the_best() if self.load_best_model_at_end else None
        if self.why_not_the_best is not None:
            self.load_best_model_at_end = False
        super().__post_init__()

    def _why_not_the_best(self) -> str | None:
        """Returns the reason why `load_best_model_at_end` is impossible; None if it is possible."""
        evaluate, save = (str(getattr(s, "value", s)) for s in (self.eval_strategy, self.save_strategy))
        if evaluate == "no":
            return "nothing is evaluated during training (eval_strategy no)"
        if save == "no":
            return "no checkpoint is kept (save_strategy no)"
        if save == "best":
            return None
        if evaluate != save:
            return f"eval_strategy {evaluate} and save_strategy {save} differ: checkpoints are not those that are evaluated"
        if evaluate == "steps":
            steps, every = self.save_steps, self.eval_steps or self.logging_steps
            is_ratio = (steps < 1, every < 1)
            if is_ratio[0] != is_ratio[1] or (every and round(steps * 1e6) % round(every * 1e6)):
                return (
                    f"save_steps {steps:g} is no multiple of eval_steps {every:g}: not every checkpoint is evaluated"
                )
        return None


def choose_learning_rate(training: TrainingArguments, checkpoint: str | None, untrained: float) -> None:
    """Sets a missing `--learning_rate`: `untrained` if `checkpoint` is None or the name of an architecture, else 1e-4."""
    if training.learning_rate is None:
        training.learning_rate = untrained if checkpoint is None or checkpoint in VARIANTS else 1e-4


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """Returns the folder of `--resume_from_checkpoint`; `last` is the newest checkpoint in the output folder, if any.

    Raises:
        InputError: if it is no complete checkpoint of a `Trainer`.
    """
    given = arguments.resume_from_checkpoint
    if given is None:
        return None
    if given == "last":
        return last_checkpoint(arguments.output_dir)
    try:
        json.loads((Path(given) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--resume_from_checkpoint {given} is no complete checkpoint ({one_line(error)}); `last`, or a folder with a "
            "`trainer_state.json`, was expected"
        ) from error
    return given


@contextmanager
def loading(flag: str, value: object) -> Iterator[None]:
    """Within the block, errors of loading become an `InputError` with the flag and its value."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"--{flag} {value} cannot be used: {one_line(error)}") from error


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


def check_image_column(data: Data, name: str, flag: str) -> None:
    """
    Raises:
        InputError: if a split has no such column, or its values are no images.
    """
    import datasets

    check_column(data, name, flag)
    for split, dataset in data.splits.items():
        if not isinstance(dataset.features[name], datasets.Image):
            raise InputError(
                f"--{flag} {name} of the split {split} of {data.name} has the type {dataset.features[name]}; images were expected "
                "(in a metadata file, a column with a name that ends in _file_name)"
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
    """Builds the backbone of the flags, with trained weights for a checkpoint.

    Raises:
        InputError: if it cannot be loaded, or is no InternImage.
    """
    fields = {"out_features": out_features}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    if arguments.backbone is None or arguments.backbone in VARIANTS:
        with loading("drop_path_rate", arguments.drop_path_rate):
            if arguments.backbone is not None:
                return InternImageBackbone(InternImageConfig.from_variant(arguments.backbone, **fields))
            fields |= {"channels": 32, "depths": [1, 1, 2, 1], "groups": [2, 4, 8, 16]}
            return InternImageBackbone(InternImageConfig(**fields))
    model_type = model_type_of(arguments.backbone, "backbone")
    if model_type != InternImageConfig.model_type:
        raise InputError(
            f"--backbone {arguments.backbone} is a {model_type or 'file without `model_type`'}; an InternImage was expected"
        )
    with loading("backbone", arguments.backbone):
        return InternImageBackbone.from_pretrained(arguments.backbone, **fields)


def backbone_of(model: PreTrainedModel) -> InternImageBackbone | InternImageCompositeBackbone:
    """Returns the InternImage backbone of a head.

    Raises:
        InputError: if the head has none.
    """
    for module in model.modules():
        if isinstance(module, (InternImageBackbone, InternImageCompositeBackbone)):
            return module
    raise InputError(f"--model holds no InternImage backbone, it is a {type(model).__name__}")


@dataclass
class Head:
    """A head that a program trains.

    Attributes:
        model, processor: its classes.
        config: its configuration's class, or a function that makes one from fields.
        out_features: the backbone's stages that it takes.
        learning_rate: default for an untrained head.
        demo: fields of its configuration for the small untrained backbone.
        full: fields of its configuration for a backbone of `--backbone`.
        masks: whether it is trained on boxes and masks.
    """

    model: type[PreTrainedModel]
    config: Callable[..., PreTrainedConfig]
    processor: type
    out_features: list[str]
    learning_rate: float
    demo: dict
    full: dict = field(default_factory=dict)
    masks: bool = False

    @property
    def model_type(self) -> str:
        return self.model.config_class.model_type


def build_head(
    model_class: type[PreTrainedModel],
    config_class: Callable[..., PreTrainedConfig],
    backbone: InternImageBackbone,
    arguments: ModelArguments,
    **fields,
) -> PreTrainedModel:
    """Builds an untrained head on the backbone; `--head_config_overrides` take precedence over `fields`.

    Raises:
        InputError: if an override is not a field of the head's configuration.
    """
    overrides = head_overrides(arguments)
    default = config_class(backbone_config=backbone.config)
    if unknown := [name for name in overrides if not hasattr(default, name)]:
        raise InputError(f"--head_config_overrides: {', '.join(unknown)} is not a field of {type(default).__name__}")
    with loading("head_config_overrides", overrides) if overrides else nullcontext():
        model = model_class(config_class(backbone_config=backbone.config, **{**fields, **overrides}))
    # transformers draws RT-DETR's BatchNorm weights around 0 with a deviation of 0.01; RT-DETR's authors start at 1
    norms = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.weight is not None]
    with gathered(norms):
        for weight in norms:
            torch.nn.init.ones_(weight)
    copy_weights(backbone, backbone_of(model))
    return model


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copies weights to a model of the same class; either model may be sharded by DeepSpeed's ZeRO-3."""
    with gathered([*source.parameters(), *target.parameters()]):
        target.load_state_dict(source.state_dict())


def count_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters of the whole model, sharded or not."""
    return sum(whole_shape(parameter).numel() for parameter in model.parameters())


def model_type_of(name: str | os.PathLike, flag: str = "model") -> str:
    """Returns the `model_type` of a saved model, "" if its configuration has none.

    Raises:
        InputError: if the model cannot be loaded; the message names the flag.
    """
    with loading(flag, name):
        config, _ = PreTrainedConfig.get_config_dict(name)
    return config.get("model_type", "")


def head_of_model(heads: dict[str, Head], arguments: ModelArguments) -> Head:
    """Returns the head of the model of `--model`.

    Args:
        heads: the program's heads, by `--head`.
        arguments: with `model` set.

    Raises:
        InputError: if the model is none of these heads, or a flag contradicts it.
    """
    for flag in ("backbone", "drop_path_rate", "head_config_overrides"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"--{flag} is for an untrained head, --model {arguments.model} brings its own")
    model_type = model_type_of(arguments.model)
    for head in heads.values():
        if head.model_type == model_type:
            return head
    raise InputError(
        f"--model {arguments.model} is a {model_type or 'file'}, not one of {', '.join(dict.fromkeys(h.model_type for h in heads.values()))}"
    )


def load_head(
    heads: dict[str, Head], arguments: ModelArguments, id2label: dict[int, str], **fields
) -> PreTrainedModel:
    """Loads the model of `--model`. Weights that depend on the classes are new if it was trained for others; it says so.

    Args:
        heads: the program's heads, by `--head`.
        arguments: with `model` set.
        id2label: the classes.
        **fields: further fields of the configuration.

    Raises:
        InputError: if the model is none of these heads on an InternImage, or a flag contradicts it.
    """
    head = head_of_model(heads, arguments)
    with loading("model", arguments.model):
        trained = head.model.config_class.from_pretrained(arguments.model).id2label
        model = head.model.from_pretrained(arguments.model, ignore_mismatched_sizes=True, id2label=id2label, **fields)
    backbone_of(model)
    if trained != id2label:
        names = class_weights(model)
        initialize_anew(model, names)
        if os.environ.get("RANK", "0") == "0":
            modules = dict.fromkeys(re.sub(r"\.\d+", "", name.rpartition(".")[0]) for name in names)
            print(
                f"--model {arguments.model} was trained for {len(trained)} classes ({some(list(trained.values()))}), not for "
                f"the {len(id2label)} of the data set: {', '.join(modules)} are new, all other weights are kept",
                flush=True,
            )
    return model


def class_weights(model: PreTrainedModel) -> list[str]:
    """Returns the names of the parameters and buffers whose shapes depend on the number of classes."""
    shapes = []
    for more in (1, 2):
        config = copy.deepcopy(model.config)
        config.num_labels = model.config.num_labels + more
        with torch.device("meta"):
            shapes.append({name: tensor.shape for name, tensor in type(model)(config).state_dict().items()})
    return [name for name, shape in shapes[0].items() if shapes[1][name] != shape]


@torch.no_grad()
def initialize_anew(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Initialises some parameters as in a new model, and leaves all others as they are."""
    tensors = model.state_dict(keep_vars=True)
    anew = {id(tensors[name]) for name in names}
    for module in model.modules():
        module._is_hf_initialized = False  # transformers visits it and fills those of its tensors that are not marked
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = id(tensor) not in anew
    with gathered([tensors[name] for name in names]):
        model.initialize_weights()


class RandomlyTransformed(torch.utils.data.Dataset):
    """A dataset whose examples go through a random transformation of albumentations.

    The result depends only on seed, epoch and index. A run resumed within an epoch sees the same images as an uninterrupted
    run, with any number of workers and processes.

    Args:
        dataset: the dataset to transform.
        transform: `transform(example, seed)` returns the transformed example.
        seed: of the run.
    """

    def __init__(self, dataset, transform: Callable[[dict, int], dict], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # shared with persistent workers
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


class _Repeating(torch.utils.data.Sampler):
    """Yields a sampler's indices and repeats the first few at the end."""

    def __init__(self, sampler: torch.utils.data.Sampler, repeated: int):
        self.sampler, self.repeated = sampler, repeated

    def __len__(self) -> int:
        return len(self.sampler) + self.repeated

    def __iter__(self) -> Iterator[int]:
        indices = list(self.sampler)
        yield from indices + indices[: self.repeated]


class ExampleTrainer(InternImageTrainer):
    """`InternImageTrainer` that saves the package's code beside the model with `--remote_code`.

    BatchNorm cannot normalise a map of one pixel over one image. If the last batch of an epoch would hold a single image, an
    image of the epoch is repeated; accelerate fills up the last batches of several processes the same way.
    """

    def __init__(self, *, model: PreTrainedModel, **kwargs):
        self.model_class = type(model)  # FSDP changes the model's class
        super().__init__(model=model, **kwargs)

    def repeated_images(self) -> int:
        """Returns the number of training images that are repeated in an epoch."""
        args, devices = self.args, max(1, self.args.n_gpu)
        batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        endless = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        if not batch_norm or endless or args.world_size > 1 or args.dataloader_drop_last:
            return 0
        if self._train_batch_size < 2 * devices:
            return 0
        rest = len(self.train_dataset) % self._train_batch_size
        repeated = 0
        while rest and 1 in map(len, torch.arange(rest + repeated).chunk(devices)):  # as DataParallel divides a batch
            repeated += 1
        return repeated

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler, repeated = super()._get_train_sampler(train_dataset), self.repeated_images()
        if not repeated or sampler is None or isinstance(sampler, torch.utils.data.BatchSampler):
            return sampler
        if isinstance(sampler, torch.utils.data.RandomSampler):  # a class that accelerate recognises and seeds
            return torch.utils.data.RandomSampler(sampler.data_source, num_samples=len(sampler) + repeated)
        return _Repeating(sampler, repeated)

    def _run_epoch(self, *args, **kwargs):
        # `Trainer` would train one more step when it resumes at its last step within an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"--per_device_train_batch_size {self.args.per_device_train_batch_size}: BatchNorm cannot be trained on a "
                f"single image whose map has one pixel ({one_line(error)}); at least 2, or larger images, were expected"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if self.args.remote_code and self.args.should_save and (Path(folder) / "config.json").is_file():
            write_remote_code(folder, self.model_class)


class HeadTrainer(ExampleTrainer):
    """For a head of transformers."""

    def __init__(self, *, model: PreTrainedModel, train_dataset: RandomlyTransformed, **kwargs):
        # Heads accept any keyword, so `Trainer` assumes that they scale the loss by the number of targets in all accumulated
        # batches. They average over the batch.
        model.accepts_loss_kwargs = False
        # UperNet and RT-DETR declare no gradient checkpointing; their backbone, with most of the activations, supports it
        model.supports_gradient_checkpointing |= backbone_of(model).supports_gradient_checkpointing
        super().__init__(model=model, train_dataset=train_dataset, **kwargs)
        self.add_callback(_CountEpochs(train_dataset))

    @torch.no_grad()
    def predict_batch(self, model, inputs) -> tuple[torch.Tensor, object, dict]:
        """Returns the loss, the model's outputs, and the inputs on its device."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
        return outputs.loss.detach().mean(), outputs, inputs


def check_same_model(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Compares the model with that of a checkpoint by class, and by names and shapes of weights.

    Raises:
        InputError: if they differ.
    """
    checkpoint = Path(checkpoint)
    advice = "another --output_dir, or the flags of the run that wrote it, were expected"
    if (checkpoint / "config.json").is_file():
        names = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        if names and type(model).__name__ not in names:
            raise InputError(
                f"{checkpoint} is a {', '.join(names)}, this run trains a {type(model).__name__}; {advice}"
            )
    theirs: dict[str, tuple[int, ...]] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            theirs |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    if not theirs:  # weights in another file format; their reader checks them
        return
    own = model.state_dict(keep_vars=True)
    shapes = {name: tuple(whole_shape(tensor)) for name, tensor in own.items()}
    saved = {id(own[name]) for name in theirs if name in own}  # a checkpoint holds one of tied weights
    absent = [name for name in own if name not in theirs and id(own[name]) not in saved]
    for name in (*theirs, *absent):
        if theirs.get(name) != shapes.get(name):
            there, here = (f"is {s.get(name)}" if name in s else "is absent" for s in (theirs, shapes))
            raise InputError(
                f"{checkpoint} is another {type(model).__name__} than this run trains: `{name}` {there} in the checkpoint "
                f"and {here} in the model; {advice}"
            )


def set_checkpoints_aside(folder: str | os.PathLike, checkpoint: str | None, step: int) -> None:
    """Moves checkpoints of another run out of an output folder: those after the step at which this run begins.

    `Trainer` deletes checkpoints with the lowest numbers, and `last` means the highest number. Beside another run's
    checkpoints, it would delete this run's, and `last` would resume the other run.
    """
    folder = Path(folder)
    if checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve():
        step = 0
    others = [
        other
        for other in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        if (number := other.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and int(number) > step
    ]
    if not others:
        return
    number = 1
    while (
        aside := folder / f"_earlier_run_{number}"
    ).exists():  # `Trainer` does not upload folders whose name begins with _
        number += 1
    aside.mkdir()
    for other in others:
        other.rename(aside / other.name)
    names = ", ".join(other.name for other in others)
    print(f"another run's checkpoints in {folder} ({names}) were moved to {aside}; they may be deleted", flush=True)


def train_evaluate_save(trainer: ExampleTrainer, account: Account) -> tuple[dict[str, float], dict[str, float]]:
    """Trains or resumes, evaluates, and saves the best model; returns the metrics of training and of evaluation.

    The account of the data is printed before the first step and saved beside the model.

    Raises:
        InputError: if the checkpoint to resume is of other data or another model, or no batch would be full.
    """
    args, main = trainer.args, trainer.is_world_process_zero()
    checkpoint, step = checkpoint_to_resume(args), 0
    if repeated := trainer.repeated_images():
        account.data.layout += (
            f"; the last batch would hold a single image, which BatchNorm cannot normalise: {repeated} of the training "
            f"images, drawn at random, {'comes' if repeated == 1 else 'come'} twice in an epoch"
        )
    if args.dataloader_drop_last and not isinstance(trainer.train_dataset, torch.utils.data.IterableDataset):
        images, at_once = len(trainer.train_dataset), args.train_batch_size * args.world_size
        if images < at_once:
            raise InputError(
                f"--dataloader_drop_last leaves out all of the {images} images to train: a batch is {at_once}; fewer were expected"
            )
        account.data.layout += f"; --dataloader_drop_last leaves out {images % at_once} of the images in each epoch"
    if main:
        print(account, flush=True)
        if args.why_not_the_best is not None:
            print(f"the last model is saved, not the best one: {args.why_not_the_best}", flush=True)
        if checkpoint is None and args.resume_from_checkpoint is not None:
            print(f"{args.output_dir} holds no checkpoint to go on from: training begins anew", flush=True)
    if checkpoint is not None:
        check_resumed(args.output_dir, checkpoint, account)
        check_same_model(trainer.model, checkpoint)
        step = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    trainer.accelerator.wait_for_everyone()  # all processes have read the earlier run's files
    if main:
        set_checkpoints_aside(args.output_dir, checkpoint, step)
        account.write(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if main and checkpoint is not None and trainer.state.global_step == step:
        print(
            f"{checkpoint} is at step {step} of {trainer.state.max_steps}: nothing was left to train; a larger "
            "--num_train_epochs or --max_steps goes on",
            flush=True,
        )
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("all", {**result.metrics, **metrics})
    trainer.save_state()
    return result.metrics, metrics


def load_without_the_others() -> None:
    """Lets one process load models: under DeepSpeed's ZeRO-3, `from_pretrained` would wait for all processes."""
    unset_hf_deepspeed_config()


def finish(
    trainer: ExampleTrainer, picture: Callable[[Path], dict[str, object] | None], summary: dict[str, object]
) -> None:
    """Draws the picture and prints the summary in the first process; pushes the output folder to the Hub if asked.

    `picture(file)` may return more lines for the summary.
    """
    if trainer.is_world_process_zero():
        load_without_the_others()
        file = Path(trainer.args.output_dir) / "predictions.png"
        summary = {**summary, **(picture(file) or {}), "picture": file}
        width = max(map(len, summary))
        print("\n" + "\n".join(f"{name:>{width}}  {value}" for name, value in summary.items()))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
