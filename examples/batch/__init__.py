"""The parts of `batch_inference.py`: flags, storage, input, lock, results, workers, resources."""
