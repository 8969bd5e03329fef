"""Task streams: readers for the public layouts, the built-in stream, and a registry that is data."""

from cram.streams.readers import StreamError
from cram.streams.registry import load_stream
from cram.streams.types import Sample, Stream, Task, open_image, open_images

__all__ = ["Sample", "Stream", "StreamError", "Task", "load_stream", "open_image", "open_images"]
