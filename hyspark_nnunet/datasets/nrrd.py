"""The end of a packed NRRD file, which ITK does not read: damage there would pass without a message."""

import gzip
import os

from hyspark_nnunet.datasets.nifti import PIECE, gzip_errors, read_to_end

NRRD_ENDINGS = (".nrrd", ".nhdr")


def read_nrrd_to_end(path: str) -> None:
    """Reads the voxels of a NRRD file, in the file or beside it, to the end of their gzip stream.

    Raises:
        ValueError: the stream has no end or another checksum.
    """
    fields = {}
    with open(path, "rb") as file:
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            fields[name.strip().lower()] = value.strip()
        if fields.get("encoding", "").lower() not in ("gzip", "gz"):
            return
        beside = fields.get("data file") or fields.get("datafile")
        if beside is None:
            with gzip_errors(), gzip.open(file, "rb") as unpacked:
                while unpacked.read(PIECE):
                    pass
        elif os.path.isfile(other := os.path.join(os.path.dirname(path), beside)):
            read_to_end(other)
