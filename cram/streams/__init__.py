"""Task streams: the built-in streams, stream files, and readers of the public file layouts."""

from cram.streams.messages import read_messages, stream_from_datasets
from cram.streams.readers import StreamError
from cram.streams.registry import load_stream
from cram.streams.types import Sample, Stream, Task, open_image, open_images

__all__ = [
    "Sample",
    "Stream",
    "StreamError",
    "Task",
    "load_stream",
    "open_image",
    "open_images",
    "read_messages",
    "stream_from_datasets",
]
