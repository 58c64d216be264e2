"""In: released checkpoints of InternImage. Out: model folders and Hub repositories for transformers.

    python -m convert.classification internimage_t_1k_224 --output converted/internimage_t_1k_224

`convert.upernet` and `convert.mask2former` convert segmentation checkpoints, `convert.backbone` the backbone of any downstream
checkpoint, and `convert.all` every entry of the table in `convert.released`.
"""
