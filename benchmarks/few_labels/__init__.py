"""Does pre-training help with few labels? Pre-trained, from scratch and stock nnU-Net on the same cases and steps.

python -m benchmarks.few_labels run --data FOLDER --work W        everything; see docs/results.md
"""
