"""The checkpoints in https://huggingface.co/OpenGVLab/InternImage and https://huggingface.co/OpenGVLab/DCNv4, as data.

Accuracy, FLOPs and resolutions are the authors' (README files of OpenGVLab/InternImage and OpenGVLab/DCNv4). Sizes, sha256
sums and the commits of the repositories are not known: they could not be looked up where this was written, and are None. A
file whose sum is known is checked.
"""

from dataclasses import dataclass


REPOSITORY = "OpenGVLab/InternImage"
DCNV4_REPOSITORY = "OpenGVLab/DCNv4"


@dataclass(frozen=True)
class Released:
    """One released `.pth` file.

    Args:
        name: of the file, without `.pth`.
        task: `classification`, `upernet`, `mask2former`, `detection`, or `backbone` for files of which only the backbone
            has a counterpart in transformers.
        variant: of the backbone.
        labels: the data set whose class names apply; see `convert.labels`.
        size: height of the evaluation images, in pixels; of a detector's, the length that their short side must not exceed.
        metric: top-1 accuracy or single-scale mIoU in percent, if one was published.
        flops: in 10^9, as printed.
        training_data: ids on the Hub of what it was trained on.
        drop_path_rate: that of the official configuration.
        width: of the evaluation images, if they are not square; of a detector's, the length of their long side.
        precisions: of a detector, each as name, data set and value in percent.
        sha256, num_bytes: of the file, where known.
        repository: on the Hub, that holds the file.
        other_names: of the same file, without `.pth`: the authors' links and configurations do not agree on all of them.
    """

    name: str
    task: str
    variant: str
    labels: str
    size: int
    metric: float | None = None
    flops: int | None = None
    training_data: tuple[str, ...] = ("imagenet-1k",)
    drop_path_rate: float = 0.0
    width: int | None = None
    precisions: tuple[tuple[str, str, float], ...] = ()
    sha256: str | None = None
    num_bytes: int | None = None
    repository: str = REPOSITORY
    other_names: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"{self.name}.pth"

    @property
    def files(self) -> tuple[str, ...]:
        """The names that the file may have in its repository, the one to try first at the beginning."""
        return tuple(f"{name}.pth" for name in (self.name, *self.other_names))

    @property
    def labels_begin_at_one(self) -> bool:
        """Whether 0 in the data set's annotations is no class (mmsegmentation's `reduce_zero_label`)."""
        return self.labels in ("ade20k", "pascal_context_59", "nyu_depth_v2") or self.name.endswith("164k_to_10k")

    @property
    def published_repository(self) -> str | None:
        """The repository in the layout of transformers that the authors made of the file; there are none of DCNv4's."""
        is_published = self.task == "classification" and self.repository == REPOSITORY
        return f"OpenGVLab/{self.name}" if is_published else None


_1K = ("imagenet-1k",)
_22K = ("imagenet-22k",)
_22K_1K = ("imagenet-22k", "imagenet-1k")

