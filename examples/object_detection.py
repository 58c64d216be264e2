"""In: images with boxes, or boxes and masks. Out: a detector on an InternImage backbone, COCO's mAP, and a picture.

Without arguments the program takes handwritten digits on photographs (no download), trains a small RT-DETR to an mAP@50 well
above 0.5 on held-out scenes, and writes model, metrics and a picture of predictions:

    python examples/object_detection.py

`--head dino`, `--head mask_rcnn` and `--head cascade` train the detectors of InternImage's authors on the same scenes; the latter
two train on masks beside boxes, and are measured by the mAP of both.

On your own images in COCO's format, with a pretrained backbone:

    python examples/object_detection.py --dataset coco/ --backbone OpenGVLab/internimage_t_1k_224 --head rt_detr \
        --output_dir outputs/coco --num_train_epochs 12 --learning_rate 1e-4 --layer_decay 0.9 --bf16

`--dataset` is a folder with COCO annotations (`annotations/instances_train*.json` beside `train*/`, or
`train/_annotations.coco.json` among the images; the same for `val` or `valid`, else `test`; flags such as
`--train_annotations` name other files), a folder with a `metadata.jsonl`, or the id of a dataset on the Hub; the latter two have
a column `objects` with `bbox` and `category`. For masks, `segmentation` holds polygons or run lengths, or there are images of
instance masks (see instance_segmentation.py). The program first prints the numbers of used and unused files and objects. All
flags of `transformers.TrainingArguments` work, and those of `internimage_hf.training`; a YAML file with flags may come first.
`--resume_from_checkpoint last` resumes an interrupted run of the same `--output_dir`; `--model FOLDER` starts from a trained
detector, or from one that `python -m convert.detection` wrote. If it was trained for other classes, the weights that depend on
them are new; the program says which.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from common import (
    ExampleTrainingArguments,
    Head,
    HeadTrainer,
    ModelArguments,
    RandomlyTransformed,
    build_head,
    choose_learning_rate,
    count_parameters,
    finish,
    head_of_model,
    load_head,
    make_backbone,
    train_evaluate_save,
)
from data import InputError, read_image, run_program
from detection_data import (
    EMBEDDED_SIZE,
    DetectionDataArguments,
    InstanceDataArguments,
    load_splits,
    refuse_mask_flags,
    training_transform,
)
from detection_results import (
    MAX_DETECTIONS,
    CocoMetrics,
    InstanceTrainer,
    detect,
    detect_instances,
    draw_predictions,
    lists_of,
)
from flags import parse_flags
from PIL import Image
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# imported from their own modules: without torchvision, transformers 5.17 does not export these classes
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from internimage_hf import (
    InternImageDetectionImageProcessor,
    InternImageDinoConfig,
    InternImageDinoForObjectDetection,
    InternImageRcnnConfig,
    InternImageRcnnForInstanceSegmentation,
)


@dataclass
class DetectionModelArguments(ModelArguments):
    head: str = field(
        default="rt_detr",
        metadata={
            "help": "the detector on the backbone; dino, mask_rcnn and cascade are those of InternImage's authors, the latter two "
            "with masks; deformable_detr takes longer to learn, detr some hundred epochs",
            "choices": ["rt_detr", "deformable_detr", "detr", "dino", "mask_rcnn", "cascade"],
        },
    )


@dataclass
class DetectionTrainingArguments(ExampleTrainingArguments):
    output_dir: str | None = "outputs/object_detection"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    num_train_epochs: float = 8
    metric_for_best_model: str | None = "map"


HEADS = {
    "rt_detr": Head(
        RTDetrForObjectDetection,
        RTDetrConfig,
        RTDetrImageProcessorPil,
        ["stage2", "stage3", "stage4"],
        2e-3,
        {
            "d_model": 64, "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64], "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "num_queries": 30, "num_denoising": 30, "hidden_expansion": 0.5, "initializer_range": 0.1,
        },
    ),
    "deformable_detr": Head(
        DeformableDetrForObjectDetection,
        DeformableDetrConfig,
        DeformableDetrImageProcessorPil,
        ["stage2", "stage3", "stage4"],
        1e-3,
        {
            "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 3,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 30, "dropout": 0.0,
            "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 30, "auxiliary_loss": True,
            "init_std": 0.1,
        },
        full={"with_box_refine": True, "two_stage": True, "auxiliary_loss": True},
    ),
    "detr": Head(
        DetrForObjectDetection,
        DetrConfig,
        DetrImageProcessorPil,
        ["stage4"],
        5e-4,
        {
            "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 3,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 10, "dropout": 0.0,
            "auxiliary_loss": True, "init_std": 0.1,
        },
        full={"auxiliary_loss": True},
    ),
    "dino": Head(
        InternImageDinoForObjectDetection,
        InternImageDinoConfig,
        InternImageDetectionImageProcessor,
        ["stage2", "stage3", "stage4"],
        2e-3,
        {
            "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 3,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "neck_groups": 8, "num_queries": 30, "num_denoising": 30,
        },
    ),
    **{
        name: Head(
            InternImageRcnnForInstanceSegmentation,
            config,
            InternImageDetectionImageProcessor,
            ["stage1", "stage2", "stage3", "stage4"],
            1e-3,
            {
                "fpn_hidden_size": 48, "box_hidden_size": 128, "box_conv_size": 32, "num_mask_convs": 2, "mask_hidden_size": 32,
                "rpn_pre_nms_top_n": 100, "rpn_post_nms_top_n": 50, "rpn_pre_nms_top_n_training": 100,
                "rpn_post_nms_top_n_training": 50, "num_samples": 32, "max_detections": 20,
            },
            masks=True,
        )
        for name, config in (("mask_rcnn", InternImageRcnnConfig), ("cascade", InternImageRcnnConfig.cascade))
    },
}  # fmt: skip


def chosen_head(arguments: DetectionModelArguments) -> Head:
    """Returns the head of `--model`, or that of `--head`."""
    return HEADS[arguments.head] if arguments.model is None else head_of_model(HEADS, arguments)


def build_model(arguments: DetectionModelArguments, labels: list[str], image_size: int | None):
    """Builds the detector for `labels`, and its image processor.

    Args:
        arguments: the flags.
        labels: the categories' names.
        image_size: side of the images in pixels; None for the default.

    Raises:
        InputError: if `--model` is none of the heads on an InternImage backbone, or the images are too small for the head.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"--image_size must be at least 1, got {image_size}")
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head = chosen_head(arguments)
    if arguments.model is not None:
        model = load_head(HEADS, arguments, **names)
        if image_size is None:
            return model, head.processor.from_pretrained(arguments.model)
        check_queries(model, image_size)
        return model, head.processor.from_pretrained(arguments.model, **_processor_fields(head, image_size))
    backbone = make_backbone(arguments, head.out_features)
    options = dict(head.demo if arguments.backbone is None else head.full)
    if head.config is RTDetrConfig:
        options["encoder_in_channels"] = backbone.channels
    model = build_head(head.model, head.config, backbone, arguments, **names, **options)
    side = image_size or (EMBEDDED_SIZE if arguments.backbone is None else None)
    if side is not None:
        check_queries(model, side)
    return model, head.processor(**_processor_fields(head, side))


