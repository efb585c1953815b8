"""nnUNetv2_train on some of the cores: python -m benchmarks.few_labels.nnunet_train THREADS, then its arguments.

A CPU training of nnU-Net takes every core of the machine (run_training_entry sets as many threads, whatever
OMP_NUM_THREADS says), so that two side by side would be in each other's way.
"""

import multiprocessing
import sys

from nnunetv2.run.run_training import run_training_entry

if __name__ == "__main__":
    threads = int(sys.argv.pop(1))
    # what run_training_entry asks for the number of threads
    multiprocessing.cpu_count = lambda: threads
    run_training_entry()
