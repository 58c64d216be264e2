"""Tests of parameter groups, averaged weights and the Trainer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, Trainer, TrainingArguments
from utils import TINY

from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.training import (
    EMA_FILE,
    EMACallback,
    InternImageTrainer,
    InternImageTrainerMixin,
    InternImageTrainingFlags,
    layer_distances,
    parameter_groups,
)


def classifier(**fields):
    return InternImageForImageClassification(InternImageConfig(**{**TINY, **fields}))


def detector():
    backbone = InternImageConfig(**TINY, out_features=["stage4"])
    return DetrForObjectDetection(
        DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            backbone=None,
            encoder_layers=1,
            decoder_layers=1,
            d_model=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    )


def rates(model, **options):
    """Returns learning rate and weight decay of every parameter by its name."""
    groups = parameter_groups(model, 1.0, 0.05, **options)
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(by_id) == sum(len(group["params"]) for group in groups), "a parameter is in two groups"
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_learning_rate_decays_by_layer():
    """Depths 1, 1, 3, 1: six layers; the last one has the full rate, as in the official `lr_decay_keywords`."""
    model = classifier(post_norm=True, level2_post_norm_block_ids=[1], center_feature_scale=True)
    rate = {name: lr for name, (lr, _) in rates(model, layer_decay=0.5, offset_lr_multiplier=1.0).items()}
    stage = "internimage.encoder.stages."
    expected = {
        "internimage.stem.conv1.weight": 5,
        "internimage.stem.norm2.bias": 5,
        f"{stage}0.layers.0.mlp.fc1.weight": 5,
        f"{stage}0.norm.weight": 4,
        "internimage.encoder.downsamples.0.conv.weight": 4,
        f"{stage}1.layers.0.dcn.input_proj.weight": 4,
        f"{stage}2.layers.0.norm1.weight": 3,
        "internimage.encoder.downsamples.1.norm.weight": 3,
        f"{stage}2.layers.1.dcn.offset.weight": 2,
        f"{stage}2.post_norms.0.weight": 2,
        f"{stage}2.layers.2.mlp.fc2.bias": 1,
        "internimage.encoder.downsamples.2.conv.weight": 0,
        f"{stage}2.norm.weight": 0,
        f"{stage}3.layers.0.mlp.fc1.weight": 0,
        f"{stage}3.norm.weight": 0,
        "internimage.pooler.conv.weight": 0,
        "classifier.weight": 0,
    }
    for name, distance in expected.items():
        assert rate[name] == 0.5**distance, name
        assert layer_distances(model).get(name, 0) == distance


@pytest.mark.parametrize("make", [classifier, detector])
def test_offsets_get_multiplier_and_norms_get_no_weight_decay(make):
    model = make()
    found = rates(model, offset_lr_multiplier=0.1)
    slow = {name for name, (lr, _) in found.items() if lr == pytest.approx(0.1)}
    assert slow == {name for name in found if ".dcn.offset." in name or ".dcn.mask." in name} and slow
    for name, parameter in model.named_parameters():
        if name in found:
            assert found[name][1] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_frozen_parameters_are_left_out_and_other_models_work():
    model = classifier(layer_scale_init_value=0.1)
    model.internimage.stem.requires_grad_(False)
    found = rates(model)
    assert not any("stem" in name for name in found)
    assert all(decay == 0 for name, (_, decay) in found.items() if "layer_scale" in name or "norm" in name)
    with pytest.raises(ValueError, match="Linear"):
        parameter_groups(nn.Linear(2, 2), 1e-3)
    for name in ("layer_decay", "offset_lr_multiplier"):
        with pytest.raises(ValueError, match=name):
            parameter_groups(model, 1e-3, **{name: -1.0})


def test_sharded_parameters_keep_their_weight_decay():
    """DeepSpeed keeps the shape in `ds_shape`; the groups are the same as without sharding."""
    model = classifier()
    expected = rates(model, layer_decay=0.9)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert rates(model, layer_decay=0.9) == expected


def test_groups_work_with_torch_optim():
    model = classifier()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, layer_decay=0.9))
    losses = []
    pixel_values, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for _ in range(8):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------- Trainer


@dataclass
class Arguments(InternImageTrainingFlags, TrainingArguments):
    pass


def flags(folder, **options):
    options = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3, **options}
    return Arguments(output_dir=str(folder), per_device_train_batch_size=2, report_to="none", use_cpu=True, **options)


def train(folder, resume=None, **options):
    torch.manual_seed(0)
    model = classifier()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(16)]
    trainer = InternImageTrainer(model=model, args=flags(folder, **options), train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_uses_parameter_groups(tmp_path):
    trainer = train(tmp_path, layer_decay=0.5, offset_lr_multiplier=0.1, max_steps=1)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert min(rates) == pytest.approx(1e-2 * 0.5**5 * 0.1) and max(rates) == pytest.approx(1e-2)
    plain = InternImageTrainer(model=classifier(), args=TrainingArguments(str(tmp_path), report_to="none"))
    assert {group["lr"] for group in plain.create_optimizer().param_groups} == {5e-5}
    assert issubclass(InternImageTrainer, (InternImageTrainerMixin, Trainer))


@pytest.mark.parametrize("resumes", [True, False], ids=["resumed", "best model at the end"])
def test_resumed_detector_keeps_backbone(tmp_path, resumes):
    """transformers saves the backbone's weights under names that `Trainer` does not read."""

    def collate(seeds):
        images = torch.stack([torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in seeds])
        box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        return {"pixel_values": images, "labels": [dict(box) for _ in seeds]}

    def train(seed, resume=None, **options):
        torch.manual_seed(seed)
        model = detector()
        own = model.save_pretrained
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "greater_is_better": True}
        arguments = flags(tmp_path, remove_unused_columns=False, **({} if resumes else best), **options)
        data = list(range(8))
        trainer = InternImageTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate
        )
        trainer.train(resume_from_checkpoint=resume)
        assert model.save_pretrained == own
        return trainer

    trainer = train(seed=0, learning_rate=1e-3)
    expected = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    if resumes:
        actual = train(seed=1, resume=str(tmp_path / "checkpoint-4"), learning_rate=1e-3).model.state_dict()
    else:
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-4"), "the worst loss is called the best"
        actual = DetrForObjectDetection.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_averaged_weights_follow_decay(tmp_path):
    plain = train(tmp_path / "plain").model
    trainer = train(tmp_path / "ema", ema_decay=0.5)
    # the expected average, from the weights after each step
    torch.manual_seed(0)
    raw, mean = [], None

    class Record(EMACallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            raw.append({name: p.detach().clone() for name, p in model.named_parameters()})

        def on_train_end(self, *args, **kwargs):
            pass

    model = classifier()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(16)]
    Trainer(model=model, args=flags(tmp_path / "hand"), train_dataset=data, callbacks=[Record()]).train()
    for weights in raw:
        mean = weights if mean is None else {n: 0.5 * mean[n] + 0.5 * w for n, w in weights.items()}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), mean[name], atol=1e-6, rtol=1e-5)
    difference = [(a - b).abs().max() for a, b in zip(plain.parameters(), trainer.model.parameters(), strict=True)]
    assert max(difference) > 1e-4


