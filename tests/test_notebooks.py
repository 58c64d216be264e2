"""Tests of notebooks/: they run from top to bottom, in small, and their committed outputs are small and of a whole run."""

import re

import pytest
from utils import ROOT


nbformat = pytest.importorskip("nbformat", reason="needs `pip install nbclient ipykernel`")
nbclient = pytest.importorskip("nbclient", reason="needs `pip install nbclient ipykernel`")

# The line with the size of each notebook's run, and that of the test's.
SMALL = {
    "classification": ("EPOCHS = 4", "EPOCHS = 1"),
    "detection": ("STEPS, SCENES = 500, 600", "STEPS, SCENES = 2, 16"),
    "look_inside": ("STEPS, IMAGES = 400, 2500", "STEPS, IMAGES = 4, 64"),
}
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook) -> str:
    """What the cells print, without warnings and progress bars."""
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_all_notebooks_are_tested():
    assert [file.stem for file in FILES] == sorted(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    committed = pictures(notebook)
    large, small = SMALL[name]
    assert sum(large in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(large, small)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()  # raises if a cell does
    assert pictures(notebook) == committed > 0
    printed, expected = (re.sub(r"\d[\d.,e-]*", "", text) for text in (text_of(notebook), committed_text(name)))
    assert printed == expected


def committed_text(name: str) -> str:
    return text_of(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_outputs_are_small_and_of_one_whole_run(file):
    notebook = nbformat.read(file, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert file.stat().st_size < 300_000
    assert str(ROOT) not in file.read_text(encoding="utf-8")


def test_committed_outputs_show_models_that_learned():
    assert float(re.search(r"held-out images: ([\d.]+)%", committed_text("classification"))[1]) > 95
    assert float(re.search(r"at IoU 0.5 ([\d.]+)", committed_text("detection"))[1]) > 0.2
    assert float(re.search(r"(\d+)% of 200 held-out", committed_text("look_inside"))[1]) > 50


def test_each_notebook_opens_itself_in_colab_and_installs_the_same_repository():
    repositories = set()
    for file in FILES:
        text = "\n".join(cell.source for cell in nbformat.read(file, 4).cells)
        ((owner, repository, path),) = re.findall(
            r"\(https://colab\.research\.google\.com/github/([\w-]+)/([\w-]+)/blob/main/(.+?)\)", text
        )
        assert path == f"notebooks/{file.name}"
        assert f"git clone --quiet --depth 1 https://github.com/{owner}/{repository}\n" in text
        repositories.add((owner, repository))
    assert len(repositories) == 1
