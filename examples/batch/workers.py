"""In: a shard. Out: its Parquet file, by way of decoded images and the model's outputs."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from data import InputError, one_line, read_image
from PIL import Image

from .flags import BatchArguments
from .storage import open_filesystem, write_file


def scale_mean_std(processor) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns an image processor's scale, mean and standard deviation, the latter two (3, 1, 1): (pixels * scale - mean) / std."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (np.broadcast_to(np.asarray(v, np.float32).reshape(-1, 1, 1), (3, 1, 1)) for v in (mean, std))
    return scale, mean, std


class Decoder:
    """Reads the images of a shard and resizes them to the model's size.

    If the image processor ends with the arithmetic of `scale_mean_std`, the images stay in 8 bits per channel and `Model`
    normalises them. Otherwise the processor normalises, and the images are float32.

    Raises:
        InputError: if the model has no image processor, or the processor cannot process an image.
    """

    def __init__(self, arguments: BatchArguments):
        from transformers import AutoImageProcessor

        import internimage_hf  # noqa: F401

        self.arguments, self.in_bytes = arguments, False
        try:
            self.processor = AutoImageProcessor.from_pretrained(arguments.model)
            self.in_bytes = self.normalises_plainly()
        except Exception as error:  # transformers and its processors raise many kinds
            raise InputError(f"--model {arguments.model} has no usable image processor: {one_line(error)}") from error

    def normalises_plainly(self) -> bool:
        """Tests with an image whether the processor normalises by the arithmetic of `scale_mean_std`."""
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        if not all(hasattr(self.processor, name) for name in names):
            return False
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (199, 251, 3), dtype=np.uint8))
        pixels = self.process(image, do_rescale=False, do_normalize=False)
        if pixels.shape[0] != 3 or (pixels != pixels.round()).any() or pixels.min() < 0 or pixels.max() > 255:
            return False
        scale, mean, std = scale_mean_std(self.processor)
        return np.allclose((pixels * scale - mean) / std, self.process(image), rtol=1e-5, atol=1e-5)

    def process(self, image: Image.Image, **flags: bool) -> np.ndarray:
        """(channels, height, width), float32."""
        return np.asarray(self.processor(image, return_tensors="np", **flags)["pixel_values"][0], np.float32)

    def pixels(self, content: object, path: str) -> np.ndarray:
        """(channels, height, width), uint8 or float32.

        Raises:
            InputError: if the content is no image, or the processor cannot process it.
        """
        image = read_image(content, path)
        size = getattr(self.processor, "size", None) or {}
        edge, most = size.get("shortest_edge"), Image.MAX_IMAGE_PIXELS
        if getattr(self.processor, "do_resize", False) and edge and not size.get("longest_edge") and most:
            ratio = max(image.size) / min(image.size)
            if edge**2 * ratio > 2 * most:  # Pillow's limit for reading
                raise InputError(
                    f"{path} is too long for its width: {image.width} x {image.height} would become "
                    f"{edge} x {edge * ratio:.0f} before the crop"
                )
        try:
            if self.in_bytes:
                return self.process(image, do_rescale=False, do_normalize=False).astype(np.uint8)
            return self.process(image)
        except Exception as error:  # processors raise many kinds
            raise InputError(f"{path} cannot be brought to the model's size: {one_line(error)}") from error

    def contents(self, shard: dict) -> Iterator[object]:
        """Yields the content of each image's file, or the exception of reading it."""
        filesystem, _ = open_filesystem(self.arguments.input)
        if shard["source"]:
            try:
                column = self.table(shard, [self.arguments.image_column])[0]
            except (OSError, pa.ArrowException) as error:
                yield from [error] * len(shard["paths"])
                return
            for value in column:
                value = value.as_py()
                if isinstance(value, dict):
                    path = value.get("path")
                    value = value["bytes"]
                    if value is None and path is not None:
                        value = OSError(f"the row names the file {path}, and its bytes were expected")
                yield value
            return
        for path in shard["paths"]:
            try:
                with filesystem.open_input_file(path) as file:
                    yield file.read()
            except Exception as error:  # every storage has its own kinds
                yield error

    def table(self, shard: dict, columns: list[str]) -> pa.Table:
        """Reads columns of a shard's rows, only from the row groups that hold them."""
        filesystem, _ = open_filesystem(self.arguments.input)
        with pa.parquet.ParquetFile(shard["source"], filesystem=filesystem) as file:
            first, groups, start = None, [], 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if start <= shard["rows"][-1] and shard["rows"][0] < stop:
                    first = start if first is None else first
                    groups.append(group)
                start = stop
            table = file.read_row_groups(groups, columns=columns).select(columns)
            return table.take([row - first for row in shard["rows"]])

    def kept(self, shard: dict) -> bytes:
        """Returns the columns to keep of a shard's rows in Arrow's format; null where they cannot be read."""
        columns = list(dict.fromkeys(self.arguments.keep_columns))
        if not columns:
            return b""
        try:
            table = self.table(shard, columns)
        except (OSError, pa.ArrowException):  # the images' errors report this damage
            filesystem, _ = open_filesystem(self.arguments.input)
            schema = pa.parquet.read_schema(shard["source"], filesystem=filesystem)
            nulls = {name: pa.nulls(len(shard["paths"]), schema.field(name).type) for name in columns}
            table = pa.table(nulls)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    def __call__(self, shard: dict) -> dict:
        images, errors = [], []
        for path, content in zip(shard["paths"], self.contents(shard), strict=True):
            try:
                # one image at a time: a fault concerns one row
                if isinstance(content, Exception):
                    raise InputError(f"{path} cannot be read: {one_line(content)}")
                images.append(self.pixels(content, path))
                errors.append("")
            except InputError as error:
                errors.append(str(error))
        shapes = np.array([image.shape for image in images], np.int64).reshape(-1, 3)
        kind = np.uint8 if self.in_bytes else np.float32
        pixels = np.concatenate([image.ravel() for image in images]) if images else np.zeros(0, kind)
        result = {"name": shard["name"], "paths": shard["paths"], "errors": errors, "kept": self.kept(shard)}
        return result | {"pixels": pixels, "shapes": shapes}  # all images in one flat array: their sizes may differ


