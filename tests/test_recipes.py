"""Tests of the recipes: they equal the official configurations, and the example programs run them."""

import importlib
import json
import math
import sys

import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy, log_softmax
from transformers import TrainingArguments, get_scheduler
from utils import FIXTURES, ROOT


EXAMPLES = ROOT / "examples"
RECIPES = EXAMPLES / "recipes"
sys.path.insert(0, str(EXAMPLES))

from augmentation import OPERATIONS, Mix, rand_augment, random_erasing  # noqa: E402
from flags import parse_flags  # noqa: E402


# Program and argument classes by the first part of a recipe's name.
PROGRAMS = {
    "imagenet": (
        "image_classification",
        ("DataArguments", "ModelArguments", "ClassificationTrainingArguments"),
    ),
    "coco": (
        "object_detection",
        ("DetectionDataArguments", "DetectionModelArguments", "DetectionTrainingArguments"),
    ),
    "ade20k": (
        "semantic_segmentation",
        ("SegmentationDataArguments", "SegmentationModelArguments", "SegmentationTrainingArguments"),
    ),
}
IMAGES = 1281167  # ImageNet-1k's training set

# The values of the official configurations, with their sources.
OFFICIAL = json.loads((FIXTURES / "official_recipes.json").read_text())["recipes"]
CLASSIFICATION, DETECTION, SEGMENTATION = ([name for name in OFFICIAL if name.startswith(p)] for p in PROGRAMS)
SMALL_SIZES = {
    "upernet": {"hidden_size": 16, "auxiliary_channels": 8},
    "mask2former": {
        "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 2, "encoder_layers": 1,
        "num_queries": 20, "num_attention_heads": 4, "dim_feedforward": 32, "encoder_feedforward_dim": 32, "train_num_points": 64,
    },
}  # fmt: skip


def parse(name: str, *flags: str):
    """Parses a recipe as its program does; returns data, model and training arguments."""
    module, classes = next(value for start, value in PROGRAMS.items() if name.startswith(start))
    if not (EXAMPLES / f"{module}.py").is_file():
        pytest.skip(f"there is no examples/{module}.py")
    pytest.importorskip("datasets")
    program = importlib.import_module(module)
    return parse_flags([str(RECIPES / f"{name}.yaml"), *flags], *(getattr(program, c) for c in classes))


