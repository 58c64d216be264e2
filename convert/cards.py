"""In: a released checkpoint's entry. Out: its model card."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .released import REPOSITORY, Released


CITATION = """@inproceedings{wang2023internimage,
  title={InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author={Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and Hu, Xiaowei
          and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle={CVPR},
  year={2023}
}"""

_TASKS = {
    "classification": ("image-classification", "AutoModelForImageClassification"),
    "upernet": ("image-segmentation", "UperNetForSemanticSegmentation"),
    "mask2former": ("image-segmentation", "Mask2FormerForUniversalSegmentation"),
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
    repository: str, task: str, released: Released | None, num_parameters: int, remote_code: bool
) -> ModelCard:
    """Returns the README.md of a converted checkpoint; `repository` is its Hub id, or its folder's name."""
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
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["internimage", "dcnv3", "vision"],
        datasets=list(released.training_data) if released is not None and released.training_data else None,
        base_model=(released.published_repository or REPOSITORY) if released is not None else None,
        model_name=name,
        eval_results=results,
    )
    if task in ("classification", "upernet", "mask2former"):
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
        facts.append(f"- Converted from `{released.file}` of [{REPOSITORY}](https://huggingface.co/{REPOSITORY})")
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
    text = f"""# {name}

InternImage, a convolutional network built on DCNv3 (deformable convolution v3), by Wang et al., CVPR 2023
([paper](https://arxiv.org/abs/2211.05778), [official code](https://github.com/OpenGVLab/InternImage)).

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
{CITATION}
```
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
