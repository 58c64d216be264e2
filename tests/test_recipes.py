"""The authors' recipes, as flags of the example programs."""

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


# What each program is parsed into, by the beginning of a recipe's name.
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

# Figures of the official repository (OpenGVLab/InternImage at 31c962d), by the recipe made after them.
#
# classification/configs/NAME.yaml, defaults in classification/config.py, GPUs and batch per GPU in classification/README.md:
# file, DATA.IMG_SIZE, MODEL.DROP_PATH_RATE, GPUs, batch per GPU, TRAIN.EPOCHS, WARMUP_EPOCHS, BASE_LR, WARMUP_LR, MIN_LR,
# LR_LAYER_DECAY_RATIO (1 where LR_LAYER_DECAY is off), DCN_LR_MUL (likewise), AUG.MIXUP, CUTMIX, REPROB,
# MODEL.LABEL_SMOOTHING, TRAIN.USE_CHECKPOINT
CLASSIFICATION = {
    "imagenet1k_t": ("internimage_t_1k_224", 224, 0.1, 32, 128, 300, 20, 5e-4, 5e-7, 5e-6, 1, 1, 0.8, 1.0, 0.25, 0.1, False),
    "imagenet1k_s": ("internimage_s_1k_224", 224, 0.4, 32, 128, 300, 20, 5e-4, 5e-7, 5e-6, 1, 1, 0.8, 1.0, 0.25, 0.1, False),
    "imagenet1k_b": ("internimage_b_1k_224", 224, 0.5, 32, 128, 300, 20, 5e-4, 5e-7, 5e-6, 1, 1, 0.8, 1.0, 0.25, 0.1, False),
    "imagenet22k_to_1k_l": ("internimage_l_22kto1k_384", 384, 0.1, 32, 16, 20, 2, 2e-5, 0, 0, 0.9, 0.1, 0, 0, 0, 0.3, True),
    "imagenet22k_to_1k_xl": ("internimage_xl_22kto1k_384", 384, 0.2, 32, 16, 20, 2, 2e-5, 0, 0, 0.9, 0.1, 0, 0, 0, 0.3, True),
    "imagenet22k_to_1k_h": ("internimage_h_22kto1k_640", 640, 0.2, 32, 16, 20, 2, 2e-5, 0, 0, 0.9, 0.1, 0, 0, 0, 0.3, True),
    "imagenet22k_to_1k_h_384": ("internimage_h_22kto1k_384", 384, 0.2, 32, 16, 20, 2, 2e-5, 0, 0, 0.9, 0.1, 0, 0, 0, 0.3, True),
    "imagenet22k_to_1k_g": ("internimage_g_22kto1k_512", 512, 0.4, 64, 8, 20, 2, 2e-5, 0, 0, 0.9, 0.1, 0, 0, 0, 0.3, True),
}  # fmt: skip
# detection/configs/coco/NAME.py with _base_/schedules: backbone.drop_path_rate, optimizer.lr, weight_decay, layer_decay_rate,
# grad_clip.max_norm (0 for None), epochs and steps (one of them 0), warmup_iters, total batch (None: not said), factor of the
# learning rate at the end, momentum of ExpMomentumEMAHook
DETECTION = {
    "coco_t": ("dino_4scale_internimage_t_1x_coco_layer_wise_lr", 0.2, 1e-4, 1e-4, 0.9, 0.1, 12, 0, 500, 16, 0.1, None),
    "coco_s": ("mask_rcnn_internimage_s_fpn_3x_coco", 0.3, 1e-4, 0.05, 1.0, 0, 36, 0, 500, 16, 0.01, None),
    "coco_b": ("mask_rcnn_internimage_b_fpn_3x_coco", 0.4, 1e-4, 0.05, 1.0, 0, 36, 0, 500, 16, 0.01, None),
    "coco_l": ("dino_4scale_internimage_l_1x_coco_layer_wise_lr", 0.4, 1e-4, 1e-4, 0.9, 0.1, 12, 0, 500, 16, 0.1, None),
    "coco_xl": ("cascade_internimage_xl_fpn_3x_coco", 0.6, 2e-4, 0.05, 0.9, 0, 36, 0, 500, 64, 0.01, 1e-4),
    "coco_h": ("dino_4scale_internimage_h_objects365_coco_ss", 0.5, 1e-4, 1e-4, 0.94, 0.1, 0, 20000, 500, None, 1, None),
    "coco_g": ("dino_4scale_internimage_g_objects365_coco_ss", 0.5, 1e-4, 1e-4, 0.94, 0.1, 0, 20000, 500, None, 1, None),
}  # fmt: skip
# segmentation/configs/ade20k/NAME.py with _base_/schedules: crop_size, backbone.drop_path_rate, optimizer.lr, layer_decay_rate,
# grad_clip.max_norm (0 for none), max_iters, batch per GPU, GPUs, evaluation.interval, with_cp
SEGMENTATION = {
    "ade20k_t": ("upernet_internimage_t_512_160k_ade20k", 512, 0.2, 6e-5, 1.0, 0, 160000, 2, 8, 16000, False),
    "ade20k_s": ("upernet_internimage_s_512_160k_ade20k", 512, 0.3, 6e-5, 1.0, 0, 160000, 2, 8, 16000, False),
    "ade20k_b": ("upernet_internimage_b_512_160k_ade20k", 512, 0.4, 6e-5, 1.0, 0, 160000, 2, 8, 16000, False),
    "ade20k_l": ("upernet_internimage_l_640_160k_ade20k", 640, 0.4, 2e-5, 0.94, 0.1, 160000, 2, 8, 16000, False),
    "ade20k_xl": ("upernet_internimage_xl_640_160k_ade20k", 640, 0.4, 2e-5, 0.94, 0.1, 160000, 2, 8, 16000, False),
    "ade20k_h": ("upernet_internimage_h_896_160k_ade20k", 896, 0.5, 2e-5, 0.95, 0.1, 160000, 1, 16, 16000, False),
    "ade20k_g": ("upernet_internimage_g_896_160k_ade20k", 896, 0.5, 2e-5, 0.95, 0.1, 160000, 1, 16, 16000, True),
    "ade20k_h_mask2former": (
        "mask2former_internimage_h_896_80k_cocostuff2ade20k_ss", 896, 0.5, 1e-5, 0.95, 0.1, 80000, 1, 16, 2000, False,
    ),
}  # fmt: skip
SMALL_SIZES = {
    "upernet": {"hidden_size": 16, "auxiliary_channels": 8},
    "mask2former": {
        "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 2, "encoder_layers": 1,
        "num_queries": 20, "num_attention_heads": 4, "dim_feedforward": 32, "encoder_feedforward_dim": 32, "train_num_points": 64,
    },
}  # fmt: skip
OFFICIAL = {**CLASSIFICATION, **DETECTION, **SEGMENTATION}