def learning_rates(training: TrainingArguments, steps: int) -> list[float]:
    """Returns the learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=training.learning_rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        training.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    return [training.learning_rate * scheduler.lr_lambdas[0](step) for step in range(steps)]


def total_batch(training: TrainingArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def official_batch(official: dict) -> int | None:
    """Returns the official number of images per step; None where the source does not give it."""
    per_gpu = official.get("batch_size_per_gpu", official.get("data.samples_per_gpu"))
    return None if official["gpus"] is None else per_gpu * official["gpus"]


def test_every_recipe_has_official_figures():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == OFFICIAL.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_names_its_source(name):
    assert OFFICIAL[name]["file"] in (RECIPES / f"{name}.yaml").read_text().replace("\n# ", "")


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_recipe_equals_official(name):
    official = OFFICIAL[name]["values"]
    data, model, training = parse(name)
    assert data.image_size == official["DATA.IMG_SIZE"]
    assert model.drop_path_rate == official["MODEL.DROP_PATH_RATE"]
    assert (data.mixup_alpha, data.mixup_prob) == (official["AUG.MIXUP"], official["AUG.MIXUP_PROB"])
    assert (data.cutmix_alpha, data.mixup_switch_prob) == (official["AUG.CUTMIX"], official["AUG.MIXUP_SWITCH_PROB"])
    assert data.random_erasing == official["AUG.REPROB"]
    assert official["AUG.AUTO_AUGMENT"].startswith(f"rand-m{data.rand_augment:g}-")
    assert (data.random_crop_scale, data.random_flip) == (0.08, True)  # timm's defaults, which the official code takes
    assert training.label_smoothing_factor == official["MODEL.LABEL_SMOOTHING"]
    assert training.weight_decay == official["TRAIN.WEIGHT_DECAY"]
    assert training.max_grad_norm == official["TRAIN.CLIP_GRAD"]
    assert [training.adam_beta1, training.adam_beta2] == official["TRAIN.OPTIMIZER.BETAS"]
    assert training.adam_epsilon == official["TRAIN.OPTIMIZER.EPS"]
    decays, multiplier = official["TRAIN.LR_LAYER_DECAY"], official["TRAIN.OPTIMIZER.DCN_LR_MUL"]
    assert training.layer_decay == (official["TRAIN.LR_LAYER_DECAY_RATIO"] if decays else 1)
    assert training.offset_lr_multiplier == (1 if multiplier is None else multiplier)
    assert official["TRAIN.EMA.ENABLE"] and training.ema_decay == official["TRAIN.EMA.DECAY"]
    assert training.gradient_checkpointing == official["TRAIN.USE_CHECKPOINT"]

    epochs, warmup, batch = official["TRAIN.EPOCHS"], official["TRAIN.WARMUP_EPOCHS"], official_batch(official)
    assert training.num_train_epochs == epochs
    assert training.per_device_train_batch_size == official["batch_size_per_gpu"]
    assert total_batch(training) == batch
    per_epoch = math.ceil(IMAGES / batch)
    assert abs(training.get_warmup_steps(epochs * per_epoch) - warmup * per_epoch) <= 1  # a ratio, rounded up
    # main.py multiplies the learning rates by batch / 512
    base, start, least = (official[f"TRAIN.{key}"] * batch / 512 for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"))
    rates = learning_rates(training, epochs * per_epoch)
    assert max(rates) == pytest.approx(base, rel=1e-3)
    assert rates[0] == pytest.approx(start, abs=2 * max(rates) / (warmup * per_epoch))
    assert rates[-1] == pytest.approx(least, rel=1e-3, abs=1e-4 * max(rates))
    assert rates.index(max(rates)) == pytest.approx(warmup * per_epoch, abs=1)


def check_optimizer(official: dict, model, training: TrainingArguments) -> None:
    """Compares the values that the configurations for detection and segmentation have in common."""
    assert model.drop_path_rate == official["model.backbone.drop_path_rate"]
    assert training.learning_rate == official["optimizer.lr"]
    assert training.weight_decay == official["optimizer.weight_decay"]
    assert training.layer_decay == official["optimizer.paramwise_cfg.layer_decay_rate"]
    assert training.max_grad_norm == (official["optimizer_config.grad_clip.max_norm"] or 0)  # 0: no clipping
    assert training.warmup_steps == official["lr_config.warmup_iters"]


@pytest.mark.parametrize("name", DETECTION)
def test_detection_recipe_equals_official(name):
    official = OFFICIAL[name]["values"]
    _, model, training = parse(name)
    check_optimizer(official, model, training)
    momentum = official["custom_hooks.ExpMomentumEMAHook.momentum"]
    assert training.ema_decay == (None if momentum is None else 1 - momentum)
    batch, steps = official_batch(official), official["runner.max_iters"]
    if batch is not None:
        assert total_batch(training) == batch
    if steps is None:
        assert training.num_train_epochs == official["runner.max_epochs"]
        steps = official["runner.max_epochs"] * math.ceil(117266 / batch)  # COCO's training images with boxes
    else:
        assert training.max_steps == steps
    rates = learning_rates(training, steps)
    assert max(rates) == pytest.approx(official["optimizer.lr"])
    # the official rate falls to a tenth after each of the steps
    assert rates[-1] == pytest.approx(official["optimizer.lr"] * 0.1 ** len(official["lr_config.step"]), rel=0.01)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_recipe_equals_official(name):
    official = OFFICIAL[name]["values"]
    data, model, training = parse(name)
    check_optimizer(official, model, training)
    assert [data.image_size] * 2 == official["crop_size"]
    assert (data.min_scale, data.max_scale, data.reduce_labels) == (0.5, 2.0, True)
    assert training.max_steps == official["runner.max_iters"]
    assert training.eval_steps == official["evaluation.interval"]
    assert training.per_device_train_batch_size == official["data.samples_per_gpu"]
    assert total_batch(training) == official_batch(official)
    assert training.gradient_checkpointing == official["model.backbone.with_cp"]
    assert (official["lr_config.policy"], official["lr_config.power"]) == ("poly", 1.0)  # linear
    rates, steps = learning_rates(training, training.max_steps), training.max_steps
    assert max(rates) == pytest.approx(official["optimizer.lr"])
    assert rates[-1] == pytest.approx(official["lr_config.min_lr"], abs=official["optimizer.lr"] * 1e-4)
    # the official rate falls from the first step on, the warm-up included
    assert rates[steps // 2] == pytest.approx(official["optimizer.lr"] / 2, rel=0.02)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_recipe_trains_one_step(name, coco_folder, tmp_path):
    """Trains one step on small images with a small backbone and head; all other values are the recipe's."""
    small = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 8, "two_stage_num_proposals": 8,
    }  # fmt: skip
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    flags = {
        "dataset": coco_folder, "backbone": FIXTURES / "hf_t_like", "image_size": 64, "output_dir": tmp_path, "max_steps": 1,
        "picture_samples": 1, "head_config_overrides": json.dumps({**recipe["head_config_overrides"], **small}),
    }  # fmt: skip
    program = importlib.import_module("object_detection")
    metrics = program.main(
        [str(RECIPES / f"{name}.yaml"), *(f"--{flag}={value}" for flag, value in flags.items()), "--use_cpu"]
    )
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_map"] >= 0
    assert (tmp_path / "model.safetensors").is_file()


