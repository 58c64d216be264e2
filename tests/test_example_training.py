"""Tests of the training programs' common parts: flags, recipes, the last batch, the best model, checkpoints of other runs."""

import json
import shutil
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments
from utils import FIXTURES, ONE_EPOCH, ROOT, TINY, run_main, write_images

from internimage_hf import InternImageConfig, InternImageForImageClassification


sys.path.insert(0, str(ROOT / "examples"))

import common
import data
import image_classification
from common import ExampleTrainer, ExampleTrainingArguments
from data import InputError
from flags import parse_flags


def parse(tmp_path, text: str, *flags: str) -> ExampleTrainingArguments:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return parse_flags([str(file), "--use_cpu", "--output_dir", str(tmp_path), *flags], ExampleTrainingArguments)[0]


# ----------------------------------------------------------------------------------------------------- flags and recipes


def test_recipe_values_reach_arguments_with_their_types(tmp_path):
    """YAML 1.1 reads `no` as a boolean and 1e-4 as text."""
    arguments = parse(
        tmp_path,
        "eval_strategy: no\nlearning_rate: 1e-4\nbf16: off\ngradient_checkpointing: yes\nsave_total_limit: null\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6, other: '1e-6'}\nmax_steps: -1\n",
    )
    assert arguments.eval_strategy == "no" and not arguments.load_best_model_at_end
    assert (arguments.learning_rate, arguments.bf16, arguments.gradient_checkpointing) == (1e-4, False, True)
    assert arguments.save_total_limit is None and arguments.max_steps == -1
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-6, "other": "1e-6"}
    assert parse(tmp_path, "save_total_limit: null\n", "--save_total_limit", "3").save_total_limit == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rate: fast\n", "line 2: learning_rate: invalid float value: 'fast'"),
        ("bf16: maybe\n", "line 1: bf16: Truthy value expected: got maybe"),
        ("eval_strategy: sometimes\n", "line 1: eval_strategy: invalid choice: 'sometimes' .*no.*steps.*epoch"),
        ("learning_rate: yes\n", "learning_rate: invalid float value: 'yes'"),
        ("seed: [1, 2]\n", "line 1: seed is a list; one value was expected"),
        ("label_names: [[a], b]\n", "label_names is a list of lists or mappings"),
        ("weight_decay: null\n", "line 1: weight_decay is null; a value was expected"),
        ("seed: 1\nbf16: no\nseed: 2\n", "seed is there twice, in lines 1 and 3"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "lr_scheduler_kwargs: a is there twice"),
        ("lerning_rate: 1\n", "line 1: 'lerning_rate' is no flag of this program; did you mean 'learning_rate'"),
        ("? [a]\n: 1\n", "is no flag of this program"),
        ("seed: 1: 2\n", "cannot be read as YAML: .*line 1"),
        ("", "must map flags to values, it is empty"),
        ("- seed\n", "must map flags to values, it is list"),
    ],
)
def test_recipe_mistakes_name_file_and_key(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"recipe\.yaml.*{message}") as error:
        parse(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--lerning_rate", "1"], "--lerning_rate is no flag of this program, .* did you mean 'learning_rate'"),
        (["--seed", "1", "2"], "2 is no flag of this program, nor the value of one"),
        (["--seed", "-1"], "--seed must be 0 to"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0"),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0"),
        (["--ema_decay", "1"], "--ema_decay must be 0 to"),
        (["--lr_scheduler_type", "cosin"], "cosin"),
        (["--gradient-accumulation-steps", "3", "--total_train_batch_size", "16"], "leave it out"),
    ],
)
def test_flag_mistakes_are_one_line(tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as error:
        parse_flags(["--use_cpu", "--output_dir", str(tmp_path), *flags], ExampleTrainingArguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- when it is evaluated and saved


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--eval_strategy", "no"], "nothing is evaluated"),
        (["--save_strategy", "no"], "no checkpoint is kept"),
        (["--eval_strategy", "no", "--save_strategy", "no"], "nothing is evaluated"),
        (["--save_strategy", "steps"], "eval_strategy epoch and save_strategy steps differ"),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "4", "--save_steps", "6"], "no multiple"),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "6"], "no multiple"),
        (["--eval_strategy", "no", "--save_strategy", "best"], "nothing is evaluated"),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "6"], None),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "0.3"], None),
        (["--save_strategy", "best"], None),
        ([], None),
    ],
)  # fmt: skip
def test_best_model_is_loaded_where_possible(tmp_path, flags, why):
    def parsed(*more):
        return parse_flags(["--use_cpu", "--output_dir", str(tmp_path), *flags, *more], ExampleTrainingArguments)[0]

    arguments = parsed()
    assert arguments.load_best_model_at_end == (why is None)
    assert arguments.why_not_the_best is None if why is None else why in arguments.why_not_the_best
    assert parsed("--load_best_model_at_end", "false").why_not_the_best is None
    if why is not None:  # an error if the flag was given explicitly
        with pytest.raises(InputError, match=f"--load_best_model_at_end is not possible: .*{why}"):
            parsed("--load_best_model_at_end", "true")