class Model:
    """Computes a decoded shard and writes its file.

    Raises:
        InputError: if the model cannot be loaded, has no weights for the task, or a file cannot be written.
    """

    def __init__(self, arguments: BatchArguments, on_gpu: bool):
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        import internimage_hf  # noqa: F401

        if not on_gpu:
            torch.set_num_threads(arguments.threads_per_actor)
        self.torch, self.arguments = torch, arguments
        self.device, self.dtype = "cuda" if on_gpu else "cpu", getattr(torch, arguments.dtype)
        try:
            model, report = AutoModelForImageClassification.from_pretrained(
                arguments.model, dtype=self.dtype, output_loading_info=True
            )
        except Exception as error:  # transformers, safetensors and torch raise many kinds
            raise InputError(f"--model {arguments.model} cannot be loaded: {one_line(error)}") from error
        needed = f"{model.base_model_prefix}." if arguments.task == "embed" else ""
        if missing := sorted(key for key in report["missing_keys"] if key.startswith(needed)):
            raise InputError(
                f"--model {arguments.model} has no weights for {missing[0]}"
                f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}, which --task {arguments.task} needs"
            )
        self.model = model.to(self.device).eval()
        problem = model.config.problem_type  # as in transformers' pipeline
        self.sigmoid = problem == "multi_label_classification" or model.config.num_labels == 1
        self.processor = AutoImageProcessor.from_pretrained(arguments.model)

    def forward(self, images: list[np.ndarray]) -> np.ndarray:
        """Computes probabilities or embeddings, float32, of images of one size."""
        torch = self.torch
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        if pixels.dtype == torch.uint8:
            scale, mean, std = scale_mean_std(self.processor)
            mean, std = (torch.tensor(v, device=self.device) for v in (mean, std))
            pixels = (pixels * scale - mean) / std
        with torch.inference_mode():
            if self.arguments.task == "embed":
                return self.model.base_model(pixels.to(self.dtype)).pooler_output.float().cpu().numpy()
            logits = self.model(pixels.to(self.dtype)).logits.float()
            return (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).cpu().numpy()

    def outputs(self, shard: dict) -> dict[int, np.ndarray]:
        """Computes probabilities or embeddings of a decoded shard's readable images, by their index in the shard."""
        flat, stop, result = shard["pixels"], 0, {}
        sizes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        numbers = [i for i, error in enumerate(shard["errors"]) if not error]
        for number, shape in zip(numbers, shard["shapes"], strict=True):
            start, stop = stop, stop + int(np.prod(shape))
            shape = tuple(map(int, shape))
            sizes.setdefault(shape, []).append((number, flat[start:stop].reshape(shape)))
        for images in sizes.values():
            for first in range(0, len(images), self.arguments.batch_size):
                batch = images[first : first + self.arguments.batch_size]
                result |= zip((i for i, _ in batch), self.forward([pixels for _, pixels in batch]), strict=True)
        return result

    def table(self, shard: dict) -> pa.Table:
        paths, errors, outputs = (
            list(shard["paths"]),
            [error or None for error in shard["errors"]],
            self.outputs(shard),
        )
        for i, output in list(outputs.items()):
            if not np.isfinite(output).all():
                del outputs[i]
                errors[i] = f"{paths[i]} has an output that is not finite: --dtype {self.arguments.dtype}"

        def column(value: Callable[[np.ndarray], object], type: pa.DataType) -> pa.Array:
            return pa.array([value(outputs[i]) if i in outputs else None for i in range(len(paths))], type)

        columns = {"path": pa.array(paths, pa.string()), "error": pa.array(errors, pa.string())}
        if self.arguments.task == "embed":
            width = self.model.base_model.pooler.hidden_size
            columns["embedding"] = column(lambda output: output, pa.list_(pa.float32(), width))
        else:
            names, top = self.model.config.id2label, self.arguments.top_k or 5
            best = {i: np.argsort(-output, kind="stable")[:top] for i, output in outputs.items()}
            outputs = {
                i: ([names[int(n)] for n in best[i]], output[best[i]].tolist()) for i, output in outputs.items()
            }
            columns["label"] = column(lambda output: output[0][0], pa.string())
            columns["score"] = column(lambda output: output[1][0], pa.float32())
            columns["top_labels"] = column(lambda output: output[0], pa.list_(pa.string()))
            columns["top_scores"] = column(lambda output: output[1], pa.list_(pa.float32()))
        if shard["kept"]:
            kept = pa.ipc.open_stream(shard["kept"]).read_all()
            columns |= {name: kept[name] for name in kept.column_names}
        return pa.table(columns)

    def __call__(self, shard: dict) -> dict:
        filesystem, root = open_filesystem(self.arguments.output)
        table = self.table(shard)
        write_file(filesystem, root, shard["name"], lambda stream: pa.parquet.write_table(table, stream))
        return {"images": len(shard["paths"]), "errors": table["error"].length() - table["error"].null_count}