def parse(name: str, *flags: str):
    """A recipe as its program reads it: data, model and training arguments."""
    module, classes = next(value for start, value in PROGRAMS.items() if name.startswith(start))
    if not (EXAMPLES / f"{module}.py").is_file():
        pytest.skip(f"there is no examples/{module}.py")
    pytest.importorskip("datasets")
    program = importlib.import_module(module)
    return parse_flags([str(RECIPES / f"{name}.yaml"), *flags], *(getattr(program, c) for c in classes))


def learning_rates(training: TrainingArguments, steps: int) -> list[float]:
    """The learning rate before each of the steps."""
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


def test_every_recipe_has_official_figures():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == OFFICIAL.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_names_its_source(name):
    assert f"/{OFFICIAL[name][0]}." in (RECIPES / f"{name}.yaml").read_text().replace("\n# ", "")


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_recipe_equals_official(name):
    _, size, drop_path, gpus, per_gpu, epochs, warmup, base, start, least, decay, offsets, *rest = CLASSIFICATION[name]
    mixup, cutmix, erasing, smoothing, checkpointing = rest
    data, model, training = parse(name)
    assert (data.image_size, model.drop_path_rate) == (size, drop_path)
    assert (data.mixup_alpha, data.cutmix_alpha, data.random_erasing) == (mixup, cutmix, erasing)
    assert (data.mixup_prob, data.mixup_switch_prob, data.rand_augment) == (1.0, 0.5, 9)
    assert (data.random_crop_scale, data.random_flip) == (0.08, True)
    assert training.label_smoothing_factor == smoothing
    assert (training.num_train_epochs, training.max_grad_norm, training.weight_decay) == (epochs, 5.0, 0.05)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.layer_decay, training.offset_lr_multiplier, training.ema_decay) == (decay, offsets, 0.9999)
    assert training.gradient_checkpointing == checkpointing

    batch = gpus * per_gpu
    assert training.per_device_train_batch_size == per_gpu
    assert total_batch(training) == batch
    per_epoch = math.ceil(IMAGES / batch)
    assert abs(training.get_warmup_steps(epochs * per_epoch) - warmup * per_epoch) <= 1  # a ratio, rounded up
    # main.py: learning rates grow with the batch, from 512 images on
    rates = learning_rates(training, epochs * per_epoch)
    assert max(rates) == pytest.approx(base * batch / 512, rel=1e-3)
    assert rates[0] == pytest.approx(start * batch / 512, abs=2 * max(rates) / (warmup * per_epoch))
    assert rates[-1] == pytest.approx(least * batch / 512, rel=1e-3, abs=1e-4 * max(rates))
    assert rates.index(max(rates)) == pytest.approx(warmup * per_epoch, abs=1)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_recipe_equals_official(name):
    _, drop_path, lr, weight_decay, decay, clip, epochs, steps, warmup, batch, end, momentum = DETECTION[name]
    _, model, training = parse(name)
    assert model.drop_path_rate == drop_path
    assert (training.learning_rate, training.weight_decay, training.layer_decay) == (lr, weight_decay, decay)
    assert (training.max_grad_norm, training.warmup_steps) == (clip, warmup)
    assert training.ema_decay == (None if momentum is None else 1 - momentum)
    if batch is not None:
        assert total_batch(training) == batch
    if epochs:
        assert training.num_train_epochs == epochs
        steps = epochs * math.ceil(117266 / batch)  # COCO's training images with boxes
    else:
        assert training.max_steps == steps
    rates = learning_rates(training, steps)
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] == pytest.approx(lr * end, rel=0.01)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_recipe_equals_official(name):
    _, size, drop_path, lr, decay, clip, steps, per_gpu, gpus, interval, checkpointing = SEGMENTATION[name]
    data, model, training = parse(name)
    assert (data.image_size, data.min_scale, data.max_scale, data.reduce_labels) == (size, 0.5, 2.0, True)
    assert model.drop_path_rate == drop_path
    assert (training.learning_rate, training.weight_decay, training.layer_decay) == (lr, 0.05, decay)
    assert (training.max_grad_norm, training.warmup_steps, training.max_steps) == (clip, 1500, steps)
    assert training.eval_steps == interval
    assert (training.per_device_train_batch_size, total_batch(training)) == (per_gpu, per_gpu * gpus)
    assert training.gradient_checkpointing == checkpointing
    rates = learning_rates(training, steps)
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] == pytest.approx(0, abs=lr * 1e-4)
    # the official rate falls from the first step on, beside the warm-up
    assert rates[steps // 2] == pytest.approx(lr / 2, rel=0.02)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_recipe_trains_one_step(name, coco_folder, tmp_path):
    """One step on small images, with a small backbone and a small head; all else is the recipe's."""
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
    """ImageNet's layout: two classes of two images to train, and of one to evaluate."""
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
    """One step and the evaluation on little data with a small model; all else is the recipe's."""
    flags = {"max_steps": 1, "output_dir": tmp_path, "dataloader_num_workers": 0}
    if name in CLASSIFICATION:
        flags |= {"dataset": class_folder, "model": FIXTURES / "hf_t_like", "image_size": 32, "warmup_steps": 0}
    else:
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        sizes = {**recipe.get("head_config_overrides", {}), **SMALL_SIZES[recipe["head"]]}
        flags |= {"dataset": mask_folder, "backbone": FIXTURES / "hf_t_like", "image_size": 64, "max_train_samples": 3}
        flags |= {"max_eval_samples": 2, "head_config_overrides": json.dumps(sizes)}
    program = importlib.import_module("image_classification" if name in CLASSIFICATION else "semantic_segmentation")
    monkeypatch.setattr(program, "finish", lambda *_: None)  # which draws
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
    """Every image has a constant value of its own, so that the result shows what it was made of."""
    labels = torch.arange(4)
    images = labels.float().reshape(4, 1, 1, 1).expand(4, 3, 32, 24).contiguous()
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mix = Mix(4, *alphas)
        cut = 0
        for _ in range(50):
            mixed, parts = mix(images, labels)
            torch.testing.assert_close(parts.sum(1), torch.ones(4))
            # the mean of an image is that of its classes' values, weighted by their parts
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
    """As in the authors' code: each of the two classes is smoothed, then they are mixed."""
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
    """On the digits: a recipe's augmentation, soft targets, and average, with accumulated steps."""
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
