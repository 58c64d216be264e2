# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DINO: DETR with Improved DeNoising Anchor Boxes (https://arxiv.org/abs/2203.03605), as InternImage's authors train it.

Known as: `DINO` and `DINOHead` in detection/mmdet_custom of OpenGVLab/InternImage. The layers are those of transformers'
Deformable DETR. What is DINO's own lies between them: two-stage queries whose content is learned ("mixed" selection),
anchors that each decoder layer encodes and refines, separate branches per layer, and contrastive denoising.

Boxes are (centre x, centre y, width, height), relative to the image without its padding. They are computed in float32 at
least, whatever the dtype of the model.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoder,
    DeformableDetrEncoderLayer,
    DeformableDetrMLPPredictionHead,
    DeformableDetrMultiscaleDeformableAttention,
    DeformableDetrSelfAttention,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .compatibility import is_sharded_away, none_is_unset
from .configuration_internimage_dino import InternImageDinoConfig
from .modeling_backbone import InternImageHeadPreTrainedModel, load_backbone


# Of the encoding of the queries' anchors; that of the maps has the configuration's.
_QUERY_TEMPERATURE = 10000
# Of the inverse sigmoid; that of Deformable DETR is 1e-5.
_EPS = 1e-3


@dataclass
class InternImageDinoDecoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state: of the last layer, normalised, (batch, queries, d_model).
        intermediate_hidden_states: of all layers, normalised, (batch, layers, queries, d_model).
        intermediate_logits: class logits of all layers, (batch, layers, queries, labels).
        intermediate_pred_boxes: boxes of all layers, (batch, layers, queries, 4).
        intermediate_reference_points: anchors after each layer, (batch, layers, queries, 4).
        hidden_states: what entered the first layer and left each, on request.
        attentions: weights of the self-attention of all layers, on request.
        cross_attentions: weights of the deformable attention of all layers, on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    intermediate_hidden_states: torch.FloatTensor | None = None
    intermediate_logits: torch.FloatTensor | None = None
    intermediate_pred_boxes: torch.FloatTensor | None = None
    intermediate_reference_points: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class InternImageDinoObjectDetectionOutput(ModelOutput):
    """
    Queries are the matching queries, without the denoising ones of training. Boxes are (centre x, centre y, width, height),
    relative to the image without its padding.

    Args:
        loss: if there are labels.
        loss_dict: its parts, not weighted: `loss_ce`, `loss_bbox`, `loss_giou` of the last layer, with `_0` ... of the
            layers before it, `_enc` of the proposals, `_dn`, `_dn_0` ... of the denoising queries, and each of these with
            `_assistant` for the first part of a composite backbone, which counts half.
        logits: of the last layer, (batch, queries, labels); their sigmoid is the score.
        pred_boxes: of the last layer, (batch, queries, 4).
        last_hidden_state: of the last decoder layer, normalised, (batch, queries, d_model).
        intermediate_logits, intermediate_pred_boxes, intermediate_hidden_states, intermediate_reference_points: logits,
            boxes, normalised states and refined anchors of all decoder layers, (batch, layers, queries, ...), on request.
        proposal_indices: positions of the proposals in the encoder's sequence, best first, (batch, queries), on request.
        proposal_logits, proposal_boxes: class logits (batch, queries, labels) and boxes (batch, queries, 4) of the
            proposals, on request. The boxes are the anchors of the first layer.
        denoising_logits, denoising_pred_boxes: of the denoising queries, (batch, layers, denoising queries, ...), on
            request, in training.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_hidden_states, encoder_attentions: on request.
        encoder_last_hidden_state: (batch, sequence, d_model), the levels one after the other.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    intermediate_logits: torch.FloatTensor | None = None
    intermediate_pred_boxes: torch.FloatTensor | None = None
    intermediate_hidden_states: torch.FloatTensor | None = None
    intermediate_reference_points: torch.FloatTensor | None = None
    proposal_indices: torch.LongTensor | None = None
    proposal_logits: torch.FloatTensor | None = None
    proposal_boxes: torch.FloatTensor | None = None
    denoising_logits: torch.FloatTensor | None = None
    denoising_pred_boxes: torch.FloatTensor | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


def _box_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def inverse_sigmoid(values: torch.Tensor) -> torch.Tensor:
    """The logit of values in [0, 1], both they and their complement at least 1e-3."""
    values = values.clamp(min=0, max=1)
    return (values.clamp(min=_EPS) / (1 - values).clamp(min=_EPS)).log()


def corners_from_centers(boxes: torch.Tensor) -> torch.Tensor:
    """(centre x, centre y, width, height) to (left, top, right, bottom)."""
    center, size = boxes.chunk(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def sine_encoding(coordinates: torch.Tensor, features: int, temperature: float) -> torch.Tensor:
    """Sines and cosines of (x, y, ...) in [0, 1], those of y before those of x: (..., n) -> (..., n * features).

    As transformers' `encode_sinusoidal_position_embedding` (GroundingDINO), which knows float32 frequencies alone.
    """
    exponents = torch.arange(0, features, 2, dtype=coordinates.dtype, device=coordinates.device) / features
    coordinates = torch.cat([coordinates[..., 1:2], coordinates[..., :1], coordinates[..., 2:]], -1)
    angles = coordinates[..., None] * (2 * math.pi) / temperature**exponents  # (..., n, features / 2)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-3)


def map_positions(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Row and column numbers, counted from 1, over the valid rows and columns: (N, H, W) -> (N, H, W, 2), x before y."""
    rows, columns = mask.cumsum(1, dtype=dtype), mask.cumsum(2, dtype=dtype)
    return torch.stack([columns / (columns[:, :, -1:] + 1e-6), rows / (rows[:, -1:] + 1e-6)], -1)


