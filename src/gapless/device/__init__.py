"""Streams, events, pinned memory and graphs: the only room that knows which accelerator this is."""
