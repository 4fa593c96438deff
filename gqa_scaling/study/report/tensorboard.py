"""The study's pictures for TensorBoard, beside the curves of its runs."""

import struct
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

RGBA = 4  # the colour space in a summary's image


def events_file(images: Mapping[str, bytes]) -> tuple[str, bytes]:
    """One events file with these pictures: what its name ends in and what it holds.

    `images` holds PNG files by name; they appear as study/<name>. The file's name is new each time
    and sorts last, so that a TensorBoard that is watching goes on to it; step 0 again tells it to
    forget the older pictures.
    """
    now = time.time_ns()
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch, "events")
        with closing(RecordWriter(str(aside))) as writer:
            first = Event(wall_time=now / 1e9, file_version="brain.Event:2")
            writer.write(first.SerializeToString())
            for name, png in images.items():
                width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, always first
                size = {"width": width, "height": height, "colorspace": RGBA}
                image = Summary.Image(**size, encoded_image_string=png)
                value = Summary.Value(tag=f"study/{name}", image=image)
                event = Event(wall_time=now / 1e9, step=0, summary=Summary(value=[value]))
                writer.write(event.SerializeToString())
            writer.flush()
        return f"{now}.study", aside.read_bytes()
