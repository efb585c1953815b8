"""The report of a transfer, beside what test_transfer.py shows of it."""

from hyspark_nnunet.checkpoints.report import TransferReport


def test_parts_stand_in_the_order_of_the_network() -> None:
    report = TransferReport()
    names = ("conv.weight", "decoder.seg_layers.0.bias", "decoder.levels.0.a", "encoder.vit.a", "encoder.stages.1.a")
    for name in (*names, "encoder.stages.0.a", "encoder.stem.a"):
        report.add(name, "loaded", 10)
    lines = report.table().splitlines()[1:-1]
    parts = [line[:24].strip() for line in lines]
    assert parts == ["stem", "stage 0", "stage 1", "ViT", "decoder level 0", "heads", "other"]


def test_a_line_says_tensors_parameters_and_reason() -> None:
    report = TransferReport(notes=["a note"])
    report.add("encoder.stem.weight", "adapted", 1000, "kernel 3x3x3 -> 1x3x3")
    report.add("encoder.stem.bias", "random", 3000, "not in the file")
    table = report.table()
    assert "stem                    adapted          1         1,000  kernel 3x3x3 -> 1x3x3\n" in table
    assert "25.0% of the encoder's parameters come from the file." in table and table.endswith("a note")
