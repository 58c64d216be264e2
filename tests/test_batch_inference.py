"""examples/batch_inference.py: rows, errors, restarts, killed workers."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import internimage_hf  # noqa: F401


pytest.importorskip("ray", reason="needs `pip install internimage-hf[batch]`")

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq


MODEL = FIXTURES / "hf_t_like"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(*flags: object) -> list[str]:
    fixed = ["--model", MODEL, "--num_cpus", 2, "--object_store_mb", 100]
    return [sys.executable, str(ROOT / "examples" / "batch_inference.py"), *map(str, (*flags, *fixed))]


def run(*flags: object, expect: int = 0) -> str:
    result = subprocess.run(command(*flags), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stdout if expect == 0 else result.stderr


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import batch_inference

    return batch_inference


def write_photos(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Noise of many sizes and modes, in two folders."""
    rng, files = np.random.default_rng(seed), []
    for i in range(number):
        file = folder / "ab"[i % 2] / f"{seed}-{i:04}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i % 50, 90 - i % 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if i % 7 == 0 else "RGB").save(file)
        files.append(file)
    return files


def rows(folder: Path) -> dict[str, dict]:
    """The rows of all files by path, each of which must be there once."""
    found = ds.dataset(sorted(map(str, folder.glob("part-*.parquet")))).to_table().to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("part-*.parquet")}


def expected_outputs(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and embeddings as the model and its image processor give them, one image at a time."""
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


def test_a_folder_on_ray_and_a_second_start(tmp_path, module):
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

    # nothing to do; then a new image, in the middle of the others by name, and other shards
    before = stamps(out)
    argv = [*map(str, flags), "--model", str(MODEL)]
    assert "15 of them done before" in module.main(argv)["input"]
    write_photos(tmp_path / "photos", 1, seed=5)
    (arguments,) = module.HfArgumentParser(module.BatchArguments).parse_args_into_dataclasses(argv)
    arguments.shard_size = 6
    todo = module.unfinished_shards(module.find_shards(arguments), arguments)
    assert [Path(path).name for shard in todo for path in shard["paths"]] == ["5-0000.jpg"]
    module.Model(arguments, on_gpu=False)(module.Decoder(arguments)(todo[0]))
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert len(rows(out)) == 16
    with pytest.raises(ValueError, match="holds results of"):
        module.main([*argv, "--task", "embed"])


def test_parquet_embeddings_and_kept_columns(tmp_path, module):
    """The workers' code without Ray: row groups, two layouts of images, a null, 16-bit."""
    files = write_photos(tmp_path / "photos", 7)
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = pa.table({"image": [*images[:3], None, *images[3:]], "id": list(range(8))})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=3)
    arguments = module.BatchArguments(
        input=f"file://{tmp_path}/images.parquet", output=str(tmp_path / "out"), model=str(MODEL), task="embed",
        keep_columns=["id"], shard_size=5, batch_size=2,
    )  # fmt: skip
    shards = module.unfinished_shards(module.find_shards(arguments), arguments)
    assert [len(shard["paths"]) for shard in shards] == [5, 3]
    decoder, model = module.Decoder(arguments), module.Model(arguments, on_gpu=False)
    for shard in shards:
        model(decoder(shard))
    assert module.unfinished_shards(module.find_shards(arguments), arguments) == []

    table = module.read_results(arguments)
    assert pa.types.is_fixed_size_list(table.schema.field("embedding").type)
    found = rows(tmp_path / "out")
    assert [found[f"{tmp_path}/images.parquet#{i}"]["id"] for i in range(8)] == list(range(8))
    missing = found.pop(f"{tmp_path}/images.parquet#3")
    assert missing["embedding"] is None and missing["error"] is not None
    actual = torch.tensor([row["embedding"] for row in sorted(found.values(), key=lambda row: row["id"])])
    _, embeddings = expected_outputs(files)
    torch.testing.assert_close(actual, embeddings, atol=2e-2, rtol=2e-2)  # 8-bit pixels before normalising


def test_bad_input_is_named(tmp_path, module):
    arguments = module.BatchArguments(input=str(tmp_path / "nothing"), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not exist"):
        module.find_shards(arguments)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no images"):
        module.find_shards(arguments)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"picture": [b""]}), buffer)
    (tmp_path / "nothing" / "x.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="no column 'image', only picture"):
        module.find_shards(arguments)
    arguments.image_column, arguments.keep_columns = "picture", ["label"]
    with pytest.raises(ValueError, match="--keep_columns label is the name of a column of the output"):
        module.find_shards(arguments)
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        module.main(["--batch_size", "0"])


def start(tmp_path: Path, out: Path) -> subprocess.Popen:
    """A run of many small shards that has written some of them."""
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
@pytest.mark.parametrize("stage", ["Model", "Decoder"])
def test_a_killed_worker_loses_nothing(tmp_path, stage):
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
def test_a_killed_driver_is_started_again(tmp_path):
    psutil = pytest.importorskip("psutil")
    files = write_photos(tmp_path / "photos", 200)
    out = tmp_path / "out"
    process = start(tmp_path, out)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)  # Ray ends its own processes, though not all at once
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
