"""In: a released checkpoint's entry. Out: its model card."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .released import Released


CITATION = """@inproceedings{wang2023internimage,
  title={InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author={Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and Hu, Xiaowei
          and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle={CVPR},
  year={2023}
}"""
DCNV4_CITATION = """@inproceedings{xiong2024efficient,
  title={Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications},
  author={Xiong, Yuwen and Li, Zhiqi and Chen, Yuntao and Wang, Feng and Zhu, Xizhou and Luo, Jiapeng and Wang, Wenhai
          and Lu, Tong and Li, Hongsheng and Qiao, Yu and Lu, Lewei and Zhou, Jie and Dai, Jifeng},
  booktitle={CVPR},
  year={2024}
}"""
# The first sentence of a card and its citation, by the version of the deformable convolution.
_MODELS = {
    3: (
        """InternImage, a convolutional network built on DCNv3 (deformable convolution v3), by Wang et al., CVPR 2023
([paper](https://arxiv.org/abs/2211.05778), [official code](https://github.com/OpenGVLab/InternImage)).""",
        CITATION,
    ),
    4: (
        """FlashInternImage, a convolutional network built on DCNv4 (deformable convolution v4), by Xiong et al., CVPR 2024
([paper](https://arxiv.org/abs/2401.06197), [official code](https://github.com/OpenGVLab/DCNv4)).""",
        DCNV4_CITATION,
    ),
}

_TASKS = {
    "classification": ("image-classification", "AutoModelForImageClassification"),
    "upernet": ("image-segmentation", "UperNetForSemanticSegmentation"),
    "mask2former": ("image-segmentation", "Mask2FormerForUniversalSegmentation"),
    "dino": ("object-detection", "AutoModelForObjectDetection"),
    "rcnn": ("image-segmentation", "AutoModelForInstanceSegmentation"),
    "backbone": ("image-feature-extraction", "InternImageBackbone"),
}
_DATA_SETS = {
    "imagenet-1k": ("imagenet-1k", "ImageNet-1k"),
    "ade20k": ("scene_parse_150", "ADE20K"),
    "cityscapes": ("cityscapes", "Cityscapes"),
    "coco_stuff": ("coco_stuff", "COCO-Stuff"),
    "pascal_context_59": ("pascal_context", "Pascal Context (59 classes)"),
    "nyu_depth_v2": ("nyu_depth_v2", "NYU Depth V2"),
}


def model_card(
    repository: str, task: str, released: Released | None, num_parameters: int, remote_code: bool, dcn_version: int = 3
) -> ModelCard:
    """Returns the README.md of a converted checkpoint; `repository` is its Hub id, or its folder's name."""
    introduction, citation = _MODELS[dcn_version]
    name = repository.split("/")[-1]
    pipeline_tag, model_class = _TASKS[task]
    results = None
    if released is not None and released.metric is not None and released.labels in _DATA_SETS:
        data_set_type, data_set_name = _DATA_SETS[released.labels]
        metric = ("accuracy", "Top-1 accuracy") if task == "classification" else ("mean_iou", "mIoU, single scale")
        results = [
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=data_set_type,
                dataset_name=data_set_name,
                metric_type=metric[0],
                metric_name=metric[1],
                metric_value=released.metric,
            )
        ]
    if released is not None and task in ("dino", "rcnn"):
        results = [
            EvalResult(
                task_type="object-detection" if name_of_metric != "mask AP" else "instance-segmentation",
                dataset_type=released.labels,
                dataset_name=data_set,
                metric_type="mean_average_precision",
                metric_name=name_of_metric,
                metric_value=value,
            )
            for name_of_metric, data_set, value in released.precisions
        ] or None
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["internimage", f"dcnv{dcn_version}", "vision"],
        datasets=list(released.training_data) if released is not None and released.training_data else None,
        base_model=(released.published_repository or released.repository) if released is not None else None,
        model_name=name,
        eval_results=results,
    )
    if task != "backbone":
        use = f'from transformers import pipeline\n\nprint(pipeline("{pipeline_tag}", model="{repository}")("image.jpg"))'
    else:
        use = f'from internimage_hf import {model_class}\n\nbackbone = {model_class}.from_pretrained("{repository}")'
    remote = (
        "Without it, the code in this repository serves: pass `trust_remote_code=True`."
        if remote_code
        else "It is required."
    )
    facts = [f"- Parameters: {num_parameters:,}"]
    if released is not None:
        origin = released.repository
        facts.append(f"- Converted from `{released.file}` of [{origin}](https://huggingface.co/{origin})")
        if task in ("dino", "rcnn"):
            facts.append(f"- Image size: short side up to {released.size}, long side up to {released.width}")
        else:
            facts.append(f"- Image size: {released.size}")
        if released.flops is not None:
            facts.append(f"- FLOPs, as published: {released.flops} G")
        if released.metric is not None:
            kind = (
                "ImageNet-1k top-1 accuracy"
                if task == "classification"
                else f"mIoU on {released.labels}, single scale"
            )
            facts.append(f"- {kind}, as published by the authors: {released.metric} %")
        facts += [
            f"- {name_of_metric} on {data_set}, single scale, as published by the authors: {value} %"
            for name_of_metric, data_set, value in (released.precisions if task in ("dino", "rcnn") else ())
        ]
    text = f"""# {name}

{introduction}

{chr(10).join(facts)}

## Use

The package `internimage-hf` teaches transformers this model. {remote}

```python
import internimage_hf
{use}
```

## Limits

The weights are the authors'. They know the classes of the data they were trained on, with its biases, and were not tested
for safety-relevant uses. The figures above are the authors'; what the conversion verified is in `conversion_report.json`.

## Citation

```bibtex
{citation}
```
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
