"""In: the command line. Out: the flags of `batch_inference.py`."""

from dataclasses import dataclass, field


@dataclass
class BatchArguments:
    input: str | None = field(
        default=None,
        metadata={"help": "images: a folder, a Parquet file, a folder of them, or a URL; digits if absent"},
    )
    output: str = field(default="outputs/batch_inference", metadata={"help": "folder or URL for the Parquet files"})
    model: str | None = field(
        default=None, metadata={"help": "an InternImage checkpoint, folder or Hub id; the demo's model if absent"}
    )
    task: str = field(default="classify", metadata={"help": "what to compute", "choices": ["classify", "embed"]})
    top_k: int | None = field(
        default=None, metadata={"help": "classes per image; 5, or all of a model that has fewer, if absent"}
    )
    image_column: str = field(
        default="image", metadata={"help": "Parquet input: column with the files' bytes, or with {bytes, path}"}
    )
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Parquet input: columns to copy to the output", "nargs": "+"}
    )
    shard_size: int = field(
        default=256, metadata={"help": "images per output file and per block in memory: 150 kB each at 224 x 224"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    address: str | None = field(
        default=None, metadata={"help": "of a Ray cluster, or `auto`; starts Ray on this machine alone if absent"}
    )
    autoscaling: bool = field(
        default=False,
        metadata={"help": "the cluster adds machines when they are asked for: do not compare with what it has now"},
    )
    num_actors: int | None = field(
        default=None, metadata={"help": "copies of the model; by default one per GPU, or one per CPU"}
    )
    gpus_per_actor: float | None = field(default=None, metadata={"help": "by default 1 where there are GPUs, else 0"})
    threads_per_actor: int = field(default=1, metadata={"help": "threads of an actor on CPUs"})
    num_cpus: int | None = field(default=None, metadata={"help": "CPUs that a local Ray uses; all if absent"})
    object_store_mb: int = field(
        default=512, metadata={"help": "shared memory of a local Ray, for shards between decoding and the model"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the model", "choices": ["float32", "float16", "bfloat16"]}
    )
    compare: bool = field(
        default=False, metadata={"help": "run the same images through a plain loop in this process, for its images/s"}
    )