def test_averaged_weights_resume_and_are_evaluated(tmp_path):
    whole = train(tmp_path / "whole", ema_decay=0.9)
    folder = tmp_path / "parts"
    train(folder, ema_decay=0.9)
    assert (folder / "checkpoint-4" / EMA_FILE).is_file()
    resumed = train(folder, ema_decay=0.9, resume=str(folder / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    ema = EMACallback(0.5)
    model = classifier()
    ema.update(model)
    before = model.classifier.weight.detach().clone()
    with torch.no_grad():
        model.classifier.weight.add_(1)
    with ema.applied(model):
        assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.classifier.weight, before + 1)
    with pytest.raises(ValueError, match="ema_decay"):
        EMACallback(1.0)


def test_average_of_best_checkpoint_is_saved(tmp_path):
    trainer = train(
        tmp_path,
        ema_decay=0.5,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        save_strategy="steps",
    )
    from safetensors.torch import load_file

    best = load_file(f"{trainer.state.best_model_checkpoint}/{EMA_FILE}")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)


def test_resume_from_run_without_average_starts_average(tmp_path, caplog):
    """The best checkpoint may have no average: the last average is used, with a warning."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True}
    train(tmp_path, max_steps=4, **options)
    trainer = train(tmp_path, max_steps=8, ema_decay=0.5, resume=str(tmp_path / "checkpoint-4"), **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert sum(EMA_FILE in record.getMessage() for record in caplog.records) == 2


def test_average_of_sharded_or_other_model_is_refused(tmp_path):
    state = type("State", (), {"global_step": 0})
    model = classifier()
    model.classifier.weight.ds_id = 0  # DeepSpeed sets this on sharded parameters
    with pytest.raises(ValueError, match="ZeRO-3"):
        EMACallback(0.5).on_train_begin(flags(tmp_path), state, None, model=model)
    ema = EMACallback(0.5)
    ema.update(classifier(num_labels=7))
    ema.save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        ema.load(tmp_path / EMA_FILE, classifier())


def test_synchronised_batch_norm_without_gpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_batch_norm"):
        InternImageTrainer(model=classifier(), args=flags(tmp_path, sync_batch_norm=True))