def valid_sizes(mask: torch.Tensor) -> torch.Tensor:
    """Width and height of the image within a map: (N, H, W) -> (N, 2)."""
    return torch.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], -1)


def grid_proposals(masks: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One box per position of each level, 0.05 * 2**level wide and high, around the position's centre.

    Returns:
        Logits of the boxes, (N, sequence, 4), +inf where a position is padding or its box is not within (0.01, 0.99); and
        where they are finite, (N, sequence, 1).
    """
    proposals = []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        rows, columns = (torch.arange(size, dtype=dtype, device=mask.device) + 0.5 for size in (height, width))
        centers = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (H, W, 2)
        centers = centers[None] / valid_sizes(mask)[:, None, None]
        proposals.append(torch.cat([centers, torch.full_like(centers, 0.05 * 2**level)], -1).flatten(1, 2))
    boxes = torch.cat(proposals, 1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    valid = valid & torch.cat([mask.flatten(1) for mask in masks], 1)[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid, float("inf")), valid


@dataclass
class DenoisingDraws:
    """The random numbers of one denoising batch. A row belongs to one noised box: those of the first image, then those of
    the next, and this list repeated for the positives and the negatives of each group in turn.

    Args:
        replace: (rows,) in [0, 1); a label is replaced where it is below half of `label_noise_ratio`.
        labels: (rows,) what by.
        signs: (rows, 4) 0 or 1, for moving a side left / up or right / down.
        parts: (rows, 4) in [0, 1), how far.
    """

    replace: torch.Tensor
    labels: torch.Tensor
    signs: torch.Tensor
    parts: torch.Tensor


def draw_denoising(rows: int, num_labels: int, dtype: torch.dtype, device: torch.device) -> DenoisingDraws:
    return DenoisingDraws(
        replace=torch.rand(rows, dtype=dtype, device=device),
        labels=torch.randint(num_labels, (rows,), device=device),
        signs=torch.randint(2, (rows, 4), device=device),
        parts=torch.rand(rows, 4, dtype=dtype, device=device),
    )


@dataclass
class DenoisingQueries:
    """Denoising queries of a batch: groups one after the other, in each the positives, then the negatives.

    Args:
        content: (batch, queries, d_model), zero in empty slots.
        anchors: (batch, queries, 4), a centred box of half size in empty slots.
        attention_mask: (denoising and matching queries, the same) True where a query must not see another.
        indices: for each image the queries that are positives, and the boxes that they belong to.
        groups: how many.
    """

    content: torch.Tensor
    anchors: torch.Tensor
    attention_mask: torch.Tensor
    indices: list[tuple[torch.Tensor, torch.Tensor]]
    groups: int


def denoising_queries(
    targets: list[dict[str, torch.Tensor]], embedding: nn.Embedding, config: InternImageDinoConfig
) -> DenoisingQueries | None:
    """Contrastive denoising (section 3.3 of the paper): noised copies of the boxes, from which the decoder finds them back.

    In positives the sides of a box move by up to half its size, in negatives by half to all of it.

    Args:
        targets: `class_labels` (boxes,) and `boxes` (boxes, 4) of each image.
        embedding: of the labels.
        config: of the model.

    Returns:
        None if no image has a box.
    """
    counts = [len(target["class_labels"]) for target in targets]
    largest = max(counts)
    if largest == 0:
        return None
    groups = max(1, config.num_denoising // largest)
    size = 2 * groups * largest
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["class_labels"] for target in targets])
    device, repeats = boxes.device, 2 * groups
    draws = draw_denoising(repeats * len(boxes), config.num_labels, boxes.dtype, device)

    labels = torch.where(draws.replace < config.label_noise_ratio / 2, draws.labels, labels.repeat(repeats))
    is_negative = (torch.arange(repeats, device=device) % 2).repeat_interleave(len(boxes))[:, None]
    boxes = boxes.repeat(repeats, 1)
    shifts = (2 * draws.signs - 1) * (draws.parts + is_negative) * (boxes[:, 2:] / 2).repeat(1, 2)
    corners = (corners_from_centers(boxes) + shifts * config.box_noise_scale).clamp(min=0, max=1)
    start, end = corners.chunk(2, -1)
    boxes = torch.cat([(start + end) / 2, end - start], -1)

    image = torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(counts)]).repeat(repeats)
    slot = torch.cat([torch.arange(count, device=device) for count in counts]).repeat(repeats)
    slot = slot + (torch.arange(repeats, device=device) * largest).repeat_interleave(sum(counts))
    embedded = embedding(labels)
    content = embedded.new_zeros(len(counts), size, embedded.shape[-1]).index_put((image, slot), embedded)
    anchors = boxes.new_full((len(counts), size, 4), 0.5).index_put((image, slot), inverse_sigmoid(boxes).sigmoid())

    group = torch.arange(size + config.num_queries, device=device).div(2 * largest, rounding_mode="floor")
    group[size:] = groups
    mask = (group[:, None] != group) & (group != groups)  # all see the matching queries, and the group sees itself
    indices = []
    for count in counts:
        of_group = torch.arange(count, device=device)
        starts = torch.arange(groups, device=device)[:, None] * (2 * largest)
        indices.append(((starts + of_group).flatten(), of_group.repeat(groups)))
    return DenoisingQueries(content, anchors, mask, indices, groups)


class InternImageDinoPreTrainedModel(InternImageHeadPreTrainedModel):
    """Initialisation, and the layers that are not split over devices."""

    config: InternImageDinoConfig
    config_class = InternImageDinoConfig
    _no_split_modules = ["InternImageLayer", "DeformableDetrEncoderLayer", "DeformableDetrDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the authors do. Each module is judged by itself, as in `InternImagePreTrainedModel`."""
        if is_sharded_away(module):
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            kind = getattr(module, "initialization", None)
            if kind == "fused":  # a third of one matrix of queries, keys and values
                bound = math.sqrt(6 / (4 * module.in_features))
                init.uniform_(module.weight, -bound, bound)
            elif kind in ("zeros", "points", "prior"):
                init.zeros_(module.weight)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
            if kind == "points":
                init.copy_(module.bias, _ring_of_points(*module.points))
            elif kind == "prior":
                init.xavier_uniform_(module.weight)
                init.constant_(module.bias, -math.log(0.99 / 0.01))  # scores of 0.01
        elif isinstance(module, nn.Conv2d):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)


