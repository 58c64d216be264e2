"""Turns the checkpoints that the authors of InternImage released into repositories for transformers.

    python -m convert.classification internimage_t_1k_224 --output converted/internimage_t_1k_224

`convert.upernet`, `convert.mask2former` and `convert.backbone` do the same for segmentation checkpoints and for the
backbone inside any downstream checkpoint; `convert.all` does everything in the table of `convert.released`.
"""
