"""Tests of examples/batch_inference.py: rows, errors, restarts, killed workers."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextV2Config,
    DetrConfig,
    HfArgumentParser,
    pipeline,
)
from utils import FIXTURES, ROOT, run_command, run_python

import internimage_hf  # noqa: F401


pytest.importorskip("ray", reason="needs `pip install internimage-hf[batch]`")

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq


sys.path.insert(0, str(ROOT / "examples"))

import batch_inference
from batch import run_lock
from batch.flags import BatchArguments
from batch.inputs import find_shards
from batch.resources import plan
from batch.results import account, read_results, unfinished_shards
from batch.run_lock import sole_writer
from batch.storage import CLAIM, UNFINISHED, open_filesystem, write_file
from batch.workers import Decoder, Model
from batch_inference import check_model, ship_modules
from data import InputError, LeftOut, read_image


MODEL = FIXTURES / "hf_t_like"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(*flags: object) -> list[str]:
    fixed = ["--model", MODEL, "--num_cpus", 2, "--object_store_mb", 100]
    return [sys.executable, str(ROOT / "examples" / "batch_inference.py"), *map(str, (*fixed, *flags))]


def run(*flags: object, expect: int = 0) -> str:
    return run_command(*command(*flags), expect=expect, **ENVIRONMENT)


def write_photos(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Writes images of noise of many sizes and modes into two folders."""
    rng, files = np.random.default_rng(seed), []
    for i in range(number):
        file = folder / "ab"[i % 2] / f"{seed}-{i:04}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i % 50, 90 - i % 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if i % 7 == 0 else "RGB").save(file)
        files.append(file)
    return files


def rows(folder: Path) -> dict[str, dict]:
    """Reads the rows of all result files by path; each path must occur once."""
    found = ds.dataset(sorted(map(str, folder.glob("part-*.parquet")))).to_table().to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("part-*.parquet")}


def expected_outputs(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes probabilities and embeddings by the model and its image processor, one image at a time."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(MODEL).eval(),
        AutoImageProcessor.from_pretrained(MODEL),
    )
    probabilities, embeddings = [], []
    with torch.no_grad():
        for file in files:
            pixel_values = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            probabilities.append(model(pixel_values).logits.softmax(-1)[0])
            embeddings.append(model.internimage(pixel_values).pooler_output[0])
    return torch.stack(probabilities), torch.stack(embeddings)


def test_folder_is_classified_and_second_run_finds_it_done(tmp_path):
    files = write_photos(tmp_path / "photos", 13)
    (tmp_path / "photos" / "a" / "broken.jpg").write_bytes(files[0].read_bytes()[:200])
    (tmp_path / "photos" / "empty.png").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("not an image by its name")
    out = tmp_path / "out"
    flags = ["--input", tmp_path / "photos", "--output", out, "--shard_size", 4, "--batch_size", 3, "--top_k", 3]
    output = run(*flags, "--compare")
    assert "15 images" in output and "2 errors" in output and "plain loop  15 images" in output

    found = rows(out)
    assert len(found) == 15
    broken = [row for row in found.values() if row["error"] is not None]
    assert {Path(row["path"]).name for row in broken} == {"broken.jpg", "empty.png"}
    assert all(row["label"] is None and row["top_scores"] is None for row in broken)
    probabilities, _ = expected_outputs(files)
    id2label = json.loads((MODEL / "config.json").read_text()).get("id2label")
    for file, scores in zip(files, probabilities, strict=True):
        row = found[str(file)]
        best = scores.topk(3)
        np.testing.assert_allclose(row["top_scores"], best.values, atol=2e-3)
        if id2label and best.values[0] - best.values[1] > 5e-3:
            assert row["label"] == id2label[str(best.indices[0].item())]
        assert row["score"] == row["top_scores"][0] and row["label"] == row["top_labels"][0]

    # first nothing to do; then a new image, in the middle by its name, and shards of another size
    before = stamps(out)
    argv = [*map(str, flags), "--model", str(MODEL)]
    assert "15 of them done before" in batch_inference.main(argv)["input"]
    write_photos(tmp_path / "photos", 1, seed=5)
    (arguments,) = HfArgumentParser(BatchArguments).parse_args_into_dataclasses(argv)
    arguments.shard_size = 6
    todo = unfinished_shards(find_shards(arguments), arguments)
    assert [Path(path).name for shard in todo for path in shard["paths"]] == ["5-0000.jpg"]
    Model(arguments, on_gpu=False)(Decoder(arguments)(todo[0]))
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert len(rows(out)) == 16
    with pytest.raises(ValueError, match="holds results of"):
        batch_inference.main([*argv, "--task", "embed"])