def _ring_of_points(heads: int, levels: int, points: int) -> torch.Tensor:
    """Initial offsets of deformable attention: point i of each head lies i + 1 steps away, in the head's direction."""
    angles = torch.arange(heads, device="cpu") * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1, device="cpu")[:, None]
    return (directions[:, None, None] * steps).expand(heads, levels, points, 2).reshape(-1)


def _tell_initialization(layers: nn.ModuleList) -> None:
    """Marks the linear layers of attention for `_init_weights`, which sees one layer at a time."""
    for module in layers.modules():
        if isinstance(module, DeformableDetrMultiscaleDeformableAttention):
            module.sampling_offsets.initialization = "points"
            module.sampling_offsets.points = (module.n_heads, module.n_levels, module.n_points)
            module.attention_weights.initialization = "zeros"
        elif isinstance(module, DeformableDetrSelfAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                projection.initialization = "fused"


class InternImageDinoNeck(nn.Module):
    """Maps of one width: 1x1 convolutions on the backbone's maps, 3x3 ones of stride 2 for further levels.

    The first further level comes from the backbone's last map, each other from the level before it. Known as: `ChannelMapper`.
    """

    def __init__(self, config: InternImageDinoConfig, channels: list[int]):
        super().__init__()
        extra = config.num_feature_levels - len(channels)
        inputs = [*channels, *[channels[-1], *[config.d_model] * extra][:extra]]
        self.num_maps = len(channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, config.d_model, kernel_size=1, bias=False)
            if level < self.num_maps
            else nn.Conv2d(width, config.d_model, kernel_size=3, stride=2, padding=1, bias=False)
            for level, width in enumerate(inputs)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(config.neck_groups, config.d_model) for _ in inputs)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        maps = []
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if level < self.num_maps:
                source = feature_maps[level]
            else:
                source = feature_maps[-1] if level == self.num_maps else maps[-1]
            maps.append(norm(conv(source)))
        return maps