def test_flags_override_recipe():
    _, model, training = parse(
        "imagenet1k_t", "--num_train_epochs", "100", "--drop_path_rate=0.2", "--per_device_train_batch_size", "64"
    )
    assert model.drop_path_rate == 0.2
    assert (training.gradient_accumulation_steps, total_batch(training)) == (64, 4096)
    assert training.warmup_steps == 0.2  # 20 of 100 epochs
    assert parse("imagenet1k_t", "--warmup_steps", "7")[2].warmup_steps == 7


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """A folder in ImageNet's layout: two classes, each with two images to train on and one to evaluate on."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 2), ("val", 1)):
        for label, colour in (("dark", 40), ("bright", 200)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), (colour + i,) * 3).save(root / split / label / f"{i}.png")
    return root


@pytest.mark.parametrize("name", [*CLASSIFICATION, *SEGMENTATION])
def test_classification_and_segmentation_recipes_train_one_step(
    name, class_folder, mask_folder, tmp_path, monkeypatch
):
    """Trains one step and evaluates on little data with a small model; all other values are the recipe's."""
    flags = {"max_steps": 1, "output_dir": tmp_path, "dataloader_num_workers": 0}
    if name in CLASSIFICATION:
        flags |= {"dataset": class_folder, "model": FIXTURES / "hf_t_like", "image_size": 32, "warmup_steps": 0}
    else:
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        sizes = {**recipe.get("head_config_overrides", {}), **SMALL_SIZES[recipe["head"]]}
        flags |= {"dataset": mask_folder, "backbone": FIXTURES / "hf_t_like", "image_size": 64, "max_train_samples": 3}
        flags |= {"max_eval_samples": 2, "head_config_overrides": json.dumps(sizes)}
    program = importlib.import_module("image_classification" if name in CLASSIFICATION else "semantic_segmentation")
    monkeypatch.setattr(program, "finish", lambda *_: None)  # it would draw pictures
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    metrics = program.main([str(RECIPES / f"{name}.yaml"), *words, "--use_cpu", "--disable_tqdm", "true"])
    assert math.isfinite(metrics["eval_loss"])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--total_train_batch_size", "4000"],
            "`total_train_batch_size` must be a multiple of the 128 images.*got 4000",
        ),
        (["--gradient_accumulation_steps", "3"], "`gradient_accumulation_steps` 3 makes a batch of 384.*4096"),
        (["--num_train_epochs", "10"], "`warmup_epochs` must be at least 0 and below `num_train_epochs` 10.*got 20"),
        (["--max_steps", "10"], "give `warmup_steps`"),
        (["--rand_augment", "11"], "--rand_augment must be from 0 to 10, got 11"),
    ],
)
def test_contradictory_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("imagenet1k_t", *flags)