def test_parquet_is_embedded_with_kept_columns(tmp_path):
    """The workers' code without Ray: row groups, two layouts of images, a null, 16-bit."""
    files = write_photos(tmp_path / "photos", 7)
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = pa.table({"image": [*images[:3], None, *images[3:]], "id": list(range(8))})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=3)
    arguments = BatchArguments(
        input=f"file://{tmp_path}/images.parquet", output=str(tmp_path / "out"), model=str(MODEL), task="embed",
        keep_columns=["id"], shard_size=5, batch_size=2,
    )  # fmt: skip
    shards = unfinished_shards(find_shards(arguments), arguments)
    assert [len(shard["paths"]) for shard in shards] == [5, 3]
    decoder, model = Decoder(arguments), Model(arguments, on_gpu=False)
    for shard in shards:
        model(decoder(shard))
    assert unfinished_shards(find_shards(arguments), arguments) == []

    table = read_results(arguments)
    assert pa.types.is_fixed_size_list(table.schema.field("embedding").type)
    found = rows(tmp_path / "out")
    assert [found[f"{tmp_path}/images.parquet#{i}"]["id"] for i in range(8)] == list(range(8))
    missing = found.pop(f"{tmp_path}/images.parquet#3")
    assert missing["embedding"] is None and missing["error"] is not None
    actual = torch.tensor([row["embedding"] for row in sorted(found.values(), key=lambda row: row["id"])])
    _, embeddings = expected_outputs(files)
    torch.testing.assert_close(actual, embeddings, atol=1e-4, rtol=1e-4)