def check_queries(model, side: int) -> None:
    """
    Raises:
        InputError: if a two-stage head has more queries than its maps of small images have positions, or the sizes of RT-DETR's
            maps do not fit together.
    """
    config = model.config
    if isinstance(config, RTDetrConfig):
        field_name, strides = "num_queries", config.feat_strides
        if side % max(strides):
            raise InputError(
                f"--image_size {side} is not a multiple of {max(strides)}, with which RT-DETR's maps fit together; "
                f"{max(1, round(side / max(strides))) * max(strides)} is"
            )
    elif isinstance(config, InternImageDinoConfig) or (isinstance(config, DeformableDetrConfig) and config.two_stage):
        field_name = "num_queries" if isinstance(config, InternImageDinoConfig) else "two_stage_num_proposals"
        strides = [8 * 2**level for level in range(config.num_feature_levels)]
    else:
        return
    places, queries = sum(math.ceil(side / stride) ** 2 for stride in strides), getattr(config, field_name)
    if places < queries:
        raise InputError(
            f"--image_size {side} is too small: {type(model).__name__} has {places} places in such images, fewer than "
            f"its {queries} queries; --head_config_overrides '{{\"{field_name}\": {places}}}' makes them fewer"
        )


def _processor_fields(head: Head, side: int | None) -> dict:
    """Returns the fields of the head's official resizing with another `side`, and ImageNet's mean and deviation."""
    fields = {"do_normalize": True, "image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if side is not None and head.processor is RTDetrImageProcessorPil:
        fields["size"] = {"height": side, "width": side}
    elif side is not None:
        fields["size"] = {"shortest_edge": side, "longest_edge": round(side * 1333 / 800)}
    return fields


class Collate:
    """Turns examples into a batch of the model's inputs by the head's image processor: resized, normalised, padded."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        keys = {"bbox": "bbox", "category": "category_id", "area": "area", "iscrowd": "iscrowd"}
        options = {}
        if "segmentation" in examples[0]["objects"]:
            keys["segmentation"], options["return_segmentation_masks"] = "segmentation", True
        annotations = [
            {
                "image_id": example["image_id"],
                "annotations": [
                    dict(zip(keys.values(), values, strict=True))
                    for values in zip(*(example["objects"][name] for name in keys), strict=True)
                ],
            }
            for example in examples
        ]
        images = [read_image(example["image"], example["name"]) for example in examples]
        batch = self.processor(images=images, annotations=annotations, return_tensors="pt", **options)
        return {**batch, "labels": [dict(label) for label in batch["labels"]]}


class DetectionTrainer(HeadTrainer):
    """Evaluation gathers detections and their images' ids from all processes, as tensors of a fixed shape."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs, inputs = self.predict_batch(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        rows = sizes.new_full((len(sizes), MAX_DETECTIONS, 6), -1, dtype=torch.float32)
        for row, found in zip(
            rows, detect(self.processing_class, outputs, sizes, inputs.get("pixel_mask")), strict=True
        ):
            values = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None]], dim=1)
            row[: len(values)] = values
        return loss, rows, torch.cat([label["image_id"] for label in inputs["labels"]])