def test_mistakes_in_recipe_file_are_named(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("weight_decai: 0.1\n")
    with pytest.raises(ValueError, match="'weight_decai' is no flag of this program; did you mean 'weight_decay'"):
        parse_flags([str(file)], TrainingArguments)
    file.write_text("- weight_decay\n")
    with pytest.raises(ValueError, match="must map flags to values, it is list"):
        parse_flags([str(file)], TrainingArguments)
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        parse_flags([str(tmp_path / "absent.yaml")], TrainingArguments)


def test_mixup_and_cutmix_mix_images_and_targets_alike():
    """Each image has a constant value: a mixed image shows its parts."""
    labels = torch.arange(4)
    images = labels.float().reshape(4, 1, 1, 1).expand(4, 3, 32, 24).contiguous()
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mix = Mix(4, *alphas)
        cut = 0
        for _ in range(50):
            mixed, parts = mix(images, labels)
            torch.testing.assert_close(parts.sum(1), torch.ones(4))
            # an image's mean is the mean of its classes' values, weighted by their parts
            torch.testing.assert_close(mixed.mean((1, 2, 3)), parts @ labels.float())
            cut += bool(torch.isin(mixed, labels.float()).all())
        assert {(0.8, 0.0): cut <= 5, (0.0, 1.0): cut == 50, (0.8, 1.0): 5 < cut < 45}[alphas]
    assert torch.equal(images[:, 0, 0, 0], labels.float()), "the batch itself has changed"
    for off in (Mix(4, 0.0, 0.0), Mix(4, probability=0.0)):
        mixed, parts = off(images, labels)
        assert torch.equal(mixed, images)
        assert torch.equal(parts, torch.eye(4))
    with pytest.raises(ValueError, match="`mixup_prob` must be a number from 0 to 1, got 2"):
        Mix(4, probability=2)
    with pytest.raises(ValueError, match="`cutmix_alpha` must be a number from 0, got -1"):
        Mix(4, cutmix_alpha=-1)


def test_label_smoothing_of_mixed_targets_equals_official():
    """The official code smooths each of the two classes, then mixes them."""
    logits = torch.randn(3, 5, dtype=torch.float64)
    own, other, part, smoothing = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 0.3, 0.1

    def smooth(labels):
        return torch.eye(5, dtype=torch.float64)[labels] * (1 - smoothing) + smoothing / 5

    expected = -((part * smooth(own) + (1 - part) * smooth(other)) * log_softmax(logits, 1)).sum(1).mean()
    targets = part * torch.eye(5, dtype=torch.float64)[own] + (1 - part) * torch.eye(5, dtype=torch.float64)[other]
    torch.testing.assert_close(cross_entropy(logits, targets, label_smoothing=smoothing), expected)


def test_rand_augment_and_erasing_change_images_as_documented():
    image = Image.merge("RGB", [Image.effect_noise((40, 30), 80) for _ in range(3)])
    for name, operation in OPERATIONS.items():
        for strength in (0.0, 0.5, 1.0):
            result = operation(image, strength)
            assert (result.size, result.mode) == (image.size, "RGB"), name
        if name not in ("auto_contrast", "equalize", "invert", "posterize"):
            assert operation(image, 0.0).tobytes() == image.tobytes(), f"{name} of no strength"
        assert operation(image, 0.9).tobytes() != image.tobytes() or name == "auto_contrast", name
    assert len({rand_augment(image, 9).tobytes() for _ in range(20)}) > 5

    pixels = torch.zeros(3, 32, 24)
    assert random_erasing(pixels, 0.0) is pixels
    shares = [float((random_erasing(pixels, 1.0) != 0).float().mean()) for _ in range(100)]
    assert min(shares) > 0.01
    assert max(shares) < 0.4
    assert not pixels.any(), "the image itself has changed"


def test_training_with_all_augmentation_learns(tmp_path):
    """Trains on the digits with a recipe's augmentation, soft targets and average, and with accumulated steps."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    program = importlib.import_module("image_classification")
    recipe = {
        "output_dir": str(tmp_path / "model"),
        "max_train_samples": 600,
        "max_eval_samples": 100,
        "total_train_batch_size": 20,
        "per_device_train_batch_size": 10,
        "num_train_epochs": 3,
        "warmup_epochs": 0.5,
        "learning_rate": 2.0e-3,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.01, "warmup_lr_rate": 0.001},
        "drop_path_rate": 0.05,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "label_smoothing_factor": 0.1,
        "rand_augment": 2,
        "random_erasing": 0.25,
        "ema_decay": 0.9,
        "layer_decay": 0.9,
        "max_grad_norm": 5.0,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    metrics = program.main([str(file)])
    assert metrics["eval_accuracy"] > 0.5
    # evaluation sees whole images and hard labels
    assert metrics["eval_loss"] < math.log(10)