def test_bad_input_is_one_line_that_names_it(tmp_path):
    arguments = BatchArguments(input=str(tmp_path / "nothing"), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not exist"):
        find_shards(arguments)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no images"):
        find_shards(arguments)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"picture": [b""]}), buffer)
    (tmp_path / "nothing" / "x.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="no column 'image', only picture"):
        find_shards(arguments)
    arguments.image_column, arguments.keep_columns = "picture", ["label"]
    with pytest.raises(ValueError, match="--keep_columns label is the name of a column of the output"):
        find_shards(arguments)


# --------------------------------------------------------------------------------------------- scores, image by image


def compute(tmp_path: Path, **flags) -> dict[str, dict]:
    """Runs without Ray; returns the rows."""
    arguments = BatchArguments(**{"output": str(tmp_path / "out"), "model": str(MODEL), "top_k": 10} | flags)
    decoder, model = Decoder(arguments), Model(arguments, on_gpu=False)
    for shard in unfinished_shards(find_shards(arguments), arguments):
        model(decoder(shard))
    return rows(tmp_path / "out")


def model_with(folder: Path, processor: dict, **config) -> Path:
    """Saves the model of the tests with another image processor and other fields of the configuration."""
    folder.mkdir()
    for file in MODEL.iterdir():
        if file.name not in ("config.json", "preprocessor_config.json"):
            (folder / file.name).symlink_to(file)
    old = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def assert_scores_equal(row: dict, expected: list[dict], atol: float = 1e-5) -> None:
    assert row["error"] is None
    actual = dict(zip(row["top_labels"], row["top_scores"], strict=True))
    assert actual == pytest.approx({item["label"]: item["score"] for item in expected}, abs=atol)


def gradient(width: int, height: int) -> np.ndarray:
    """A picture (height, width, 3), uint8, that differs from all its rotations and reflections."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y**2, 255 * x * (1 - y)], -1).astype(np.uint8)


def test_scores_equal_pipeline_for_every_image_mode(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.fromarray(gradient(120, 70))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(photos / f"orientation {orientation}.jpg", exif=exif, quality=95)
        image.save(photos / f"orientation {orientation}.png", exif=exif)
    for mode, ending in (("1", "png"), ("L", "jpg"), ("LA", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg")):
        image.convert(mode).save(photos / f"{mode}.{ending}")
    Image.fromarray(gradient(120, 70)[..., 0].astype(np.uint16) * 256).save(photos / "16 bits.png")
    found = compute(tmp_path, input=str(photos))
    assert len(found) == 23
    classify = pipeline("image-classification", str(MODEL))
    scores = {}
    for path, row in found.items():
        # the pipeline would clip 16-bit pixels to white, all but the darkest
        source = read_image(path) if Path(path).name == "16 bits.png" else path
        scores[Path(path).name] = classify(source, top_k=10)
        assert_scores_equal(row, scores[Path(path).name])
    with pytest.raises(AssertionError):  # orientation matters to these scores
        assert_scores_equal(found[str(photos / "orientation 6.png")], scores["orientation 1.png"], 1e-3)


PROCESSORS = {
    "CLIP without crop": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"shortest_edge": 64}},
    "no resizing, no crop": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "do_resize": False},
    "shortest and longest edge": {
        "image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 48, "longest_edge": 64},
    },
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 48}, "resample": 0},
    "ConvNeXt": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}},
    "not normalised": {"image_processor_type": "CLIPImageProcessor", "do_normalize": False, "crop_size": 64, "size": 64},
    "not rescaled": {
        "image_processor_type": "CLIPImageProcessor", "do_rescale": False, "image_mean": [120, 110, 100],
        "image_std": [60, 50, 40], "crop_size": 64, "size": 64,
    },
    "other factor, mean and filter": {
        "image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0],
        "image_std": [0.5, 0.5, 0.5], "resample": 1, "crop_size": 64, "size": 64,
    },
    "EfficientNet": {  # its processor divides by the standard deviation twice
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 64, "width": 64}, "include_top": True,
    },
    "EfficientNet with an offset": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 64, "width": 64}, "include_top": False,
        "rescale_offset": True, "rescale_factor": 1 / 127.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("processor", PROCESSORS)
def test_scores_equal_pipeline_for_any_image_processor(tmp_path, processor):
    photos = tmp_path / "photos"
    photos.mkdir()
    for width, height in ((64, 64), (90, 70), (70, 90), (40, 120), (90, 70)):
        Image.fromarray(gradient(width, height)).save(photos / f"{len(list(photos.iterdir()))}.png")
    model = model_with(tmp_path / "model", PROCESSORS[processor])
    found = compute(tmp_path, input=str(photos), model=str(model), batch_size=2)
    assert len(found) == 5
    classify = pipeline("image-classification", str(model))
    for path, row in found.items():
        assert_scores_equal(row, classify(path, top_k=10))
    arguments = BatchArguments(model=str(model))
    assert Decoder(arguments).in_bytes == ("EfficientNet" not in processor)


def test_multi_label_scores_are_sigmoids(tmp_path):
    processor = json.loads((MODEL / "preprocessor_config.json").read_text())
    model = model_with(tmp_path / "model", processor, problem_type="multi_label_classification")
    (file,) = write_photos(tmp_path / "photos", 1)
    found = compute(tmp_path, input=str(file), model=str(model))
    assert_scores_equal(found[str(file)], pipeline("image-classification", str(model))(str(file), top_k=10))


def test_failing_image_is_row_with_error_and_others_keep_results(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    (good,) = write_photos(photos, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    odd = {
        "cut.png": (good.read_bytes()[:600], "cannot be read as an image"),
        "empty.png": (b"", "cannot be read as an image"),
        "text.jpg": (b"text", "cannot be read as an image"),
    }
    for name, (content, _) in odd.items():
        (photos / name).write_bytes(content)
    Image.new("RGB", (300, 300)).save(photos / "bomb.png")
    Image.new("RGB", (2, 3000)).save(photos / "line.png")
    Image.fromarray(np.ones((40, 40), np.float32)).save(photos / "float.tif")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    found = compute(tmp_path, input=str(photos))
    errors = {Path(path).name: row["error"] for path, row in found.items() if row["error"]}
    expected = {name: message for name, (_, message) in odd.items()} | {
        "bomb.png": "exceeds limit", "line.png": "too long for its width: 2 x 3000 would become 64 x 96000",
        "float.tif": "floating-point pixels", "gone.png": "cannot be read: ",
    }  # fmt: skip
    assert errors.keys() == expected.keys() and found[str(good)]["score"] > 0
    for name, message in expected.items():
        assert message in errors[name] and str(photos / name) in errors[name]


def test_output_that_is_not_finite_is_row_with_error(tmp_path):
    files = write_photos(tmp_path / "photos", 2)
    arguments = BatchArguments(input=str(tmp_path / "photos"), output=str(tmp_path / "out"), model=str(MODEL))
    (shard,) = unfinished_shards(find_shards(arguments), arguments)
    model = Model(arguments, on_gpu=False)
    forward = model.forward
    model.forward = lambda images: forward(images) * np.array([[1], [np.nan]], np.float32)
    assert model(Decoder(arguments)(shard)) == {"images": 2, "errors": 1}
    found = rows(tmp_path / "out")
    assert found[str(files[0])]["error"] is None
    assert "not finite" in found[str(files[1])]["error"] and found[str(files[1])]["score"] is None


# ------------------------------------------------------------------------------------------- every file is used or counted


def listing(url: str, **flags) -> tuple[set[str], dict[str, int]]:
    """Returns the names of the files to read, and the numbers of others by reason."""
    left_out = LeftOut()
    shards = find_shards(BatchArguments(input=url, **flags), left_out)
    return {Path(path).name for shard in shards for path in shard["paths"]}, dict(left_out.counts)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gradient(60, 50)).save(buffer, "png")
    return buffer.getvalue()


CAMERA = ["_DSC0002.JPG", "__x.png", "a b.jpg", "ünï#%?&.PNG", "100%.png", "deep/er/IMG.TIFF", "photo.tar.webp"]
NO_CAMERA = {
    ".hidden.png": "hidden", ".folder/x.png": "hidden", "__MACOSX/x.png": "hidden", "IMG_1.HEIC": "with the ending .HEIC",
    "b/IMG_2.HEIC": "with the ending .HEIC", "_SUCCESS": "without an ending", "metadata.parquet": "metadata of images",
}  # fmt: skip


@pytest.mark.parametrize("storage", ["folder", "object storage"])
def test_every_file_is_read_or_counted_as_skipped(tmp_path, storage):
    if storage == "folder":
        url, write = f"{tmp_path}/photos #1", lambda path, content: Path(path).write_bytes(content)
    else:
        memory = fsspec.filesystem("memory")
        url, write = f"memory://{tmp_path.name}/photos #1", memory.pipe
    _, root = open_filesystem(url)
    for name in [*CAMERA, *NO_CAMERA]:
        if storage == "folder":
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        write(f"{root}/{name}", png())
    names, left_out = listing(url)
    assert names == {Path(name).name for name in CAMERA}
    assert left_out == dict(Counter(NO_CAMERA.values()))
    arguments = BatchArguments(input=url, output=str(tmp_path / "out"), model=str(MODEL))
    (shard,) = unfinished_shards(find_shards(arguments), arguments)
    assert Decoder(arguments)(shard)["errors"] == [""] * len(CAMERA)


def test_unreadable_names_pipes_and_link_loops_are_counted(tmp_path):
    (file,) = write_photos(tmp_path / "photos", 1)
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    names, left_out = listing(str(tmp_path / "photos"))
    assert names == {file.name}
    assert left_out == {
        "with a name that is not UTF-8": 1, "no regular files": 1, "folders that were read under another name": 1,
    }  # fmt: skip


def test_invalid_parquet_files_are_counted_and_damaged_rows_have_errors(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    table = pa.table({"image": [png()] * 6, "id": list(range(6))})
    pq.write_table(table, folder / "_good.parquet", row_group_size=2, compression="none", use_dictionary=False)
    pq.write_table(table.slice(0, 0), folder / "nothing.parquet")
    (folder / "text.parquet").write_text("no Parquet")
    (folder / ".hidden.parquet").write_bytes(b"")
    damaged = bytearray((folder / "_good.parquet").read_bytes())
    first = pq.ParquetFile(folder / "_good.parquet").metadata.row_group(1).column(0)
    damaged[first.data_page_offset : first.data_page_offset + 12] = b"\xff" * 12
    (folder / "damaged.parquet").write_bytes(damaged)
    names, left_out = listing(str(folder))
    assert names == {f"{name}.parquet#{row}" for name in ("_good", "damaged") for row in range(6)}
    assert left_out == {
        "hidden": 1, "Parquet files without rows": 1, "damaged, or no Parquet for all their ending": 1,
    }  # fmt: skip
    found = compute(tmp_path, input=str(folder), keep_columns=["id"], shard_size=2)
    errors = {Path(path).name: row["error"] for path, row in found.items() if row["error"]}
    assert errors.keys() == {"damaged.parquet#2", "damaged.parquet#3"}
    assert all("cannot be read: " in error for error in errors.values())
    assert found[f"{folder}/damaged.parquet#4"]["id"] == 4


@pytest.mark.parametrize(
    "layout", ["output in input", "input is output", "input in output", "link to output", "two outputs"]
)
def test_own_results_are_not_read_as_input(tmp_path, layout):
    photos = tmp_path / "photos"
    out = {"output in input": photos / "out", "two outputs": photos / "out", "input is output": photos}.get(
        layout, tmp_path / "out" if layout == "link to output" else tmp_path
    )
    write_photos(photos, 3)
    if layout == "link to output":
        out.mkdir()
        (photos / "link").symlink_to(out)
    arguments = BatchArguments(input=str(photos), output=str(out), model=str(MODEL), shard_size=2)
    shards = find_shards(arguments)
    decoder, model = Decoder(arguments), Model(arguments, on_gpu=False)
    with sole_writer(arguments):
        for shard in unfinished_shards(shards, arguments):
            model(decoder(shard))
    (out / ".unfinished-of-a-killed-run").write_text("")
    if layout == "two outputs":
        arguments.output = str(photos / "other")
    left_out = LeftOut()
    assert find_shards(arguments, left_out) == shards
    assert set(left_out.counts) <= {"results of this program"}
    assert bool(unfinished_shards(shards, arguments)) == (layout == "two outputs")


# --------------------------------------------------------------------------------------- one run at a time, nothing twice


def test_second_concurrent_run_is_refused(tmp_path):
    write_photos(tmp_path / "photos", 2)
    arguments = BatchArguments(input=str(tmp_path / "photos"), output=str(tmp_path / "out"), model=str(MODEL))
    with sole_writer(arguments):
        writing = tmp_path / "out" / f"{UNFINISHED}1"
        writing.write_text("half a shard")
        for second in (lambda: batch_inference.main(["--input", arguments.input, "--output", arguments.output, "--model", str(MODEL)]),
                       lambda: sole_writer(arguments).__enter__()):  # fmt: skip
            with pytest.raises(InputError, match=f"in use: process {os.getpid()} on .* has been writing there"):
                second()
        unfinished_shards(find_shards(arguments), arguments)
        assert writing.exists()
    with sole_writer(arguments):  # the first run has ended
        assert not writing.exists()


def test_lock_is_released_when_its_process_dies(tmp_path):
    code = (
        "import sys; from batch.flags import BatchArguments; from batch.run_lock import sole_writer; "
        "holder = sole_writer(BatchArguments(output=sys.argv[1])); holder.__enter__(); print('x', flush=True); input()"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline()
        arguments = BatchArguments(output=str(tmp_path))
        with pytest.raises(InputError, match=f"in use: process {process.pid}"), sole_writer(arguments):
            pass
    finally:
        process.kill()
        process.communicate()
    with sole_writer(arguments):
        pass


@pytest.fixture
def claims(monkeypatch, tmp_path):
    """Flags for an output on object storage."""
    monkeypatch.setattr(run_lock, "SETTLE", 0.2)
    return BatchArguments(output=f"memory://{tmp_path.name}/out", model=str(MODEL))


def test_second_run_on_object_storage_is_refused(claims):
    barrier, results = threading.Barrier(2), []

    def work():
        barrier.wait()
        try:
            with sole_writer(claims) as check:
                check()
                results.append("worked")
                barrier.wait(timeout=60)
        except InputError as error:
            results.append(str(error))
            barrier.wait(timeout=60)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result == "worked" for result in results) == [False, True]
    assert any("is in use: process" in result for result in results)
    with sole_writer(claims):  # the claims were deleted
        pass


def test_claim_is_renewed_and_stale_claim_is_taken_over(claims, monkeypatch):
    filesystem, root = open_filesystem(claims.output)
    filesystem.create_dir(root)

    def write(name: str, renewed: float) -> None:
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            claim = {"host": "far", "process": 7, "start": 1.0, "working": True, "renewed": renewed}
            stream.write(json.dumps(claim).encode())

    def names() -> list[str]:
        return [entry.base_name for entry in filesystem.get_file_info(pa.fs.FileSelector(root))]

    write(f"{CLAIM}1.json", time.time() - run_lock.EXPIRY - 1)
    write(f"{UNFINISHED}1", 0.0)
    monkeypatch.setattr(run_lock, "RENEWAL", 0.05)
    with sole_writer(claims) as check:
        (mine,) = names()
        before = filesystem.open_input_stream(f"{root}/{mine}").read()
        deadline = time.monotonic() + 60
        while filesystem.open_input_stream(f"{root}/{mine}").read() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        check()
        filesystem.delete_file(f"{root}/{mine}")  # as a run does that takes over
        monkeypatch.setattr(run_lock, "EXPIRY", 0.2)
        time.sleep(0.3)
        with pytest.raises(InputError, match="could not be renewed"):
            check()
    assert names() == []
    monkeypatch.setattr(run_lock, "EXPIRY", 600.0)
    write(f"{CLAIM}2.json", time.time() - 60)
    with pytest.raises(InputError, match="process 7 on far"), sole_writer(claims):
        pass
    assert names() == [f"{CLAIM}2.json"]


def test_changed_shard_size_or_input_repeats_no_row(tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos, 5)
    assert len(compute(tmp_path, input=str(photos), shard_size=2)) == 5
    before = stamps(tmp_path / "out")
    write_photos(photos, 4, seed=1)
    found = compute(tmp_path, input=str(photos), shard_size=3)
    assert len(found) == 9 and before.items() <= stamps(tmp_path / "out").items()


def test_summary_counts_errors_earlier_missing_and_repeated_rows(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    files = write_photos(photos, 4)
    for name in ("x.png", "y.png"):
        (photos / name).write_bytes(b"x")
    arguments = BatchArguments(input=str(photos), output=str(out), model=str(MODEL), shard_size=2, top_k=10)
    compute(tmp_path, input=str(photos), shard_size=2)
    shards = find_shards(arguments)
    broken = f"{photos}/x.png, {photos}/y.png"
    rows_line = f"6 for 6 images, 2 with an error: 2 cannot be read as an image ({broken})"
    assert account(shards, arguments) == {"rows": rows_line}
    files[0].unlink()
    lines = account(find_shards(arguments), arguments)
    assert (
        "5 for 5 images" in lines["rows"]
        and f"1 of earlier runs, whose files --input does not hold now ({files[0]})" in lines["also"]
    )
    part = next(out.glob("part-*.parquet"))
    (out / f"part-{'0' * 20}.parquet").write_bytes(part.read_bytes())
    with pytest.raises(InputError, match="2 images have several rows"):
        account(shards, arguments)
    (out / f"part-{'0' * 20}.parquet").unlink()
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(InputError, match="2 images have no row"):
        account(shards, arguments)
    part.write_bytes(content[: len(content) // 2])
    for check in (lambda: account(shards, arguments), lambda: unfinished_shards(shards, arguments)):
        with pytest.raises(InputError, match=f"holds a damaged file; delete it .*{part.name}"):
            check()


def test_failed_shard_write_leaves_no_file(tmp_path):
    filesystem, root = open_filesystem(str(tmp_path))

    def write(stream):
        stream.write(b"half a file")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"part-1.parquet cannot be written: \[Errno 28\] No space left"):
        write_file(filesystem, root, "part-1.parquet", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"task": "embed"}, {"top_k": 3}, {"dtype": "bfloat16"}, {"image_column": "photo"}, {"model": "retrained"}],
)
def test_resume_with_changed_settings_is_refused(tmp_path, change):
    arguments = BatchArguments(output=str(tmp_path / "out"), model=str(tmp_path / "model"))
    processor = {"image_processor_type": "CLIPImageProcessor"}
    model_with(tmp_path / "model", processor)
    unfinished_shards([], arguments)
    unfinished_shards([], replace(arguments, top_k=5))  # the default
    if change == {"model": "retrained"}:  # other weights in the same folder
        (tmp_path / "model" / "config.json").write_text((MODEL / "config.json").read_text() + " ")
        change = {}
    with pytest.raises(InputError, match=r"holds results of .*, not of .*; name another --output"):
        unfinished_shards([], replace(arguments, **change))


# ------------------------------------------------------------------------------------------------ flags and resources


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus_per_actor", "1"], r"no room for 1 actors of --gpus_per_actor 1; there are 0 GPUs on 1 machines"),
        (["--num_actors", "100"], "no room for 100 actors of --threads_per_actor 1; there are 1 CPUs on 1 machines, with room for 1"),
        (["--threads_per_actor", "64"], "no room for 1 actors of --threads_per_actor 64; .* with room for 0"),
        (["--gpus_per_actor", "1.5"], "--gpus_per_actor must be 0, a part of one GPU or a whole number of GPUs, got 1.5"),
        (["--gpus_per_actor", "-1"], "--gpus_per_actor must be 0, .* got -1"),
        (["--num_cpus", "100000"], "--num_cpus 100000 is more than the [0-9]+ CPUs of this machine"),
        (["--object_store_mb", "100000000"], "--object_store_mb must be between 75, .* got 100000000"),
        (["--object_store_mb", "10"], "--object_store_mb must be between 75, .* got 10"),
        (["--num_actors", "0"], "--num_actors must be at least 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--top_k", "11"], "--top_k 11 is more than the 10 classes of --model"),
        (["--model", "no/such"], "--model no/such cannot be loaded: "),
        (["--model", "HERE"], "--model .* cannot be loaded: "),
        (["--input", "HERE/nothing"], "--input .*nothing does not exist"),
        (["--input", "HERE/empty"], "--input .*empty holds no images and no Parquet files; nothing is left out"),
        (["--input", "HERE/note.txt"], "--input .*note.txt is neither an image nor a Parquet file"),
        (["--input", "foo://bar"], "foo://bar cannot be opened: .*foo"),
        (["--input", "s3://bucket/x?color=red"], "cannot be opened: Unexpected query parameter in S3 URI: 'color'"),
        (["--output", "HERE/note.txt"], "--output .*note.txt cannot be written: "),
        (["--output", "HERE/note.txt/x"], "--output .*note.txt/x cannot be written: "),
        (["--output", "/proc/x"], "--output /proc/x cannot be written: "),
        (["--output", "foo://bar"], "foo://bar cannot be opened: "),
        (["--keep_columns", "id"], "--keep_columns is for Parquet files, and --input .* holds images"),
        (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9 does not answer .*; host:port of a Ray cluster, or auto"),
        (["--address", "nonsense"], "--address nonsense does not answer .*; host:port of a Ray cluster, or auto"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    write_photos(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("text")
    flags = [flag.replace("HERE", str(tmp_path)) for flag in flags]
    given = {"--model": str(MODEL), "--input": str(tmp_path / "photos"), "--output": str(tmp_path / "out")}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    with pytest.raises(InputError, match=message) as error:
        batch_inference.main([word for item in given.items() for word in item])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("type", "values", "message"),
    [
        (
            pa.string(),
            ["a.jpg"],
            "the column 'image' has the type string; files' bytes, or {bytes, path}, were expected",
        ),
        (pa.int64(), [1], "has the type int64"),
        (pa.list_(pa.binary()), [[b""]], "has the type list<"),
        (pa.struct({"path": pa.string()}), [{"path": "a"}], "has the type struct<path: string>"),
    ],
)
def test_column_without_images_is_refused(tmp_path, type, values, message):
    pq.write_table(pa.table({"image": pa.array(values, type)}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        find_shards(BatchArguments(input=str(tmp_path)))


def test_row_without_bytes_has_error_and_bytes_in_dictionaries_are_read(tmp_path):
    values = [{"bytes": None, "path": "a.jpg"}, {"bytes": png(), "path": None}, None, {"bytes": None, "path": None}]
    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": pa.array([png()] * 2).dictionary_encode()}), tmp_path / "y.parquet")
    found = compute(tmp_path, input=str(tmp_path))
    errors = [found[f"{tmp_path}/x.parquet#{row}"]["error"] for row in range(4)]
    assert "names the file a.jpg, and its bytes were expected" in errors[0] and errors[1] is None
    assert errors[2].endswith("there is no image (null)") and errors[3].endswith("there is no image (null)")
    assert all(found[f"{tmp_path}/y.parquet#{row}"]["error"] is None for row in range(2))


@pytest.mark.parametrize(
    ("machines", "flags", "expected"),
    [
        ([{"CPU": 8.0}], {}, (8, 0.0, 0.75, 8, 0.25)),
        ([{"CPU": 8.0}], {"threads_per_actor": 4}, (2, 0.0, 3, 2, 0.25)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}], {}, (4, 1.0, 0.0, 16, 1.0)),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus_per_actor": 0.4}, (4, 0.4, 0.0, 8, 1.0)),
        ([{"CPU": 8.0, "GPU": 3.0}], {"gpus_per_actor": 2.0}, (1, 2.0, 0.0, 8, 1.0)),
        ([{"CPU": 8.0, "GPU": 3.0}], {"gpus_per_actor": 0.0}, (8, 0.0, 0.75, 8, 0.25)),
        ([{"CPU": 4.0}], {"gpus_per_actor": 1.0, "num_actors": 8, "autoscaling": True}, (8, 1.0, 0.0, 4, 1.0)),
    ],
)
def test_number_of_actors_fits_machines(machines, flags, expected):
    work = plan(BatchArguments(**flags), machines)
    assert (work.actors, work.gpus, work.actor_cpus, work.decoders, work.decoder_cpus) == expected


@pytest.mark.parametrize(
    "flags", [{"num_actors": 5, "gpus_per_actor": 0.4}, {"gpus_per_actor": 2.0}, {"num_actors": 3}]
)
def test_resources_beyond_every_machine_are_refused(flags):
    machines = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    with pytest.raises(InputError, match="there is no room for"):
        plan(BatchArguments(**flags), machines)


def test_model_without_task_is_refused(tmp_path):
    model = AutoModelForImageClassification.from_pretrained(MODEL)
    processor = AutoImageProcessor.from_pretrained(MODEL)
    model.internimage.save_pretrained(tmp_path / "headless")
    processor.save_pretrained(tmp_path / "headless")
    arguments = BatchArguments(model=str(tmp_path / "headless"))
    with pytest.raises(
        InputError, match=r"has no weights for classifier.bias and 1 others, which --task classify needs"
    ):
        Model(arguments, on_gpu=False)
    Model(replace(arguments, task="embed"), on_gpu=False)

    (tmp_path / "headless" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be loaded: "):
        Model(replace(arguments, task="embed"), on_gpu=False)
    (tmp_path / "headless" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="has no usable image processor: "):
        check_model(replace(arguments, task="embed"))
    ConvNextV2Config(num_labels=3).save_pretrained(tmp_path / "convnext")
    with pytest.raises(InputError, match="is a convnextv2; --task embed expects an InternImage"):
        check_model(BatchArguments(model=str(tmp_path / "convnext"), task="embed"))
    DetrConfig().save_pretrained(tmp_path / "detr")
    with pytest.raises(InputError, match="is a detr; an image classifier was expected"):
        check_model(BatchArguments(model=str(tmp_path / "detr")))
    model_with(tmp_path / "no classes", {}, num_classes=0)
    with pytest.raises(InputError, match="has no classes; --task embed needs none"):
        check_model(BatchArguments(model=str(tmp_path / "no classes")))


def test_workers_run_without_program_files_and_datasets(tmp_path):
    """`[batch]` does not install `datasets`."""
    from ray import cloudpickle

    (file,) = write_photos(tmp_path / "photos", 1)
    ship_modules()
    arguments = BatchArguments(input=str(file), model=str(MODEL))
    shard = find_shards(arguments)[0] | {"name": ""}
    (tmp_path / "work.pickle").write_bytes(cloudpickle.dumps((Decoder, arguments, shard)))
    code = (
        "import pickle, sys; sys.modules['datasets'] = None; kind, arguments, shard = pickle.load(open('work.pickle', 'rb')); "
        "print(kind(arguments)(shard)['errors'])"
    )
    assert run_python(code, cwd=tmp_path, **ENVIRONMENT) == "['']\n"


# -------------------------------------------------------------------------------------------------- killed processes


def start(tmp_path: Path, out: Path) -> subprocess.Popen:
    """Starts a run of many small shards and waits for the first files."""
    flags = ["--input", tmp_path / "photos", "--output", out, "--shard_size", 2, "--batch_size", 1]
    process = subprocess.Popen(
        command(*flags), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_worker_error_is_one_line(tmp_path):
    write_photos(tmp_path / "photos", 2)
    headless = tmp_path / "headless"
    AutoModelForImageClassification.from_pretrained(MODEL).internimage.save_pretrained(headless)
    AutoImageProcessor.from_pretrained(MODEL).save_pretrained(headless)
    error = run("--input", tmp_path / "photos", "--output", tmp_path / "out", "--model", headless, expect=1)
    assert error.splitlines()[-1].startswith(f"error: --model {headless} has no weights for classifier.bias")
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Model", "Decoder"])
def test_killed_worker_loses_no_row(tmp_path, stage):
    psutil = pytest.importorskip("psutil")
    files = write_photos(tmp_path / "photos", 200)
    out = tmp_path / "out"
    process = start(tmp_path, out)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(f"Map({stage})" in part for part in child.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    before = stamps(out)
    assert len(before) < 100
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    assert set(rows(out)) == set(map(str, files))
    assert len(stamps(out)) == 100 and not list(out.glob(".unfinished-*"))
    reference = tmp_path / "reference"
    run("--input", tmp_path / "photos", "--output", reference, "--shard_size", 50)
    for path, row in rows(reference).items():
        np.testing.assert_allclose(rows_at(out, path)["score"], row["score"], atol=1e-5)


_cache: dict[Path, dict] = {}


def rows_at(folder: Path, path: str) -> dict:
    if folder not in _cache:
        _cache[folder] = rows(folder)
    return _cache[folder][path]


@pytest.mark.slow
def test_killed_driver_resumes_without_lost_rows(tmp_path):
    psutil = pytest.importorskip("psutil")
    files = write_photos(tmp_path / "photos", 200)
    out = tmp_path / "out"
    process = start(tmp_path, out)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)  # Ray ends its own processes, one after the other
    workers = [child for child in alive if child.is_running() and "MapWorker" in child.name()]
    for child in alive:
        child.kill()
    assert not workers
    before = stamps(out)
    assert 3 <= len(before) < 100
    output = run("--input", tmp_path / "photos", "--output", out, "--shard_size", 2)
    assert f"200 images, {2 * len(before)} of them done before" in output
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == 100 and not list(out.glob(".unfinished-*"))
    assert set(rows(out)) == set(map(str, files))
