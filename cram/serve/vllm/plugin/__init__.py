"""The plugin: what it wraps in vLLM, in its front end, its engine core and its workers."""