_ALL = [
    Released("internimage_t_1k_224", "classification", "t", "imagenet-1k", 224, 83.5, 5),
    Released("internimage_s_1k_224", "classification", "s", "imagenet-1k", 224, 84.2, 8),
    Released("internimage_b_1k_224", "classification", "b", "imagenet-1k", 224, 84.9, 16),
    Released("internimage_l_22kto1k_384", "classification", "l", "imagenet-1k", 384, 87.7, 108, _22K_1K),
    Released("internimage_xl_22kto1k_384", "classification", "xl", "imagenet-1k", 384, 88.0, 163, _22K_1K),
    Released("internimage_h_22kto1k_640", "classification", "h", "imagenet-1k", 640, 89.6, 1478, _22K_1K),
    Released("internimage_g_22kto1k_512", "classification", "g", "imagenet-1k", 512, 90.1, 2700, _22K_1K),
    Released("internimage_l_22k_384", "classification", "l", "imagenet-22k", 384, training_data=_22K),
    Released("internimage_xl_22k_384", "classification", "xl", "imagenet-22k", 384, training_data=_22K),
    Released("internimage_h_jointto22k_384", "classification", "h", "imagenet-22k", 384, training_data=_22K),
    Released("internimage_g_jointto22k_384", "classification", "g", "imagenet-22k", 384, training_data=_22K),
    *(
        Released(
            f"upernet_internimage_{variant}_{size}_160k_ade20k",
            "upernet",
            variant,
            "ade20k",
            size,
            miou,
            flops,
            ("scene_parse_150",),
            drop_path_rate,
        )
        for variant, size, miou, flops, drop_path_rate in (
            ("t", 512, 47.9, 944, 0.2),
            ("s", 512, 50.1, 1017, 0.3),
            ("b", 512, 50.8, 1185, 0.4),
            ("l", 640, 53.9, 2526, 0.4),
            ("xl", 640, 55.0, 3142, 0.4),
            ("h", 896, 59.9, 3566, 0.5),
        )
    ),
    Released(
        "mask2former_internimage_h_896_80k_cocostuff2ade20k",
        "mask2former",
        "h",
        "ade20k",
        896,
        62.6,
        4635,
        ("scene_parse_150",),
        0.5,
    ),
    Released(
        "mask2former_internimage_h_896_80k_cocostuff164k",
        "mask2former",
        "h",
        "coco_stuff",
        896,
        52.6,
        4635,
        ("coco_stuff",),
        0.5,
    ),
    Released(
        "mask2former_internimage_h_512_40k_cocostuff164k_to_10k",
        "mask2former",
        "h",
        "coco_stuff",
        512,
        59.2,
        1528,
        ("coco_stuff",),
        0.5,
    ),
    Released(
        "mask2former_internimage_h_480_40k_pascal_context_59",
        "mask2former",
        "h",
        "pascal_context_59",
        480,
        69.7,
        867,
        (),
        0.5,
    ),
    Released("mask2former_internimage_h_480_40k_nyu", "mask2former", "h", "nyu_depth_v2", 480, 67.1, 867, (), 0.5),
    *(
        Released(
            f"upernet_internimage_{variant}_512x1024_160k_{data}",
            "upernet",
            variant,
            "cityscapes",
            1024,
            miou,
            flops,
            ("cityscapes",),
            drop_path_rate,
            2048,
        )
        for variant, data, miou, flops, drop_path_rate in (
            ("t", "cityscapes", 82.58, 1889, 0.2),
            ("s", "cityscapes", 82.74, 2035, 0.3),
            ("b", "cityscapes", 83.18, 2369, 0.4),
            ("l", "cityscapes", 83.68, 3234, 0.4),
            ("xl", "cityscapes", 83.62, 4022, 0.4),
            ("l", "mapillary2cityscapes", 85.94, 3234, 0.4),
            ("xl", "mapillary2cityscapes", 86.20, 4022, 0.4),
        )
    ),
    Released(
        "mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes",
        "mask2former",
        "h",
        "cityscapes",
        1024,
        86.37,
        7878,
        ("cityscapes",),
        0.5,
        2048,
    ),
    *(
        Released(name, task, variant, "cityscapes", 1024, None, flops, (), drop_path_rate, 2048)  # 19 classes, too
        for name, task, variant, flops, drop_path_rate in (
            ("upernet_internimage_l_512x1024_80k_mapillary", "upernet", "l", 3234, 0.4),
            ("upernet_internimage_xl_512x1024_80k_mapillary", "upernet", "xl", 4022, 0.4),
            ("mask2former_internimage_h_896x896_80k_mapillary", "mask2former", "h", 7878, 0.5),
        )
    ),
    *(
        Released(
            name,
            "detection",
            variant,
            "coco",
            800,
            flops=flops,
            training_data=("coco",),
            drop_path_rate=drop_path_rate,
            width=1333,
            precisions=(("box AP", "COCO val2017", box), ("mask AP", "COCO val2017", mask)),
        )
        for name, variant, box, mask, flops, drop_path_rate in (
            ("mask_rcnn_internimage_t_fpn_1x_coco", "t", 47.2, 42.5, 270, 0.2),
            ("mask_rcnn_internimage_t_fpn_3x_coco", "t", 49.1, 43.7, 270, 0.2),
            ("mask_rcnn_internimage_s_fpn_1x_coco", "s", 47.8, 43.3, 340, 0.3),
            ("mask_rcnn_internimage_s_fpn_3x_coco", "s", 49.7, 44.5, 340, 0.3),
            ("mask_rcnn_internimage_b_fpn_1x_coco", "b", 48.8, 44.0, 501, 0.4),
            ("mask_rcnn_internimage_b_fpn_3x_coco", "b", 50.3, 44.8, 501, 0.4),
            ("cascade_internimage_l_fpn_1x_coco", "l", 54.9, 47.7, 1399, 0.4),
            ("cascade_internimage_l_fpn_3x_coco", "l", 56.1, 48.5, 1399, 0.4),
            ("cascade_internimage_xl_fpn_1x_coco", "xl", 55.3, 48.1, 1782, 0.4),
            ("cascade_internimage_xl_fpn_3x_coco", "xl", 56.2, 48.8, 1782, 0.6),
        )
    ),
    *(
        Released(
            f"dino_4scale_{name}",
            "detection",
            variant,
            labels,
            1000 if variant in ("h", "g") else 800,
            training_data=data,
            drop_path_rate=drop_path_rate,
            width=2000 if variant in ("h", "g") else 1333,
            precisions=precisions,
        )
        for name, variant, labels, data, drop_path_rate, precisions in (
            ("internimage_t_1x_coco", "t", "coco", ("coco",), 0.2, (("box AP", "COCO val2017", 53.9),)),
            ("internimage_l_1x_coco_layer_wise_lr", "l", "coco", ("coco",), 0.4, (("box AP", "COCO val2017", 57.5),)),
            (
                "internimage_l_1x_coco_0.1x_backbone_lr",
                "l",
                "coco",
                ("coco",),
                0.4,
                (("box AP", "COCO val2017", 57.6),),
            ),
            (
                "internimage_h_objects365_coco",
                "h",
                "coco",
                ("objects365", "coco"),
                0.5,
                (("box AP", "COCO val2017", 63.4),),
            ),
            (
                "internimage_g_objects365_coco",
                "g",
                "coco",
                ("objects365", "coco"),
                0.5,
                (("box AP", "COCO val2017", 64.2),),
            ),
            (
                "cbinternimage_h_objects365_coco",
                "h",
                "coco",
                ("objects365", "coco"),
                0.5,
                (("box AP", "COCO val2017", 64.5),),
            ),
            (
                "cbinternimage_h_objects365_lvis",
                "h",
                "lvis_v1",
                ("objects365", "lvis"),
                0.5,
                (("box AP", "LVIS v1 minival", 65.8), ("box AP", "LVIS v1 val", 62.3)),
            ),
            (
                "cbinternimage_h_objects365_openimages",
                "h",
                "open_images",
                ("objects365", "open_images"),
                0.5,
                (("mAP", "Open Images V6", 74.1),),
            ),
            (
                "cbinternimage_h_objects365_voc0712",
                "h",
                "voc",
                ("objects365", "pascal_voc"),
                0.5,
                (("mAP", "Pascal VOC 2007", 94.0), ("mAP", "Pascal VOC 2012", 97.2)),
            ),
            ("cbinternimage_h_objects365_80classes", "h", "coco", ("objects365",), 0.5, ()),
            ("cbinternimage_h_objects365_20classes", "h", "voc", ("objects365",), 0.5, ()),
        )
    ),
    *(
        Released(name, "backbone", variant, "none", size, None, None, data, drop_path_rate)
        for name, variant, size, data, drop_path_rate in (
            ("segformer_internimage_l_512x1024_160k_mapillary2cityscapes", "l", 1024, ("cityscapes",), 0.4),
            ("segformer_internimage_xl_512x1024_160k_mapillary2cityscapes", "xl", 1024, ("cityscapes",), 0.4),
            ("segformer_internimage_l_512x1024_80k_mapillary", "l", 1024, (), 0.4),
            ("segformer_internimage_xl_512x1024_80k_mapillary", "xl", 1024, (), 0.4),
        )
    ),
    *(
        Released(
            name,
            "classification",
            variant,
            data[-1],
            size,
            top1,
            training_data=data,
            repository=DCNV4_REPOSITORY,
            other_names=other_names,
        )
        for name, variant, size, top1, data, other_names in (
            ("flash_intern_image_t_1k_224", "flash_t", 224, 83.6, _1K, ()),
            ("flash_intern_image_s_1k_224", "flash_s", 224, 84.4, _1K, ()),
            ("flash_intern_image_b_1k_224", "flash_b", 224, 84.9, _1K, ()),
            # The README links to the first name, which users report as dead; the configuration has the second.
            (
                "flash_internimage_l_22kto1k_384",
                "flash_l",
                384,
                88.1,
                _22K_1K,
                ("flash_intern_image_l_22kto1k_384",),
            ),
            # Named in configurations alone.
            ("flash_intern_image_l_22k_384", "flash_l", 384, None, _22K, ("flash_internimage_l_22k_384",)),
        )
    ),
    *(
        Released(
            name,
            name.partition("_")[0],
            f"flash_{variant}",
            "ade20k",
            size,
            miou,
            training_data=("scene_parse_150",),
            drop_path_rate=drop_path_rate,
            repository=DCNV4_REPOSITORY,
        )
        for name, variant, size, miou, drop_path_rate in (
            ("upernet_flash_internimage_t_512_160k_ade20k", "t", 512, 49.3, 0.2),
            ("upernet_flash_internimage_s_512_160k_ade20k", "s", 512, 50.6, 0.3),
            ("upernet_flash_internimage_b_512_160k_ade20k", "b", 512, 52.0, 0.3),
            ("upernet_flash_internimage_l_640_160k_ade20k", "l", 640, 55.6, 0.4),
            ("mask2former_flash_internimage_t_512_160k_ade20k_ss", "t", 512, 51.2, 0.2),
            (
                "mask2former_flash_internimage_s_640_160k_ade20k_ss",
                "s",
                640,
                52.6,
                0.3,
            ),  # 52.2 in segmentation/README.md
            ("mask2former_flash_internimage_b_640_160k_ade20k_ss", "b", 640, 53.4, 0.4),
            ("mask2former_flash_internimage_l_640_160k_ade20k_ss", "l", 640, 56.7, 0.5),
        )
    ),
    *(
        Released(
            name,
            "detection",
            f"flash_{variant}",
            "coco",
            800,
            training_data=("coco",),
            drop_path_rate=drop_path_rate,
            width=1333,
            precisions=tuple(
                (kind, "COCO val2017", value) for kind, value in zip(("box AP", "mask AP"), values, strict=False)
            ),
            repository=DCNV4_REPOSITORY,
        )
        for name, variant, drop_path_rate, *values in (
            ("mask_rcnn_flash_internimage_t_fpn_1x_coco", "t", 0.2, 48.0, 43.1),
            ("mask_rcnn_flash_internimage_t_fpn_3x_coco", "t", 0.2, 49.5, 44.0),
            ("mask_rcnn_flash_internimage_s_fpn_1x_coco", "s", 0.3, 49.2, 44.0),
            ("mask_rcnn_flash_internimage_s_fpn_3x_coco", "s", 0.4, 50.5, 44.9),
            ("mask_rcnn_flash_internimage_b_fpn_1x_coco", "b", 0.3, 50.1, 44.5),
            ("mask_rcnn_flash_internimage_b_fpn_3x_coco", "b", 0.4, 50.6, 45.4),
            ("cascade_flash_internimage_l_fpn_1x_coco", "l", 0.4, 55.6, 48.2),
            ("cascade_flash_internimage_l_fpn_3x_coco", "l", 0.4, 56.7, 48.9),
            ("dino_4scale_flash_internimage_t_1x_coco", "t", 0.2, 54.7),
            ("dino_4scale_flash_internimage_s_1x_coco", "s", 0.3, 55.3),
            ("dino_4scale_flash_internimage_b_1x_coco", "b", 0.3, 56.0),
            ("dino_4scale_flash_internimage_l_1x_coco", "l", 0.4, 58.8),
        )
    ),
]

RELEASED: dict[str, Released] = {released.name: released for released in _ALL}
_NAMES = {name: released for released in _ALL for name in (released.name, *released.other_names)}


def released_as(name: str) -> Released | None:
    """The released checkpoint whose file has this name, or one of its other names, without `.pth`."""
    return _NAMES.get(name)
