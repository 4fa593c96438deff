"""A study's pictures and tables as TensorBoard events, beside the curves of its runs."""

import struct
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import text as text_summary

RGBA = 4  # the colour space in a summary's image


def events_file(images: Mapping[str, bytes], texts: Mapping[str, str]) -> tuple[str, bytes]:
    """One events file with these PNG files and Markdown texts: its name's end, and what it holds.

    They appear as study/<name>. The file's name is new each time and sorts last, so that a
    TensorBoard that is watching goes on to it; step 0 again tells it to forget the older ones.
    """
    now = time.time_ns()
    summaries = [Summary(value=[_image(f"study/{name}", png)]) for name, png in images.items()]
    summaries += [text_summary(f"study/{name}", text) for name, text in texts.items()]
    events = [Event(wall_time=now / 1e9, file_version="brain.Event:2")]
    events += [Event(wall_time=now / 1e9, step=0, summary=summary) for summary in summaries]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "events")
        with closing(RecordWriter(str(path))) as writer:
            for event in events:
                writer.write(event.SerializeToString())
            writer.flush()
        return f"{now}.study", path.read_bytes()


def _image(tag: str, png: bytes) -> Summary.Value:
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always first
    size = {"width": width, "height": height, "colorspace": RGBA}
    return Summary.Value(tag=tag, image=Summary.Image(**size, encoded_image_string=png))
