"""python -m convert.detection SOURCE --output DIR: a detector with an InternImage backbone, to transformers or (--reverse) back.

DINO (`convert/dino.py`), Mask R-CNN and Cascade Mask R-CNN (`convert/rcnn.py`); what kind a file is, its tensors' names tell.
"""

import argparse
import sys

from internimage_hf import InternImageDinoForObjectDetection, InternImageRcnnForInstanceSegmentation

from . import cli, dino, rcnn, reverse
from .conversion import Plan
from .detectors import read_detector
from .errors import ConversionError, listed
from .source import Source


# What begins the name of a tensor that each kind of detector has, and its converter's module.
KINDS = {"bbox_head.transformer.": dino, "roi_head.": rcnn}
CLASSES = {
    InternImageDinoForObjectDetection: dino.official_state_dict,
    InternImageRcnnForInstanceSegmentation: rcnn.official_state_dict,
}


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    """The conversion of a detector of any kind.

    Raises:
        ConversionError: if the file is no detector of a known kind.
    """
    detector = read_detector(source, arguments)
    for prefix, module in KINDS.items():
        if any(name.startswith(prefix) for name in detector.head):
            return module.plan_for(source, detector)
    raise ConversionError(
        f"{source.file} is no detector that is known here, none of its names begins with "
        f"{' or '.join(f'`{prefix}`' for prefix in KINDS)}; beside the backbone it has {listed(detector.head) or 'nothing'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("Converts a detector with an InternImage backbone to a folder for transformers.")
    reverse.add_option(parser)
    return reverse.run(parser, argv, make_plan, "detection", CLASSES, "state_dict")


if __name__ == "__main__":
    sys.exit(main())