# --------------------------------------------------------------------------------------------------------- the last batch


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 32, 32), float(index)), "labels": index % 5}


def trainer_of(tmp_path, count: int, model=None, **flags) -> ExampleTrainer:
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
        "eval_strategy": "no",
    }  # fmt: skip
    model = model or InternImageForImageClassification(InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1]}))
    return ExampleTrainer(model=model, args=ExampleTrainingArguments(**options | flags), train_dataset=Numbers(count))


@pytest.mark.parametrize("count", [1, 5, 8, 9, 11])
@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_epoch_has_every_image_and_no_batch_of_one(tmp_path, count, strategy):
    trainer = trainer_of(tmp_path, count, train_sampling_strategy=strategy)
    loader, again = trainer.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = [batch["pixel_values"][:, 0, 0, 0].int().tolist() for batch in loader]
        assert min(map(len, batches)) > 1 and len(batches) == -(-count // 4)
        seen = Counter(index for batch in batches for index in batch)
        assert set(seen) == set(range(count)) and seen.total() == count + (count % 4 == 1)
        again.append(batches)
    if strategy == "random" and count > 4:
        assert again[0] != again[1]


def test_image_is_repeated_only_for_batch_norm(tmp_path):
    assert trainer_of(tmp_path, 9).repeated_images() == 1
    assert trainer_of(tmp_path, 9, dataloader_drop_last=True).repeated_images() == 0
    assert trainer_of(tmp_path, 9, per_device_train_batch_size=1).repeated_images() == 0
    with_layer_norm = torch.nn.Sequential(torch.nn.LayerNorm(3))
    trainer = trainer_of(tmp_path, 9)
    trainer.model = with_layer_norm
    assert trainer.repeated_images() == 0
    trainer = trainer_of(tmp_path, 13)
    trainer.args._n_gpu, trainer._train_batch_size = (
        4,
        12,
    )  # DataParallel: a batch of up to 4 images gives each device one
    assert trainer.repeated_images() == 5
    trainer.train_dataset = Numbers(17)  # 5 would be 2 + 2 + 1
    assert trainer.repeated_images() == 1


def test_batch_of_one_pixel_is_refused_by_name(tmp_path):
    with pytest.raises(
        InputError, match=r"--per_device_train_batch_size 1: BatchNorm .* at least 2, or larger images"
    ):
        trainer_of(tmp_path, 2, per_device_train_batch_size=1, max_steps=1).train()


def test_epoch_with_repeated_image_resumes_exactly(tmp_path):
    """9 images in batches of 4 with 2 accumulated, stopped after the first of two steps of the second epoch."""
    flags = {
        "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1,
        "save_total_limit": 9, "disable_tqdm": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = InternImageForImageClassification(InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1]}))
    trainer_of(tmp_path, 9, model, **flags).train()
    expected = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer_of(tmp_path, 9, **flags).train(str(tmp_path / "checkpoint-3"))
    for name, tensor in load_file(tmp_path / "checkpoint-4" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------- checkpoints of other runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_checkpoint):
    """A finished run on two classes: a folder with `photos` and `out`, the latter with the checkpoints 2, 4 and 5."""
    root = tmp_path_factory.mktemp("trained")
    write_images(root / "photos", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)])
    run_main(image_classification, *resume_flags(root / "photos", root / "out", small_checkpoint, 5))
    return root


def resume_flags(photos, out, model, steps, *more):
    return [
        "--dataset", photos, "--output_dir", out, "--model", model, *ONE_EPOCH, "--eval_strategy", "steps", "--eval_steps", 2,
        "--save_strategy", "steps", "--save_steps", 2, "--max_steps", steps, *more,
    ]  # fmt: skip