class RcnnTrainer(InstanceTrainer):
    def instances(self, outputs, inputs: dict) -> dict[int, dict[str, list]]:
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        ids = torch.cat([label["image_id"] for label in inputs["labels"]]).tolist()
        return dict(zip(ids, detect_instances(self.processing_class, outputs, sizes), strict=True))


def draw(head: Head, folder: Path, samples: list[dict], file: Path) -> None:
    """Loads the saved detector and writes a PNG of truth and predictions for examples of `Detections`."""
    model = head.model.from_pretrained(folder).eval()
    processor = head.processor.from_pretrained(folder)

    @torch.no_grad()
    def predict(image: Image.Image) -> dict[str, list]:
        inputs = processor(images=[image], return_tensors="pt")
        outputs, size = model(**inputs), torch.tensor([[image.height, image.width]])
        if head.masks:
            return detect_instances(processor, outputs, size)[0]
        return lists_of(detect(processor, outputs, size, inputs.get("pixel_mask"))[0])

    draw_predictions(samples, predict, model.config.id2label, file)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, InstanceDataArguments, DetectionModelArguments, DetectionTrainingArguments
    )
    set_seed(training_arguments.seed)
    head = chosen_head(model_arguments)
    if not head.masks:
        refuse_mask_flags(
            data_arguments,
            f"--head {model_arguments.head}" if model_arguments.model is None else f"--model {model_arguments.model}",
        )
        data_arguments = DetectionDataArguments(
            **{one.name: getattr(data_arguments, one.name) for one in fields(DetectionDataArguments)}
        )
    train, evaluation, account = load_splits(data_arguments, training_arguments.seed)
    labels = list(account.classes)
    checkpoint = model_arguments.model or model_arguments.backbone
    choose_learning_rate(training_arguments, checkpoint, untrained=head.learning_rate)
    model, processor = build_model(model_arguments, labels, data_arguments.image_size)
    metrics = CocoMetrics(evaluation.objects["objects"], labels)
    trainer_class, how = (RcnnTrainer, "metrics") if head.masks else (DetectionTrainer, "compute_metrics")
    trainer = trainer_class(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, training_transform(data_arguments), training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        processing_class=processor,
        **{how: metrics},
    )
    training, metrics = train_evaluate_save(trainer, account)
    folder = Path(training_arguments.output_dir)
    samples = [evaluation[index] for index in range(min(data_arguments.picture_samples, len(evaluation)))]
    finish(
        trainer,
        lambda file: draw(head, folder, samples, file),
        {
            "dataset": f"{data_arguments.dataset}: {len(train)} images to train, {len(evaluation)} to evaluate, "
            f"{len(labels)} categories",
            "model": f"{trainer.model_class.__name__}, {count_parameters(model):,} parameters, saved in {folder}",
            **{
                title: f"{metrics[f'eval_{key}']:.3f} (at IoU 0.5: {metrics[f'eval_{key}_50']:.3f}) on the held-out images"
                for title, key in (("mAP", "map"), ("mask mAP", "mask_map"))
                if f"eval_{key}" in metrics
            },
            "training": f"{training['train_runtime']:.0f} s",
        },
    )
    return metrics


if __name__ == "__main__":
    run_program(main)