class InternImageDinoEncoder(InternImageDinoPreTrainedModel, DeformableDetrEncoder):
    """Deformable DETR's encoder, initialised as the authors do."""

    _can_record_outputs = {
        "hidden_states": DeformableDetrEncoderLayer,
        "attentions": OutputRecorder(DeformableDetrMultiscaleDeformableAttention, layer_name="self_attn", index=1),
    }

    def post_init(self) -> None:
        _tell_initialization(self.layers)
        super().post_init()


class InternImageDinoDecoder(InternImageDinoPreTrainedModel):
    """Decoder layers with refinement of the anchors, and the predictions of each layer.

    The prediction of a layer comes from its normalised state and the anchor that entered it. The next anchor comes from the
    same branch on the state before the norm; the next layer gets it detached, the next prediction does not ("look forward
    twice", section 3.5 of the paper).
    """

    _can_record_outputs = {
        "hidden_states": DeformableDetrDecoderLayer,
        "attentions": OutputRecorder(DeformableDetrSelfAttention, layer_name="self_attn", index=1),
        "cross_attentions": OutputRecorder(
            DeformableDetrMultiscaleDeformableAttention, layer_name="encoder_attn", index=1
        ),
    }

    def __init__(self, config: InternImageDinoConfig):
        super().__init__(config)
        width = config.d_model
        self.layers = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.position_head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        _tell_initialization(self.layers)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        anchors: torch.Tensor,
        class_branches: nn.ModuleList,
        box_branches: nn.ModuleList,
        valid_ratios: torch.Tensor,
        spatial_shapes: torch.Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> InternImageDinoDecoderOutput:
        r"""
        Args:
            inputs_embeds: content of the queries, (batch, queries, d_model).
            anchors: their boxes, (batch, queries, 4), detached.
            class_branches, box_branches: one per layer, more are left alone.
            valid_ratios: the image's part of each level, (batch, levels, 2), width before height.
            spatial_shapes, spatial_shapes_list, level_start_index: sizes of the levels, and where each begins.
            encoder_hidden_states: (batch, sequence, d_model).
            encoder_attention_mask: (batch, sequence), False where a position is padding.
            attention_mask: what is added to the logits of self-attention, (1, 1, queries, queries).
        """
        hidden_states, dtype = inputs_embeds, inputs_embeds.dtype
        ratios = torch.cat([valid_ratios, valid_ratios], -1)[:, None]  # (N, 1, levels, 4)
        reference = anchors
        states, logits, boxes, references = [], [], [], []
        for layer, class_branch, box_branch in zip(self.layers, class_branches, box_branches, strict=False):
            points = reference.detach()[:, :, None] * ratios  # (N, queries, levels, 4)
            encoded = sine_encoding(points[:, :, 0], self.config.d_model // 2, _QUERY_TEMPERATURE)
            hidden_states = layer(
                hidden_states,
                self.position_head(encoded.to(dtype)),
                points.to(dtype),
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                encoder_hidden_states,  # by position, as reentrant gradient checkpointing wants what has a gradient
                encoder_attention_mask,
                attention_mask=attention_mask,
                **kwargs,
            )
            state = self.norm(hidden_states)
            states.append(state)
            logits.append(class_branch(state))
            boxes.append((box_branch(state).to(reference) + inverse_sigmoid(reference)).sigmoid())
            refined = box_branch(hidden_states).to(reference) + inverse_sigmoid(reference.detach())
            reference = refined.sigmoid()
            references.append(reference)
        return InternImageDinoDecoderOutput(
            last_hidden_state=states[-1],
            intermediate_hidden_states=torch.stack(states, 1),
            intermediate_logits=torch.stack(logits, 1),
            intermediate_pred_boxes=torch.stack(boxes, 1),
            intermediate_reference_points=torch.stack(references, 1),
        )


class InternImageDinoForObjectDetection(InternImageDinoPreTrainedModel):
    """DINO on a backbone: boxes and class scores for a fixed number of queries, without non-maximum suppression."""

    accepts_loss_kwargs = False

    def __init__(self, config: InternImageDinoConfig):
        super().__init__(config)
        width = config.d_model
        self.backbone = load_backbone(config.backbone_config)
        self.neck = InternImageDinoNeck(config, self.backbone.channels)
        self.level_embedding = nn.Embedding(config.num_feature_levels, width)
        self.encoder = InternImageDinoEncoder(config)
        self.proposal_projection = nn.Linear(width, width)
        self.proposal_norm = nn.LayerNorm(width)
        self.query_embedding = nn.Embedding(config.num_queries, width)
        self.label_embedding = nn.Embedding(config.num_labels, width)
        self.decoder = InternImageDinoDecoder(config)
        # one pair per decoder layer; the last is that of the proposals
        pairs = config.decoder_layers + 1
        self.class_branches = nn.ModuleList(nn.Linear(width, config.num_labels) for _ in range(pairs))
        self.box_branches = nn.ModuleList(DeformableDetrMLPPredictionHead(width, width, 4, 3) for _ in range(pairs))
        for class_branch, box_branch in zip(self.class_branches, self.box_branches, strict=True):
            class_branch.initialization = "prior"
            box_branch.layers[-1].initialization = "zeros"
        self.post_init()

    def freeze_backbone(self) -> None:
        """Takes the backbone out of training."""
        self.backbone.requires_grad_(False)

    def unfreeze_backbone(self) -> None:
        """Takes the backbone into training again."""
        self.backbone.requires_grad_(True)

    @none_is_unset
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_intermediate: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InternImageDinoObjectDetectionOutput:
        r"""
        Args:
            pixel_values: normalised images, (batch, num_channels, height, width), padded at the right and at the bottom.
            pixel_mask: (batch, height, width), 1 for the image and 0 for padding; None if there is none.
            labels: for each image `class_labels` (boxes,), from 0, and `boxes` (boxes, 4), as `pred_boxes`. In training
                denoising queries are added, as `config.num_denoising` says.
            output_intermediate: whether to return the results of each decoder layer and the proposals.
            output_hidden_states, output_attentions (`bool`, *optional*): whether to return `encoder_hidden_states`,
                `decoder_hidden_states`, and `encoder_attentions`, `decoder_attentions`, `cross_attentions`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Raises:
            ValueError: if an argument has a wrong shape or value; the message names both.
        """
        if pixel_values is None:
            raise ValueError("You have to specify `pixel_values`")
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values.shape[:1] + pixel_values.shape[2:])
        elif pixel_mask.shape != pixel_values.shape[:1] + pixel_values.shape[2:]:
            raise ValueError(
                f"`pixel_mask` must have the shape (batch, height, width) of `pixel_values` "
                f"{tuple(pixel_values.shape)}, got {tuple(pixel_mask.shape)}"
            )
        targets = None
        if labels is not None:
            targets = self._targets(labels, len(pixel_values), _box_dtype(self.dtype), pixel_values.device)
        features = self.backbone(pixel_values)
        outputs = self._detect(features.feature_maps, pixel_mask, targets, output_intermediate, **kwargs)
        assisting = getattr(features, "auxiliary_feature_maps", None)
        if assisting is not None and targets is not None and self.training:
            # of a composite backbone, whose first part the authors train on a loss of its own
            auxiliary = self._detect(assisting, pixel_mask, targets, False)
            outputs.loss = outputs.loss + 0.5 * auxiliary.loss
            outputs.loss_dict |= {f"{name}_assistant": value for name, value in auxiliary.loss_dict.items()}
        return outputs

    def _targets(
        self, labels: list[dict[str, torch.Tensor]], batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[dict[str, torch.Tensor]]:
        """The labels on the model's device.

        Raises:
            ValueError: if they are not as `forward` wants them.
        """
        if not isinstance(labels, (list, tuple)) or len(labels) != batch_size:
            count = len(labels) if hasattr(labels, "__len__") else type(labels).__name__
            raise ValueError(f"`labels` must be a list of one dictionary per image ({batch_size}), got {count}")
        targets = []
        for i, label in enumerate(labels):
            for name in ("class_labels", "boxes"):
                if name not in label:
                    raise ValueError(f"`labels[{i}]` must have `class_labels` and `boxes`, `{name}` is missing")
            classes = torch.as_tensor(label["class_labels"], device=device)
            boxes = torch.as_tensor(label["boxes"], device=device).to(dtype)
            if classes.numel() == 0 and boxes.numel() == 0:  # of whatever shape and dtype an empty list became
                classes, boxes = classes.new_zeros(0, dtype=torch.long), boxes.new_zeros(0, 4)
            if boxes.ndim != 2 or boxes.shape[1] != 4 or classes.shape != boxes.shape[:1]:
                raise ValueError(
                    f"`labels[{i}]` must have `class_labels` of the shape (boxes,) and `boxes` of the shape (boxes, 4), "
                    f"got {tuple(classes.shape)} and {tuple(boxes.shape)}"
                )
            if classes.is_floating_point() or classes.is_complex():
                raise ValueError(f"`labels[{i}]['class_labels']` must be integers, got {classes.dtype}")
            classes = classes.long()
            if (wrong := classes[(classes < 0) | (classes >= self.config.num_labels)]).numel():
                raise ValueError(
                    f"`labels[{i}]['class_labels']` must be from 0 to {self.config.num_labels - 1} "
                    f"(`config.num_labels`), got {wrong[0].item()}"
                )
            # rounding may leave a box a little outside of the image
            if (
                wrong := boxes[~((boxes >= -1e-3) & (boxes <= 1 + 1e-3)).all(-1) | (boxes[:, 2:] < 0).any(-1)]
            ).numel():
                raise ValueError(
                    f"`labels[{i}]['boxes']` must be (centre x, centre y, width, height) relative to the image, from 0 "
                    f"to 1, got {[round(value, 4) for value in wrong[0].tolist()]}"
                )
            targets.append({"class_labels": classes, "boxes": boxes})
        return targets

    def _detect(
        self,
        feature_maps: tuple[torch.Tensor, ...],
        pixel_mask: torch.Tensor,
        targets: list[dict[str, torch.Tensor]] | None,
        output_intermediate: bool,
        **kwargs,
    ) -> InternImageDinoObjectDetectionOutput:
        config = self.config
        maps = self.neck(feature_maps)
        shapes = [tuple(map_.shape[2:]) for map_ in maps]
        hidden_states = torch.cat([map_.flatten(2).transpose(1, 2) for map_ in maps], 1)  # (N, sequence, d_model)
        dtype, device = hidden_states.dtype, hidden_states.device
        box_dtype = _box_dtype(dtype)
        if hidden_states.shape[1] < config.num_queries:
            height, width = pixel_mask.shape[1:]
            raise ValueError(
                f"`pixel_values` must be large enough for {config.num_queries} proposals (`config.num_queries`), its maps "
                f"of {height} x {width} pixels have {hidden_states.shape[1]} positions: resize or pad the images"
            )

        masks = [
            nn.functional.interpolate(pixel_mask[None].to(box_dtype), size=shape).bool()[0] for shape in shapes
        ]  # nearest
        mask = torch.cat([map_.flatten(1) for map_ in masks], 1)
        spatial_shapes = torch.tensor(shapes, device=device)
        layout = {
            "spatial_shapes": spatial_shapes,
            "spatial_shapes_list": shapes,
            "level_start_index": torch.cat([spatial_shapes.new_zeros(1), spatial_shapes.prod(1).cumsum(0)[:-1]]),
        }
        valid_ratios = torch.stack(
            [valid_sizes(map_).to(box_dtype) / map_.new_tensor(map_.shape[:0:-1], dtype=box_dtype) for map_ in masks],
            1,
        )  # (N, levels, 2)
        positions = torch.cat(
            [
                sine_encoding(
                    map_positions(map_, box_dtype), config.d_model // 2, config.positional_embedding_temperature
                ).flatten(1, 2)
                + level
                for map_, level in zip(masks, self.level_embedding.weight, strict=True)
            ],
            1,
        )
        encoder_outputs = self.encoder(
            inputs_embeds=hidden_states,
            attention_mask=mask,
            spatial_position_embeddings=positions.to(dtype),
            valid_ratios=valid_ratios.to(dtype),
            return_dict=True,
            **layout,
            **kwargs,
        )
        memory = encoder_outputs.last_hidden_state

        proposals, valid = grid_proposals(masks, box_dtype)
        tokens = self.proposal_norm(self.proposal_projection(memory.masked_fill(~valid, 0)))
        proposal_logits = self.class_branches[-1](tokens)
        indices = proposal_logits.amax(-1).topk(config.num_queries, dim=1).indices  # (N, queries)

        def selected(values: torch.Tensor) -> torch.Tensor:
            return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))

        proposal_logits = selected(proposal_logits)
        proposal_boxes = (self.box_branches[-1](selected(tokens)).to(box_dtype) + selected(proposals)).sigmoid()

        content = self.query_embedding.weight.expand(len(memory), -1, -1).to(dtype)
        anchors, attention_mask, denoising, size = proposal_boxes.detach(), None, None, 0
        if targets is not None and self.training and config.num_denoising > 0:
            denoising = denoising_queries(targets, self.label_embedding, config)
        if denoising is not None:
            size = denoising.content.shape[1]
            content = torch.cat([denoising.content.to(dtype), content], 1)
            anchors = torch.cat([denoising.anchors, anchors], 1)
            attention_mask = torch.zeros_like(denoising.attention_mask, dtype=dtype)
            attention_mask = attention_mask.masked_fill(denoising.attention_mask, torch.finfo(dtype).min)[None, None]
        outputs = self.decoder(
            content,
            anchors,
            self.class_branches,
            self.box_branches,
            valid_ratios,
            attention_mask=attention_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            return_dict=True,
            **layout,
            **kwargs,
        )
        logits, boxes = outputs.intermediate_logits, outputs.intermediate_pred_boxes

        loss, loss_dict = None, None
        if targets is not None:
            loss, loss_dict = self._loss(logits, boxes, proposal_logits, proposal_boxes, targets, denoising)
        intermediate = {}
        if output_intermediate:
            intermediate = {
                "intermediate_logits": logits[:, :, size:],
                "intermediate_pred_boxes": boxes[:, :, size:],
                "intermediate_hidden_states": outputs.intermediate_hidden_states[:, :, size:],
                "intermediate_reference_points": outputs.intermediate_reference_points[:, :, size:],
                "proposal_indices": indices,
                "proposal_logits": proposal_logits,
                "proposal_boxes": proposal_boxes,
                "denoising_logits": logits[:, :, :size] if size else None,
                "denoising_pred_boxes": boxes[:, :, :size] if size else None,
            }
        return InternImageDinoObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[:, -1, size:],
            pred_boxes=boxes[:, -1, size:],
            last_hidden_state=outputs.last_hidden_state[:, size:],
            **intermediate,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _loss(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        proposal_logits: torch.Tensor,
        proposal_boxes: torch.Tensor,
        targets: list[dict[str, torch.Tensor]],
        denoising: DenoisingQueries | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Focal, L1 and GIoU loss of each layer, of the proposals and of the denoising queries, over the number of boxes.

        The number is the mean over the processes of a training, so that the mean of their gradients is right.
        """
        config = self.config
        matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
        total = sum(len(target["class_labels"]) for target in targets)
        groups = denoising.groups if denoising is not None else 0
        counts = torch.tensor([total, total * groups], dtype=torch.float64)
        distributed = torch.distributed
        if self.training and distributed.is_available() and distributed.is_initialized():
            counts = counts.to(logits.device, torch.float32)
            distributed.all_reduce(counts)
            counts /= distributed.get_world_size()
        num_boxes, num_denoising = counts.clamp(min=1).tolist()
        none = [(torch.empty(0, dtype=torch.long),) * 2] * len(targets)  # transformers' matcher cannot match nothing
        losses: dict[str, torch.Tensor] = {}

        def add(suffix: str, logits: torch.Tensor, boxes: torch.Tensor, number: float, indices=None) -> None:
            outputs = {"logits": logits.to(boxes.dtype), "pred_boxes": boxes}
            if indices is None:
                indices = matcher(outputs, targets) if total else none
            for name in criterion.losses:
                parts = criterion.get_loss(name, outputs, targets, indices, number)
                losses.update({f"{part}{suffix}": value for part, value in parts.items()})

        size = denoising.content.shape[1] if denoising is not None else 0
        last = logits.shape[1] - 1
        for layer in range(logits.shape[1]) if config.auxiliary_loss else [last]:
            suffix = f"_{layer}" if layer < last else ""
            add(suffix, logits[:, layer, size:], boxes[:, layer, size:], num_boxes)
            if denoising is not None:
                of_layer = logits[:, layer, :size], boxes[:, layer, :size]
                add(f"_dn{suffix}", *of_layer, num_denoising, denoising.indices)
        add("_enc", proposal_logits, proposal_boxes, num_boxes)

        weights = {
            "loss_ce": config.class_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        loss = sum(weights["_".join(name.split("_")[:2])] * value for name, value in losses.items())
        # every parameter has a gradient, as DistributedDataParallel wants it
        if denoising is None:
            loss = loss + 0 * self.label_embedding.weight.sum()
        if not config.auxiliary_loss:
            loss = loss + 0 * (logits.sum() + boxes.sum())
        return loss, losses


__all__ = [
    "InternImageDinoForObjectDetection",
    "InternImageDinoObjectDetectionOutput",
    "InternImageDinoPreTrainedModel",
]