@pytest.fixture
def out(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path / "out"


LAST = ("--resume_from_checkpoint", "last")


def test_checkpoint_of_other_classes_is_refused(tmp_path, out, small_checkpoint):
    write_images(tmp_path / "photos", [f"{name}/{i}.png" for name in ("rose", "tulip") for i in range(10)])
    before = load_file(out / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint-\d was trained on the 2 classes cat, dog, .* rose, tulip"):
        run_main(image_classification, *resume_flags(tmp_path / "photos", out, small_checkpoint, 5, *LAST))
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "cat" in (out / "data.json").read_text()


def test_checkpoint_of_other_dataset_with_same_classes_is_refused(tmp_path, out, small_checkpoint):
    write_images(tmp_path / "photos", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(15)])
    with pytest.raises(InputError, match="was trained on another data set"):
        run_main(image_classification, *resume_flags(tmp_path / "photos", out, small_checkpoint, 5, *LAST))


def test_moved_dataset_is_accepted_and_finished_run_is_reported(tmp_path, trained, out, small_checkpoint, capsys):
    shutil.copytree(trained / "photos", tmp_path / "moved")
    run_main(image_classification, *resume_flags(tmp_path / "moved", out, small_checkpoint, 5, *LAST))
    output = capsys.readouterr().out
    assert "is taken for the same" in output
    assert "checkpoint-5 is at step 5 of 5: nothing was left to train" in output
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 5
    assert not list(out.glob("checkpoint-6")) and not list(out.glob("_earlier*"))


def test_streamed_dataset_of_other_name_is_reported(tmp_path, capsys):
    parts = {"train": data.Part(None), "evaluation": data.Part(None)}
    for name in ("me/a", "me/b"):
        account = data.Account(data.Data(name, "", {}), ["x"], parts)
        if name == "me/b":
            data.check_resumed(tmp_path, tmp_path / "checkpoint-1", account)
        account.write(tmp_path)
    assert "was trained on me/a; me/b is taken for the same" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"depths": [1, 1, 2, 1]}, {"channels": 16}])
def test_checkpoint_of_other_architecture_is_refused(tmp_path, trained, out, change):
    config = InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1], "image_size": 32, **change})
    InternImageForImageClassification(config).save_pretrained(tmp_path / "model")
    shutil.copy(trained / "out" / "preprocessor_config.json", tmp_path / "model")
    with pytest.raises(
        InputError, match=r"checkpoint-5 is another InternImageForImageClassification .*`\w+\.[\w.]+` is"
    ):
        run_main(image_classification, *resume_flags(trained / "photos", out, tmp_path / "model", 9, *LAST))


def test_checkpoint_of_other_class_names_both_classes(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["DetrForObjectDetection"]}')
    model = InternImageForImageClassification.from_pretrained(FIXTURES / "hf_t_like")
    with pytest.raises(InputError, match="is a DetrForObjectDetection, this run trains a InternImageForImageClass"):
        common.check_same_model(model, tmp_path)


def test_tied_weights_match_checkpoint(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    save_file({n: t for n, t in model.state_dict().items() if n != "b.weight"}, tmp_path / "model.safetensors")
    common.check_same_model(model, tmp_path)
    model["b"].weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(InputError, match=r"`b\.weight` is absent in the checkpoint and is \(2, 2\) in the model"):
        common.check_same_model(model, tmp_path)


def test_new_run_sets_earlier_checkpoints_aside(trained, out, small_checkpoint, capsys):
    """`Trainer` would delete the new run's lower-numbered checkpoints, and `last` would resume the old run."""
    old = {file.name: (file / "trainer_state.json").read_bytes() for file in out.glob("checkpoint-*")}
    run_main(image_classification, *resume_flags(trained / "photos", out, small_checkpoint, 2))
    assert {file.name for file in out.glob("checkpoint-*")} == {"checkpoint-2"}
    aside = out / "_earlier_run_1"
    assert {file.name: (file / "trainer_state.json").read_bytes() for file in aside.iterdir()} == old
    assert f"were moved to {aside}" in capsys.readouterr().out
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("out/checkpoint-2")


def test_checkpoints_after_resumed_one_are_set_aside(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    common.set_checkpoints_aside(tmp_path, str(tmp_path / "checkpoint-4"), 4)
    assert {file.name for file in tmp_path.iterdir()} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-best", "_earlier_run_1",
    }  # fmt: skip
    common.set_checkpoints_aside(tmp_path, None, 0)
    assert {file.name for file in (tmp_path / "_earlier_run_2").iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("given", ["nowhere", "True", "incomplete"])
def test_incomplete_checkpoint_is_named(tmp_path, given):
    (tmp_path / "incomplete").mkdir()
    path = str(tmp_path / given) if given == "incomplete" else given
    arguments = TrainingArguments(str(tmp_path), resume_from_checkpoint=path, use_cpu=True)
    with pytest.raises(InputError, match=rf"--resume_from_checkpoint .*{given} is no complete checkpoint"):
        common.checkpoint_to_resume(arguments)
